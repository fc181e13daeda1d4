"""How far forecasts can be believed: ECE, Brier score and AUC at each slot of a block, with intervals over prompts.

The forecasts are survivals, the events "all drafts up to this slot were accepted", and blocks of one prompt are
alike, so a resample draws prompts. ECE is a sum of absolute values: on few blocks even exact probabilities have one
above zero, and resampling adds to it, so that its interval may lie above the estimate. ``ece_floor`` is what exact
probabilities would show on as many independent blocks; blocks of one prompt are not independent, and the true floor is
higher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.analysis.stats import Bootstrap, Interval
from dspark_sim.errors import UserError
from dspark_sim.training.calibration import (
    NUM_BINS,
    BoolArray,
    FloatArray,
    Outcomes,
    bins,
    expected_calibration_error,
    require_judged,
)

METRICS = ("ece", "brier", "auc")


def brier_score(forecast: FloatArray, happened: BoolArray) -> float:
    """Mean squared difference of forecasts [n] and events [n]; not a number without forecasts."""
    return float(np.mean((forecast - happened) ** 2)) if forecast.size else float("nan")


def ranking_auc(forecast: FloatArray, happened: BoolArray) -> float:
    """Probability that a case [n] where the event happened has the larger forecast, ties counted half.

    Not a number if the event happened always or never.
    """
    wins, pairs = _comparisons(forecast, happened, np.zeros(forecast.size, dtype=np.int64), 1)
    return float(wins.sum() / pairs.sum()) if pairs.sum() else float("nan")


def calibration_floor(forecast: FloatArray, num_bins: int = NUM_BINS) -> float:
    """Expected ECE of exact probabilities [n] of independent events, in the normal approximation.

    In a bin the sum of forecast less event has variance v = Σ p (1 - p), and its absolute value mean √(2 v / π).
    """
    if not forecast.size:
        return float("nan")
    variance = np.bincount(bins(forecast, num_bins), weights=forecast * (1.0 - forecast), minlength=num_bins)
    return float(np.sqrt(2.0 * variance / np.pi).sum() / forecast.size)


def reliability(forecast: FloatArray, happened: BoolArray, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Reliability diagram of forecasts [n] of events [n].

    Returns
    -------
    DataFrame
        One row per bin that has forecasts: ``bin_low, bin_high, num_blocks, forecast, frequency`` (means in the bin).
    """
    index = bins(forecast, num_bins)
    counts = np.bincount(index, minlength=num_bins)
    used = np.flatnonzero(counts)
    frame = pd.DataFrame({"bin_low": used / num_bins, "bin_high": (used + 1) / num_bins, "num_blocks": counts[used]})
    for name, values in (("forecast", forecast), ("frequency", happened.astype(np.float64))):
        frame[name] = np.bincount(index, weights=values, minlength=num_bins)[used] / counts[used]
    return frame


@dataclass(frozen=True)
class Scores:
    """Scores of several forecasts of the same blocks.

    Parameters
    ----------
    table
        One row per forecast and slot, and one with position ``mean`` over slots: ``method, position`` (from 1),
        ``num_blocks, survival`` (observed), ``forecast`` (mean), ``ece, brier, auc`` with ``_low`` and ``_high``, and
        ``ece_floor``.
    resampled
        Of each method and metric, values of the mean over slots in each resample, [num_resamples].
    bootstrap
        How was resampled.
    """

    table: pd.DataFrame
    resampled: dict[tuple[str, str], FloatArray]
    bootstrap: Bootstrap

    def mean(self, method: str, metric: str = "ece") -> Interval:
        """A metric's mean over slots, with its interval."""
        row = self.table[(self.table["method"] == method) & (self.table["position"] == "mean")].iloc[0]
        return Interval(float(row[metric]), float(row[f"{metric}_low"]), float(row[f"{metric}_high"]))

    def difference(self, method: str, other: str, metric: str = "ece") -> Interval:
        """Mean over slots of one method less that of the other, paired by resample."""
        estimate = self.mean(method, metric).estimate - self.mean(other, metric).estimate
        return self.bootstrap.interval(estimate, self.resampled[method, metric] - self.resampled[other, metric])


