"""When requests arrive in an open loop: at times that do not depend on the server.

An arrival law is a gap law of mean 1 scaled by a rate. A profile of rates over time is the same law with its clock
bent: where the rate is r, one second of the profile is r units of the law (time rescaling), so that a
Poisson law stays an exact Poisson process with that intensity. Gaps are never rounded or clipped. The first gap
starts at 0. Times are float seconds, rates are requests per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError
from dspark_sim.gaps import ExponentialGaps, GammaGaps, Gaps, WeibullGaps
from dspark_sim.request_traces import RequestTrace

FloatArray = npt.NDArray[np.float64]
_ARRIVALS = 0xA221


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What every workload has.

    Parameters
    ----------
    timeout_seconds
        A user abandons a request that is not answered in so many seconds after it arrived; ``None``: users wait for
        ever.
    """

    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.timeout_seconds is not None and not 0 < self.timeout_seconds < math.inf:
            raise UserError(
                f"timeout_seconds is {self.timeout_seconds}; give a positive number, or none for users who wait"
            )
        seed = getattr(self, "seed", 0)
        if seed < 0:
            raise UserError(f"seed is {seed}; give 0 or more")

    def reseeded(self, offset: int) -> Self:
        """The same workload with `offset` added to its seed; itself if nothing in it is drawn."""
        if offset == 0 or not hasattr(self, "seed"):
            return self
        return replace(self, seed=self.seed + offset)  # type: ignore[call-arg]

    def describe(self) -> dict[str, Any]:
        """Kind and parameters as JSON, for the configuration of a trace."""
        return {"kind": type(self).__name__, **{part.name: _plain(getattr(self, part.name)) for part in fields(self)}}


@dataclass(frozen=True)
class Poisson(Demand):
    """Open loop with exponential gaps.

    Parameters
    ----------
    rate
        Requests per second.
    seed
        Keys the gaps.
    timeout_seconds
        See `Demand`.
    """

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)

    def arrivals(self, num_requests: int) -> FloatArray:
        """Arrival times [num_requests] in seconds."""
        return _renewals(ExponentialGaps(), self.rate, self.seed, num_requests)


@dataclass(frozen=True)
class Gamma(Demand):
    """Open loop with gamma gaps.

    Parameters
    ----------
    rate
        Requests per second.
    cv
        Standard deviation over mean of a gap; 1 is Poisson. vLLM's `burstiness` is ``1 / cv**2``.
    seed
        Keys the gaps.
    timeout_seconds
        See `Demand`.
    """

    rate: float
    cv: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)
        GammaGaps(self.cv)

    def arrivals(self, num_requests: int) -> FloatArray:
        """Arrival times [num_requests] in seconds."""
        return _renewals(GammaGaps(self.cv), self.rate, self.seed, num_requests)


@dataclass(frozen=True)
class Weibull(Demand):
    """Open loop with Weibull gaps.

    Parameters
    ----------
    rate
        Requests per second.
    shape, cv
        One of the two; see `WeibullGaps`.
    seed
        Keys the gaps.
    timeout_seconds
        See `Demand`.
    """

    rate: float
    shape: float | None = None
    cv: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)
        WeibullGaps(self.shape, self.cv)

    def arrivals(self, num_requests: int) -> FloatArray:
        """Arrival times [num_requests] in seconds."""
        return _renewals(WeibullGaps(self.shape, self.cv), self.rate, self.seed, num_requests)


@dataclass(frozen=True)
class Deterministic(Demand):
    """Open loop with equal gaps: request i arrives at (i + 1) / rate.

    Parameters
    ----------
    rate
        Requests per second.
    timeout_seconds
        See `Demand`.
    """

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)

    def arrivals(self, num_requests: int) -> FloatArray:
        """Arrival times [num_requests] in seconds."""
        _check_num(num_requests)
        return np.arange(1, num_requests + 1) / self.rate


@dataclass(frozen=True)
class Stepped(Demand):
    """Open loop whose rate changes in steps.

    Parameters
    ----------
    steps
        Pairs (start_seconds, rate); the first starts at 0, the starts rise, each rate holds until the next start and
        the last for ever. A rate of 0 is a pause; the last must be positive.
    gaps
        Law of the gaps where the rate is 1. Exponential gaps give the Poisson process of that intensity.
    seed
        Keys the gaps.
    timeout_seconds
        See `Demand`.
    """

    steps: Sequence[tuple[float, float]]
    gaps: Gaps = field(default_factory=ExponentialGaps)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", _checked_steps(self.steps))

    def arrivals(self, num_requests: int) -> FloatArray:
        """Arrival times [num_requests] in seconds."""
        starts, rates = np.array(self.steps, dtype=np.float64).T
        ends = np.cumsum(rates[:-1] * np.diff(starts))
        units = _renewals(self.gaps, 1.0, self.seed, num_requests)
        # An arrival at the very start of a pause belongs to the step before it.
        step = np.searchsorted(ends, units, side="left")
        return np.asarray(starts[step] + (units - np.append(0.0, ends)[step]) / rates[step])

    def rate_at(self, seconds: npt.ArrayLike) -> FloatArray:
        """Requests per second of the profile at times `seconds` (any shape, 0 or more)."""
        starts, rates = np.array(self.steps, dtype=np.float64).T
        return np.asarray(rates[np.searchsorted(starts, np.asarray(seconds), side="right") - 1])


