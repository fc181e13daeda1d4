"""How long the prompts and outputs of synthetic requests are, in tokens: whole numbers, at least 1.

A law gives the first n requests their lengths, keyed by its seed: more requests do not change the first ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError
from dspark_sim.request_traces import RequestTrace

IntArray = npt.NDArray[np.int64]
_PROMPT, _OUTPUT, _ROWS = 0x1E41, 0x1E42, 0x1E43


@dataclass(frozen=True)
class ConstantLengths:
    """All requests alike.

    Parameters
    ----------
    prompt_len, output_len
        Tokens, at least 1.
    """

    prompt_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name, value in (("prompt_len", self.prompt_len), ("output_len", self.output_len)):
            if value < 1:
                raise UserError(f"{name} is {value}; give at least 1 token")

    def lengths(self, num_requests: int) -> tuple[IntArray, IntArray]:
        """Prompt and output lengths, each [num_requests]."""
        _check_num(num_requests)
        return np.full(num_requests, self.prompt_len), np.full(num_requests, self.output_len)

    def describe(self) -> dict[str, Any]:
        """Kind and parameters as JSON."""
        return {"kind": type(self).__name__, "prompt_len": self.prompt_len, "output_len": self.output_len}


@dataclass(frozen=True)
class LognormalLengths:
    """Independent lognormal lengths, rounded to whole tokens, at least 1.

    Parameters
    ----------
    prompt_mean, output_mean
        Mean lengths before rounding, at least 1.
    prompt_cv, output_cv
        Standard deviation over mean; 0 makes all alike.
    seed
        Keys the draws.
    max_prompt_len, max_output_len
        Longer draws are set to these; ``None``: no limit.
    """

    prompt_mean: float
    output_mean: float
    prompt_cv: float = 1.0
    output_cv: float = 1.0
    seed: int = 0
    max_prompt_len: int | None = None
    max_output_len: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_mean", "output_mean"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1 token")
        for name in ("prompt_cv", "output_cv"):
            if not 0 <= getattr(self, name) <= 100:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 0 to 100")
        for name in ("max_prompt_len", "max_output_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1 token")
        _check_seed(self.seed)

    def lengths(self, num_requests: int) -> tuple[IntArray, IntArray]:
        """Prompt and output lengths, each [num_requests]."""
        _check_num(num_requests)
        return (
            self._draw(self.prompt_mean, self.prompt_cv, self.max_prompt_len, _PROMPT, num_requests),
            self._draw(self.output_mean, self.output_cv, self.max_output_len, _OUTPUT, num_requests),
        )

    def _draw(self, mean: float, cv: float, most: int | None, purpose: int, num: int) -> IntArray:
        variance = math.log1p(cv * cv)
        normal = np.random.default_rng(np.random.SeedSequence([self.seed, purpose])).standard_normal(num)
        drawn = np.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * normal)
        return np.asarray(np.clip(np.rint(drawn), 1, most or 2**53), dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        """Kind and parameters as JSON."""
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in self.__dataclass_fields__}}


@dataclass(frozen=True)
class EmpiricalLengths:
    """Lengths of a recorded trace of requests; a request takes both from one row, so that they stay correlated.

    Parameters
    ----------
    trace
        Made by `read_request_trace`.
    bootstrap
        Draw rows with replacement; otherwise take them in order, from the start again when used up.
    seed
        Keys the draws.
    """

    trace: RequestTrace
    bootstrap: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def lengths(self, num_requests: int) -> tuple[IntArray, IntArray]:
        """Prompt and output lengths, each [num_requests]."""
        _check_num(num_requests)
        rows = np.arange(num_requests) % len(self.trace)
        if self.bootstrap:
            uniform = np.random.default_rng(np.random.SeedSequence([self.seed, _ROWS])).random(num_requests)
            rows = (uniform * len(self.trace)).astype(np.int64)
        return self.trace.prompt_len[rows], self.trace.output_len[rows]

    def describe(self) -> dict[str, Any]:
        """Kind and parameters as JSON; the trace by its name and the digest of its rows."""
        return {
            "kind": type(self).__name__,
            "trace": self.trace.name,
            "digest": self.trace.digest(),
            "bootstrap": self.bootstrap,
            "seed": self.seed,
        }


Lengths = ConstantLengths | LognormalLengths | EmpiricalLengths


def _check_num(num_requests: int) -> None:
    if num_requests < 0:
        raise UserError(f"num_requests is {num_requests}; give 0 or more")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
