"""How far a prediction of Figures 7 and 8 is from the published DSpark curves.

A curve is a frame with ``concurrency_requests``, ``throughput_tok_s_gpu`` and ``verification_budget_tokens``, simulated
at some concurrencies. Between them the seconds per token of a user (concurrency over throughput) and the budget are
taken as linear in concurrency.

The gains of Figure 7 are ratios of DSpark to MTP-1, so both are read off curves of the same origin: the predicted
DSpark and the MTP-1 that it was predicted from. That is Figure 8's, and Figure 7's MTP-1 line of V4-Pro differs from it
by up to 22 %; ``from_figure8_pct`` therefore also gives what the published DSpark curve of Figure 8 says by the same
reckoning.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student

from dspark_sim import reference
from dspark_sim.production_inputs import BaselineFigure, published_baseline

FloatArray = npt.NDArray[np.float64]
GainKind = Literal["throughput_at_matched_tps", "tps_at_matched_throughput"]

_FINE = np.arange(1.0, 350.01, 0.05)


def published_throughput(target_model: str) -> pd.DataFrame:
    """Figure 8's DSpark throughput, from 1 request to where the visible axis ends."""
    return _visible("fig8_throughput", target_model)


def published_budget(target_model: str) -> pd.DataFrame:
    """Figure 8's DSpark budget, over the range in which it is drawn on the visible axis."""
    return _visible("fig8_verification_budget", target_model)


def throughput_at(curve: pd.DataFrame, concurrency: npt.ArrayLike) -> FloatArray:
    """Throughput of a curve at any concurrency within its own."""
    known = curve["concurrency_requests"].to_numpy(dtype=np.float64)
    seconds = known / curve["throughput_tok_s_gpu"].to_numpy(dtype=np.float64)
    x = np.asarray(concurrency, dtype=np.float64)
    return np.asarray(x / np.interp(x, known, seconds))


def budget_at(curve: pd.DataFrame, concurrency: npt.ArrayLike) -> FloatArray:
    """Budget of a curve at any concurrency within its own."""
    return np.asarray(
        np.interp(np.asarray(concurrency), curve["concurrency_requests"], curve["verification_budget_tokens"])
    )


def curve_errors(curve: pd.DataFrame, target_model: str) -> dict[str, float]:
    """Errors of a predicted DSpark curve, each the mean over the whole numbers of requests that Figure 8 shows.

    Returns
    -------
    dict
        ``throughput_mean_abs_error, throughput_mean_error`` (fractions of the published), ``budget_mean_abs_error,
        budget_mean_error`` (tokens). Positive means predicted too high.
    """
    throughput, budget = published_throughput(target_model), published_budget(target_model)
    relative = throughput_at(curve, throughput["concurrency_requests"]) / throughput["throughput_tok_s_gpu"] - 1.0
    tokens = budget_at(curve, budget["concurrency_requests"]) - budget["verification_budget_tokens"]
    return {
        "throughput_mean_abs_error": float(relative.abs().mean()),
        "throughput_mean_error": float(relative.mean()),
        "budget_mean_abs_error": float(tokens.abs().mean()),
        "budget_mean_error": float(tokens.mean()),
    }


def gains(curve: pd.DataFrame, target_model: str, figure: BaselineFigure = "figure8") -> pd.DataFrame:
    """The four annotated gains of a target, predicted and published.

    Parameters
    ----------
    curve
        A predicted DSpark curve.
    target_model
        Which one it is of.
    figure
        Whose MTP-1 line it was predicted from and is divided by.

    Returns
    -------
    DataFrame
        In the order of Figure 7: ``gain_kind, sla_anchor_tps_tok_s_user, predicted_pct, published_pct, error_points,
        from_figure8_pct``. At matched throughput, that of the annotation's MTP-1 point is matched; at matched speed,
        its speed.
    """
    baseline = published_baseline(target_model, figure)
    mtp = pd.DataFrame({"concurrency_requests": baseline.concurrency, "throughput_tok_s_gpu": baseline.throughput})
    rows = []
    for _, label in reference.curve("fig7_annotations", target_model=target_model).iterrows():
        at = (label["gain_kind"], label["mtp_tps_tok_s_user"], label["mtp_throughput_tok_s_gpu"])
        predicted, published = _gain(curve, mtp, *at), float(label["gain_pct_printed"])
        rows.append(
            {
                "gain_kind": label["gain_kind"],
                "sla_anchor_tps_tok_s_user": label["sla_anchor_tps_tok_s_user"],
                "predicted_pct": predicted,
                "published_pct": published,
                "error_points": predicted - published,
                "from_figure8_pct": _gain(published_throughput(target_model), mtp, *at),
            }
        )
    return pd.DataFrame(rows)


