"""The evaluation: acceptance of several drafters on the same outputs of one target, and their speed live.

The target's outputs are recorded once per temperature by plain decoding, many requests at a time. Every drafter then
drafts a block at every position of them, off the clock, and walking these blocks gives the rounds of a live run:
exactly at temperature 0, and with the same law under rejection sampling above. So all drafters are judged on the same
tokens, and differences are paired by prompt. Speed is measured live at one user, plain and speculative runs in
alternation in this process.

Every table is written as soon as a drafter is done, so an interruption keeps what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dspark_sim.analysis import evaluation
from dspark_sim.analysis.blocks import Blocks, prompt_counts, walk
from dspark_sim.analysis.evaluation import MACRO, ROW
from dspark_sim.analysis.evaluation_tables import paper_table, printed_table, speed_medians
from dspark_sim.analysis.metrics import summary
from dspark_sim.analysis.tables import plain, write_rows
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file, write_json
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed
from dspark_sim.provenance import provenance
from dspark_sim.reference import printed_gains
from dspark_sim.workload import ClosedLoop, Prompt

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine


@dataclass(frozen=True)
class EvaluationScale:
    """Size of an evaluation.

    Parameters
    ----------
    per_domain
        Prompts of each domain at most; ``None`` takes all.
    max_tokens
        Most output tokens per prompt.
    num_pairs
        Pairs of a plain and a speculative run for the speed of each drafter; 0 measures none.
    num_speed_prompts, speed_tokens
        Prompts of such a run, and their most output tokens.
    """

    per_domain: int | None = None
    max_tokens: int = 128
    num_pairs: int = 3
    num_speed_prompts: int = 6
    speed_tokens: int = 48


FULL = EvaluationScale()
QUICK = EvaluationScale(per_domain=6, max_tokens=32, num_pairs=2, num_speed_prompts=3, speed_tokens=12)
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

TABLES = ("acceptance", "prompts", "positions", "thresholds", "speed")


@dataclass(eq=False)
class _Results:
    """Tables so far; `write` replaces their files."""

    out: Path
    target: str
    counts: dict[float, dict[str, pd.DataFrame]] = field(default_factory=dict)
    positions: list[pd.DataFrame] = field(default_factory=list)
    thresholds: list[pd.DataFrame] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)

    def acceptance(self) -> pd.DataFrame:
        tables = [
            evaluation.acceptance_table(counts).assign(target=self.target, temperature=temperature)
            for temperature, counts in self.counts.items()
        ]
        frame = pd.concat(tables, ignore_index=True)
        return frame[[*ROW, *(name for name in frame.columns if name not in ROW)]]

    def add(self, drafter: str, temperature: float, blocks: Blocks) -> None:
        names: dict[str, Any] = {"target": self.target, "drafter": drafter, "temperature": temperature}
        self.counts.setdefault(temperature, {})[drafter] = prompt_counts(blocks, walk(blocks))
        self.positions += [
            evaluation.position_table(blocks, source).assign(**names) for source in ("anchors", "rounds")
        ]
        self.thresholds.append(evaluation.threshold_table(blocks, THRESHOLDS).assign(**names))
        _write(self.acceptance(), self.out / "acceptance.parquet")
        per_prompt = [
            sums.reset_index().assign(target=self.target, drafter=name, temperature=level)
            for level, found in self.counts.items()
            for name, sums in found.items()
        ]
        _write(pd.concat(per_prompt, ignore_index=True), self.out / "prompts.parquet")
        _write(pd.concat(self.positions, ignore_index=True), self.out / "positions.parquet")
        _write(pd.concat(self.thresholds, ignore_index=True), self.out / "thresholds.parquet")

    def add_speed(self, row: dict[str, Any]) -> None:
        self.speed.append({"target": self.target, **row})
        _write(pd.DataFrame(self.speed), self.out / "speed.parquet")


def run_evaluation(
    prompts: Sequence[Prompt],
    out: Path | str = "runs/evaluation",
    *,
    drafters: Sequence[str] | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    scale: EvaluationScale = FULL,
    target: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    num_threads: int | None = None,
    concurrency: int = 16,
    seed: int = 0,
    json_path: Path | str | None = None,
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Evaluate drafters and print one table; write tables, a summary and a figure to `out`.

    Parameters
    ----------
    prompts
        At least one; `scale` may take fewer.
    out
        Folder for ``acceptance, prompts, positions, thresholds, speed`` (Parquet), ``summary.json`` and the figure.
    drafters
        Names or folders; ``None`` takes the bundled ones that fit the target, and prompt lookup.
    temperatures
        0 is greedy, others by rejection sampling.
    scale
        How many prompts and tokens.
    target, device, dtype, num_threads
        See `Engine.load`; ignored where `engine` is given.
    concurrency
        Requests decoded at once while outputs are recorded; changes only how long it takes.
    seed
        Of sampling.
    json_path
        File for the rows of `evaluation.ROW`.
    engine
        A loaded engine, to save loading one.

    Returns
    -------
    DataFrame
        A row per drafter, domain and temperature, the columns of `evaluation.ROW` first.

    Raises
    ------
    UserError
        If target, drafter or prompts cannot be had, a value is out of range, or a file cannot be written.
    """
    from dspark_sim.engine.models import EMBEDDED
    from dspark_sim.engine.serve import Engine

    out, start = Path(out), perf_counter()
    levels = _levels(temperatures)
    if scale.max_tokens < 2:
        raise UserError(f"max_tokens is {scale.max_tokens}; give at least 2, for the first token is not drafted")
    if concurrency < 1:
        raise UserError(f"concurrency is {concurrency}; give at least 1")
    chosen = first_of_each(prompts, scale.per_domain)
    with explain_os_errors(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
    print("Loading the target and the drafters …", flush=True)
    base = engine or Engine.load(
        target or EMBEDDED, "none", device=device, dtype=dtype, num_threads=num_threads, max_num_seqs=concurrency
    )
    base = base.with_drafter("none")
    engines = load_drafters(base, drafters)
    with explain_os_errors(out, "write"):
        # Tables of an earlier run must not stand beside those of this one.
        for name in TABLES:
            (out / f"{name}.parquet").unlink(missing_ok=True)
    results = _Results(out, base.target.name)
    bar = tqdm(total=len(levels) * (1 + len(engines)) + len(engines) * scale.num_pairs, desc="evaluate", unit="part")
    with bar:
        blocks: dict[tuple[str, float], Blocks] = {}
        for temperature in levels:
            bar.set_postfix_str(f"outputs at T = {temperature:g}")
            recording = base.record(
                chosen,
                Fixed(0),
                ClosedLoop(min(concurrency, base.max_num_seqs)),
                max_tokens=scale.max_tokens,
                mode=_mode(temperature),
                temperature=temperature,
                seed=seed,
            )
            bar.update()
            for name, drafting in engines.items():
                bar.set_postfix_str(f"{name} at T = {temperature:g}")
                blocks[name, temperature] = Blocks.from_trace(drafting.anchors(recording))
                results.add(name, temperature, blocks[name, temperature])
                bar.update()
        if scale.num_pairs:
            _measure(base, engines, chosen[: scale.num_speed_prompts], levels[0], scale, seed, blocks, results, bar)
    config = {
        "target": base.target.name,
        "drafters": {name: drafting.block_size for name, drafting in engines.items()},
        "temperatures": levels,
        "modes": [_mode(temperature) for temperature in levels],
        "num_prompts": len(chosen),
        "seed": seed,
        "thresholds": list(THRESHOLDS),
        "scale": asdict(scale),
    }
    _report(results, config, base, json_path, perf_counter() - start)
    return results.acceptance()


def load_drafters(base: Engine, names: Sequence[str] | None) -> dict[str, Engine]:
    """Engines by drafter name.

    Parameters
    ----------
    base
        The target's engine.
    names
        As for `run_evaluation`.

    Raises
    ------
    UserError
        If a drafter cannot be had or proposes nothing, or two have one name.
    """
    from dspark_sim.engine.drafters.named import BUNDLED_DRAFTERS

    if names is None:
        folder = Path(__file__).parent / "drafters"
        names = [name for name in BUNDLED_DRAFTERS if _is_for(folder / name / "config.json", base.target.name)]
        names = [*names, "ngram"]
    if not names:
        raise UserError("zero drafters to evaluate; name at least one, such as dspark")
    engines: dict[str, Engine] = {}
    for name in names:
        loaded = base.with_drafter(name)
        if loaded.drafter is None:
            raise UserError(f"drafter {name} proposes nothing, so there is nothing to evaluate; leave it out")
        if loaded.drafter_name in engines:
            raise UserError(f"two drafters are named {loaded.drafter_name}; rename a folder or leave one out")
        engines[loaded.drafter_name] = loaded
    return engines


def first_of_each(prompts: Sequence[Prompt], per_domain: int | None) -> list[Prompt]:
    """The first prompts of each domain, in order.

    Raises
    ------
    UserError
        If none is left.
    """
    seen: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        seen[prompt.domain] = seen.get(prompt.domain, 0) + 1
        if per_domain is None or seen[prompt.domain] <= per_domain:
            chosen.append(prompt)
    if not chosen:
        raise UserError("zero prompts to evaluate; give at least one of each domain")
    return chosen


def _is_for(config: Path, target: str) -> bool:
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("target") == target


def _levels(temperatures: Sequence[float]) -> list[float]:
    levels = list(dict.fromkeys(float(temperature) for temperature in temperatures))
    if not levels:
        raise UserError("zero temperatures; give at least one, such as 0")
    for temperature in levels:
        if not 0.0 <= temperature < float("inf"):
            raise UserError(f"temperature is {temperature:g}; give 0 (greedy) or more")
    return levels


def _mode(temperature: float) -> Mode:
    return "rejection" if temperature else "greedy"


def _measure(
    base: Engine,
    engines: dict[str, Engine],
    prompts: list[Prompt],
    temperature: float,
    scale: EvaluationScale,
    seed: int,
    blocks: dict[tuple[str, float], Blocks],
    results: _Results,
    bar: tqdm[Any],
) -> None:
    """Live pairs at one user; at temperature 0 the live acceptance length must be the walked one."""
    num_tokens = min(scale.speed_tokens, scale.max_tokens)
    for name, drafting in engines.items():
        bar.set_postfix_str(f"speed of {name}")
        drafting.warm_up(prompts, seed=seed)
        own = blocks[name, temperature]
        rounds = walk(own, max_tokens=num_tokens)
        asked = own.requests["prompt_id"].isin([prompt.prompt_id for prompt in prompts]).to_numpy()
        rounds = rounds[asked[rounds["request"]]]
        for pair in range(scale.num_pairs):
            plain_run, fast_run = (
                one.record(
                    prompts,
                    Fixed(one.block_size),
                    ClosedLoop(1),
                    max_tokens=num_tokens,
                    mode=_mode(temperature),
                    temperature=temperature,
                    seed=seed,
                    progress=False,
                )
                for one in (base, drafting)
            )
            results.add_speed(
                {
                    **{"drafter": name, "temperature": temperature, "pair": pair, "num_prompts": len(prompts)},
                    **evaluation.speed_row(plain_run, fast_run),
                    "live_mean_acceptance_length": summary(fast_run)["mean_acceptance_length"],
                    "walked_mean_acceptance_length": float((rounds["num_accepted"] + 1).mean()),
                }
            )
            bar.update()


def _write(frame: pd.DataFrame, path: Path) -> None:
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), partial)


