"""Laws of a pause: positive numbers of mean 1 with a given spread, drawn independently.

An arrival law scales them by a rate, a user's think time by its mean. Nothing is rounded or clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import gammaln

from dspark_sim.errors import UserError

FloatArray = npt.NDArray[np.float64]
_MOST_CV = 100.0
_LEAST_CV = 0.01


@dataclass(frozen=True)
class ConstantGaps:
    """Every gap is 1."""

    def draw(self, rng: np.random.Generator, num: int) -> FloatArray:
        """Gaps [num]; nothing is drawn."""
        return np.ones(num)


@dataclass(frozen=True)
class ExponentialGaps:
    """Exponential gaps: coefficient of variation 1, no memory."""

    def draw(self, rng: np.random.Generator, num: int) -> FloatArray:
        """Gaps [num] of mean 1."""
        return rng.standard_exponential(num)


@dataclass(frozen=True)
class GammaGaps:
    """Gamma gaps: bursts above cv 1, more even than Poisson below.

    Parameters
    ----------
    cv
        Standard deviation over mean of a gap. vLLM's `burstiness` is ``1 / cv**2``.
    """

    cv: float

    def __post_init__(self) -> None:
        _check_cv(self.cv)

    def draw(self, rng: np.random.Generator, num: int) -> FloatArray:
        """Gaps [num] of mean 1; from cv 4 on many are so short that two arrivals get the same time."""
        return rng.standard_gamma(self.cv**-2, num) * self.cv**2


@dataclass(frozen=True)
class WeibullGaps:
    """Weibull gaps, by shape or by coefficient of variation.

    Parameters
    ----------
    shape
        Below 1 bursty (the tail is heavier than exponential), 1 exponential, above 1 more even.
    cv
        Standard deviation over mean instead.
    """

    shape: float | None = None
    cv: float | None = None

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.cv is None):
            raise UserError(f"Weibull gaps have shape {self.shape} and cv {self.cv}; give one of the two")
        if self.cv is not None:
            _check_cv(self.cv)
        if self.shape is not None and not 0.1 <= self.shape <= 1000:
            raise UserError(f"shape is {self.shape}; give a number between 0.1 and 1000")

    def draw(self, rng: np.random.Generator, num: int) -> FloatArray:
        """Gaps [num] of mean 1."""
        shape = _weibull_shape(self.cv) if self.shape is None and self.cv is not None else self.shape
        assert shape is not None
        return rng.weibull(shape, num) / math.gamma(1 + 1 / shape)


Gaps = ConstantGaps | ExponentialGaps | GammaGaps | WeibullGaps


def _weibull_shape(cv: float) -> float:
    """The shape k with 1 + cv² = Γ(1 + 2/k) / Γ(1 + 1/k)²."""
    wanted = math.log1p(cv * cv)
    return float(brentq(lambda k: gammaln(1 + 2 / k) - 2 * gammaln(1 + 1 / k) - wanted, 0.1, 1000.0))


def _check_cv(cv: float) -> None:
    if not _LEAST_CV <= cv <= _MOST_CV:
        raise UserError(f"cv is {cv}; give a number between {_LEAST_CV} and {_MOST_CV:g}, or the deterministic law")
