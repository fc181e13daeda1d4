"""Which domain each request comes from, when the shares of the domains drift, and which prompt it then has.

The share of a domain is linear between the points where it is given and constant outside them. Each request draws
its domain with its own uniform number, keyed by the seed, so that two mixes with the same seed differ only where
their shares do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_DOMAINS = 0xD0A1
_PROMPTS = 0xD0A2


@dataclass(frozen=True)
class DomainMix:
    """Domains of requests.

    Parameters
    ----------
    shares
        Weight of each domain at the start; weights need not sum to 1.
    drift
        Pairs (place, shares), places rising and positive: the shares at that place. A domain that is not named there
        has share 0. Empty: the shares stay.
    unit
        Places are fractions of the list of requests (``"fraction"``, at most 1) or arrival times (``"seconds"``).
    seed
        Keys the draws.
    """

    shares: Mapping[str, float]
    drift: Sequence[tuple[float, Mapping[str, float]]] = ()
    unit: Literal["fraction", "seconds"] = "fraction"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit not in ("fraction", "seconds"):
            raise UserError(f"unit is {self.unit!r}; choose fraction or seconds")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more")
        before = 0.0
        for place, shares in [(0.0, self.shares), *self.drift]:
            _check_shares(place, shares)
            if shares is not self.shares and not before < place < math.inf:
                raise UserError(f"shares are given at {place} after {before}; give places that rise from above 0")
            if self.unit == "fraction" and place > 1:
                raise UserError(f"shares are given at the fraction {place}; give at most 1, or unit seconds")
            before = place

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that is named, in order of naming."""
        return tuple(dict.fromkeys(name for shares in (self.shares, *(s for _, s in self.drift)) for name in shares))

    def shares_at(self, places: npt.ArrayLike) -> FloatArray:
        """Shares [n, domains] at places [n]; rows sum to 1."""
        points = [(0.0, self.shares), *self.drift]
        knots = [place for place, _ in points]
        weights = np.array([[shares.get(name, 0.0) for name in self.domains] for _, shares in points])
        weights = weights / weights.sum(axis=1, keepdims=True)
        at = np.atleast_1d(np.asarray(places, dtype=np.float64))
        return np.stack([np.interp(at, knots, column) for column in weights.T], axis=1)

    def draw(self, num_requests: int, arrivals: npt.ArrayLike | None = None) -> IntArray:
        """Domain of each request.

        Parameters
        ----------
        num_requests
            Request i stands at the fraction i / (num_requests - 1).
        arrivals
            Seconds [num_requests]; needed for unit ``"seconds"`` with a drift.

        Returns
        -------
        IntArray
            Indices [num_requests] into `domains`.
        """
        if num_requests < 0:
            raise UserError(f"num_requests is {num_requests}; give 0 or more")
        places = np.arange(num_requests) / max(num_requests - 1, 1)
        if self.unit == "seconds" and self.drift:
            if arrivals is None:
                raise UserError("a mix that drifts in seconds needs arrival times; give arrivals, or unit fraction")
            places = np.asarray(arrivals, dtype=np.float64)
            if places.shape != (num_requests,):
                raise UserError(f"there are {places.size} arrivals and {num_requests} requests; give one for each")
        uniform = np.random.default_rng(np.random.SeedSequence([self.seed, _DOMAINS])).random(num_requests)
        below = np.cumsum(self.shares_at(places), axis=1)[:, :-1]
        # The last domain with a share takes what rounding leaves.
        return np.asarray((uniform[:, None] >= below).sum(axis=1), dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        """Parameters as JSON, for the configuration of a trace."""
        return {**asdict(self), "shares": dict(self.shares), "drift": [[at, dict(shares)] for at, shares in self.drift]}


def parse_mix(text: str, seed: int = 0) -> DomainMix:
    """A mix from text: ``math:2,code:1``, then pairs place=shares, such as ``math:1 0.5=math:1,chat:1 1=chat:1``.

    Places are fractions of the list of requests.

    Raises
    ------
    UserError
        If the text is none, or the mix impossible.
    """

    def shares(part: str) -> dict[str, float]:
        pairs = [pair.partition(":") for pair in part.split(",")]
        return {name: float(value) for name, _, value in pairs}

    first, *later = text.split() or [""]
    try:
        drift = [(float(place), shares(part)) for place, _, part in (point.partition("=") for point in later)]
        start = shares(first)
    except ValueError:
        raise UserError(
            f"{text!r} is no mix; give shares such as math:2,code:1, and later ones as 0.5=code:1"
        ) from None
    return DomainMix(start, drift, seed=seed)


def assign_prompts(
    mix: DomainMix,
    num_requests: int,
    prompt_domains: Sequence[str],
    *,
    arrivals: npt.ArrayLike | None = None,
    choice: Literal["in_order", "bootstrap"] = "in_order",
) -> IntArray:
    """Give each request a recorded prompt of its domain.

    Parameters
    ----------
    mix
        Draws the domains; its seed also keys the bootstrap.
    num_requests
        How many.
    prompt_domains
        Domain of each recorded prompt.
    arrivals
        See `DomainMix.draw`.
    choice
        ``"in_order"``: each domain's prompts in their order, from the start again when used up. ``"bootstrap"``: any
        of them with equal chance, with replacement.

    Returns
    -------
    IntArray
        Indices [num_requests] into `prompt_domains`.

    Raises
    ------
    UserError
        If a domain of the mix has no prompt.
    """
    if choice not in ("in_order", "bootstrap"):
        raise UserError(f"choice is {choice!r}; choose in_order or bootstrap")
    owned = [np.flatnonzero([domain == name for domain in prompt_domains]) for name in mix.domains]
    for name, indices in zip(mix.domains, owned, strict=True):
        if not indices.size:
            known = ", ".join(sorted(set(prompt_domains))) or "none"
            raise UserError(f"the mix has domain {name} and no recorded prompt is of it; recorded are {known}")
    drawn = mix.draw(num_requests, arrivals)
    uniform = np.random.default_rng(np.random.SeedSequence([mix.seed, _PROMPTS])).random(num_requests)
    chosen = np.zeros(num_requests, dtype=np.int64)
    for number, indices in enumerate(owned):
        mine = np.flatnonzero(drawn == number)
        turn = np.arange(mine.size) if choice == "in_order" else (uniform[mine] * indices.size).astype(np.int64)
        chosen[mine] = indices[turn % indices.size]
    return chosen


def _check_shares(place: float, shares: Mapping[str, float]) -> None:
    for name, share in shares.items():
        if not 0 <= share < math.inf:
            raise UserError(f"the share of {name} at {place} is {share}; give 0 or more")
    if not sum(shares.values()) > 0:
        raise UserError(f"the shares at {place} are {dict(shares)}; give at least one above 0")
