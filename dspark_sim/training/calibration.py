"""Sequential temperature scaling (STS): make the product of confidences a probability one can count on.

A drafter's confidence c_k estimates P(accept draft k | all before it accepted), so the product of c_1 .. c_k, the
survival, estimates P(the first k drafts are accepted), and that is what policies weigh against cost. STS replaces c_k
by σ(logit(c_k) / T_k): above 1 a temperature draws estimates to one half, below 1 it drives them apart, and their
order at one slot stays. Temperatures are found from the first slot to the last, each by a search of a grid for the
least expected calibration error of the survival up to its slot, with those before it frozen (DSpark paper,
section 3.2.1).

Expected calibration error (ECE): cut [0, 1] into equal bins by the forecast; the mean over forecasts of the distance
between a bin's mean forecast and the frequency of the event in it. All are fractions, not percents.

A slot behind the end of an output was never judged, whatever happened before it, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from dspark_sim.anchor_arrays import integers, lengths, padded, request_rows, room
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NUM_BINS = 20
"""As in the paper's Figure 6."""
GRID = tuple(10.0 ** (step / 60) for step in range(-60, 61))
"""Temperatures tried: 0.1 to 10 in steps of 4 %, 1 among them."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How sure a drafter was of its blocks, and what became of them.

    Parameters
    ----------
    confidence
        [M, γ] estimated conditional acceptance; not a number where nothing was drafted.
    num_accepted
        [M] leading drafts that were accepted.
    judged
        [M, γ] whether the slot has a draft and lies inside the output.
    prompts
        [M] the prompt of each block.
    """

    confidence: FloatArray
    num_accepted: npt.NDArray[np.int64]
    judged: BoolArray
    prompts: npt.NDArray[np.object_]

    @property
    def block_size(self) -> int:
        """γ."""
        return self.confidence.shape[1]

    @property
    def survived(self) -> BoolArray:
        """[M, γ] whether all drafts up to the slot were accepted."""
        return self.num_accepted[:, None] > np.arange(self.block_size)

    def of(self, prompts: npt.ArrayLike) -> Outcomes:
        """Those of some prompts."""
        chosen = np.isin(self.prompts, np.asarray(prompts, dtype=object))
        return Outcomes(self.confidence[chosen], self.num_accepted[chosen], self.judged[chosen], self.prompts[chosen])

    @staticmethod
    def of_trace(trace: Trace) -> Outcomes:
        """From a recording's dense anchors.

        Raises
        ------
        UserError
            If it has no anchors or no confidences, or these were at temperatures already.
        """
        anchors = trace.tables["anchors"]
        if anchors.num_rows == 0:
            raise UserError("the trace has no anchors, to which temperatures are fitted; record it with --anchors")
        if anchors["confidence"].null_count:
            raise UserError(
                f"drafter {trace.config.get('drafter')} of the trace has no confidences, to which temperatures are "
                "fitted; record one with a confidence head, or with --confidence top1"
            )
        if (trace.config.get("confidence") or {}).get("temperatures"):
            raise UserError(
                "the confidences of the trace are at temperatures already; record it again with --temperatures none"
            )
        lens = lengths(anchors, "confidence")
        confidence = padded(anchors, "confidence", int(lens.max(initial=0)), np.nan)
        drafted = np.arange(confidence.shape[1]) < lens[:, None]
        strange = confidence[drafted & ~((confidence >= 0) & (confidence <= 1))]
        if strange.size:
            raise UserError(f"the trace has a confidence of {strange[0]:.3g}, which is no probability; record it again")
        judged = drafted & (np.arange(drafted.shape[1]) < room(trace)[:, None])
        prompts = trace.tables["requests"]["prompt_id"].to_numpy()[request_rows(trace)]
        return Outcomes(confidence, integers(anchors, "num_accepted"), judged, prompts.astype(object))


