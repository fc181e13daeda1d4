"""Benchmarks of the live engine: ratios measured in one run, alternating, so that drift cancels.

Seconds are wall seconds of whole runs; report medians of the ratios with their spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dspark_sim.engine.models import EMBEDDED, embedded_model_folder
from dspark_sim.engine.serve import Engine
from dspark_sim.policy import Fixed
from dspark_sim.trace import Trace
from dspark_sim.tree_shapes import Sequoia, TreeShape
from dspark_sim.workload import ClosedLoop, Prompt


def generate_ratio(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int = 32, repeats: int = 3
) -> list[dict[str, Any]]:
    """Plain decoding at concurrency 1 against transformers' `generate` with its own SDPA attention.

    Returns
    -------
    list
        One row: seconds of each (median), the ratio generate / engine (median, low, high), and whether the outputs
        were the same. Above 1 the engine is faster.
    """
    from transformers import AutoModelForCausalLM

    plain = engine.with_drafter("none")
    source = embedded_model_folder() if engine.target.name == EMBEDDED else engine.target.name
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=engine.target.dtype, attn_implementation="sdpa")
    reference.to(engine.target.device).eval()
    encoded = [engine.target.encode(prompt.turns[0]) for prompt in prompts]
    outputs: dict[str, list[list[int]]] = {}

    def ours() -> None:
        trace = plain.record(prompts, Fixed(0), ClosedLoop(1), max_tokens=max_tokens, progress=False)
        outputs["engine"] = [list(map(int, tokens)) for tokens in trace.requests["output_tokens"]]

    def theirs() -> None:
        outputs["generate"] = [
            reference.generate(
                torch.tensor([ids], device=engine.target.device), max_new_tokens=max_tokens, do_sample=False
            )[0, len(ids) :].tolist()
            for ids in encoded
        ]

    ours()
    theirs()
    seconds = _alternate({"engine": ours, "generate": theirs}, repeats)
    return [
        {
            "num_prompts": len(prompts),
            "max_tokens": max_tokens,
            "repeats": repeats,
            **_ratio("generate", "engine", seconds),
            "same_output": outputs["engine"] == outputs["generate"],
        }
    ]


def recording_overhead(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int = 32, repeats: int = 3
) -> list[dict[str, Any]]:
    """What recording a trace costs: seconds spent in the recorder as a fraction of step seconds.

    The recorder's calls are timed inside the run they belong to; the difference of two runs would drown in noise.

    Returns
    -------
    list
        One row: steps, microseconds of recording per step, mean step milliseconds, and the fraction.
    """
    rows = []
    policy = Fixed(engine.block_size)
    for _ in range(repeats):
        with _TimedRecorder() as spent:
            trace = engine.record(prompts, policy, ClosedLoop(len(prompts)), max_tokens=max_tokens, progress=False)
        rows.append((len(trace.steps), spent.seconds, float(trace.steps["step_seconds"].sum())))
    steps, recording, total = np.array(rows).T
    return [
        {
            "num_steps": int(steps.sum()),
            "recording_us_per_step": 1e6 * recording.sum() / steps.sum(),
            "step_ms": 1e3 * total.sum() / steps.sum(),
            "recording_fraction": recording.sum() / total.sum(),
            "recording_fraction_high": float((recording / total).max()),
        }
    ]


def tree_over_chain(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int = 32, repeats: int = 3, users: Sequence[int] = (1, 4)
) -> list[dict[str, Any]]:
    """The code of trees, on trees without a branch, against chains of the same length.

    The engine drafts a tree of width 1 as the chain that it is, so a shape stands in whose second candidate is never
    worth a node: candidates, building and the walk are those of trees, and the nodes are the chain.

    Returns
    -------
    list
        A row per number of users: seconds of each (median), the ratio tree / chain (median, low, high), and whether
        outputs and accepted counts were the same.
    """
    gamma, rows = engine.block_size, []
    unbranched = Sequoia(gamma, ((1.0, 0.0),))
    prompts = list(prompts)[: max(users)]
    for count in users:
        traces: dict[str, Trace] = {}

        def run(name: str, tree: TreeShape | None, count: int = count, traces: dict[str, Trace] = traces) -> None:
            traces[name] = engine.record(
                prompts, Fixed(gamma), ClosedLoop(count), max_tokens=max_tokens, tree=tree, progress=False
            )

        runs: dict[str, Callable[[], None]] = {
            "tree": partial(run, "tree", unbranched),
            "chain": partial(run, "chain", None),
        }
        for one in runs.values():
            one()
        seconds = _alternate(runs, repeats)
        assert traces["tree"].config["tree"] is not None and traces["chain"].config["tree"] is None
        found, wanted = (_rounds(traces[name]) for name in ("tree", "chain"))
        rows.append({"users": count, **_ratio("tree", "chain", seconds), "same_rounds": found == wanted})
    return rows


def tree_build_share(
    engine: Engine, prompts: Sequence[Prompt], nodes: int = 64, users: int = 16, max_tokens: int = 16
) -> list[dict[str, Any]]:
    """What finding candidates and building trees takes of an iteration, greedy, with whole trees verified.

    Returns
    -------
    list
        A row per shape that the drafter can grow: milliseconds of a decode iteration, of its drafter's backbone, and of
        the heads with candidates and building; the latter's share; and the tokens of its pass.
    """
    rows = []
    dynamic = f"dynamic:8,{engine.block_size},{nodes}"
    for text in (f"best-first:{nodes}", f"markov:{nodes}", f"sequoia:{nodes}", dynamic):
        tree = engine.fit_tree(text)
        for _ in ("to warm up", "to measure"):
            trace = engine.record(
                prompts, Fixed(engine.num_drafts(tree)), ClosedLoop(users), max_tokens=max_tokens, tree=tree,
                num_requests=users, progress=False,
            )  # fmt: skip
        steps = trace.steps[(trace.steps["num_prefill_tokens"] == 0) & (trace.steps["num_running"] == users)]
        means = steps[["step_seconds", "draft_seconds", "head_seconds", "batch_tokens"]].mean()
        rows.append(
            {"tree": text, "users": users, "batch_tokens": means["batch_tokens"]}
            | {"step_ms": 1e3 * means["step_seconds"], "backbone_ms": 1e3 * means["draft_seconds"]}
            | {"head_and_build_ms": 1e3 * means["head_seconds"]}
            | {"head_and_build_share": means["head_seconds"] / means["step_seconds"]}
        )
    return rows


def _rounds(trace: Trace) -> list[Any]:
    outputs = [list(map(int, tokens)) for tokens in trace.requests["output_tokens"]]
    return [outputs, trace.drafts["num_accepted"].tolist()]


class _TimedRecorder:
    """Times `TraceRecorder.step` and `.drafts` while it is entered."""

    def __enter__(self) -> _TimedRecorder:
        from dspark_sim.trace import TraceRecorder

        self.seconds = 0.0
        self._owner = TraceRecorder
        self._originals = {name: getattr(TraceRecorder, name) for name in ("step", "drafts", "finish")}
        for name, original in self._originals.items():
            setattr(TraceRecorder, name, self._timed(original))
        return self

    def _timed(self, original: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            start = perf_counter()
            original(*args)
            self.seconds += perf_counter() - start

        return timed

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(self._owner, name, original)


def _alternate(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, np.ndarray]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc="bench", unit="repeat", leave=False):
        for name, run in runs.items():
            start = perf_counter()
            run()
            seconds[name].append(perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def _ratio(numerator: str, denominator: str, seconds: dict[str, np.ndarray]) -> dict[str, float]:
    ratios = seconds[numerator] / seconds[denominator]
    return {
        **{f"{name}_seconds": float(np.median(values)) for name, values in seconds.items()},
        "ratio": float(np.median(ratios)),
        "ratio_low": float(ratios.min()),
        "ratio_high": float(ratios.max()),
    }