def score(
    forecasts: Mapping[str, FloatArray],
    outcomes: Outcomes,
    *,
    num_bins: int = NUM_BINS,
    bootstrap: Bootstrap | None = None,
) -> Scores:
    """Score forecasts of survival.

    Parameters
    ----------
    forecasts
        By method, [M, γ] each.
    outcomes
        The same M blocks, held out from whatever the forecasts were fitted to.
    num_bins
        Of the ECE.
    bootstrap
        How to resample prompts; with one prompt the intervals are not numbers.

    Raises
    ------
    UserError
        If a forecast has another shape, or no output reaches a slot.
    """
    bootstrap = bootstrap or Bootstrap()
    names, prompt = np.unique(outcomes.prompts.astype(str), return_inverse=True)
    weights = bootstrap.weights(len(names))
    rows, resampled = [], {}
    for method, forecast in forecasts.items():
        if forecast.shape != outcomes.confidence.shape:
            raise UserError(
                f"forecast {method} has the shape {forecast.shape} and the blocks {outcomes.confidence.shape}; give "
                "one number for each slot"
            )
        slots: list[dict[str, float]] = []
        draws: dict[str, list[FloatArray]] = {metric: [] for metric in METRICS}
        for slot in range(outcomes.block_size):
            judged = require_judged(outcomes, slot)
            p, happened = forecast[judged, slot], outcomes.survived[judged, slot]
            drawn = _resampled(p, happened, prompt[judged], weights, num_bins)
            estimates = {
                "ece": expected_calibration_error(p, happened, num_bins),
                "brier": brier_score(p, happened),
                "auc": ranking_auc(p, happened),
            }
            about = {"num_blocks": float(p.size), "survival": float(happened.mean()), "forecast": float(p.mean())}
            slots.append({**about, **estimates, "ece_floor": calibration_floor(p, num_bins)})
            for metric in METRICS:
                draws[metric].append(drawn[metric])
            rows.append(_row(method, str(slot + 1), slots[-1], drawn, bootstrap, len(names)))
        # Where a slot's AUC is not defined, the mean is over the others.
        means = {key: _nanmean(np.array([one[key] for one in slots])) for key in slots[0]}
        drawn = {metric: _nanmean(np.array(draws[metric])) for metric in METRICS}
        rows.append(_row(method, "mean", {k: float(v) for k, v in means.items()}, drawn, bootstrap, len(names)))
        resampled.update({(method, metric): drawn[metric] for metric in METRICS})
    table = pd.DataFrame(rows)
    return Scores(table.astype({"num_blocks": int}), resampled, bootstrap)


def _row(
    method: str,
    position: str,
    values: Mapping[str, float],
    drawn: Mapping[str, FloatArray],
    bootstrap: Bootstrap,
    num_prompts: int,
) -> dict[str, object]:
    row: dict[str, object] = {"method": method, "position": position, **values}
    for metric in METRICS:
        whole = bootstrap.interval(values[metric], drawn[metric] if num_prompts > 1 else np.empty(0))
        row |= {f"{metric}_low": whole.low, f"{metric}_high": whole.high}
    return row


def _resampled(
    forecast: FloatArray, happened: BoolArray, prompt: npt.NDArray[np.int64], weights: FloatArray, num_bins: int
) -> dict[str, FloatArray]:
    """The metrics in every resample, [num_resamples]: all are made of sums over prompts."""
    num_prompts = weights.shape[1]
    cell = prompt * num_bins + bins(forecast, num_bins)
    excess = np.bincount(cell, weights=forecast - happened, minlength=num_prompts * num_bins)
    count = weights @ np.bincount(prompt, minlength=num_prompts)
    squared = np.bincount(prompt, weights=(forecast - happened) ** 2, minlength=num_prompts)
    wins, pairs = _comparisons(forecast, happened, prompt, num_prompts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "ece": np.abs(weights @ excess.reshape(num_prompts, num_bins)).sum(axis=1) / count,
            "brier": (weights @ squared) / count,
            "auc": ((weights @ wins) * weights).sum(axis=1) / ((weights @ pairs) * weights).sum(axis=1),
        }


def _comparisons(
    forecast: FloatArray, happened: BoolArray, prompt: npt.NDArray[np.int64], num_prompts: int
) -> tuple[FloatArray, FloatArray]:
    """[P, P]: wins of forecasts of events in one prompt over those of non-events in another, and how many pairs."""
    wins = np.zeros((num_prompts, num_prompts))
    yes, owner = forecast[happened], prompt[happened]
    for other in range(num_prompts):
        no = np.sort(forecast[~happened & (prompt == other)])
        won = (np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")) / 2.0
        wins[:, other] = np.bincount(owner, weights=won, minlength=num_prompts)
    num_yes = np.bincount(owner, minlength=num_prompts).astype(np.float64)
    num_no = np.bincount(prompt[~happened], minlength=num_prompts).astype(np.float64)
    return wins, num_yes[:, None] * num_no


def _nanmean(values: FloatArray) -> FloatArray:
    """Mean over the first axis of what is a number."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0))
