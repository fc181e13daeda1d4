"""Our engine under load, for the paper's Figures 7 and 8: MTP-1, DSpark with Algorithm 1, and whole blocks always.

Acceptance is that of the recordings of `paper_recordings`, T = 1. Step seconds come from profile passes of this machine
under both drafters, kept in the folder ``costs`` of the results, so that a second run gives the same numbers. Every
concurrency is then simulated, in a closed loop; intervals are 95 % by bootstrap over prompts and do not hold the
profile's error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from dspark_sim.analysis.metrics import per_request
from dspark_sim.analysis.stats import run_intervals
from dspark_sim.api import simulate
from dspark_sim.cost import CostModel
from dspark_sim.paper_figures import Scale
from dspark_sim.paper_recordings import drafter_digest, recordings, setting
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.reference import curve
from dspark_sim.sweep import sweep
from dspark_sim.trace import Trace
from dspark_sim.workload import bundled_prompts

FloatArray = npt.NDArray[np.float64]
DRAFTERS = {"mtp1": "mtp1", "dspark": "dspark", "fixed": "dspark"}
"""What is served, and by which drafter: MTP-1 always, DSpark by Algorithm 1, DSpark's whole block always."""


@dataclass(frozen=True)
class LoadSize:
    """How much is profiled and simulated.

    Parameters
    ----------
    concurrency
        Users, rising.
    profiled
        Users of the profile passes.
    profile_tokens
        Most output tokens per request of a profile pass.
    repeats
        Passes of each drafter at each number of users, in turn, so that a drift of the machine's speed meets all alike.
    turns
        Requests per user of a simulated run, at least; every prompt is served equally often.
    """

    concurrency: tuple[int, ...]
    profiled: tuple[int, ...]
    profile_tokens: int
    repeats: int
    turns: int


SIZES: dict[Scale, LoadSize] = {
    "smoke": LoadSize((1, 2, 4, 8), (1, 4), 6, 1, 4),
    "laptop": LoadSize((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), 16, 2, 8),
    "gpu": LoadSize((1, 2, 4, 8, 16, 32, 64, 128), (1, 4, 16, 64, 128), 48, 3, 8),
}


def load_curves(out: Path, scale: Scale) -> tuple[pd.DataFrame, str, str]:
    """Our curves of Figures 7 and 8; recordings, costs and simulated points that are missing are made.

    Parameters
    ----------
    out
        Folder of results.
    scale
        See `SIZES`.

    Returns
    -------
    frame
        A row per ``served`` (see `DRAFTERS`) and ``concurrency_requests``: ``output_throughput`` (tokens per second),
        ``user_tokens_per_second``, ``mean_acceptance_length``, ``verification_budget`` (tokens), each with ``_low`` and
        ``_high``; and ``mtp1_speed_share``, MTP-1's speed per user at this concurrency over that of a lone user, by
        which loads of different servers can be compared.
    about
        Target, drafters, prompts and hardware.
    device
        Where step seconds were measured.

    Raises
    ------
    UserError
        If target or drafter cannot be had, or a file cannot be read or written.
    """
    size = SIZES[scale]
    traces = recordings(out, ["dspark", "mtp1"], scale)
    costs = _costs(out, scale, size)
    frame = simulated(traces, costs, size.concurrency, size.turns, out / "costs")
    about = setting(traces["dspark"], "DSpark and MTP-1 (γ = 1)")
    device = costs["dspark"].provenance
    about = f"{about}. Step seconds profiled on {device['device']}, {device['num_threads']} threads"
    return frame, about, str(device["device"])


def simulated(
    traces: dict[str, Trace], costs: dict[str, CostModel], concurrency: Sequence[int], turns: int, folder: Path
) -> pd.DataFrame:
    """The frame of `load_curves` from recordings and cost tables of both drafters, by their names.

    Parameters
    ----------
    traces, costs
        By ``mtp1`` and ``dspark``.
    concurrency
        Users; 1 among them.
    turns
        Requests per user, at least.
    folder
        Simulated points are kept here, in a file named after what they depend on.

    Raises
    ------
    UserError
        If a recording has no anchors, or a file cannot be read or written.
    """
    grid = [{"served": name, "concurrency_requests": users} for name in DRAFTERS for users in concurrency]
    kept = folder / f"load-{_fingerprint(traces, costs, turns)}.jsonl"
    frame = sweep(partial(_point, traces, costs, turns), grid, kept)
    single = frame[frame["served"] == "mtp1"].set_index("concurrency_requests")["user_tokens_per_second"]
    frame["mtp1_speed_share"] = frame["concurrency_requests"].map(single / single.loc[1])
    return frame


