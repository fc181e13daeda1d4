"""A synthetic law of acceptance: given conditional acceptance per position, some requests and anchors harder.

A draft at position k of a block is accepted, given that all before it were, with probability

    p_k = σ(θ_k + b + e + u_k),    b ~ N(0, difficulty_sd²),  e ~ N(0, anchor_sd²),  u_k ~ N(0, position_sd²)

where b is drawn once a request, e once an anchor (a block) and u_k once a drafted token; σ is the logistic function.
Given b, the anchors of a request are independent. The confidence is an affine view of the same logit with noise,

    logit c_k = scale_k · logit p_k + shift_k + noise_sd_k · ε_k,    ε_k ~ N(0, 1),

so it is calibrated (P(accepted | c) = c) at scale 1, shift 0 and no noise, over-confident above.

**Selection.** What is measured as conditional acceptance at position k is a mean over the anchors that got there, and
those are the easy ones: mean p_k is below it. The logits θ are therefore solved for, so that the population's
E[p_1 … p_k] / E[p_1 … p_{k-1}] are the given figures. A live run that verifies whole blocks selects once more: a hard
request needs more rounds for the same output and weighs more. `averaged_over` says which of the two was measured.

Lengths and counts are in tokens; survival is P(drafts 1 … k accepted).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import expit

from dspark_sim.errors import UserError
from dspark_sim.loop import Mode

FloatArray = npt.NDArray[np.float64]
Averaged = Literal["anchors", "rounds"]
"""Over all anchors of all outputs alike, or over the rounds of a run that verifies whole blocks."""

_MAX_LOGIT = 60.0


@dataclass(frozen=True)
class ConfidenceLaw:
    """How confidences follow from true acceptance: ``logit c = scale · logit p + shift + noise_sd · ε``.

    Parameters
    ----------
    scale, shift, noise_sd
        One number for all positions of a block, or one for each.

    Raises
    ------
    UserError
        If a number is not finite, or a noise is negative.
    """

    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    noise_sd: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        for name in ("scale", "shift", "noise_sd"):
            values = getattr(self, name)
            if not values or not np.isfinite(values).all():
                raise UserError(f"{name} is {values}; give one finite number, or one for each position of a block")
        if min(self.noise_sd) < 0:
            raise UserError(f"noise_sd is {min(self.noise_sd)}; a standard deviation is at least 0")

    def per_position(self, block_size: int) -> FloatArray:
        """Scale, shift and noise of every position, [3, γ].

        Raises
        ------
        UserError
            If there is neither one number nor γ.
        """
        rows = []
        for name in ("scale", "shift", "noise_sd"):
            values = getattr(self, name)
            if len(values) not in (1, block_size):
                raise UserError(f"{name} has {len(values)} numbers and the block {block_size} positions; give 1 or all")
            rows.append(np.broadcast_to(np.asarray(values, dtype=np.float64), (block_size,)))
        return np.stack(rows)


@dataclass(frozen=True)
class SyntheticAcceptance:
    """The law, with its closed forms.

    Parameters
    ----------
    conditional_acceptance
        [γ], P(draft k accepted | all before it accepted) in the population, each strictly between 0 and 1.
    difficulty_sd, anchor_sd, position_sd
        Spread of requests, of the anchors of a request, and of the positions of a block, on the logit scale. Two
        positions of a block are correlated by anchor_sd² / (anchor_sd² + position_sd²) within a request.
    averaged_over
        What the given conditional acceptance was measured on.
    confidence
        How the drafter's confidences follow; ``None`` for a drafter without.
    mode
        Acceptance mode that the run claims; policies that would bias it are refused as in a live run.
    domain
        Label of the requests.

    Raises
    ------
    UserError
        If a probability or a spread is out of range.
    """

    conditional_acceptance: tuple[float, ...]
    difficulty_sd: float = 0.0
    anchor_sd: float = 0.0
    position_sd: float = 0.0
    averaged_over: Averaged = "anchors"
    confidence: ConfidenceLaw | None = ConfidenceLaw()
    mode: Mode = "rejection"
    domain: str = "synthetic"

    def __post_init__(self) -> None:
        if not self.conditional_acceptance:
            raise UserError("conditional_acceptance is empty; give one probability for each position of a block")
        for position, value in enumerate(self.conditional_acceptance, 1):
            if not 0.0 < value < 1.0:
                raise UserError(
                    f"conditional_acceptance at position {position} is {value}; give a number strictly between 0 and 1"
                )
        for name in ("difficulty_sd", "anchor_sd", "position_sd"):
            if not 0.0 <= getattr(self, name) <= 10.0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 to 10 (a spread on the logit scale)")
        if self.averaged_over not in get_args(Averaged):
            raise UserError(f"averaged_over is {self.averaged_over!r}; give one of {', '.join(get_args(Averaged))}")
        if self.confidence is not None:
            self.confidence.per_position(self.block_size)

    @property
    def block_size(self) -> int:
        """Most tokens per block (γ)."""
        return len(self.conditional_acceptance)

    @cached_property
    def difficulty_nodes(self) -> tuple[FloatArray, FloatArray]:
        """Values of a request's effect and their weights, for integrals over requests."""
        return _normal_nodes(self.difficulty_sd)

    @cached_property
    def _smoothed(self) -> _SmoothedLogistic:
        return _SmoothedLogistic(self.position_sd)

    @cached_property
    def logits(self) -> FloatArray:
        """θ, [γ]: the logits under which the population's conditional acceptance is the given one.

        Raises
        ------
        UserError
            If the weights of a law averaged over rounds do not settle.
        """
        effects, weights = self.difficulty_nodes
        if self.averaged_over == "anchors":
            return self._matched(weights)
        shares = weights
        for _ in range(200):
            theta = self._matched(shares)
            rounds = weights / (1.0 + self._survival(theta, effects).sum(axis=1))
            new = rounds / rounds.sum()
            if np.abs(new - shares).max() < 1e-13:
                return theta
            shares = new
        raise UserError(
            f"no law with difficulty_sd {self.difficulty_sd} has this conditional acceptance over rounds; "
            "lower difficulty_sd, or give it over anchors"
        )

    def _matched(self, shares: FloatArray) -> FloatArray:
        """θ by which survivors of each position go on as given, when requests weigh `shares`."""
        effects, _ = self.difficulty_nodes
        anchors, anchor_weights = _normal_nodes(self.anchor_sd)
        x = effects[:, None] + anchors
        survivors = shares[:, None] * anchor_weights
        theta = np.empty(self.block_size)
        for k, target in enumerate(self.conditional_acceptance):
            total = survivors.sum()

            def excess(
                shift: float, survivors: FloatArray = survivors, total: float = total, target: float = target
            ) -> float:
                return float((survivors * self._smoothed(x + shift)).sum() / total - target)

            theta[k] = brentq(excess, -_MAX_LOGIT, _MAX_LOGIT, xtol=1e-13, rtol=1e-14)
            survivors = survivors * self._smoothed(x + theta[k])
        return theta

    def _survival(self, theta: FloatArray, effects: FloatArray) -> FloatArray:
        """Survival of requests with given effects [n] under logits θ, [n, γ]."""
        anchors, weights = _normal_nodes(self.anchor_sd)
        x = effects[:, None, None] + anchors[:, None] + theta
        return np.asarray(np.einsum("nak,a->nk", np.cumprod(self._smoothed(x), axis=2), weights))

    def survival(self, effects: npt.ArrayLike) -> FloatArray:
        """P(drafts 1 … k accepted) at an anchor of a request with effect b; [n] -> [n, γ]."""
        return self._survival(self.logits, np.atleast_1d(np.asarray(effects, dtype=np.float64)))

    def mean_survival(self, over: Averaged = "anchors") -> FloatArray:
        """P(drafts 1 … k accepted) in the population, [γ]."""
        effects, weights = self.difficulty_nodes
        survival = self.survival(effects)
        if over == "rounds":
            weights = weights / (1.0 + survival.sum(axis=1))
        return np.asarray(weights @ survival / weights.sum())

    def conditional(self, over: Averaged = "anchors") -> FloatArray:
        """P(draft k accepted | all before it accepted) in the population, [γ]."""
        survival = self.mean_survival(over)
        return np.asarray(survival / np.concatenate(([1.0], survival[:-1])))

    def mean_acceptance_length(self, verify_len: int | None = None, over: Averaged = "rounds") -> float:
        """Tokens per round at a fixed `verify_len` (bonus included; ``None`` for γ), far from an output's end.

        Over ``rounds`` it is Σ emitted / Σ rounds of equally long outputs, the harmonic mean over requests; over
        ``anchors`` the arithmetic one.
        """
        width = self._width(verify_len)
        effects, weights = self.difficulty_nodes
        lengths = 1.0 + self.survival(effects)[:, :width].sum(axis=1)
        return float(weights @ lengths) if over == "anchors" else float(1.0 / (weights @ (1.0 / lengths)))

    def expected_rounds(self, output_len: int, verify_len: int | None = None) -> float:
        """Mean number of decode rounds of a request with `output_len` tokens at a fixed `verify_len`, exactly.

        The first token comes from the prefill; near the end drafts are cut to the remaining length - 1.

        Raises
        ------
        UserError
            If `output_len` is below 1 or `verify_len` not within 0 to γ.
        """
        if output_len < 1:
            raise UserError(f"output_len is {output_len}; an output has at least 1 token")
        width = self._width(verify_len)
        effects, weights = self.difficulty_nodes
        survival = np.concatenate((np.ones((effects.size, 1)), self.survival(effects)), axis=1)
        rounds = np.zeros((output_len, effects.size))
        for remaining in range(1, output_len):
            cap = min(width, remaining - 1)
            rounds[remaining] = 1.0 + survival[:, cap] * rounds[remaining - cap - 1]
            for accepted in range(cap):
                stopped = survival[:, accepted] - survival[:, accepted + 1]
                rounds[remaining] += stopped * rounds[remaining - accepted - 1]
        return float(weights @ rounds[-1])

    def _width(self, verify_len: int | None) -> int:
        if verify_len is None:
            return self.block_size
        if not 0 <= verify_len <= self.block_size:
            raise UserError(f"verify_len is {verify_len} and the law has {self.block_size} positions; give 0 to those")
        return verify_len

    def to_json(self) -> dict[str, Any]:
        """All parameters, JSON types only."""
        values = asdict(self)
        values["conditional_acceptance"] = list(self.conditional_acceptance)
        if self.confidence is not None:
            values["confidence"] = {name: list(numbers) for name, numbers in values["confidence"].items()}
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> SyntheticAcceptance:
        """The law that `to_json` wrote.

        Raises
        ------
        UserError
            If a name is unknown or missing, or a value impossible.
        """
        try:
            known = dict(values)
            if known.get("confidence") is not None:
                known["confidence"] = ConfidenceLaw(**{k: tuple(v) for k, v in known["confidence"].items()})
            known["conditional_acceptance"] = tuple(known["conditional_acceptance"])
            return SyntheticAcceptance(**known)
        except (KeyError, TypeError) as error:
            raise UserError(f"this is no synthetic law ({error}); give what `to_json` wrote") from error


