"""The demonstration: decode live, simulate the same, print both and the error between them.

Cells are policies × concurrencies. Every cell runs twice live, in alternation, so that the difference of the two
says how far a figure can be trusted on this machine; the live figure is their mean. The simulator sees profile
passes' costs and one recording's anchors, never the cells' own times. Some profile passes lie between and behind the
cells of each concurrency, because a shared machine's speed drifts within minutes. The scheduling policy decides by
a table profiled beforehand, live and simulated alike, so that both make the same choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import pandas as pd
from tqdm import tqdm

from dspark_sim.analysis.fidelity import rounds_equal
from dspark_sim.analysis.metrics import summary
from dspark_sim.analysis.tables import aligned, write_rows
from dspark_sim.api import simulate
from dspark_sim.cost import CostModel
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop, Prompt, bundled_prompts

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine


@dataclass(frozen=True)
class DemoScale:
    """Size of the demonstration.

    Parameters
    ----------
    num_requests
        Pairs (concurrency, requests served at it).
    max_tokens
        Most output tokens per request.
    profile_tokens
        Most output tokens per request of a profile pass.
    """

    num_requests: tuple[tuple[int, int], ...] = ((1, 4), (4, 8), (16, 48))
    max_tokens: int = 32
    profile_tokens: int = 24


FULL = DemoScale()
QUICK = DemoScale(num_requests=((1, 2), (4, 4), (16, 16)), max_tokens=12, profile_tokens=10)

HEADERS = {
    "policy": "policy",
    "concurrency": "users",
    "live_output_throughput": "live tok/s",
    "simulated_output_throughput": "sim tok/s",
    "error": "error",
    "repeat_error": "repeat",
    "live_user_tokens_per_second": "live tok/s/user",
    "simulated_user_tokens_per_second": "sim tok/s/user",
    "mean_acceptance_length": "accept len",
    "verification_budget": "budget",
    "rounds_equal": "rounds equal",
}
FORMATS = {
    **dict.fromkeys(("error", "repeat_error"), "+.1%"),
    **dict.fromkeys(("live_output_throughput", "simulated_output_throughput"), ".1f"),
    **dict.fromkeys(("live_user_tokens_per_second", "simulated_user_tokens_per_second"), ".1f"),
    **dict.fromkeys(("mean_acceptance_length", "verification_budget"), ".2f"),
}


@dataclass(eq=False)
class _Cell:
    """A policy on an engine, what its replay needs, and its place in the table."""

    engine: Engine
    policy: SpeculationPolicy
    label: str
    anchors: Trace


def run_demo(
    out: Path | str = "runs/demo",
    *,
    quick: bool = False,
    target: str | None = None,
    drafter: str = "dspark",
    device: str = "auto",
    dtype: str = "float32",
    scale: DemoScale | None = None,
    json_path: Path | str | None = None,
) -> pd.DataFrame:
    """Run the demonstration and write traces, the cost table, the table and two figures to `out`.

    Returns
    -------
    DataFrame
        A row per policy and concurrency; errors are fractions.

    Raises
    ------
    UserError
        If target or drafter cannot be had, or a file cannot be written.
    """
    from dspark_sim.engine.models import EMBEDDED
    from dspark_sim.engine.serve import Engine

    out, start = Path(out), perf_counter()
    scale = scale or (QUICK if quick else FULL)
    levels = [users for users, _ in scale.num_requests]
    print("Loading the target and the drafters …", flush=True)
    engine = Engine.load(
        target or EMBEDDED, drafter, device=device, dtype=dtype, max_num_seqs=max(levels), max_model_len=512
    )
    prompts = bundled_prompts()[: max(count for _, count in scale.num_requests)]

    print("Profiling what an iteration costs …", flush=True)
    engine.warm_up(prompts)
    passes = [_pass(engine, prompts, users, scale, seed) for seed, users in enumerate(levels)]
    table = engine.fit_cost(passes)
    lookup = engine.with_drafter("ngram")

    print("Recording outputs, and drafting a block at every position of them …", flush=True)
    base = engine.with_drafter("none").record(
        prompts, Fixed(0), ClosedLoop(max(levels)), max_tokens=scale.max_tokens, progress=True
    )
    anchors = engine.anchors(base)
    anchors.write(out / "recording")
    lookup_anchors = lookup.anchors(base)

    gamma = engine.block_size
    name = engine.drafter_name
    cells = [
        _Cell(engine.with_drafter("none"), Fixed(0), "none", anchors),
        _Cell(lookup, Fixed(lookup.block_size), f"ngram fixed-{lookup.block_size}", lookup_anchors),
        _Cell(engine, Fixed(gamma), f"{name} fixed-{gamma}", anchors),
    ]
    if engine.has_confidence:
        cells.append(_Cell(engine, PrefixScheduler(table), f"{name} prefix", anchors))
    lookup_passes: list[Trace] = []
    runs: dict[tuple[str, int], list[Trace]] = {}
    with tqdm(total=2 * len(cells) * len(levels), desc="live runs", unit="run") as bar:
        for users, count in scale.num_requests:
            for repeat in (0, 1):
                for cell in cells:
                    trace = cell.engine.record(
                        prompts[:count],
                        cell.policy,
                        ClosedLoop(users),
                        max_tokens=scale.max_tokens,
                        cost=table,
                        progress=False,
                    )
                    runs.setdefault((cell.label, users), []).append(trace)
                    if repeat == 0:
                        trace.write(out / "traces" / f"{cell.label.replace(' ', '-')}-c{users}")
                    bar.update()
                passes.append(_pass(engine, prompts, users, scale, len(passes)))
            lookup_passes.append(_pass(lookup, prompts, users, scale, len(passes)))
    cost = engine.fit_cost(passes, lookup_passes)
    cost.write(out / "cost.json")
    plain_cost = lookup.fit_cost(lookup_passes, passes)
    rows = [
        _row(cell, users, count, cost if cell.engine is engine else plain_cost, *runs[cell.label, users])
        for users, count in scale.num_requests
        for cell in cells
    ]
    frame = pd.DataFrame(rows)
    _report(frame, engine, out, json_path)
    print(f"Wrote traces, cost table, table and figures to {out} in {perf_counter() - start:.0f} s.")
    return frame


def _pass(engine: Engine, prompts: list[Prompt], users: int, scale: DemoScale, seed: int) -> Trace:
    return engine.profile_pass(
        prompts, users, max_tokens=scale.profile_tokens, num_requests=max(4, users), seed=seed + 1
    )


def _row(cell: _Cell, users: int, count: int, cost: CostModel, live: Trace, again: Trace) -> dict[str, object]:
    twin = simulate(cell.anchors, policy=cell.policy, cost=cost, concurrency=users, num_requests=count)
    first, second, simulated = summary(live), summary(again), summary(twin)
    throughput = (first["output_throughput"] + second["output_throughput"]) / 2
    speed = (first["user_tokens_per_second"] + second["user_tokens_per_second"]) / 2
    return {
        "policy": cell.label,
        "concurrency": users,
        "live_output_throughput": throughput,
        "simulated_output_throughput": simulated["output_throughput"],
        "error": simulated["output_throughput"] / throughput - 1,
        "repeat_error": second["output_throughput"] / first["output_throughput"] - 1,
        "live_user_tokens_per_second": speed,
        "simulated_user_tokens_per_second": simulated["user_tokens_per_second"],
        "mean_acceptance_length": first["mean_acceptance_length"],
        "simulated_mean_acceptance_length": simulated["mean_acceptance_length"],
        "verification_budget": first["verification_budget"],
        "simulated_verification_budget": simulated["verification_budget"],
        "rounds_equal": bool(rounds_equal(live, twin)),
        "num_requests": count,
    }


def _report(frame: pd.DataFrame, engine: Engine, out: Path, json_path: Path | str | None) -> None:
    from dspark_sim.analysis import plots

    hardware = engine.hardware
    note = (
        f"Target {hardware['model']} ({hardware['dtype']}), drafter {engine.drafter_name} (γ = {engine.block_size}), "
        f"T = 0, {hardware['device']}, {hardware['num_threads']} threads."
    )
    print(f"\n{note}\n")
    print(aligned(frame, HEADERS, FORMATS))
    print(
        "\nlive: mean of two runs; error: simulated / live - 1; repeat: second live run / first - 1;\n"
        "accept len: tokens per round, bonus included; budget: tokens verified per request and round;\n"
        "rounds equal: every round of the replay is the live one.\n"
    )
    write_rows(frame, json_path or out / "table.json")
    plots.save(plots.throughput_and_budget(frame, note), frame, out / "throughput_and_budget")
    plots.save(plots.frontier(frame, note), frame, out / "frontier")