def _report(
    results: _Results, config: dict[str, Any], base: Engine, json_path: Path | str | None, seconds: float
) -> None:
    from dspark_sim.analysis import acceptance_plots, plots

    acceptance, speed = results.acceptance(), speed_medians(results.speed)
    hardware = base.hardware
    note = (
        f"Target {hardware['model']} ({hardware['dtype']}), prompts: {config['num_prompts']}, output tokens at "
        f"most: {config['scale']['max_tokens']}, {hardware['device']}, {hardware['num_threads']} threads."
    )
    out = results.out
    if json_path is not None:
        write_rows(acceptance[list(ROW)], json_path)
    document = {
        "config": config,
        "provenance": provenance(seed=config["seed"], **hardware),
        "seconds": seconds,
        "acceptance": _rows(acceptance),
        "speed": _rows(speed),
        "paper_gains": printed_gains(),
    }
    write_json(out / "summary.json", document)
    positions = pd.concat(results.positions, ignore_index=True)
    shown = positions[(positions["source"] == "anchors") & (positions["domain"] == MACRO)]
    text = (
        f"{note}\nMean of the domains, from a block at every output position. Bars: 95 % by bootstrap over prompts; "
        "none where too few prompts reach the position."
    )
    plots.save(acceptance_plots.conditional_acceptance(shown, text), shown, out / "conditional_acceptance")
    print(f"\nMean acceptance length (tokens per round, bonus included). {note}\n")
    print(printed_table(acceptance, speed))
    print(
        "\nmacro: mean of the domains; 95 %: of macro and of the gain, by bootstrap over prompts, drafters paired;\n"
        "DSpark gain: dspark's macro over the drafter's, less 1; paper's: its Table 1, Qwen3 targets, T = 1;\n"
        "accept_len, verify_rate: as DeepSpec counts, the last round not cut by the length limit;\n"
        "draft cost: draft seconds over a plain step's target seconds; speed-up: decode tokens per second over plain\n"
        f"decoding's, one user; medians of {config['scale']['num_pairs']} pairs of runs; timed len: mean acceptance "
        "length of the prompts timed.\n"
    )
    print(f"The paper's Table 1 (γ = 7, T = 1)\n\n{paper_table()}\n")
    if results.speed and config["temperatures"][0] == 0:
        frame = pd.DataFrame(results.speed)
        equal = frame["live_mean_acceptance_length"] == frame["walked_mean_acceptance_length"]
        print(f"Acceptance length live and from anchors: equal in {equal.sum()} of {len(equal)} runs.")
    print(f"Wrote tables, summary and figure to {out} in {seconds:.0f} s.")


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
