"""Live runs against their simulations: with their own seconds, and with seconds fitted on other runs.

*Identity*: a live run is replayed with its own iterations' seconds and must have the same rounds, request by request,
in the same iterations. It holds whatever the policy and the arrivals, because who is in a batch is then decided at
the same instants.

*Splits*: which runs the costs were fitted on that price a cell.

==================== ==================================================== ========================
split                fitted on                                            judged on
==================== ==================================================== ========================
same policy          first repeats of all cells                           second repeat
held-out policy      all runs of all other policies, profile passes       mean of both repeats
held-out concurrency all runs and passes at all other concurrencies       mean of both repeats
profile              profile passes only, as a user's cost table is made  mean of both repeats
==================== ==================================================== ========================

Profile passes belong to the held-out fits because they alone mix rounds with and without drafts: where every round
drafts, what a round without drafts costs cannot be told from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from dspark_sim import cost as cost_model
from dspark_sim.analysis.fidelity import rounds_equal
from dspark_sim.analysis.fidelity_scores import METRICS, SPLITS
from dspark_sim.analysis.metrics import summary
from dspark_sim.cost import CostModel, Curve
from dspark_sim.cost_curve import FloatArray
from dspark_sim.policy import SpeculationPolicy
from dspark_sim.scheduler import SchedulerConfig
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.run import simulate
from dspark_sim.trace import Trace
from dspark_sim.workload import Workload

Arrivals = Literal["closed", "poisson"]
# A cell that spends this share of its time in batches so many times larger than any fitted counts as extrapolated.
_MUCH, _LARGER = 0.1, 1.25


@dataclass(frozen=True)
class Cell:
    """A policy at a concurrency under a kind of arrivals."""

    policy: str
    concurrency: int
    arrivals: Arrivals

    def as_dict(self) -> dict[str, Any]:
        """The columns of tables."""
        return {"policy": self.policy, "concurrency": self.concurrency, "arrivals": self.arrivals}


@dataclass(frozen=True, eq=False)
class CellRuns:
    """A cell's two live runs and what a simulation of them needs.

    Parameters
    ----------
    cell
        Which.
    policy, workload, num_requests
        What ran.
    first, second
        The live runs.
    """

    cell: Cell
    policy: SpeculationPolicy
    workload: Workload
    num_requests: int
    first: Trace
    second: Trace

    @property
    def clock_free(self) -> bool:
        """Whether the rounds cannot depend on the clock: a closed loop, or a policy blind to the load."""
        return self.cell.arrivals == "closed" or not hasattr(self.policy, "cost")

    def simulate(self, anchors: RecordedAnchors, cost: CostModel) -> Trace:
        """The cell under a cost model, on a server with the live one's limits."""
        limits = SchedulerConfig(**self.first.config["scheduler"])
        return simulate(anchors, self.policy, self.workload, cost, num_requests=self.num_requests, scheduler=limits)


class OwnSeconds(CostModel):
    """A cost stand-in for one replay: the seconds of a live run's iterations, in their order.

    An iteration's whole time is its host time; its other parts cost nothing.

    Parameters
    ----------
    seconds
        One entry per iteration; the last is repeated if the replay needs more.
    """

    def __init__(self, seconds: FloatArray) -> None:
        super().__init__(Curve())
        object.__setattr__(self, "_seconds", seconds)
        object.__setattr__(self, "_iteration", 0)

    def host_seconds(self, num_requests: int) -> float:
        """The next iteration's seconds."""
        seconds: FloatArray = vars(self)["_seconds"]
        iteration: int = vars(self)["_iteration"]
        object.__setattr__(self, "_iteration", iteration + 1)
        return float(seconds[min(iteration, len(seconds) - 1)])

    def prefill_host_seconds(self, num_requests: int) -> float:
        """The next iteration's seconds."""
        return self.host_seconds(num_requests)

    def round_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int, draft_len: int) -> float:
        """Nothing is predicted."""
        return float("nan")