def result_row(curve: pd.DataFrame, target_model: str) -> dict[str, Any]:
    """A target's errors and its gains per user, JSON types only.

    Returns
    -------
    dict
        ``target_model, throughput_mean_abs_error`` (fraction), ``budget_mean_abs_error`` (tokens),
        ``gain_errors_points``: predicted less published percentage of the gains per user at matched throughput, in the
        order of Figure 7, and beside them the predicted and the published ones.
    """
    errors, found = curve_errors(curve, target_model), gains(curve, target_model)
    per_user = found[found["gain_kind"] == "tps_at_matched_throughput"]
    return {
        "target_model": target_model,
        "throughput_mean_abs_error": errors["throughput_mean_abs_error"],
        "budget_mean_abs_error": errors["budget_mean_abs_error"],
        "gain_errors_points": per_user["error_points"].tolist(),
        "gains_predicted_pct": per_user["predicted_pct"].tolist(),
        "gains_published_pct": per_user["published_pct"].tolist(),
    }


def _visible(name: str, target_model: str) -> pd.DataFrame:
    rows = reference.curve(name, target_model=target_model, drafter="dspark-5")
    shown = (rows["within_plotted_axis"] == 1) & (rows["concurrency_requests"] >= 1.0)
    return rows[shown].drop(columns="within_plotted_axis").reset_index(drop=True)


def _gain(dspark: pd.DataFrame, mtp: pd.DataFrame, kind: GainKind, tps: float, throughput: float) -> float:
    """DSpark over MTP-1 in percent, at the same speed per user or the same throughput; NaN beyond the curves."""
    ends = []
    for curve in (dspark, mtp):
        known = curve["concurrency_requests"]
        fine = _FINE[(known.min() <= _FINE) & (known.max() >= _FINE)]
        rate = throughput_at(curve, fine)
        speed = rate / fine
        if kind == "throughput_at_matched_tps":
            # Speed falls with concurrency.
            ends.append(float(np.interp(tps, speed[::-1], rate[::-1], left=np.nan, right=np.nan)))
        else:
            ends.append(float(np.interp(throughput, rate, speed, left=np.nan, right=np.nan)))
    return 100.0 * (ends[0] / ends[1] - 1.0)


def over_seeds(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Means over runs that differ by their seed alone, with 95 % intervals.

    Parameters
    ----------
    frames
        Of `production.predict`, at least one.

    Returns
    -------
    DataFrame
        The same rows; beside ``throughput_tok_s_gpu`` and the other numbers ``_low`` and ``_high``, the ends of
        Student's interval of the mean (NaN for one seed).
    """
    labels = ["target_model", "served", "concurrency_requests"]
    groups = pd.concat(frames, ignore_index=True).groupby(labels, sort=False)
    names = [str(name) for name in frames[0] if name not in labels]
    found = {name: mean_intervals(groups[name], len(frames)) for name in names}
    whole = pd.DataFrame({name: ends["mean"] for name, ends in found.items()})
    ends = {f"{name}_{end}": found[name][end] for name in names for end in ("low", "high")}
    return whole.assign(**ends).reset_index()


def mean_intervals(groups: Any, num: int) -> pd.DataFrame:
    """Mean of each group of `num` values, and ``low`` and ``high``, the ends of Student's 95 % interval of it."""
    mean = groups.mean()
    half = groups.sem() * (float(student.ppf(0.975, num - 1)) if num > 1 else np.nan)
    return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half})


def lines(table: pd.DataFrame, target_model: str, served: str = "lagged-2") -> pd.DataFrame:
    """The rows of one target and policy; by default of what production runs."""
    return table[(table["target_model"] == target_model) & (table["served"] == served)].reset_index(drop=True)
