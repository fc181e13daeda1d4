"""The command line: one subcommand per task, every printed table also as JSON.

A failure that the user can cure ends as one line on standard error and exit status 2; Ctrl-C as one line and 130.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dspark_sim.errors import UserError
from dspark_sim.options import LoadOptions, ModelOptions, PolicyOptions, PromptOptions

if TYPE_CHECKING:
    import pandas as pd

    from dspark_sim.training.synthesis import SynthesisConfig
    from dspark_sim.training.trainer import TrainConfig


@dataclass(frozen=True)
class Demo:
    """Decode live, simulate the same, print both and the error between them (about 5 minutes on 2 cores)."""

    out: Path = Path("runs/demo")
    """Folder for traces, cost table, table and figures."""
    quick: bool = False
    """A smaller run, under 90 seconds."""
    target: str | None = None
    """As for `record`."""
    drafter: str = "dspark"
    """A drafter with a block: dspark, dflash or a folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the target's weights."""
    json: Path | None = None
    """Also write the table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.demo import run_demo

        run_demo(
            self.out,
            quick=self.quick,
            target=self.target,
            drafter=self.drafter,
            device=self.device,
            dtype=self.dtype,
            json_path=self.json,
        )


@dataclass(frozen=True)
class Record:
    """Serve prompts live, draft a block at every position of the outputs, write a trace."""

    out: Path = Path("runs/recording")
    """Folder for the trace."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    policy: tyro.conf.OmitArgPrefixes[PolicyOptions] = PolicyOptions()
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = LoadOptions()
    max_tokens: int = 64
    """Most output tokens per request."""
    mode: Literal["greedy", "rejection"] = "greedy"
    """Acceptance rule; rejection needs --temperature above 0."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability; 1 keeps all."""
    anchors: bool = True
    """Make the dense pass that replay needs (greedy runs with a drafter)."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.api import record

        workload = self.load.load()
        engine = self.model.load(self.load.concurrency if self.load.rate is None else 16)
        trace = record(
            self.prompts.load(),
            policy=self.policy.load(engine.block_size),
            workload=workload,
            max_tokens=self.max_tokens,
            mode=self.mode,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.load.seed,
            anchors=self.anchors,
            out=self.out,
            engine=engine,
        )
        _print_summary(trace, self.json)
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
    max_tokens: int = 32
    """Output tokens per request."""
    seed: int = 0
    """Of the draft and verify lengths tried."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        import pandas as pd

        if not self.concurrency or min(self.concurrency) < 1:
            raise UserError(f"concurrency is {self.concurrency}; give one or more positive numbers")
        engine = self.model.load(max(self.concurrency))
        cost = engine.profile(
            self.prompts.load(), concurrency=self.concurrency, max_tokens=self.max_tokens, seed=self.seed
        )
        cost.write(self.out)
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= cost.verify.knots[-1]]
        rows = [
            {
                "batch_tokens": size,
                "verify_seconds": float(
                    cost.verify.seconds(size, context_tokens=100 * min(size, 16), num_requests=min(size, 16))
                ),
            }
            for size in sizes
        ]
        _print(pd.DataFrame(rows), self.json)
        error, held_out = (cost.provenance[f"verify_{name}_error"] for name in ("mean_abs", "leave_one_out"))
        print(f"Mean absolute error of a step {error:.1%}, of a left-out batch size {held_out:.1%}. Wrote {self.out}.")


@dataclass(frozen=True)
class Simulate:
    """Replay a recording under another policy, block size or load."""

    trace: tyro.conf.Positional[Path]
    """Recording with dense anchors (made by `dspark-sim record`)."""
    cost: Path
    """Cost table (made by `dspark-sim profile`)."""
    policy: Literal["none", "fixed", "prefix"] = "prefix"
    """none, fixed (with --verify-len) or prefix (DSpark's Algorithm 1)."""
    verify_len: int | None = None
    """For fixed: drafted tokens verified; default: the whole block."""
    block_size: int | None = None
    """At most the recorded one."""
    num_requests: int | None = None
    """Requests to serve; the recorded prompts are repeated."""
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = LoadOptions()
    out: Path | None = None
    """Folder to write the simulated trace to."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.api import simulate
        from dspark_sim.cost import CostModel
        from dspark_sim.trace import Trace

        recording = Trace.read(self.trace)
        recorded = int(recording.config.get("block_size", 0))
        block_size = recorded if self.block_size is None else self.block_size
        options = PolicyOptions(self.policy, self.verify_len, self.cost)
        trace = simulate(
            recording,
            policy=options.load(block_size),
            cost=CostModel.read(self.cost),
            workload=self.load.load(),
            block_size=self.block_size,
            num_requests=self.num_requests,
            progress=True,
        )
        if self.out is not None:
            trace.write(self.out)
        _print_summary(trace, self.json)


@dataclass(frozen=True)
class Compare:
    """Print live, simulated and error, metric by metric."""

    live: tyro.conf.Positional[Path]
    """Trace of a live run."""
    simulated: tyro.conf.Positional[Path]
    """Trace of a simulated run of the same requests."""
    repeat: Path | None = None
    """Trace of a second live run: the noise floor."""
    json: Path | None = None
    """Also write the table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.fidelity import compare, rounds_equal
        from dspark_sim.trace import Trace

        live, simulated = Trace.read(self.live), Trace.read(self.simulated)
        repeat = None if self.repeat is None else Trace.read(self.repeat)
        _print(compare(live, simulated, repeat), self.json, {"error": "+.1%", "repeat_error": "+.1%"})
        print(rounds_equal(live, simulated).message)