class _SmoothedLogistic:
    """x -> E σ(x + u), u ~ N(0, sd²): the acceptance of a position when its own effect is averaged out."""

    def __init__(self, sd: float) -> None:
        self._spline: CubicSpline | None = None
        if sd > 0:
            nodes, weights = _normal_nodes(sd, 161)
            # Its logit is all but straight, so that a spline of it is exact to 1e-9.
            knots = np.linspace(-2 * _MAX_LOGIT, 2 * _MAX_LOGIT, 4801)
            right = expit(np.abs(knots)[:, None] + nodes) @ weights
            left = expit(-np.abs(knots)[:, None] + nodes) @ weights
            self._spline = CubicSpline(knots, np.sign(knots) * (np.log(right) - np.log(left)))

    def __call__(self, x: FloatArray) -> FloatArray:
        return np.asarray(expit(x if self._spline is None else self._spline(x)))


def _normal_nodes(sd: float, num_nodes: int = 81) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights of the trapezoid rule for N(0, sd²), exponentially exact for smooth functions."""
    if sd == 0:
        return np.zeros(1), np.ones(1)
    nodes = np.linspace(-7.0, 7.0, num_nodes)
    weights = np.exp(-0.5 * nodes**2)
    return sd * nodes, weights / weights.sum()
