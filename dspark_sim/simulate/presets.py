"""Synthetic laws of the paper's drafters: conditional acceptance of its Figure 2, confidences of its Figure 6.

Figure 2 gives conditional acceptance per position for Qwen3-4B by drafter and domain, over the rounds of live runs at
γ = 7 and T = 1. Figure 6 gives, for DSpark on Alpaca, the histogram of predicted survivals at positions 1, 3, 5 and 7
and how often they came true. From its raw (``before``) curves come the spread of acceptance within a domain, shared by
a block's positions and each position's own, and the confidences' scale and shift: four numbers for the four histograms
and the four reliability curves, by least squares (`fit_figure6`). `figure6_misfit` says how far off they are.

The paper does not say how much of the shared spread lies between requests. `DIFFICULTY_SD` is this project's own DSpark
drafter, fitted per domain on 48 recorded greedy outputs of the embedded model: 0.45 ± 0.17 (math), 0.67 ± 0.21 (chat),
1.15 ± 0.22 (code), weighted by precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import least_squares
from scipy.special import expit, ndtri
from scipy.stats import qmc

from dspark_sim.errors import UserError
from dspark_sim.reference import load
from dspark_sim.simulate.synthetic import ConfidenceLaw, FloatArray, SyntheticAcceptance

Calibration = Literal["before", "after"]
"""Confidences as the head gives them, or after sequential temperature scaling (taken as exact)."""

DIFFICULTY_SD = 0.7
WITH_CONFIDENCE = ("dspark",)
_POSITIONS = (1, 3, 5, 7)
_NUM_BINS = 20


@dataclass(frozen=True)
class Figure6:
    """What Figure 6 determines, on the logit scale.

    Parameters
    ----------
    shared_sd, position_sd
        Spread of acceptance that the positions of a block share, and that each has of its own.
    scale, shift
        Of the raw confidences.
    """

    shared_sd: float
    position_sd: float
    scale: float
    shift: float

    def law(self) -> SyntheticAcceptance:
        """The law of Figure 6's own data (Alpaca).

        Survival at positions 2, 4 and 6 is not published: the conditional acceptance of two positions is taken as
        equal.
        """
        figure = _figure6()
        steps = figure.survival / np.concatenate(([1.0], figure.survival[:-1]))
        conditional = [steps[0], *np.repeat(np.sqrt(steps[1:]), 2)]
        return SyntheticAcceptance(
            conditional_acceptance=tuple(float(value) for value in conditional),
            anchor_sd=self.shared_sd,
            position_sd=self.position_sd,
            averaged_over="rounds",
            confidence=ConfidenceLaw((self.scale,), (self.shift,)),
        )


FIGURE6 = Figure6(shared_sd=1.12, position_sd=0.98, scale=1.14, shift=0.21)
"""What `fit_figure6` finds, rounded to what its starting points agree in."""


def preset(
    target: str = "qwen3-4b",
    *,
    drafter: str,
    domain: str,
    calibration: Calibration = "after",
    difficulty_sd: float = DIFFICULTY_SD,
) -> SyntheticAcceptance:
    """The law of one of the paper's drafters.

    Parameters
    ----------
    target
        ``qwen3-4b``, the target of Figures 2 and 6.
    drafter
        ``dspark``, ``dflash`` or ``eagle3``; the last two have no confidences.
    domain
        ``math``, ``code`` or ``chat``.
    calibration
        Raw confidences as in Figure 6, over-confident, or calibrated ones as the paper's scheduler uses.
    difficulty_sd
        Spread of requests; the rest of Figure 6's shared spread is the anchors'.

    Raises
    ------
    UserError
        If the paper has no such drafter, or the spread is larger than what a block's positions share.
    """
    figure2 = load("fig2_conditional_acceptance")
    chosen = pd.Series(True, index=figure2.index)
    for column, value in (("target_model", target), ("drafter", drafter), ("domain", domain)):
        if value not in set(figure2[column]):
            raise UserError(
                f"Figure 2 has no {column} {value!r}; choose one of {', '.join(sorted(set(figure2[column])))}"
            )
        chosen &= figure2[column] == value
    if calibration not in ("before", "after"):
        raise UserError(f"calibration is {calibration!r}; give before or after")
    if not 0.0 <= difficulty_sd <= FIGURE6.shared_sd:
        raise UserError(
            f"difficulty_sd is {difficulty_sd} and the spread that Figure 6 leaves to requests and anchors is "
            f"{FIGURE6.shared_sd}; give 0 to that, or build a SyntheticAcceptance"
        )
    raw = ConfidenceLaw((FIGURE6.scale,), (FIGURE6.shift,))
    confidence = raw if calibration == "before" else ConfidenceLaw()
    conditional = figure2[chosen].sort_values("draft_position")["conditional_acceptance"]
    return SyntheticAcceptance(
        conditional_acceptance=tuple(conditional.tolist()),
        difficulty_sd=difficulty_sd,
        anchor_sd=float(np.sqrt(FIGURE6.shared_sd**2 - difficulty_sd**2)),
        position_sd=FIGURE6.position_sd,
        averaged_over="rounds",
        confidence=confidence if drafter in WITH_CONFIDENCE else None,
        domain=domain,
    )


def fit_figure6(start: Figure6 = FIGURE6) -> Figure6:
    """Least squares of the four numbers on Figure 6's raw histograms and reliability curves; takes seconds.

    Histograms jump where a forecast crosses the edge of a bin, so differences are taken over 2 % of a parameter; the
    shift, which may be 0, is counted from -1.
    """

    def figure6(x: FloatArray) -> Figure6:
        return Figure6(float(x[0]), float(x[1]), float(x[2]), float(x[3]) - 1.0)

    first = [start.shared_sd, start.position_sd, start.scale, start.shift + 1.0]
    bounds = ([0.0, 0.0, 0.1, 0.0], [5.0, 5.0, 5.0, 5.0])
    found = least_squares(lambda x: figure6_residuals(figure6(x)), first, bounds=bounds, diff_step=0.02, xtol=1e-5)
    return figure6(found.x)


def figure6_residuals(guess: Figure6) -> FloatArray:
    """What `fit_figure6` squares and adds: 20 bins at 4 positions, twice.

    First the histograms' cumulative differences, each bin alike; then the differences of observed acceptance, weighted
    by the published counts. A mean square of either counts once a position.
    """
    figure = _figure6()
    parts = [
        ((np.cumsum(view.fraction - fraction)) / np.sqrt(_NUM_BINS), np.sqrt(fraction) * (view.observed - observed))
        for view, fraction, observed in zip(_model(guess), figure.fraction, figure.observed, strict=True)
    ]
    return np.concatenate([residual for pair in parts for residual in pair])


def figure6_misfit(guess: Figure6 = FIGURE6) -> pd.DataFrame:
    """How far a law is from Figure 6's raw curves.

    Returns
    -------
    DataFrame
        A row per position: mean and standard deviation of the predicted survival, the calibration error (ECE) and the
        AUC, each published and of the law (``_law``); ``histogram_distance``, how far a prediction would have to move
        on average (Wasserstein, as a probability); and ``reliability_error``, the mean distance of the observed
        acceptances, weighted by the published counts.
        The published AUC is the printed one, its standard deviation is from bin means.
    """
    figure = _figure6()
    rows = []
    for k, view in enumerate(_model(guess)):
        fraction = figure.fraction[k]
        mean = float(fraction @ figure.predicted[k])
        rows.append(
            {
                "position": _POSITIONS[k],
                "mean": mean,
                "mean_law": view.mean,
                "sd": float(np.sqrt(fraction @ (figure.predicted[k] - mean) ** 2)),
                "sd_law": view.sd,
                "ece": float(fraction @ np.abs(figure.predicted[k] - figure.observed[k])),
                "ece_law": view.ece,
                "auc": float(figure.auc[k]),
                "auc_law": view.auc,
                "histogram_distance": float(np.abs(np.cumsum(view.fraction - fraction)).sum() / _NUM_BINS),
                "reliability_error": float(fraction @ np.abs(view.observed - figure.observed[k])),
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Figure:
    """The published raw curves, [4, 20] by position and bin, and [4]."""

    fraction: FloatArray
    predicted: FloatArray
    observed: FloatArray
    survival: FloatArray
    auc: FloatArray


@dataclass(frozen=True)
class _View:
    """The same of a law at one position: [20], and numbers."""

    fraction: FloatArray
    observed: FloatArray
    mean: float
    sd: float
    ece: float
    auc: float


@cache
def _figure6() -> _Figure:
    histogram, curve, summary = (
        load(f"fig6_{name}") for name in ("confidence_histogram", "reliability_curve", "calibration_summary")
    )

    def rows(frame: pd.DataFrame, column: str) -> FloatArray:
        return np.stack([frame.loc[frame["draft_position"] == k, column].to_numpy() for k in _POSITIONS])

    curve, summary = curve[curve["calibration"] == "before"], summary[summary["calibration"] == "before"]
    return _Figure(
        rows(histogram, "sample_fraction"),
        rows(curve, "predicted_acceptance_bin_mean"),
        rows(curve, "observed_acceptance"),
        rows(summary, "observed_acceptance_overall")[:, 0],
        rows(summary, "auc_printed")[:, 0],
    )


@cache
def _normals() -> FloatArray:
    """Quasi-random standard normals for the blocks of Figure 6, [16384, 8]: the shared effect, and each position's."""
    return np.asarray(ndtri(qmc.Sobol(8, seed=6).random(2**14)))