def published_load(target_model: str) -> pd.DataFrame:
    """Figure 8 of one target in the same columns, ``served`` by ``mtp1`` and ``dspark``, from 1 request on."""
    frames = []
    for served, drafter in (("mtp1", "mtp-1"), ("dspark", "dspark-5")):
        which = {"target_model": target_model, "drafter": drafter}
        rate = curve("fig8_throughput", **which)
        rate = rate[(rate["concurrency_requests"] >= 1) & (rate["within_plotted_axis"] == 1)]
        budget = curve("fig8_verification_budget", **which)
        users = rate["concurrency_requests"].to_numpy()
        known, tokens = budget["concurrency_requests"], budget["verification_budget_tokens"]
        frames.append(
            pd.DataFrame(
                {
                    "served": served,
                    "concurrency_requests": users,
                    "output_throughput": rate["throughput_tok_s_gpu"].to_numpy(),
                    "user_tokens_per_second": rate["throughput_tok_s_gpu"].to_numpy() / users,
                    "verification_budget": np.interp(users, known, tokens, left=np.nan, right=np.nan),
                }
            )
        )
    mtp = frames[0].set_index("concurrency_requests")["user_tokens_per_second"]
    share = np.interp(frames[1]["concurrency_requests"], mtp.index, mtp / mtp.loc[1.0])
    frames[0]["mtp1_speed_share"] = (mtp / mtp.loc[1.0]).to_numpy()
    frames[1]["mtp1_speed_share"] = share
    return pd.concat(frames, ignore_index=True)


def by_interpolation(x: float, line: pd.DataFrame, along: str, wanted: str) -> float:
    """Where a curve passes `x` of column `along`, its `wanted`; NaN beyond its ends."""
    rows = line.sort_values(along)
    return float(np.interp(x, rows[along], rows[wanted], left=np.nan, right=np.nan))


def _point(
    traces: dict[str, Trace], costs: dict[str, CostModel], turns: int, served: str, concurrency_requests: int
) -> dict[str, float]:
    trace, cost = traces[DRAFTERS[served]], costs[DRAFTERS[served]]
    prompts = len(trace.requests)
    run = simulate(
        trace,
        policy=_policy(served, cost, int(trace.config["block_size"])),
        cost=cost,
        concurrency=concurrency_requests,
        num_requests=prompts * -(-turns * concurrency_requests // prompts),
    )
    found: dict[str, float] = {}
    for metric, row in run_intervals(per_request(run)).iterrows():
        found |= {str(metric): row["estimate"], f"{metric}_low": row["low"], f"{metric}_high": row["high"]}
    return found


def _policy(served: str, cost: CostModel, block_size: int) -> SpeculationPolicy:
    return PrefixScheduler(cost) if served == "dspark" else Fixed(block_size)


def _costs(out: Path, scale: Scale, size: LoadSize) -> dict[str, CostModel]:
    """Cost tables of both drafters, from passes of both in turn."""
    names = tuple(dict.fromkeys(DRAFTERS.values()))
    places = {name: out / "costs" / f"{name}-{scale}-{_key()}.json" for name in names}
    if not all(place.is_file() for place in places.values()):
        from dspark_sim.engine.serve import Engine

        prompts = bundled_prompts()
        base = Engine.load(drafter=names[0], max_num_seqs=max(size.profiled))
        engines = {name: base.with_drafter(name) for name in names}
        passes: dict[str, list[Trace]] = {name: [] for name in names}
        for engine in engines.values():
            engine.warm_up(prompts)
        order = size.repeats * size.profiled
        with tqdm(total=len(order) * len(names), desc="profile", unit="pass") as bar:
            for seed, users in enumerate(order):
                for name, engine in engines.items():
                    options: dict[str, Any] = {"max_tokens": size.profile_tokens, "num_requests": max(users, 4)}
                    passes[name].append(engine.profile_pass(prompts, users, seed=seed, **options))
                    bar.update()
        for name, engine in engines.items():
            others: Sequence[Trace] = [trace for other in names if other != name for trace in passes[other]]
            engine.fit_cost(passes[name], others).write(places[name])
    return {name: CostModel.read(place) for name, place in places.items()}


def _fingerprint(traces: dict[str, Trace], costs: dict[str, CostModel], turns: int) -> str:
    """Names what the simulated points depend on."""
    whole = hashlib.sha256(str(turns).encode())
    for name in costs:
        whole.update(json.dumps(costs[name].to_json(), sort_keys=True).encode())
        whole.update(np.asarray(traces[name].anchors["num_accepted"], dtype=np.int64).tobytes())
    return whole.hexdigest()[:10]


def _key() -> str:
    """Names the drafters' weights."""
    return "".join(drafter_digest(name)[:5] for name in dict.fromkeys(DRAFTERS.values())).strip("-")
