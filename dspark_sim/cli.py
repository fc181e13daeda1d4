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
from importlib import import_module
from typing import TYPE_CHECKING, Any

import tyro

from dspark_sim.errors import UserError

if TYPE_CHECKING:
    from dspark_sim.training.config import TrainConfig
    from dspark_sim.training.synthesis import SynthesisConfig

# Imported when asked for: the list of commands shall not take seconds to print.
_COMMANDS = {
    "demo": ("whole", "Demo"),
    "record": ("live", "Record"),
    "profile": ("live", "Profile"),
    "cost": ("cost", "Cost"),
    "simulate": ("replay", "Simulate"),
    "compare": ("replay", "Compare"),
    "metrics": ("inspection", "Metrics"),
    "explain": ("inspection", "Explain"),
    "export-trace": ("inspection", "ExportTrace"),
    "fidelity": ("fidelity", "Fidelity"),
    "verify": ("whole", "Verify"),
    "evaluate": ("evaluate", "Evaluate"),
    "figures": ("figures", "Figures"),
    "fit-margin": ("live", "FitMargin"),
    "calibrate": ("calibrate", "Calibrate"),
    "export": ("export", "Export"),
    "bench": ("live", "Bench"),
    "merge-synthesis": ("training", "MergeSynthesis"),
    "learning-curves": ("training", "LearningCurves"),
    "model-card": ("training", "ModelCard"),
}
_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "accelerate", "gguf"), "engine"),
    **dict.fromkeys(("matplotlib", "seaborn"), "plots"),
}
_HELP = """usage: dspark-sim COMMAND [options]      (dspark-sim COMMAND --help explains a command)

Record speculative decoding on a real engine once, then replay any schedule in a simulator.

commands:
  demo             decode live, simulate the same, print both and the error between them
  record           serve prompts live and write a trace that can be replayed
  profile          measure what iterations cost on this machine
  cost             show, fit, import, export or estimate what iterations cost
  simulate         replay a recording under another policy, block size or load
  compare          live against simulated, metric by metric
  metrics          all metrics of a run or of replications, with intervals and objectives
  explain          what a policy saw and chose at one step, made again from the trace
  export-trace     write a trace as a vLLM result file or a Perfetto timeline
  fidelity         how far the simulator may be trusted here: a grid of live runs, each simulated
  verify           check here that speculation changes the speed and not the output
  evaluate         compare drafters: acceptance by domain and position, and speed
  figures          the paper's table and figures from our own runs, beside the published values
  synthesise       let the target write training text
  merge-synthesis  make one file of several that it wrote
  train            train a drafter (DSpark, DFlash, Eagle3 or MTP)
  learning-curves  draw training runs in one figure
  model-card       write a trained drafter's README
  fit-margin       learn how sure a drafter without a confidence head is
  calibrate        turn a drafter's confidences into probabilities
  export           write a drafter as a DeepSpec checkpoint
  bench            ratio to transformers' generate, and what recording costs
"""


def _train(config: TrainConfig) -> None:
    from dspark_sim.commands.training import train_and_draw

    train_and_draw(config)


def _synthesise(config: SynthesisConfig) -> None:
    from dspark_sim.training.synthesis import synthesise

    print(f"Wrote the text to {synthesise(config)}.")


def _dispatch(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return
    name, rest = arguments[0], list(arguments[1:])
    program = f"dspark-sim {name}"
    if name == "train":
        from dspark_sim.training.config import TrainConfig

        _train(_parse(TrainConfig, program, rest))
    elif name == "synthesise":
        from dspark_sim.training.synthesis import SynthesisConfig

        _synthesise(_parse(SynthesisConfig, program, rest))
    elif name in _COMMANDS:
        module, command = _COMMANDS[name]
        _parse(getattr(import_module(f"dspark_sim.commands.{module}"), command), program, rest).run()
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
    """Entry point; exits with 0, 1 (a check of `verify` failed), 2 (an error with a remedy) or 130 (interrupted)."""
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
