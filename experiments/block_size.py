"""Block size: throughput, per-user speed and acceptance against γ and concurrency, from one recording.

A larger block helps a lone user until acceptance dies out, and hurts a full batch sooner, because every rejected token
took a place in the target's pass. One live run with dense anchors and one cost profile; every point of the grid is
then replayed in the simulator under `Fixed(γ)`, exactly as far as rounds and acceptance go. Intervals are 95 %, by
bootstrap over prompts; they do not hold the error of the cost profile.

    python experiments/block_size.py --scale smoke
    python experiments/block_size.py --trace runs/block_size/trace --cost runs/block_size/cost.json
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import tyro

from dspark_sim import CostModel, Engine, Fixed, Trace, profile, record, simulate
from dspark_sim.analysis import plots
from dspark_sim.analysis.metrics import per_request
from dspark_sim.analysis.stats import run_intervals
from dspark_sim.analysis.tables import aligned
from dspark_sim.errors import UserError
from dspark_sim.sweep import sweep

PANELS = (
    ("output_throughput", "output tokens per second (all users)"),
    ("user_tokens_per_second", "per-user speed (tokens per second)"),
    ("mean_acceptance_length", "mean acceptance length (tokens)"),
)
LABELS = {"block_size": "block size γ (drafted tokens)", "concurrency": "users:"}


@dataclass(frozen=True)
class Scale:
    per_domain: int
    max_tokens: int
    profile_tokens: int
    concurrency: Sequence[int]


SCALES = {"smoke": Scale(1, 12, 6, (1, 4)), "laptop": Scale(16, 64, 32, (1, 2, 4, 8, 16))}


def main(
    scale: Literal["smoke", "laptop"] = "laptop",
    trace: Path | None = None,
    cost: Path | None = None,
    drafter: str = "dspark",
    out: Path = Path("runs/block_size"),
) -> None:
    """Sweep block size and concurrency from one recording; writes block_size.png, .pdf and .csv.

    Parameters
    ----------
    scale
        smoke: under a minute, to see that it runs. laptop: some minutes on two cores.
    trace
        A recording with anchors to use instead of a live run.
    cost
        A cost table to use instead of a profile run.
    drafter
        What to record, when there is no trace.
    out
        Folder of the results; holds the recording and the cost table, too.
    """
    size = SCALES[scale]
    if trace is None or cost is None:
        name = drafter if trace is None else Trace.read(trace).config["drafter"]
        engine = Engine.load(drafter=name, max_num_seqs=max(size.concurrency))
        if trace is None:
            trace = out / "trace"
            record(engine=engine, concurrency=4, per_domain=size.per_domain, max_tokens=size.max_tokens, out=trace)
        if cost is None:
            cost = out / "cost.json"
            profile(engine=engine, concurrency=size.concurrency, max_tokens=size.profile_tokens).write(cost)
    recording = Trace.read(trace)
    grid = [
        {"block_size": block_size, "concurrency": users, "inputs": fingerprint(trace, cost)}
        for users in size.concurrency
        for block_size in range(int(recording.config["block_size"]) + 1)
    ]
    frame = sweep(partial(cell, trace, cost), grid, out / "sweep.jsonl")
    figure = plots.lines_with_intervals(
        frame, "block_size", PANELS, "concurrency", LABELS, note(recording, CostModel.read(cost))
    )
    paths = plots.save(figure, frame, out / "block_size")
    best = frame.loc[frame.groupby("concurrency")["output_throughput"].idxmax()]
    print(aligned(best, {"concurrency": "users", "block_size": "best γ", **{name: name for name, _ in PANELS}}))
    print("\n".join(f"wrote {path}" for path in paths))


def cell(trace: Path, cost: Path, block_size: int, concurrency: int, inputs: str) -> dict[str, float]:
    """One simulated run: every prompt equally often, at least four requests per user."""
    recording, table = load(trace, cost)
    prompts = len(recording.requests)
    run = simulate(
        recording,
        policy=Fixed(block_size),
        cost=table,
        concurrency=concurrency,
        block_size=block_size,
        num_requests=prompts * -(-4 * concurrency // prompts),
    )
    metrics = run_intervals(per_request(run))
    ends = {"estimate": "", "low": "_low", "high": "_high"}
    return {f"{metric}{ends[end]}": value for metric, row in metrics.iterrows() for end, value in row.items()}


@lru_cache(maxsize=1)
def load(trace: Path, cost: Path) -> tuple[Trace, CostModel]:
    return Trace.read(trace), CostModel.read(cost)


def fingerprint(trace: Path, cost: Path) -> str:
    """Names the recording and the cost table, so that a sweep never mixes two of them."""
    files = (trace / "requests.parquet", trace / "anchors.parquet", cost)
    if not cost.is_file():
        raise UserError(f"no cost table at {cost}; make one with `dspark-sim profile`")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def note(recording: Trace, cost: CostModel) -> str:
    config, hardware = recording.config, cost.provenance
    facts: dict[str, Any] = {
        "Target": config["target"],
        "drafter": config["drafter"],
        "T": f"{config['sampling']['temperature']:g}",
        "prompts": recording.requests["prompt_id"].nunique(),
        "output tokens at most": config["max_tokens"],
        "hardware": f"{hardware['device']}, {hardware['dtype']}, {hardware['num_threads']} threads",
    }
    text = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"{text}.\nSimulated from one recording; bars: 95 % by bootstrap over prompts."


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"block_size: {error}")
