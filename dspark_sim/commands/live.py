"""Commands that run the engine: record, profile, fit-margin, bench."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from dspark_sim.analysis.tables import write_rows
from dspark_sim.commands.output import print_summary, print_table
from dspark_sim.errors import UserError
from dspark_sim.loop import Mode
from dspark_sim.options import LoadOptions, ModelOptions, NetworkOptions, PolicyOptions, PromptOptions


@dataclass(frozen=True)
class Record:
    """Serve prompts live, draft a block at every position of the outputs, write a trace."""

    out: Path = Path("runs/recording")
    """Folder for the trace."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    policy: tyro.conf.OmitArgPrefixes[PolicyOptions] = PolicyOptions()
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = LoadOptions()
    tree: str = "chain"
    """Shape of the drafts. A policy then chooses how many nodes are verified (--verify-len counts nodes).
    chain: one token after the other, as deep as the drafter proposes; chain:DEPTH for fewer.
    width:WIDTH,DEPTH: so many candidates below every node.
    best-first:BUDGET: the likeliest nodes, the candidates of a depth the same below every node.
    markov:BUDGET: as best-first, but the sequential head says anew what follows each node.
    dynamic:TOP_K,DEPTH,BUDGET: grown by a beam of TOP_K, then the likeliest nodes (EAGLE-2).
    sequoia:BUDGET: the best fixed tree for assumed rates by rank, or those given as sequoia:BUDGET@RATE/RATE/..."""
    max_tokens: int = 64
    """Most output tokens per request."""
    mode: Mode = "greedy"
    """How drafts are accepted. The output has the target's law in all of them; all but greedy need --temperature.
    greedy: the target's likeliest token, temperature 0.
    rejection: by the ratio of the target's and the drafter's probability (speculative sampling).
    coupled: if target and drafter, sampling with the same noise, agree; can be replayed exactly.
    target_match: if the target's own sample is the drafter's likeliest token; can be replayed exactly.
    block: whole drafts by rejection, a little longer than one by one; cannot be replayed."""
    temperature: float = 0.0
    """Of target and drafter; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability; 1 keeps all."""
    allow_biased: bool = False
    """Also run argmax and tetris under mode rejection or block, where they change the output: a negative control."""
    anchors: bool = True
    """Make the dense pass that replay needs (with a drafter; not after mode block, trees under rejection, or a biased
    run)."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.api import record
        from dspark_sim.workload import ClosedLoop

        workload = self.load.load()
        engine = self.model.load(self.load.concurrency if isinstance(workload, ClosedLoop) else 16)
        trace = record(
            self.prompts.load(),
            policy=self.policy.load(engine.num_drafts(self.tree)),
            workload=workload,
            max_tokens=self.max_tokens,
            mode=self.mode,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.load.seed,
            allow_biased=self.allow_biased,
            force_cost=self.policy.force_cost,
            anchors=self.anchors,
            out=self.out,
            engine=engine,
            tree=self.tree,
        )
        print_summary(trace, self.json)
        print(f"Wrote the trace to {self.out}.")


@dataclass(frozen=True)
class Profile:
    """Measure what iterations cost on this machine and fit a cost table."""

    out: Path = Path("runs/cost.json")
    """Cost table to write."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of users to measure at."""
    tree: str = "chain"
    """As for `record`: drafting and building such trees is then what a draft costs."""
    max_tokens: int = 32
    """Output tokens per request."""
    seed: int = 0
    """Of the draft and verify lengths tried."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        if not self.concurrency or min(self.concurrency) < 1:
            raise UserError(f"concurrency is {self.concurrency}; give one or more positive numbers")
        engine = self.model.load(max(self.concurrency))
        cost = engine.profile(
            self.prompts.load(),
            concurrency=self.concurrency,
            max_tokens=self.max_tokens,
            seed=self.seed,
            tree=self.tree,
        )
        cost.write(self.out)
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= cost.largest_batch]
        rows = [
            {
                "batch_tokens": size,
                "verify_seconds": cost.step_seconds(size, 100 * min(size, 16), min(size, 16)),
            }
            for size in sizes
        ]
        print_table(pd.DataFrame(rows), self.json)
        error, held_out = (cost.provenance[f"verify_{name}_error"] for name in ("mean_abs", "leave_one_out"))
        print(f"Mean absolute error of a step {error:.1%}, of a left-out batch size {held_out:.1%}. Wrote {self.out}.")


@dataclass(frozen=True)
class FitMargin:
    """Learn how sure a drafter is from the gap between its two largest logits; for --confidence margin.

    Decodes the prompts greedily, drafts a block at every position of the outputs, and fits
    P(accept a draft) = logistic(intercept + slope * gap).
    """

    out: Path = Path("runs/margin.json")
    """File for the two numbers."""
    model: tyro.conf.OmitArgPrefixes[NetworkOptions] = field(default_factory=NetworkOptions)
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    concurrency: int = 4
    """Requests decoded at once; changes only how long it takes."""
    max_tokens: int = 64
    """Most output tokens per prompt."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.engine.margin import MARGIN, fit_margin, score_margin, write_margin
        from dspark_sim.policy import Fixed
        from dspark_sim.workload import ClosedLoop

        prompts, workload = self.prompts.load(), ClosedLoop(self.concurrency)
        engine = self.model.engine(self.concurrency, MARGIN)
        if not engine.has_confidence:
            raise UserError(f"drafter {engine.drafter_name} has no logits; choose dspark, dflash or a drafter's folder")
        trace = engine.anchors(engine.record(prompts, Fixed(0), workload, max_tokens=self.max_tokens))
        fitted, scores = fit_margin(trace), score_margin(trace)
        write_margin(fitted, self.out, target=engine.target.name, drafter=engine.drafter_name)
        values = {"intercept": fitted.intercept, "slope": fitted.slope, **asdict(scores)}
        print_table(pd.Series(values, name="value").rename_axis("metric").reset_index(), self.json)
        print(f"brier and auc are of outputs left out of the fit; brier_constant: of one number. Wrote {self.out}.")


