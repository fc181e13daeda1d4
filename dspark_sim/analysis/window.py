"""Which part of a run is measured: all of it, or the part between filling up and running empty.

A run starts with an empty server and ends when the last requests leave it. `Window` is a span of the run's clock. What
falls in it: requests that *arrive* in it (with their whole latency, also where they finish later: leaving those out
would leave out the slow ones); tokens, rounds and iterations whose end lies in it. Throughput is tokens in the window
over its length.

The whole run is the window from first arrival to last finish. `steady` begins where the mean of the later part has
the smallest standard error (MSER, White 1997, "An effective truncation heuristic for bias reduction in simulation
output"), judged by the number of requests in the server, and ends with the last arrival, after which no new request
keeps the batch filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dspark_sim.analysis.metrics import finished
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace

_POINTS = 500


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to `end`, seconds on the run's clock."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise UserError(f"the window is from {self.start} to {self.end} seconds; its end must be after its start")

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start

    def holds(self, instants: pd.Series[Any]) -> pd.Series[Any]:
        """Whether each instant lies in it, both ends included."""
        return (instants >= self.start) & (instants <= self.end)


def whole(trace: Trace) -> Window:
    """First arrival to last finish.

    Raises
    ------
    UserError
        If the trace has no finished request.
    """
    requests = finished(trace)
    if requests.empty:
        raise UserError("the trace has no finished request to measure; record or simulate at least one")
    return Window(float(requests["arrival"].min()), float(requests["finish"].max()))


def trimmed(trace: Trace, warmup_seconds: float = 0.0, drain_seconds: float = 0.0) -> Window:
    """The whole run less so many seconds at its start and at its end.

    Raises
    ------
    UserError
        If a length is negative or nothing is left.
    """
    if not (warmup_seconds >= 0 and drain_seconds >= 0):
        raise UserError(f"warm-up {warmup_seconds} and drain {drain_seconds} seconds must be 0 or more")
    run = whole(trace)
    if warmup_seconds + drain_seconds >= run.seconds:
        raise UserError(
            f"the run lasts {run.seconds:.6g} seconds and warm-up and drain take {warmup_seconds + drain_seconds:.6g}; "
            "trim less, or make a longer run"
        )
    return Window(run.start + warmup_seconds, run.end - drain_seconds)


def steady(trace: Trace) -> Window:
    """From the end of the initial transient (MSER) to the last arrival.

    Raises
    ------
    UserError
        If all requests arrived before the transient ended, as when they were sent at once.
    """
    run = whole(trace)
    requests = finished(trace)
    end = float(requests["arrival"].max())
    grid = np.linspace(run.start, max(end, run.start), _POINTS)
    arrivals, leaves = (np.sort(requests[name].to_numpy()) for name in ("arrival", "finish"))
    present = np.searchsorted(arrivals, grid, side="right") - np.searchsorted(leaves, grid, side="right")
    start = float(grid[mser(present.astype(np.float64))])
    if not start < end:
        raise UserError("no request arrived after the run's warm-up; make a longer run, or measure the whole run")
    return Window(start, end)


def mser(series: np.ndarray[Any, np.dtype[np.float64]]) -> int:
    """How many leading values of an evenly spaced series to leave out, at most half of them.

    The number d that minimises the variance of the values from d on over their number: the standard error of the
    mean of what is left.
    """
    remaining = np.arange(series.size, 0, -1, dtype=np.float64)
    centred = series - series.mean()
    total, squares = np.cumsum(centred[::-1])[::-1], np.cumsum(centred[::-1] ** 2)[::-1]
    error = (squares / remaining - (total / remaining) ** 2) / remaining
    # Rounding can make a constant tail slightly negative.
    return int(np.argmin(np.maximum(error, 0.0)[: max(series.size // 2, 1)]))
