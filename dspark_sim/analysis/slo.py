"""Service level objectives: the latencies that a request must keep to count as well served.

A request meets its objective if every limit that is set holds: ``ttft``, ``tpot`` and ``e2e`` at most so many
seconds. *Attainment* is the share of requests that meet theirs (one that failed does not), *goodput* how many of
those finish per second. This is what vLLM's ``bench serve --goodput`` counts (``vllm/benchmarks/serve.py``,
`calculate_metrics`): there too a request of one output token has no tpot and passes its limit. vLLM's limits are in
milliseconds and its name for ``e2e`` is ``e2el``; `parse_goodput` reads that form, `parse_slo` reads seconds.

Classes of requests are their domains: a domain may have limits of its own, which then replace the general ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from dspark_sim.errors import UserError

LIMITS = {"ttft": "ttft", "tpot": "tpot", "e2e": "e2e_latency"}
_NAMES = {**dict.fromkeys(("e2e", "e2el", "e2e_latency"), "e2e"), "ttft": "ttft", "tpot": "tpot"}
_UNITS = {"ms": 1e-3, "s": 1.0}
_PAIR = re.compile(r"(?P<name>[a-z0-9_]+):(?P<value>[0-9.eE+-]+)(?P<unit>ms|s)?")


@dataclass(frozen=True)
class SLO:
    """Most seconds of each latency; infinity sets no limit.

    Parameters
    ----------
    ttft
        Arrival to first token.
    tpot
        Mean time per output token after the first.
    e2e
        Arrival to last token.
    """

    ttft: float = math.inf
    tpot: float = math.inf
    e2e: float = math.inf

    def __post_init__(self) -> None:
        for name in LIMITS:
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(f"the {name} objective is {value} seconds; give 0 or more")

    def limits(self) -> dict[str, float]:
        """The limits that are set, in seconds."""
        return {name: getattr(self, name) for name in LIMITS if math.isfinite(getattr(self, name))}


@dataclass(frozen=True)
class Objectives:
    """An SLO for all requests, and others for some domains in its place.

    Parameters
    ----------
    general
        Of every domain without an SLO of its own.
    domains
        SLO by domain.
    """

    general: SLO = SLO()
    domains: Mapping[str, SLO] = field(default_factory=dict)

    def met(self, requests: pd.DataFrame) -> pd.DataFrame:
        """Which request keeps which limit.

        Parameters
        ----------
        requests
            The frame of `metrics.per_request`.

        Returns
        -------
        DataFrame
            Bool, one row per request: ``ttft, tpot, e2e`` and ``all`` of them. A limit that is not set is kept.

        Raises
        ------
        UserError
            If no request is of a domain that has an SLO.
        """
        for domain in self.domains:
            if domain not in set(requests["domain"]):
                known = ", ".join(sorted(set(requests["domain"])))
                raise UserError(f"no request is of domain {domain}, which has an objective; the domains are {known}")
        kept = {}
        for name, column in LIMITS.items():
            own = {domain: getattr(slo, name) for domain, slo in self.domains.items()}
            limit = requests["domain"].map(own).astype("float64").fillna(getattr(self.general, name))
            # A request of one token has no tpot: NaN is not above any limit.
            kept[name] = ~(requests[column] > limit)
        frame = pd.DataFrame(kept, index=requests.index)
        return frame.assign(all=frame.all(axis=1))


def parse_slo(text: str | Iterable[str]) -> Objectives:
    """Objectives from ``ttft:0.5 tpot:0.05``, in seconds unless a unit follows (``tpot:50ms``).

    Parameters
    ----------
    text
        One text or several. One that begins with ``DOMAIN=`` holds for that domain: ``code=tpot:0.03``.

    Raises
    ------
    UserError
        If a part is not NAME:SECONDS, a name is not ttft, tpot or e2e, or one is given twice.
    """
    return _parse(text, 1.0)


def parse_goodput(text: str | Iterable[str]) -> Objectives:
    """Objectives in the form of vLLM's ``bench serve --goodput``: ``ttft:500 tpot:50 e2el:5000``, milliseconds.

    Raises
    ------
    UserError
        As `parse_slo`.
    """
    return _parse(text, 1e-3)


def _parse(text: str | Iterable[str], unit: float) -> Objectives:
    general: SLO | None = None
    domains: dict[str, SLO] = {}
    for part in (text,) if isinstance(text, str) else tuple(text):
        domain, equals, rest = part.rpartition("=")
        slo = _limits(rest, unit)
        if not equals and general is None:
            general = slo
        elif equals and domain.strip() not in domains:
            domains[domain.strip()] = slo
        else:
            raise UserError(f"the objective {part!r} is the second of its kind; write its limits in one text")
    return Objectives(general or SLO(), domains)


def _limits(text: str, unit: float) -> SLO:
    pairs = text.replace(",", " ").split()
    if not pairs:
        raise UserError("an objective is empty; give limits such as 'ttft:0.5 tpot:0.05'")
    slo, given = SLO(), set()
    for pair in pairs:
        found = _PAIR.fullmatch(pair)
        try:
            seconds = float(found["value"]) * _UNITS.get(found["unit"] or "", unit) if found else math.nan
        except ValueError:
            seconds = math.nan
        if found is None or not math.isfinite(seconds):
            raise UserError(f"the objective has the part {pair!r}; give NAME:LIMIT, such as 'ttft:0.5 tpot:0.05'")
        name = _NAMES.get(found["name"])
        if name is None:
            raise UserError(f"the objective has a limit on {found['name']!r}; choose from ttft, tpot and e2e")
        if name in given:
            raise UserError(f"the objective limits {name} twice; give one limit")
        given.add(name)
        slo = replace(slo, **{name: seconds})
    return slo
