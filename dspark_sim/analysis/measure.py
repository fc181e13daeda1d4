"""All metrics of one run or of several replications, as one tidy table with intervals.

Where the intervals come from, said in the column ``method``:

* several traces: *t over replications*. Each statistic is taken in every trace; its mean is the estimate and the
  interval is Student's t over the traces. Replications must differ in their seeds alone.
* one trace, requests, tokens and rounds: *bootstrap over prompts* (see `stats`): prompts are drawn with replacement,
  with all that belongs to them.
* one trace, states of the server and rates: *batch means*. Time is cut into equal spans and the interval is Student's t
  over them, as a ratio estimate (Law, "Simulation Modeling and Analysis"). Percentiles of states have no interval then.

Requests of one run share a server, so one trace's intervals are too narrow where queues are long; replications are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student

from dspark_sim.analysis.samples import FloatArray, Measurable, Observations, Rate, Sample, Share, State
from dspark_sim.analysis.slo import Objectives
from dspark_sim.analysis.stats import Bootstrap
from dspark_sim.analysis.window import Window, whole
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace

PERCENTILES = (50, 90, 95, 99)
STATISTICS = ("mean", *(f"p{percent}" for percent in PERCENTILES))
COLUMNS = (
    *("metric", "domain", "unit", "per", "num", *STATISTICS, "low", "high"),
    *chain.from_iterable((f"p{percent}_low", f"p{percent}_high") for percent in PERCENTILES),
    "method",
)
_MOST_DRAWS = 2e7  # Values looked at by one bootstrap; more observations get fewer resamples, at least 50.
_FEWEST = 50


def measure(
    traces: Trace | Sequence[Trace],
    *,
    objectives: Objectives | None = None,
    window: Window | Callable[[Trace], Window] = whole,
    by_domain: bool = False,
    bootstrap: Bootstrap | None = None,
    num_batches: int = 20,
) -> pd.DataFrame:
    """Every metric with its distribution and interval.

    Parameters
    ----------
    traces
        One run, or replications that differ in their seeds.
    objectives
        Adds ``goodput``, ``slo_attainment`` and one ``slo_attainment_`` per limit, for all requests and by domain.
    window
        What part of each run counts: `window.whole`, `window.steady`, a function of the trace or a fixed window.
    by_domain
        Add rows of every domain for all metrics of requests, tokens and rounds.
    bootstrap
        How to resample prompts; its level is that of all intervals.
    num_batches
        Spans of time of the batch means, at least 2.

    Returns
    -------
    DataFrame
        A row per metric and domain (``"all"`` or a name), with columns `COLUMNS`: ``metric, domain, unit``; ``per``,
        what one observation is; ``num`` of them; ``mean, p50, p90, p95, p99``; ``low, high``, the interval of the
        mean; the intervals of the percentiles; ``method``. Seconds and tokens; undefined numbers are NaN.

    Raises
    ------
    UserError
        If there is no trace, a trace has no finished request in its window, or a domain with an objective is not there.
    """
    runs = [traces] if isinstance(traces, Trace) else list(traces)
    if not runs:
        raise UserError("zero traces to measure; give at least one")
    if num_batches < 2:
        raise UserError(f"num_batches is {num_batches}; give at least 2")
    bootstrap = bootstrap or Bootstrap()
    estimator = _Estimator(bootstrap, num_batches, intervals=len(runs) == 1)
    frames = []
    for run in runs:
        span = window if isinstance(window, Window) else window(run)
        observations = Observations.of(run, span, objectives)
        frames.append(estimator.table(observations, by_domain))
    if len(frames) == 1:
        return frames[0]
    return _over_replications(frames, bootstrap.level)


@dataclass(frozen=True)
class _Estimator:
    bootstrap: Bootstrap
    num_batches: int
    intervals: bool

    def table(self, observations: Observations, by_domain: bool) -> pd.DataFrame:
        rows = [self._row(what, "all", observations.window) for what in observations]
        for domain in observations.domains():
            part = observations.only(domain)
            rows += [
                self._row(what, domain, part.window)
                for what in part
                if by_domain or "slo" in what.metric or what.metric == "goodput"
            ]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _row(self, what: Measurable, domain: str, window: Window) -> dict[str, Any]:
        row = {**dict.fromkeys(COLUMNS, np.nan), "metric": what.metric, "domain": domain, "unit": what.unit}
        match what:
            case Sample():
                row |= {"per": what.per, "num": what.values.size, "method": "bootstrap over prompts"}
                return row | self._sample(what)
            case Share():
                row |= {"per": what.per, "num": what.numerator.size, "method": "bootstrap over prompts"}
                return row | self._share(what)
            case State():
                row |= {"per": what.per, "num": what.values.size, "method": "batch means"}
                return row | self._state(what, window)
            case Rate():
                row |= {"per": "run", "num": what.counts.size, "method": "batch means"}
                return row | self._rate(what, window)

    def _sample(self, what: Sample) -> dict[str, float]:
        values = what.values
        if not values.size:
            return {}
        row = {"mean": float(values.mean())}
        row |= {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
        return row | (self._resampled(values, what.prompts) if self.intervals else {})

    def _resampled(self, values: FloatArray, prompts: npt.NDArray[Any]) -> dict[str, float]:
        codes, names = pd.factorize(prompts)
        if len(names) < 2:
            return {}
        draws = replace(self.bootstrap, num_resamples=self._num_resamples(values.size)).weights(len(names))
        order = np.argsort(values, kind="stable")
        values, codes = values[order], codes[order]
        sums = np.bincount(codes, values, len(names)), np.bincount(codes, minlength=len(names))
        row = self._interval("", draws @ sums[0] / (draws @ sums[1]))
        found = np.empty((len(draws), len(PERCENTILES)))
        for number, draw in enumerate(draws):
            cumulated = np.cumsum(draw[codes])
            wanted = np.array(PERCENTILES) / 100.0 * cumulated[-1]
            found[number] = values[np.minimum(np.searchsorted(cumulated, wanted), values.size - 1)]
        for percent, column in zip(PERCENTILES, found.T, strict=True):
            row |= self._interval(f"p{percent}_", column)
        return row

    def _share(self, what: Share) -> dict[str, float]:
        total = float(what.denominator.sum())
        if not total:
            return {}
        row = {"mean": float(what.numerator.sum()) / total}
        codes, names = pd.factorize(what.prompts)
        if not self.intervals or len(names) < 2:
            return row
        draws = replace(self.bootstrap, num_resamples=self._num_resamples(len(names))).weights(len(names))
        sums = [np.bincount(codes, part, len(names)) for part in (what.numerator, what.denominator)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return row | self._interval("", draws @ sums[0] / (draws @ sums[1]))

    def _state(self, what: State, window: Window) -> dict[str, float]:
        values, seconds = what.values, what.seconds
        if not seconds.sum() > 0:
            return {}
        order = np.argsort(values, kind="stable")
        cumulated = np.cumsum(seconds[order])
        row = {"mean": float(np.average(values, weights=seconds))}
        for percent in PERCENTILES:
            place = np.searchsorted(cumulated, percent / 100.0 * cumulated[-1])
            row[f"p{percent}"] = float(values[order][min(place, values.size - 1)])
        return row | self._batch_means(what.instants, values * seconds, seconds, window)

    def _rate(self, what: Rate, window: Window) -> dict[str, float]:
        row = {"mean": float(what.counts.sum()) / window.seconds}
        return row | self._batch_means(what.instants, what.counts, None, window)

    def _batch_means(
        self, instants: FloatArray, amounts: FloatArray, weights: FloatArray | None, window: Window
    ) -> dict[str, float]:
        """Interval of Σ amounts / Σ weights; without weights, of amounts per second of the window."""
        if not self.intervals or not instants.size:
            return {}
        count = self.num_batches
        edges = np.linspace(window.start, window.end, count + 1)
        batch = np.clip(np.searchsorted(edges, instants, side="right") - 1, 0, count - 1)
        above = np.bincount(batch, amounts, count)
        below = np.full(count, window.seconds / count)
        if weights is not None:
            below = np.bincount(batch, weights, count)
        ratio = above.sum() / below.sum()
        # Ratio estimate: what each batch adds to the error, in units of the mean weight.
        errors = (above - ratio * below) / below.mean()
        half = _half_width(errors, self.bootstrap.level)
        # All of these are counts over counts or seconds: none is negative.
        return {"low": float(np.maximum(ratio - half, 0.0)), "high": float(ratio + half)}

    def _interval(self, prefix: str, resampled: FloatArray) -> dict[str, float]:
        interval = self.bootstrap.interval(np.nan, resampled)
        return {f"{prefix}low": interval.low, f"{prefix}high": interval.high}

    def _num_resamples(self, size: int) -> int:
        return int(min(self.bootstrap.num_resamples, max(_FEWEST, _MOST_DRAWS // max(size, 1))))


def _half_width(values: FloatArray, level: float) -> float:
    """Half the width of Student's interval of the mean of values; NaN for fewer than two."""
    if values.size < 2:
        return float("nan")
    return float(student.ppf(0.5 + level / 2.0, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))


def _over_replications(frames: Sequence[pd.DataFrame], level: float) -> pd.DataFrame:
    every = pd.concat(frames, ignore_index=True)
    rows = []
    for (metric, domain), part in every.groupby(["metric", "domain"], sort=False):
        first = part.iloc[0]
        row = {**dict.fromkeys(COLUMNS, np.nan), "metric": metric, "domain": domain, "unit": first["unit"]}
        row |= {"per": first["per"], "num": int(part["num"].sum()), "method": f"t over {len(frames)} replications"}
        for statistic in STATISTICS:
            known = part[statistic].dropna().to_numpy(dtype=np.float64)
            if not known.size:
                continue
            prefix = "" if statistic == "mean" else f"{statistic}_"
            half = _half_width(known, level)
            row |= {statistic: known.mean(), f"{prefix}low": known.mean() - half, f"{prefix}high": known.mean() + half}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))