def _model(guess: Figure6) -> list[_View]:
    normals = _normals()
    x = guess.law().logits + guess.shared_sd * normals[:, :1] + guess.position_sd * normals[:, 1:]
    survival = np.cumprod(expit(x), axis=1)
    forecast = np.cumprod(expit(guess.scale * x + guess.shift), axis=1)
    return [_view(forecast[:, k - 1], survival[:, k - 1]) for k in _POSITIONS]


def _view(forecast: FloatArray, survival: FloatArray) -> _View:
    index: npt.NDArray[np.int64] = np.minimum((forecast * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    count = np.bincount(index, minlength=_NUM_BINS)
    reached = np.bincount(index, weights=survival, minlength=_NUM_BINS)
    middles = (np.arange(_NUM_BINS) + 0.5) / _NUM_BINS
    gap = np.bincount(index, weights=forecast - survival, minlength=_NUM_BINS)
    # Pairs in which the event has the larger forecast, each block counted by how likely the event was.
    order = np.argsort(forecast)
    happens, fails = survival[order], 1.0 - survival[order]
    wins = float(happens @ (np.cumsum(fails) - 0.5 * fails))
    return _View(
        fraction=count / forecast.size,
        observed=np.where(count > 0, reached / np.maximum(count, 1), middles),
        mean=float(forecast.mean()),
        sd=float(forecast.std()),
        ece=float(np.abs(gap).sum() / forecast.size),
        auc=wins / float(happens.sum() * fails.sum()),
    )