def own_seconds(live: Trace) -> FloatArray:
    """Seconds from each iteration's start to the next one's.

    Time between iterations counts to the one before, and so does waiting for work: then what has arrived when an
    iteration starts is the same in the replay, which never waits. The first iteration lasts from the first arrival.
    """
    steps = live.steps
    starts = steps["start"].to_numpy(dtype=np.float64).copy()
    last = starts[-1] + float(steps["step_seconds"].iloc[-1])
    starts[0] = float(live.requests["arrival"].min())
    return np.diff(starts, append=last)


def busy_seconds(live: Trace) -> FloatArray:
    """Seconds of each iteration and of the host after it, waiting for work left out."""
    steps, requests = live.steps, live.requests
    starts, seconds = (steps[name].to_numpy(dtype=np.float64) for name in ("start", "step_seconds"))
    ends = starts + seconds
    # A finish is its iteration's end, rounded otherwise.
    arrived = np.searchsorted(np.sort(requests["arrival"].to_numpy()), ends + 1e-9, side="right")
    left = np.searchsorted(np.sort(requests["finish"].to_numpy()), ends + 1e-9, side="right")
    lasting = np.diff(starts, append=ends[-1])
    return np.where(arrived > left, lasting, np.minimum(seconds, lasting))


def identity_table(runs: Iterable[CellRuns], anchors: RecordedAnchors, *, progress: bool = False) -> pd.DataFrame:
    """Replay every live run with its own seconds.

    Returns
    -------
    DataFrame
        A row per cell and repeat: ``rounds_equal``, ``batches_equal`` (every request in the same iterations),
        ``num_rounds`` and ``message``.
    """
    rows = []
    for cell in tqdm(list(runs), desc="identity", unit="cell", disable=not progress, leave=False):
        for repeat, live in ((1, cell.first), (2, cell.second)):
            replay = cell.simulate(anchors, OwnSeconds(own_seconds(live)))
            verdict = rounds_equal(live, replay)
            left, right = (trace.drafts[["step", "request_id"]].to_numpy() for trace in (live, replay))
            rows.append(
                {
                    **cell.cell.as_dict(),
                    **{"repeat": repeat, "rounds_equal": bool(verdict), "batches_equal": np.array_equal(left, right)},
                    **{"num_rounds": len(live.drafts), "message": verdict.message},
                }
            )
    return pd.DataFrame(rows)


def live_table(runs: Iterable[CellRuns]) -> pd.DataFrame:
    """Metrics of every live run: the columns that `fidelity_scores.error_table` asks for.

    Also ``makespan_seconds``, ``mean_running`` (requests in the batch, by time) and ``host_gap`` (busy seconds
    between iterations over all busy seconds).
    """
    rows = []
    for cell in runs:
        for repeat, live in ((1, cell.first), (2, cell.second)):
            values, busy, steps = summary(live), busy_seconds(live), live.steps
            # The loop counts who runs before it lets the finished go.
            running = float(np.average(steps["num_running"], weights=busy))
            rows.append(
                {
                    **cell.cell.as_dict(),
                    **{"repeat": repeat, "clock_free": cell.clock_free},
                    **{name: values[name] for name in (*METRICS, "makespan_seconds")},
                    **{"num_requests": len(live.requests), "mean_running": running},
                    "host_gap": 1.0 - float(steps["step_seconds"].sum()) / float(busy.sum()),
                    "load_average": live.provenance.get("load_average"),
                }
            )
    return pd.DataFrame(rows)


