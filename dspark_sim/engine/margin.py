"""Confidence from the gap between a drafter's two largest logits, for drafters without a confidence head.

The model is P(accept k | all before k accepted) = σ(intercept + slope · margin), margin the largest logit of slot k
less the second largest. Its two numbers are fitted by maximum likelihood to the slots of dense anchors that met an
output token with everything before them accepted: those up to the first rejected one, inside the recorded output.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import rankdata

from dspark_sim.anchor_arrays import integers, lengths, padded, room
from dspark_sim.engine.drafters.choose import Confidence
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import write_json
from dspark_sim.trace import Trace

MARGIN = Confidence("margin", 0.0, 1.0)
"""Records σ(margin), from which `fit_margin` reads margins back."""

_REMEDY = "record them with an engine loaded with Confidence('margin', 0.0, 1.0), as `dspark-sim fit-margin` does"
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MarginScores:
    """How good the estimates are, on outputs that they were not fitted to.

    Parameters
    ----------
    num_observations, acceptance
        Slots, and the fraction of them that was accepted.
    brier, brier_constant
        Mean squared error of the estimates, and of the other outputs' mean acceptance in their place.
    auc
        Probability that an accepted draft has a larger margin than a rejected one.
    """

    num_observations: int
    acceptance: float
    brier: float
    brier_constant: float
    auc: float


@dataclass(frozen=True, slots=True)
class _Slots:
    """Observed slots: margins, whether each was accepted, and whose they are, [N] each."""

    margin: FloatArray
    accepted: npt.NDArray[np.bool_]
    request_id: npt.NDArray[np.int64]

    def of(self, chosen: npt.NDArray[np.bool_]) -> _Slots:
        return _Slots(self.margin[chosen], self.accepted[chosen], self.request_id[chosen])


def fit_margin(trace: Trace) -> Confidence:
    """Fit the two numbers to a recording.

    Parameters
    ----------
    trace
        With dense anchors recorded under `MARGIN`, in any acceptance mode.

    Raises
    ------
    UserError
        If there are no such anchors, or they do not determine the numbers.
    """
    return _fit(_observed(trace))


def score_margin(trace: Trace) -> MarginScores:
    """Fit on every second output and judge on the others, and the other way round; arguments as for `fit_margin`.

    Raises
    ------
    UserError
        As `fit_margin`, for either half, and if there is one output only.
    """
    slots = _observed(trace)
    requests, index = np.unique(slots.request_id, return_inverse=True)
    if len(requests) < 2:
        raise UserError("one output cannot be both fitted and judged; record two prompts or more")
    estimate, constant = np.empty((2, len(index)))
    for half in (0, 1):
        judged = index % 2 == half
        rest = slots.of(~judged)
        fitted = _fit(rest)
        estimate[judged] = expit(fitted.intercept + fitted.slope * slots.margin[judged])
        constant[judged] = rest.accepted.mean()
    num_accepted = int(slots.accepted.sum())
    num_pairs = num_accepted * (len(index) - num_accepted)
    ranks = rankdata(slots.margin)[slots.accepted].sum()
    return MarginScores(
        num_observations=len(index),
        acceptance=float(slots.accepted.mean()),
        brier=float(np.mean((estimate - slots.accepted) ** 2)),
        brier_constant=float(np.mean((constant - slots.accepted) ** 2)),
        auc=float(ranks - num_accepted * (num_accepted + 1) / 2) / num_pairs,
    )


def write_margin(confidence: Confidence, path: Path | str, **notes: str) -> None:
    """Write ``{"intercept": ..., "slope": ..., **notes}`` as JSON.

    Parameters
    ----------
    confidence
        Of kind ``margin``.
    path
        The file; its folder is made.
    notes
        Such as ``target`` and ``drafter``, whose names `read_margin` checks.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    write_json(path, {"intercept": confidence.intercept, "slope": confidence.slope, **notes})


def read_margin(path: Path | str, *, drafter: str | None = None) -> Confidence:
    """Read the two numbers.

    Parameters
    ----------
    path
        A file by `write_margin`.
    drafter
        Name or folder of the drafter they are for; ``None`` does not check.

    Raises
    ------
    UserError
        If there is no such file, it is something else, or it was fitted to another drafter.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no margin file at {path}; make one with `dspark-sim fit-margin`")
    with explain_os_errors(path, "read"):
        text = path.read_bytes()
    try:
        document = json.loads(text)
        intercept, slope = float(document["intercept"]), float(document["slope"])
        if not (isfinite(intercept) and isfinite(slope)):
            raise ValueError("a number is not finite")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a margin file ({type(error).__name__}: {error}); make one with `dspark-sim fit-margin`"
        ) from error
    fitted_to = document.get("drafter")
    if drafter is not None and fitted_to not in (None, Path(drafter).name):
        raise UserError(
            f"{path} was fitted to drafter {fitted_to} and this one is {Path(drafter).name}; make its own with "
            f"`dspark-sim fit-margin --drafter {drafter}`"
        )
    return Confidence("margin", intercept, slope)


def _observed(trace: Trace) -> _Slots:
    anchors = trace.tables["anchors"]
    if anchors.num_rows == 0:
        raise UserError(f"the trace has no anchors, to which margins are fitted; {_REMEDY}")
    if anchors["confidence"].null_count:
        raise UserError(f"the trace's anchors have no confidences, from which margins are read; {_REMEDY}")
    lens = lengths(anchors, "confidence")
    values = padded(anchors, "confidence", int(lens.max(initial=0)), np.nan)
    drafted = np.arange(values.shape[1]) < lens[:, None]
    # σ of a difference that is not negative.
    if not (values[drafted] >= 0.5).all():
        least = values[drafted].min()
        raise UserError(f"the trace's anchors have a confidence of {least:.3g}, which is no margin's; {_REMEDY}")
    num_accepted = integers(anchors, "num_accepted")
    behind = np.minimum(room(trace), num_accepted + 1)
    row, slot = np.nonzero(drafted & (np.arange(values.shape[1]) < behind[:, None]))
    # Large margins round to 1 in float32.
    margin = logit(np.minimum(values[row, slot], 1.0 - 2.0**-25))
    return _Slots(margin, slot < num_accepted[row], integers(anchors, "request_id")[row])


def _fit(slots: _Slots) -> Confidence:
    margin, accepted = slots.margin, slots.accepted
    if accepted.all() or not accepted.any():
        what = "all {} drafts were" if accepted.any() else "none of {} drafts was"
        raise UserError(f"{what.format(len(accepted))} accepted, so no law can be fitted; record more prompts")
    if np.ptp(margin) == 0.0:
        raise UserError(f"every margin is {margin[0]:.3g}, so no law can be fitted; record more, or another drafter")
    yes, no = margin[accepted], margin[~accepted]
    if yes.min() >= no.max() or no.min() >= yes.max():
        raise UserError(
            f"one margin parts the accepted from the rejected of {len(accepted)} drafts, and a law fitted to them "
            "would be infinitely steep; record more prompts"
        )
    centre, spread = margin.mean(), margin.std()
    scaled = np.column_stack((np.ones(len(margin)), (margin - centre) / spread))

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        score = scaled @ weights
        gradient = scaled.T @ (expit(score) - accepted) / len(score)
        return float(np.mean(np.logaddexp(0.0, score) - accepted * score)), gradient

    intercept, slope = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return Confidence("margin", float(intercept - slope * centre / spread), float(slope / spread))