def calibrated(confidence: npt.ArrayLike, temperatures: npt.ArrayLike) -> FloatArray:
    """σ(logit(c) / T): what `Confidence.calibrate` makes of the same estimates.

    Parameters
    ----------
    confidence
        [M, γ].
    temperatures
        [γ].

    Raises
    ------
    UserError
        If there is not one positive temperature for each slot.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    temperatures = np.asarray(temperatures, dtype=np.float64)
    if temperatures.shape != confidence.shape[-1:]:
        raise UserError(f"{temperatures.size} temperatures for {confidence.shape[-1]} slots; give one for each slot")
    if not ((temperatures > 0) & np.isfinite(temperatures)).all():
        raise UserError(f"temperatures are {temperatures.tolist()}; give positive numbers")
    scaled: FloatArray = expit(logit(confidence) / temperatures)
    return scaled


def survival(confidence: FloatArray) -> FloatArray:
    """Products of confidences up to each slot, [M, γ]."""
    return np.cumprod(confidence, axis=-1, dtype=np.float64)


def expected_calibration_error(forecast: FloatArray, happened: BoolArray, num_bins: int = NUM_BINS) -> float:
    """ECE of forecasts [n] of events [n] in equal bins; not a number without forecasts."""
    if not forecast.size:
        return float("nan")
    excess = np.bincount(bins(forecast, num_bins), weights=forecast - happened, minlength=num_bins)
    return float(np.abs(excess).sum() / forecast.size)


def bins(forecast: FloatArray, num_bins: int) -> npt.NDArray[np.int64]:
    """The bin of each forecast; the last one holds 1."""
    return np.minimum((forecast * num_bins).astype(np.int64), num_bins - 1)


def fit_temperatures(outcomes: Outcomes, *, num_bins: int = NUM_BINS, grid: Sequence[float] = GRID) -> FloatArray:
    """Fit one temperature for each slot, [γ].

    Of temperatures with the same error the one nearest to 1 is taken.

    Parameters
    ----------
    outcomes
        To fit to.
    num_bins
        Of the ECE.
    grid
        Temperatures to try.

    Raises
    ------
    UserError
        If no output reaches a slot.
    """
    if num_bins < 1:
        raise UserError(f"num_bins is {num_bins}; give at least 1")
    if not grid or min(grid) <= 0:
        raise UserError(f"grid is {grid}; give positive temperatures")
    survived = outcomes.survived
    tried = sorted(grid, key=lambda temperature: abs(np.log(temperature)))
    before = np.ones(len(outcomes.confidence))
    fitted = np.ones(outcomes.block_size)
    for slot in range(outcomes.block_size):
        judged = require_judged(outcomes, slot)
        score = logit(outcomes.confidence[:, slot])
        errors = [
            expected_calibration_error((before * expit(score / temperature))[judged], survived[judged, slot], num_bins)
            for temperature in tried
        ]
        fitted[slot] = tried[int(np.argmin(errors))]
        before = before * expit(score / fitted[slot])
    return fitted


def fit_constants(outcomes: Outcomes) -> FloatArray:
    """The baseline: frequency of survival up to each slot, [γ], the same forecast for every block.

    Raises
    ------
    UserError
        If no output reaches a slot.
    """
    survived = outcomes.survived
    return np.array(
        [survived[require_judged(outcomes, slot), slot].mean() for slot in range(outcomes.block_size)], dtype=np.float64
    )


def require_judged(outcomes: Outcomes, slot: int) -> BoolArray:
    """[M] the blocks whose draft at `slot` was judged.

    Raises
    ------
    UserError
        If there is none.
    """
    judged = outcomes.judged[:, slot]
    if not judged.any():
        raise UserError(f"no output is long enough to judge draft {slot + 1} of a block; record with more --max-tokens")
    return judged


def halves(outcomes: Outcomes, domains: dict[str, str] | None = None, seed: int = 0) -> tuple[Outcomes, Outcomes]:
    """Split by prompt into one half to fit and one to judge: every second of a shuffle, within each domain.

    Parameters
    ----------
    outcomes
        Of two prompts or more.
    domains
        The domain of each prompt; ``None`` takes them for one.
    seed
        Of the shuffle.

    Raises
    ------
    UserError
        If there are fewer than two prompts.
    """
    prompts = sorted(set(outcomes.prompts.tolist()))
    if len(prompts) < 2:
        raise UserError(
            f"{len(prompts)} prompt cannot be both fitted and judged; record two prompts or more"
            if prompts
            else "zero prompts to fit to; record two or more"
        )
    shuffled = np.random.default_rng(np.random.SeedSequence([seed, 0x575])).permutation(np.array(prompts, dtype=object))
    ordered = sorted(shuffled.tolist(), key=lambda prompt: (domains or {}).get(prompt, ""))
    return outcomes.of(ordered[::2]), outcomes.of(ordered[1::2])