def simulated_table(
    runs: list[CellRuns],
    passes: Mapping[int, list[Trace]],
    anchors: RecordedAnchors,
    hardware: Mapping[str, Any],
    *,
    progress: bool = False,
) -> tuple[pd.DataFrame, dict[str, CostModel]]:
    """Simulate every cell in every split.

    Parameters
    ----------
    runs
        All cells.
    passes
        Profile passes by concurrency.
    anchors
        The recording that is replayed.
    hardware
        Goes into the cost tables' provenance.
    progress
        Show a bar.

    Returns
    -------
    DataFrame
        A row per split and cell: `METRICS`, whether ``rounds_equal`` the judged run's, and the evidence for
        `fidelity_scores.misses`: ``price_error, price_drift, extrapolated``.
    dict
        The cost models by split and what was held out.
    """
    every_pass = [trace for traces in passes.values() for trace in traces]
    makers: dict[str, Callable[[Cell], tuple[str, list[Trace]]]] = {
        "same policy": lambda cell: ("", [one.first for one in runs]),
        "held-out policy": lambda cell: (
            cell.policy,
            _traces(one for one in runs if one.cell.policy != cell.policy) + every_pass,
        ),
        "held-out concurrency": lambda cell: (
            f"c{cell.concurrency}",
            _traces(one for one in runs if one.cell.concurrency != cell.concurrency)
            + [trace for users, traces in passes.items() if users != cell.concurrency for trace in traces],
        ),
        "profile": lambda cell: ("", every_pass),
    }
    costs: dict[str, CostModel] = {}
    largest: dict[str, tuple[float, float]] = {}
    rows = []
    with tqdm(total=len(SPLITS) * len(runs), desc="simulate", unit="cell", disable=not progress, leave=False) as bar:
        for split in SPLITS:
            for one in runs:
                held, traces = makers[split](one.cell)
                name = f"{split} {held}".strip()
                if not traces:
                    bar.update()
                    continue
                if name not in costs:
                    costs[name] = cost_model.fit([trace.steps for trace in traces], hardware)
                    largest[name] = _largest(traces)
                twin = one.simulate(anchors, costs[name])
                judged = [one.second] if split == "same policy" else [one.first, one.second]
                first, second = (price_error(costs[name], trace) for trace in (one.first, one.second))
                values, beyond = summary(twin), max(_share_beyond(trace, *largest[name]) for trace in judged)
                rows.append(
                    {
                        "split": split,
                        **one.cell.as_dict(),
                        **{metric: values[metric] for metric in METRICS},
                        "rounds_equal": bool(rounds_equal(one.second, twin)),
                        "price_error": second if split == "same policy" else (first + second) / 2,
                        "price_drift": (1.0 + first) / (1.0 + second) - 1.0,
                        "extrapolated": beyond > _MUCH,
                    }
                )
                bar.update()
    return pd.DataFrame(rows), costs


def price_error(cost: CostModel, live: Trace) -> float:
    """What a cost model says of the very iterations of a live run, over what they took, less 1."""
    steps = live.steps
    predicted = 0.0
    columns = ["num_prefill_tokens", "num_running", "batch_tokens", "context_tokens", "draft_len"]
    for prefill, running, batch, context, draft_len in steps[columns].astype(int).itertuples(index=False, name=None):
        if prefill:
            predicted += cost.prefill_seconds(prefill) + cost.prefill_host_seconds(running)
        else:
            predicted += cost.round_seconds(batch, context, running, draft_len)
    return predicted / float(busy_seconds(live).sum()) - 1.0


def _traces(runs: Iterable[CellRuns]) -> list[Trace]:
    return [trace for one in runs for trace in (one.first, one.second)]


def _share_beyond(live: Trace, batch_tokens: float, prefill_tokens: float) -> float:
    """Share of a run's time in decode rounds and prefills of well more tokens than these."""
    prefill = live.steps["num_prefill_tokens"].to_numpy()
    batch = live.steps["batch_tokens"].to_numpy()
    busy = busy_seconds(live)
    beyond = np.where(prefill > 0, prefill > _LARGER * prefill_tokens, batch > _LARGER * batch_tokens)
    return float(busy[beyond].sum() / busy.sum())


def _largest(traces: Iterable[Trace]) -> tuple[float, float]:
    """Most tokens of a decode round and of a prefill."""
    steps = pd.concat([trace.steps[["num_prefill_tokens", "batch_tokens"]] for trace in traces])
    prefill = steps["num_prefill_tokens"]
    return float(steps["batch_tokens"].where(prefill == 0, 0).max()), float(prefill.max())
