"""Intervals and paired differences by bootstrap over prompts.

Rounds of one prompt are alike, so a round is no independent observation; a prompt is. Every statistic here is a
ratio of sums, Σ numerator / Σ denominator (acceptance length, mean speed, throughput); a resample draws prompts with
replacement and takes all of their requests. Intervals are percentile intervals. The same seed draws the same
prompts, so two policies that ran on the same prompts are compared pair by pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.errors import UserError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the two ends of its interval; the ends are NaN with fewer than two prompts."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How to resample.

    Parameters
    ----------
    num_resamples
        Draws of the whole prompt set.
    level
        Coverage of the interval, between 0 and 1.
    seed
        Keys the draws.
    """

    num_resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 1:
            raise UserError(f"num_resamples is {self.num_resamples}; give at least 1")
        if not 0 < self.level < 1:
            raise UserError(f"level is {self.level}; give a coverage between 0 and 1")

    def weights(self, num_prompts: int) -> FloatArray:
        """How often each resample holds each prompt, [num_resamples, num_prompts]."""
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, 0xB007]))
        uniform = np.full(num_prompts, 1.0 / num_prompts)
        return generator.multinomial(num_prompts, uniform, size=self.num_resamples).astype(np.float64)

    def interval(self, estimate: float, resampled: FloatArray) -> Interval:
        """The percentile interval of resampled values; a value that is not a number is left out."""
        finite = resampled[np.isfinite(resampled)]
        if finite.size == 0:
            return Interval(estimate, np.nan, np.nan)
        tail = 50.0 * (1.0 - self.level)
        low, high = np.percentile(finite, [tail, 100.0 - tail])
        return Interval(estimate, float(low), float(high))


def ratio_interval(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, prompts: npt.ArrayLike, bootstrap: Bootstrap | None = None
) -> Interval:
    """Interval of Σ numerator / Σ denominator.

    Parameters
    ----------
    numerator, denominator
        [n], one entry per request (or round).
    prompts
        [n], the prompt of each entry.
    bootstrap
        How to resample.

    Raises
    ------
    UserError
        If there is no entry.
    """
    bootstrap = bootstrap or Bootstrap()
    sums = _prompt_sums(numerator, denominator, prompts)
    estimate = _ratio(sums.to_numpy().sum(axis=0))
    if len(sums) < 2:
        return Interval(float(estimate), np.nan, np.nan)
    return bootstrap.interval(float(estimate), _ratio(bootstrap.weights(len(sums)) @ sums.to_numpy()))


def paired_difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    numerator: str,
    denominator: str,
    *,
    relative: bool = False,
    bootstrap: Bootstrap | None = None,
) -> Interval:
    """Interval of the second ratio less the first, on the same resampled prompts.

    Parameters
    ----------
    first, second
        Frames with ``prompt_id`` and the two columns, one row per request.
    numerator, denominator
        Columns whose sums make the ratio.
    relative
        Divide the difference by the first ratio.
    bootstrap
        How to resample.

    Raises
    ------
    UserError
        If the frames do not hold the same prompts.
    """
    bootstrap = bootstrap or Bootstrap()
    a = _prompt_sums(first[numerator], first[denominator], first["prompt_id"])
    b = _prompt_sums(second[numerator], second[denominator], second["prompt_id"])
    if not a.index.equals(b.index):
        strange = sorted(set(a.index) ^ set(b.index))
        raise UserError(f"only one of the two runs has prompt {strange[0]}; a paired difference needs the same prompts")

    def difference(left: FloatArray, right: FloatArray) -> FloatArray:
        base = _ratio(left)
        return (_ratio(right) - base) / (base if relative else 1.0)

    estimate = float(difference(a.to_numpy().sum(axis=0), b.to_numpy().sum(axis=0)))
    if len(a) < 2:
        return Interval(estimate, np.nan, np.nan)
    weights = bootstrap.weights(len(a))
    return bootstrap.interval(estimate, difference(weights @ a.to_numpy(), weights @ b.to_numpy()))


def run_intervals(requests: pd.DataFrame, bootstrap: Bootstrap | None = None) -> pd.DataFrame:
    """Intervals of a run's main metrics.

    Throughput is tokens over makespan, which is no sum over requests. It is also mean concurrency times output
    tokens over summed latency (Little's law); the interval holds the run's mean concurrency fixed.

    Parameters
    ----------
    requests
        The frame of `metrics.per_request`.
    bootstrap
        How to resample.

    Returns
    -------
    DataFrame
        Indexed by ``output_throughput, user_tokens_per_second, mean_acceptance_length, verification_budget`` with
        columns ``estimate, low, high``.
    """
    latency = requests["e2e_latency"]
    makespan = float((requests["arrival"] + latency).max() - requests["arrival"].min())
    concurrency = float(latency.sum()) / makespan
    speed = requests["user_tokens_per_second"]
    pairs = {
        "output_throughput": (requests["output_len"] * concurrency, latency),
        "user_tokens_per_second": (speed.fillna(0.0), speed.notna()),
        "mean_acceptance_length": (requests["num_accepted"] + requests["rounds"], requests["rounds"]),
        "verification_budget": (requests["num_verified"] + requests["rounds"], requests["rounds"]),
    }
    rows = {
        name: ratio_interval(numerator, denominator, requests["prompt_id"], bootstrap)
        for name, (numerator, denominator) in pairs.items()
    }
    return pd.DataFrame(
        [(row.estimate, row.low, row.high) for row in rows.values()],
        index=pd.Index(rows, name="metric"),
        columns=["estimate", "low", "high"],
    )


def _prompt_sums(numerator: npt.ArrayLike, denominator: npt.ArrayLike, prompts: npt.ArrayLike) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "numerator": np.asarray(numerator, dtype=np.float64),
            "denominator": np.asarray(denominator, dtype=np.float64),
        }
    )
    if frame.empty:
        raise UserError("zero requests to resample; measure at least one")
    return frame.groupby(np.asarray(prompts)).sum()


def _ratio(sums: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])
