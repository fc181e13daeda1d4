"""How fast the simulator is: microseconds an iteration, milliseconds a request, memory, and how they grow.

Every row is measured in a process of its own, so that its peak of memory is its own. The requests are those of a
synthetic law with the paper's acceptance (Qwen3-4B, DSpark, math), 1,000 prompt tokens and 250 output tokens each; the
costs are a roofline's; users ask again as soon as they are answered. Everything is recorded in full unless `detail`
says otherwise, and the seconds are those of the whole call, the trace's tables included.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import SHAPES
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import LaggedPrefixScheduler
from dspark_sim.roofline import ACCELERATORS, DRAFTERS, roofline
from dspark_sim.simulate.array_recorder import Detail
from dspark_sim.simulate.presets import preset
from dspark_sim.simulate.run import simulate
from dspark_sim.simulate.synthetic_anchors import synthetic_anchors
from dspark_sim.workload import ClosedLoop

BenchPolicy = Literal["none", "fixed", "prefix", "lagged"]


@dataclass(frozen=True)
class BenchPoint:
    """One row of the benchmark.

    Parameters
    ----------
    policy
        ``none``; ``fixed``, which verifies whole blocks; ``prefix`` and ``lagged``, which look at confidences.
    num_running
        Users, and so requests running at once.
    num_requests
        Requests served.
    block_size
        Drafts per round, γ.
    detail
        What is recorded.
    output_len
        Output tokens of each request; its prompt has 1,000.
    repeats
        Runs, of which the fastest counts; the first also loads the compiled kernels.
    """

    policy: BenchPolicy
    num_running: int = 64
    num_requests: int = 4000
    block_size: int = 7
    detail: Detail = "rounds"
    output_len: int = 250
    repeats: int = 3


GROWTH: tuple[BenchPoint, ...] = (
    *(BenchPoint(policy) for policy in ("none", "fixed", "prefix", "lagged")),
    *(
        BenchPoint(policy, num_requests=num, detail="requests", repeats=2 if num == 100_000 else 3)
        for policy in ("fixed", "prefix")
        for num in (1_000, 10_000, 100_000)
    ),
    *(BenchPoint(policy, num_running=num) for policy in ("fixed", "prefix") for num in (8, 256, 1024)),
    *(BenchPoint(policy, block_size=gamma) for policy in ("fixed", "prefix") for gamma in (2, 4)),
)
QUICK: tuple[BenchPoint, ...] = tuple(
    BenchPoint(policy, num_requests=1000, repeats=2) for policy in ("fixed", "prefix")
)


def bench_simulator(points: Sequence[BenchPoint] = GROWTH, *, progress: bool = True) -> pd.DataFrame:
    """Measure the simulator.

    Returns
    -------
    DataFrame
        A row per point: ``policy, num_running, num_requests, block_size, detail, num_iterations, us_per_iteration,
        ms_per_request, iterations_per_second, peak_memory_mib``; the peak is that of the process, imports included.

    Raises
    ------
    UserError
        If a point's process fails.
    """
    rows = []
    with tqdm(total=len(points), unit="row", desc="bench simulator", disable=not progress) as bar:
        for point in points:
            command = [sys.executable, "-m", "dspark_sim.simulate.bench", json.dumps(asdict(point))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"the benchmark's process for {point} failed ({last}); run it with fewer requests")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            bar.update()
    return pd.DataFrame(rows)


def measure(point: BenchPoint) -> dict[str, Any]:
    """One row, measured in this process."""
    law = preset("qwen3-4b", drafter="dspark", domain="math")
    lengths = np.full(point.num_requests, 1000), np.full(point.num_requests, point.output_len)
    anchors = synthetic_anchors(law, point.num_requests, prompt_len=lengths[0], output_len=lengths[1])
    cost = roofline(ACCELERATORS["h100"], SHAPES["qwen3-4b"], DRAFTERS["dspark"])
    policy = _policy(point, cost)
    seconds, num_iterations = [], 0
    for _ in range(point.repeats):
        start = perf_counter()
        trace = simulate(
            anchors,
            policy,
            ClosedLoop(point.num_running),
            cost,
            num_requests=point.num_requests,
            block_size=point.block_size,
            detail=point.detail,
        )
        seconds.append(perf_counter() - start)
        num_iterations = int(trace.config["num_iterations"])
        del trace
    best = min(seconds)
    return {
        **{name: getattr(point, name) for name in ("policy", "num_running", "num_requests", "block_size", "detail")},
        "num_iterations": num_iterations,
        "us_per_iteration": 1e6 * best / num_iterations,
        "ms_per_request": 1e3 * best / point.num_requests,
        "iterations_per_second": num_iterations / best,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _policy(point: BenchPoint, cost: CostModel) -> SpeculationPolicy:
    if point.policy == "none":
        return Fixed(0)
    if point.policy == "fixed":
        return Fixed(point.block_size)
    return PrefixScheduler(cost) if point.policy == "prefix" else LaggedPrefixScheduler(cost)


if __name__ == "__main__":
    print(json.dumps(measure(BenchPoint(**json.loads(sys.argv[1])))))