@dataclass(frozen=True)
class Spike(Demand):
    """Open loop at one rate, with another for a while.

    Parameters
    ----------
    base_rate, peak_rate
        Requests per second outside and inside the spike; a peak below the base is a lull, 0 a pause.
    start_seconds, duration_seconds
        When the spike begins and how long it lasts.
    gaps, seed
        As in `Stepped`.
    timeout_seconds
        See `Demand`.
    """

    base_rate: float
    peak_rate: float
    start_seconds: float
    duration_seconds: float
    gaps: Gaps = field(default_factory=ExponentialGaps)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.base_rate, "base_rate")
        if not 0 <= self.peak_rate < math.inf:
            raise UserError(f"peak_rate is {self.peak_rate} requests per second; give 0 or more")
        if not 0 <= self.start_seconds < math.inf:
            raise UserError(f"start_seconds is {self.start_seconds}; give 0 or more")
        if not 0 < self.duration_seconds < math.inf:
            raise UserError(f"duration_seconds is {self.duration_seconds}; give a positive number")

    @property
    def profile(self) -> Stepped:
        """The same workload as steps."""
        end = self.start_seconds + self.duration_seconds
        steps = [(0.0, self.base_rate), (self.start_seconds, self.peak_rate), (end, self.base_rate)]
        return Stepped(steps[self.start_seconds == 0 :], self.gaps, self.seed, timeout_seconds=self.timeout_seconds)

    def arrivals(self, num_requests: int) -> FloatArray:
        """Arrival times [num_requests] in seconds."""
        return self.profile.arrivals(num_requests)

    def rate_at(self, seconds: npt.ArrayLike) -> FloatArray:
        """Requests per second of the profile at times `seconds` (any shape, 0 or more)."""
        return self.profile.rate_at(seconds)


@dataclass(frozen=True)
class ImportedArrivals(Demand):
    """Open loop at the times of an imported trace of requests.

    Parameters
    ----------
    trace
        Made by `read_request_trace`; it must have arrival times.
    timeout_seconds
        See `Demand`.
    """

    trace: RequestTrace

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trace.arrival is None:
            raise UserError(
                f"{self.trace.name} ({self.trace.format}) has no arrival times; take its lengths with "
                "EmpiricalLengths, and arrivals from a law such as Poisson"
            )

    def arrivals(self, num_requests: int) -> FloatArray:
        """The first `num_requests` arrival times in seconds; the first request comes at 0.

        Raises
        ------
        UserError
            If the trace has fewer requests.
        """
        _check_num(num_requests)
        if num_requests > len(self.trace):
            raise UserError(
                f"{self.trace.name} has {len(self.trace)} requests and {num_requests} were asked for; ask for fewer"
            )
        assert self.trace.arrival is not None
        return self.trace.arrival[:num_requests].copy()

    def describe(self) -> dict[str, Any]:
        """Kind and parameters as JSON; the trace by its name and the digest of its rows."""
        return {
            "kind": type(self).__name__,
            "trace": self.trace.name,
            "format": self.trace.format,
            "num_requests": len(self.trace),
            "digest": self.trace.digest(),
            "timeout_seconds": self.timeout_seconds,
        }


OpenLoop = Poisson | Gamma | Weibull | Deterministic | Stepped | Spike | ImportedArrivals


def _renewals(gaps: Gaps, rate: float, seed: int, num: int) -> FloatArray:
    _check_num(num)
    rng = np.random.default_rng(np.random.SeedSequence([seed, _ARRIVALS]))
    return np.cumsum(gaps.draw(rng, num) * (1.0 / rate))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **asdict(value)}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _check_rate(rate: float, name: str = "rate") -> None:
    if not 0 < rate < math.inf:
        raise UserError(f"{name} is {rate} requests per second; give a positive number")


def _check_num(num_requests: int) -> None:
    if num_requests < 0:
        raise UserError(f"num_requests is {num_requests}; give 0 or more")


def _checked_steps(steps: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    pairs = tuple((float(start), float(rate)) for start, rate in steps)
    if not pairs or pairs[0][0] != 0:
        raise UserError(f"steps are {list(pairs)}; give pairs (start_seconds, rate), the first with start 0")
    for (before, _), (start, _) in pairwise(pairs):
        if not before < start < math.inf:
            raise UserError(f"a step starts at {start} after one at {before}; give starts that rise")
    for start, rate in pairs:
        if not 0 <= rate < math.inf:
            raise UserError(f"the rate from {start} s on is {rate} requests per second; give 0 or more")
    if pairs[-1][1] == 0:
        raise UserError("the last step has rate 0, so that no more requests come; give it a positive rate")
    return pairs
