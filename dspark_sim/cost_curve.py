"""A cost curve: seconds as a piecewise-linear function of one size, plus non-negative linear terms.

It does not fall, except that small sizes may have a level of their own: matrix kernels handle a few rows in groups,
and a CPU may take longer for 3 tokens than for 4 or 8. Where CUDA graphs are captured, a batch is padded to the next
captured size and the curve is a staircase up to the largest of them. Values between probes are interpolated **in
seconds**; interpolating rates instead underestimates the time between probes and over-admits.

A simulator asks for one number at a time, a policy for a run of neighbouring sizes. Both are read from a table over
the integers, which holds the very numbers that the array path gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from dspark_sim.errors import UserError

FloatArray = npt.NDArray[np.float64]
_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
_ENOUGH = 4
# Linear terms are added in this order by every path, so that all give the same bits.
_FEATURES = ("context_tokens", "num_requests", "draft_len", "draft_tokens")


class IntegerTable:
    """Values of a function at 0, 1, 2, …, computed a block at a time as they are asked for.

    Parameters
    ----------
    function
        From an array of sizes to an array of values, entry by entry.
    """

    _FIRST, _LARGEST = 1024, 1 << 17

    def __init__(self, function: Callable[[FloatArray], FloatArray]) -> None:
        self._function = function
        self.array = function(np.arange(self._FIRST, dtype=np.float64))
        self.values: list[float] = self.array.tolist()

    def at(self, size: float) -> float:
        """The value at `size`, which need not be whole or small."""
        if size != int(size) or not 0 <= size < self._LARGEST:
            return float(self._function(np.asarray(size, dtype=np.float64)))
        self._grow(int(size))
        return self.values[int(size)]

    def run(self, low: int, high: int) -> FloatArray:
        """Values at low, low + 1, …, high: a view, not to be written to."""
        if high >= self._LARGEST:
            return self._function(np.arange(low, high + 1, dtype=np.float64))
        self._grow(high)
        return self.array[low : high + 1]

    def _grow(self, size: int) -> None:
        if size >= len(self.values):
            num_values = 1 << size.bit_length()
            self.array = self._function(np.arange(num_values, dtype=np.float64))
            self.values = self.array.tolist()


@dataclass(frozen=True)
class Curve:
    """Seconds as ``interpolate(size) + Σ coefficient · feature``.

    Parameters
    ----------
    knots, levels
        Sizes, rising, and the seconds at each. Above the last knot the last segment continues if it rises; below
        the first the first level holds.
    linear
        Pairs (feature name, seconds per unit).
    captured
        Sizes of captured CUDA graphs, rising: up to the last of them a size counts as the next captured one.

    Raises
    ------
    UserError
        If knots and levels do not match, or knots or captured sizes do not rise.
    """

    knots: tuple[float, ...] = (1.0,)
    levels: tuple[float, ...] = (0.0,)
    linear: tuple[tuple[str, float], ...] = ()
    captured: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.levels):
            raise UserError(
                f"a cost curve has {len(self.knots)} sizes and {len(self.levels)} levels; give one level for each of "
                "one or more sizes"
            )
        for name, sizes in (("sizes", self.knots), ("captured sizes", self.captured)):
            if any(high <= low for low, high in pairwise(sizes)):
                raise UserError(f"a cost curve has {name} {list(sizes)}; give them in rising order, each once")

    def level(self, size: npt.ArrayLike) -> FloatArray:
        """Seconds by size alone, without the linear terms."""
        x = round_up(np.asarray(size, dtype=np.float64), self.captured)
        total = np.interp(x, self.knots, self.levels)
        if len(self.knots) > 1:
            slope = (self.levels[-1] - self.levels[-2]) / (self.knots[-1] - self.knots[-2])
            total = total + max(slope, 0.0) * np.maximum(x - self.knots[-1], 0.0)
        return np.asarray(total)

    def seconds(self, size: npt.ArrayLike, **features: npt.ArrayLike) -> FloatArray:
        """Evaluate at `size`; features may be scalars or arrays of the same shape."""
        shift: float | FloatArray = 0.0
        for name, coefficient in self._ordered:
            shift = shift + coefficient * np.asarray(features[name], dtype=np.float64)
        return np.asarray(self.level(size) + shift)

    def scalar(self, size: int, context_tokens: int, num_requests: int, draft_len: int, extra: float = 0.0) -> float:
        """The same for one size, `extra` seconds added, in under a microsecond."""
        values = self._table.values
        level = values[size] if type(size) is int and 0 <= size < len(values) else self._table.at(size)
        by_context, by_requests, by_draft_len, by_draft_tokens = self._coefficients
        return level + (
            by_context * context_tokens
            + by_requests * num_requests
            + by_draft_len * draft_len
            + by_draft_tokens * (num_requests * draft_len)
            + extra
        )

    def run(self, low: int, high: int, context_tokens: int, num_requests: int, extra: float = 0.0) -> FloatArray:
        """Seconds at sizes low, low + 1, …, high, `extra` added: one addition to a slice of a table."""
        by_context, by_requests, _, _ = self._coefficients
        return self._table.run(low, high) + (by_context * context_tokens + by_requests * num_requests + extra)

    @cached_property
    def _table(self) -> IntegerTable:
        return IntegerTable(self.level)

    @cached_property
    def _coefficients(self) -> tuple[float, ...]:
        given = dict(self.linear)
        return tuple(given.get(name, 0.0) for name in _FEATURES)

    @cached_property
    def _ordered(self) -> tuple[tuple[str, float], ...]:
        given = dict(self.linear)
        known = tuple((name, given[name]) for name in _FEATURES if name in given)
        return known + tuple(pair for pair in self.linear if pair[0] not in _FEATURES)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to other processes without the tables, which are soon made again.
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @staticmethod
    def fit(
        size: FloatArray,
        seconds: FloatArray,
        staircase: int = 0,
        captured: tuple[float, ...] = (),
        **features: FloatArray,
    ) -> Curve:
        """Non-negative least squares on relative error.

        Parameters
        ----------
        size, seconds
            [n], the size of each observation and its time.
        staircase
            Every size up to this one that was seen a few times is a knot with a free level; the curve rises from the
            last of them on.
        captured
            Sizes of captured CUDA graphs; each that was seen a few times has a free level too.
        features
            [n] each, further non-negative terms.

        Raises
        ------
        UserError
            If there is no observation.
        """
        if size.size == 0:
            raise UserError("no step to fit a cost curve from; profile at least one step of every kind")
        size = round_up(size, captured)
        if captured:
            staircase = max(staircase, int(captured[-1]))
        # One knot per step of the ladder, at the largest size seen there: every level has data, so none is free.
        sizes, counts = np.unique(size, return_counts=True)
        rungs = np.searchsorted(_LADDER, sizes)
        free = sizes[(sizes <= staircase) & (counts >= _ENOUGH)]
        ladder = sizes[np.append(rungs[1:] > rungs[:-1], True)]
        free = np.union1d(free, sizes[:1])
        knots = np.union1d(free, ladder[ladder > free[-1]])
        num_free = len(free)
        steps = [np.interp(size, knots[:num_free], level) for level in np.eye(num_free)]
        ramps = [np.clip((size - low) / (high - low), 0.0, 1.0) for low, high in pairwise(knots[num_free - 1 :])]
        design = np.column_stack([*steps, *ramps, *features.values()])
        coefficients = relative_least_squares(design, seconds)
        rising = coefficients[num_free - 1] + np.cumsum(coefficients[num_free : len(knots)])
        levels = np.concatenate((coefficients[:num_free], rising))
        linear = zip(features, coefficients[len(knots) :].tolist(), strict=True)
        return Curve(tuple(knots.tolist()), tuple(levels.tolist()), tuple(linear), tuple(captured))


def round_up(size: FloatArray, captured: tuple[float, ...]) -> FloatArray:
    """Each size as it is padded: the next of the `captured` sizes, or itself above the last."""
    if not captured:
        return size
    ladder = np.asarray(captured, dtype=np.float64)
    index = np.searchsorted(ladder, size)
    return np.where(index < len(ladder), ladder[np.minimum(index, len(ladder) - 1)], size)


def relative_least_squares(design: FloatArray, seconds: FloatArray) -> FloatArray:
    """Non-negative coefficients [k] of `design` [n, k] that make the squared relative error of `seconds` [n] least."""
    scale = np.maximum(np.abs(design).max(axis=0), 1e-30)
    predicted = np.maximum(seconds, 1e-9)
    coefficients = np.zeros(design.shape[1])
    # Weight by the fitted value, not by the observation: observations' reciprocals favour the fast ones.
    for _ in range(3):
        coefficients, _ = nnls(design / scale / predicted[:, None], seconds / predicted)
        predicted = np.maximum(design @ (coefficients / scale), 1e-3 * np.median(seconds) + 1e-9)
    return np.asarray(coefficients / scale)
