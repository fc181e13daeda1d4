"""Workloads: which prompts, and when they arrive.

A closed loop has N users; each sends its next request when its last one is answered (after a think time). An open
loop sends requests at times that do not depend on the server; its laws are in `arrivals`. Both take the same list of
requests, in order, so that runs of different policies meet the same prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark_sim.arrivals import (
    Demand,
    Deterministic,
    Gamma,
    ImportedArrivals,
    OpenLoop,
    Poisson,
    Spike,
    Stepped,
    Weibull,
)
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.gaps import ConstantGaps, Gaps

__all__ = [
    "DOMAINS",
    "ClosedLoop",
    "Deterministic",
    "Gamma",
    "ImportedArrivals",
    "OpenLoop",
    "Poisson",
    "Prompt",
    "Spike",
    "Stepped",
    "Weibull",
    "Workload",
    "bundled_prompts",
    "read_prompts",
    "repeat",
]

DOMAINS = ("math", "code", "chat")
_THINK = 0x7141


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its name, its domain and the user's turns (only the first is sent)."""

    prompt_id: str
    domain: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class ClosedLoop(Demand):
    """N users who each wait for their answer before they ask again.

    Parameters
    ----------
    num_users
        Concurrency.
    think_seconds
        Mean pause between an answer and the same user's next request.
    think_law
        Law of that pause: constant by default, or any other of the gap laws, such as ``ExponentialGaps()``.
    seed
        Keys the pauses.
    timeout_seconds
        See `Demand`. A user who gave up thinks and then sends the next request, as after an answer.
    """

    num_users: int
    think_seconds: float = 0.0
    think_law: Gaps = field(default_factory=ConstantGaps)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_users < 1:
            raise UserError(f"num_users is {self.num_users}; a closed loop needs at least 1 user")
        if not 0 <= self.think_seconds < math.inf:
            raise UserError(f"think_seconds is {self.think_seconds}; give 0 or more")

    def think_times(self, num_requests: int) -> npt.NDArray[np.float64]:
        """Pause [num_requests] in seconds after each request of the list, whoever sent it.

        Keyed by the request, so that policies which answer in another order meet the same pauses.
        """
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, _THINK]))
        return self.think_law.draw(rng, num_requests) * self.think_seconds


Workload = ClosedLoop | OpenLoop


def bundled_prompts(domains: Sequence[str] = DOMAINS, per_domain: int | None = None) -> list[Prompt]:
    """The prompts shipped with the package, domains interleaved.

    Parameters
    ----------
    domains
        Any of ``math``, ``code``, ``chat``.
    per_domain
        Take the first so many of each; ``None`` means all.

    Raises
    ------
    UserError
        If a domain is unknown or nothing is left.
    """
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown:
        raise UserError(f"unknown domain {unknown[0]}; choose from {', '.join(DOMAINS)}")
    folder = Path(__file__).parent / "prompts"
    sets = [read_prompts(folder / f"{domain}.jsonl")[:per_domain] for domain in domains]
    prompts = [prompt for prompt in chain.from_iterable(zip_longest(*sets)) if prompt is not None]
    if not prompts:
        raise UserError("zero prompts selected; ask for at least one domain and one prompt each")
    return prompts


def read_prompts(path: Path | str) -> list[Prompt]:
    """Read prompts from JSON Lines with ``turns`` (or ``prompt``), optionally ``prompt_id`` and ``domain``.

    Raises
    ------
    UserError
        If the file is missing or empty, or a line is not such an object (the line is named).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no prompt file at {path}; give a JSON Lines file with `turns`")
    with explain_os_errors(path, "read"):
        try:
            # Not splitlines: a text may hold U+2028 and the like unescaped.
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8 JSON Lines") from error
    prompts = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path} has zero prompts; give at least one line with `turns`")
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise UserError(f"{path} names a prompt_id twice; make them unique")
    return prompts


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        record = json.loads(line)
        turns = record["turns"] if "turns" in record else [record["prompt"]]
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise ValueError("turns must be a list of non-empty texts")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} line {number} is not a prompt ({error}); each line needs `turns`") from error
    name = record.get("prompt_id", record.get("question_id", f"{path.stem}-{number:04d}"))
    return Prompt(str(name), str(record.get("domain", path.stem)), tuple(turns))


def repeat(prompts: Sequence[Prompt], num_requests: int) -> Iterator[Prompt]:
    """The first `num_requests` of the prompts, repeated in order as often as needed."""
    return (prompts[index % len(prompts)] for index in range(num_requests))