@dataclass(frozen=True)
class Bench:
    """Ratio to transformers' `generate`, and what recording costs."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    per_domain: int = 2
    """Bundled prompts of each domain."""
    max_tokens: int = 32
    """Output tokens per prompt."""
    repeats: int = 5
    """Alternating repeats."""
    json: Path | None = None
    """Also write the table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        import pandas as pd

        from dspark_sim.engine.bench import generate_ratio, recording_overhead
        from dspark_sim.workload import bundled_prompts

        prompts = bundled_prompts(per_domain=self.per_domain)
        engine = self.model.load(len(prompts))
        print("Plain decoding at concurrency 1 against transformers generate (ratio above 1: this engine is faster)")
        ratio = pd.DataFrame(generate_ratio(engine, prompts, self.max_tokens, self.repeats))
        _print(ratio, None)
        print("\nRecording a trace")
        overhead = pd.DataFrame(recording_overhead(engine, prompts, self.max_tokens, min(self.repeats, 3)))
        _print(overhead, None, {"recording_fraction": ".3%", "recording_fraction_high": ".3%"})
        if self.json is not None:
            from dspark_sim.analysis.tables import write_rows

            write_rows(
                pd.concat([ratio.assign(benchmark="generate"), overhead.assign(benchmark="recording")]), self.json
            )


def _print_summary(trace: object, json: Path | None) -> None:
    from dspark_sim.analysis.metrics import summary
    from dspark_sim.trace import Trace

    assert isinstance(trace, Trace)
    _print(summary(trace).rename_axis("metric").reset_index(), json)


def _print(frame: pd.DataFrame, json: Path | None, formats: dict[str, str] | None = None) -> None:
    from dspark_sim.analysis.tables import aligned, write_rows

    print(aligned(frame, None, formats or {}))
    if json is not None:
        write_rows(frame, json)


def _train(config: TrainConfig) -> None:
    from dspark_sim.training.trainer import train

    print(f"Wrote the drafter to {train(config)}.")


def _synthesise(config: SynthesisConfig) -> None:
    from dspark_sim.training.synthesis import synthesise

    print(f"Wrote the text to {synthesise(config)}.")


_COMMANDS = {
    "demo": Demo,
    "record": Record,
    "profile": Profile,
    "simulate": Simulate,
    "compare": Compare,
    "bench": Bench,
}
_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "accelerate", "gguf"), "engine"),
    **dict.fromkeys(("matplotlib", "seaborn"), "plots"),
}
_HELP = """usage: dspark-sim COMMAND [options]      (dspark-sim COMMAND --help explains a command)

Record speculative decoding on a real engine once, then replay any schedule in a simulator.

commands:
  demo         decode live, simulate the same, print both and the error between them
  record       serve prompts live and write a trace that can be replayed
  profile      measure what iterations cost on this machine
  simulate     replay a recording under another policy, block size or load
  compare      live against simulated, metric by metric
  synthesise   let the target write training text
  train        train a block drafter (DSpark or DFlash)
  bench        ratio to transformers' generate, and what recording costs
"""


def _dispatch(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return
    name, rest = arguments[0], list(arguments[1:])
    program = f"dspark-sim {name}"
    if name == "train":
        from dspark_sim.training.trainer import TrainConfig

        _train(_parse(TrainConfig, program, rest))
    elif name == "synthesise":
        from dspark_sim.training.synthesis import SynthesisConfig

        _synthesise(_parse(SynthesisConfig, program, rest))
    elif name in _COMMANDS:
        _parse(_COMMANDS[name], program, rest).run()
    else:
        known = ", ".join([*_COMMANDS, "synthesise", "train"])
        raise UserError(f"unknown command {name!r}; choose from {known}")


def _parse(kind: Any, program: str, arguments: list[str]) -> Any:
    """Parse a command's flags; tyro's boxed complaint becomes one sentence."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=program, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
        # The first line is the box's title; a rule, now empty, ends what is to be said.
        said = list(itertools.takewhile(bool, lines[1:])) or ["the flags cannot be read"]
        raise UserError(f"{' '.join(said)}; `{program} --help` lists the flags") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 2 (an error with a remedy) or 130 (interrupted)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _dispatch(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        print(f"error: {missing} is not installed; run pip install 'dspark-sim[{_EXTRAS[missing]}]'", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; what was written so far is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