@dataclass(frozen=True)
class Bench:
    """The simulator's speed, the engine's ratio to transformers' `generate`, what recording and trees cost."""

    part: Literal["all", "simulator", "engine", "trees"] = "all"
    """What to measure."""
    quick: bool = False
    """The simulator at two points instead of all (some minutes)."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    per_domain: int = 2
    """Bundled prompts of each domain, for engine and trees."""
    max_tokens: int = 32
    """Output tokens per prompt, for engine and trees."""
    repeats: int = 5
    """Alternating repeats of the ratios."""
    json: Path | None = None
    """Also write the tables as JSON rows here, the simulator's first."""

    def run(self) -> None:
        """Run it."""
        rows = []
        if self.part in ("all", "simulator"):
            from dspark_sim.simulate.bench import GROWTH, QUICK, bench_simulator

            print("The simulator: whole calls, users who ask again at once, 1,000 prompt and 250 output tokens")
            found = bench_simulator(QUICK if self.quick else GROWTH)
            formats = {"us_per_iteration": ".1f", "ms_per_request": ".3f", "iterations_per_second": ",.0f"}
            print_table(found, None, {**formats, "peak_memory_mib": ",.0f"})
            rows.append(found.assign(benchmark="simulator"))
        if self.part in ("all", "engine"):
            rows += self._engine()
        if self.part in ("all", "trees"):
            rows += self._trees()
        if self.json is not None:
            write_rows(pd.concat(rows), self.json)

    def _engine(self) -> list[pd.DataFrame]:
        from dspark_sim.engine.bench import generate_ratio, recording_overhead
        from dspark_sim.workload import bundled_prompts

        prompts = bundled_prompts(per_domain=self.per_domain)
        engine = self.model.load(len(prompts))
        print("\nPlain decoding at concurrency 1 against transformers generate (ratio above 1: this engine is faster)")
        ratio = pd.DataFrame(generate_ratio(engine, prompts, self.max_tokens, self.repeats))
        print_table(ratio)
        print("\nRecording a trace")
        overhead = pd.DataFrame(recording_overhead(engine, prompts, self.max_tokens, min(self.repeats, 3)))
        print_table(overhead, None, {"recording_fraction": ".3%", "recording_fraction_high": ".3%"})
        return [ratio.assign(benchmark="generate"), overhead.assign(benchmark="recording")]

    def _trees(self) -> list[pd.DataFrame]:
        from dspark_sim.engine.bench import tree_build_share, tree_over_chain
        from dspark_sim.workload import bundled_prompts

        prompts = bundled_prompts(per_domain=self.per_domain)
        engine = self.model.load(16)
        print("\nThe code of trees on trees without a branch, against chains (ratio above 1: trees are slower)")
        ratio = pd.DataFrame(tree_over_chain(engine, prompts, self.max_tokens, self.repeats))
        print_table(ratio)
        print("\nBuilding trees of 64 nodes, all verified")
        shares = pd.DataFrame(tree_build_share(engine, prompts))
        print_table(shares, None, {"head_and_build_share": ".1%"})
        return [ratio.assign(benchmark="tree_over_chain"), shares.assign(benchmark="tree_build")]
