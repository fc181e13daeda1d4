"""Load: whole blocks pay until the batch fills; policies that look at the load follow whichever is best.

Requests with the paper's acceptance (Qwen3-4B, Figure 2) on a roofline's costs, in closed loops of 1 to 512
users. A fixed number of drafts is fast for a few users and bends back below plain decoding once the target's pass is
bound by arithmetic. Algorithm 1 verifies fewer drafts instead, so that accepted tokens a round fall with load while
throughput does not. Every run is repeated with its own luck; bars are 95 % intervals over the repeats.

    python experiments/load.py --scale smoke
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro
from scipy.stats import t as student

from dspark_sim.analysis import plots
from dspark_sim.analysis.metrics import summary
from dspark_sim.analysis.tables import aligned
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import SHAPES
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_history import Parked
from dspark_sim.policy_ranked import LaggedPrefixScheduler
from dspark_sim.roofline import ACCELERATORS, DRAFTERS, roofline
from dspark_sim.simulate import preset, simulate, synthetic_anchors
from dspark_sim.sweep import sweep
from dspark_sim.workload import ClosedLoop

METRICS = ("output_throughput", "user_tokens_per_second", "mean_acceptance_length")
PANELS = (
    ("relative_throughput", "throughput over plain decoding's"),
    ("output_throughput", "output tokens per second (all users)"),
    ("mean_acceptance_length", "mean acceptance length (tokens)"),
)
LABELS = {"concurrency": "concurrent users", "policy": ""}
ACCELERATOR, SHAPE = "h100", "qwen3-4b"


@dataclass(frozen=True)
class Scale:
    concurrency: tuple[int, ...]
    requests_per_user: int
    repeats: int


SCALES = {
    "smoke": Scale((1, 16, 256), 2, 2),
    "laptop": Scale((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 8, 5),
}


def main(
    scale: Literal["smoke", "laptop"] = "laptop",
    domain: Literal["math", "code", "chat"] = "chat",
    out: Path = Path("runs/load"),
) -> None:
    """Policies against concurrency; writes load.png, .pdf and .csv.

    Parameters
    ----------
    scale
        smoke: three loads, under half a minute. laptop: ten loads, five repeats, three minutes.
    domain
        Whose acceptance of Figure 2.
    out
        Folder of the results; a second call goes on there.
    """
    size = SCALES[scale]
    grid = [
        {"policy": policy, "concurrency": users, "repeat": repeat}
        for policy in policies()
        for users in size.concurrency
        for repeat in range(size.repeats)
    ]
    runs = sweep(partial(cell, domain, size.requests_per_user), grid, out / f"{domain}_{scale}.jsonl")
    frame = with_intervals(runs)
    note = (
        f"Acceptance of Qwen3-4B with DSpark, {domain} (paper, Figure 2); costs: roofline of {SHAPE} on one "
        f"{ACCELERATOR}, an estimate.\n200 prompt and 250 output tokens; {size.repeats} repeats, bars: 95 % over them."
    )
    figure = plots.lines_with_intervals(frame, "concurrency", PANELS, "policy", LABELS, note)
    for axis in figure.axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(size.concurrency, [str(users) for users in size.concurrency], fontsize=8)
        axis.minorticks_off()
    figure.axes[0].axhline(1.0, color="0.4", linewidth=0.8)
    figure.axes[1].set_yscale("log", base=10)
    figure.axes[1].set_ylim(frame["output_throughput"].min() / 1.5, frame["output_throughput"].max() * 1.5)
    paths = plots.save(figure, frame, out / "load")
    shown = frame[frame["concurrency"].isin([size.concurrency[0], size.concurrency[-1]])]
    print(aligned(shown, {"policy": "policy", "concurrency": "users", **{name: name for name, _ in PANELS}}))
    print("\n".join(f"wrote {path}" for path in paths))


def policies() -> dict[str, SpeculationPolicy]:
    cost = roofline(ACCELERATORS[ACCELERATOR], SHAPES[SHAPE], DRAFTERS["dspark"])
    prefix = PrefixScheduler(cost)
    chosen = [Fixed(0), Fixed(2), Fixed(4), Fixed(7), prefix, LaggedPrefixScheduler(cost), Parked(prefix, cost)]
    return {policy.label(): policy for policy in chosen}


def cell(domain: str, requests_per_user: int, policy: str, concurrency: int, repeat: int) -> dict[str, float]:
    """One simulated run; runs of one repeat share their luck."""
    num = max(concurrency * requests_per_user, 32)
    law = preset("qwen3-4b", drafter="dspark", domain=domain)
    anchors = synthetic_anchors(law, num, prompt_len=200, output_len=250, seed=repeat)
    cost = roofline(ACCELERATORS[ACCELERATOR], SHAPES[SHAPE], DRAFTERS["dspark"])
    run = simulate(anchors, policies()[policy], ClosedLoop(concurrency), cost, num_requests=num)
    values = summary(run)
    return {metric: float(values[metric]) for metric in METRICS}


def with_intervals(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over repeats and their intervals; relative to plain decoding within a repeat."""
    plain = runs[runs["policy"] == "none"].set_index(["concurrency", "repeat"])["output_throughput"]
    keys = pd.MultiIndex.from_frame(runs[["concurrency", "repeat"]])
    runs = runs.assign(relative_throughput=runs["output_throughput"].to_numpy() / plain.loc[keys].to_numpy())
    rows = []
    for (policy, users), group in runs.groupby(["policy", "concurrency"], sort=False):
        row = {"policy": policy, "concurrency": users}
        for metric in ("relative_throughput", *METRICS):
            mean, spread = group[metric].mean(), group[metric].std(ddof=1) / np.sqrt(len(group))
            half = student.ppf(0.975, len(group) - 1) * spread
            row |= {metric: mean, f"{metric}_low": mean - half, f"{metric}_high": mean + half}
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"load: {error}")
