"""The kinds of function that one part of an iteration can cost, and how each is written as JSON.

A `Part` gives the seconds of a target pass, a draft, a prefill or the host. `Curve` interpolates a profile,
`Parametric` is a sum of four or five coefficients, `RooflinePass` the time that the arithmetic and the bytes of a pass
take on an accelerator. All answer the same questions, so a `CostModel` may mix them: a measured target pass, say, with
an analytical drafter.

Sizes are batch tokens for a target pass, prompt tokens for a prefill, and requests for a draft and the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dspark_sim.cost_curve import Curve, FloatArray, IntegerTable


@dataclass(frozen=True)
class Parametric:
    """Seconds as fixed + per request + per token + per context token (+ per draft position).

    Parameters
    ----------
    fixed
        Seconds of every pass.
    per_request, per_token, per_context_token
        Seconds per request, per token computed (drafted tokens, where the part is a draft), and per token in the KV
        cache of all requests together.
    per_position
        Seconds per draft position, for a head that runs token after token.
    """

    fixed: float = 0.0
    per_request: float = 0.0
    per_token: float = 0.0
    per_context_token: float = 0.0
    per_position: float = 0.0

    def seconds(self, size: npt.ArrayLike, **features: npt.ArrayLike) -> FloatArray:
        """Evaluate at `size`; features as for `Curve.seconds`, all optional."""
        given = {name: np.asarray(value, dtype=np.float64) for name, value in features.items()}
        x = np.asarray(size, dtype=np.float64)
        tokens = given.get("draft_tokens", x)
        shift = (
            self.per_context_token * given.get("context_tokens", np.float64(0.0))
            + self.per_request * given.get("num_requests", x)
            + self.per_position * given.get("draft_len", np.float64(0.0))
        )
        return np.asarray((self.fixed + self.per_token * tokens) + shift)

    def scalar(self, size: int, context_tokens: int, num_requests: int, draft_len: int, extra: float = 0.0) -> float:
        """The same for one size, `extra` seconds added."""
        tokens = num_requests * draft_len if draft_len else size
        return (self.fixed + self.per_token * tokens) + (
            self.per_context_token * context_tokens
            + self.per_request * num_requests
            + self.per_position * draft_len
            + extra
        )

    def run(self, low: int, high: int, context_tokens: int, num_requests: int, extra: float = 0.0) -> FloatArray:
        """Seconds at sizes low, low + 1, …, high, `extra` added."""
        shift = self.per_context_token * context_tokens + self.per_request * num_requests + extra
        return np.asarray((self.fixed + self.per_token * np.arange(low, high + 1)) + shift)


@dataclass(frozen=True)
class RooflinePass:
    """Seconds of one pass through a network: the slower of memory and arithmetic, for its matrices and its attention.

    A pass over B tokens reads every dense weight once, and of E experts per layer those that at least one token is
    routed to: E·(1 - (1 - k/E)^B) under uniform routing of k of them. Attention reads the whole KV cache once, and
    computes on every pair of a token and a place in its request's context::

        matrices  = max((dense bytes + touched · expert bytes) / bandwidth, B · flops per token / rate)
        attention = context tokens · max(KV bytes / bandwidth, tokens per request · flops per pair / rate)
        seconds   = passes · (overhead + matrices + attention)

    Activations, softmax and sampling are not counted; efficiency factors stand for them.

    Parameters
    ----------
    pattern
        What the tokens and passes are. ``target``: one pass over `size` tokens. ``block``: one pass over the drafted
        tokens of all requests. ``chain``: a pass over one token per request for each draft position. ``prompts``: one
        pass over `size` prompt tokens, which also attend to those before them in their own prompt.
    weight_bytes, expert_bytes
        Bytes of all dense weights, and of one expert in every layer that has experts.
    num_experts, experts_per_token
        E and k; 0 and 0 without experts.
    flops_per_token, flops_per_pair
        Operations on the matrices per token, and of attention per token and place in its context.
    kv_bytes
        Bytes of the KV cache per token of context.
    bytes_per_second, flops_per_second
        What the accelerators sustain.
    overhead_seconds
        Launches, communication and the like, per pass.
    """

    pattern: Literal["target", "block", "chain", "prompts"]
    weight_bytes: float
    flops_per_token: float
    bytes_per_second: float
    flops_per_second: float
    expert_bytes: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    kv_bytes: float = 0.0
    flops_per_pair: float = 0.0
    overhead_seconds: float = 0.0

    def experts_touched(self, num_tokens: npt.ArrayLike) -> FloatArray:
        """Expected experts per layer that at least one of so many tokens is routed to."""
        if self.num_experts == 0:
            return np.zeros_like(np.asarray(num_tokens, dtype=np.float64))
        missed = np.power(1.0 - self.experts_per_token / self.num_experts, np.asarray(num_tokens, dtype=np.float64))
        return np.asarray(self.num_experts * (1.0 - missed))

    def level(self, num_tokens: npt.ArrayLike) -> FloatArray:
        """Overhead and matrices of one pass over so many tokens."""
        x = np.asarray(num_tokens, dtype=np.float64)
        memory = (self.weight_bytes + self.expert_bytes * self.experts_touched(x)) / self.bytes_per_second
        return np.asarray(self.overhead_seconds + np.maximum(memory, x * self.flops_per_token / self.flops_per_second))

    def seconds(self, size: npt.ArrayLike, **features: npt.ArrayLike) -> FloatArray:
        """Evaluate at `size`; features as for `Curve.seconds`, all optional."""
        given = {name: np.asarray(value, dtype=np.float64) for name, value in features.items()}
        x = np.asarray(size, dtype=np.float64)
        requests = np.maximum(given.get("num_requests", np.float64(1.0)), 1.0)
        context = given.get("context_tokens", np.float64(0.0))
        if self.pattern == "chain":
            passes = given.get("draft_len", np.float64(1.0))
            return np.asarray(passes * (self.level(x) + self._attention(context, np.float64(1.0))))
        tokens = given.get("draft_tokens", x) if self.pattern == "block" else x
        attention = self._attention(context, tokens / requests)
        if self.pattern == "prompts":
            attention = attention + self._own_prompt(x, requests)
        return np.asarray(self.level(tokens) + attention)

    def _attention(self, context: npt.ArrayLike, tokens_each: npt.ArrayLike) -> FloatArray:
        by_memory, by_pair = self._rates
        return np.asarray(context * np.maximum(by_memory, by_pair * np.asarray(tokens_each)))

    def _own_prompt(self, num_tokens: FloatArray, num_requests: FloatArray) -> FloatArray:
        # Each of n prompt tokens attends to n/2 of its own prompt on average.
        return np.asarray(self._rates[1] * num_tokens * num_tokens / (2.0 * num_requests))

    def scalar(self, size: int, context_tokens: int, num_requests: int, draft_len: int, extra: float = 0.0) -> float:
        """The same for one size, `extra` seconds added, in about a microsecond."""
        by_memory, by_pair = self._rates
        requests = num_requests if num_requests > 1 else 1
        tokens = num_requests * draft_len if self.pattern == "block" else size
        values = self._table.values
        level = values[tokens] if type(tokens) is int and 0 <= tokens < len(values) else self._table.at(tokens)
        tokens_each = 1.0 if self.pattern == "chain" else tokens / requests
        pair = by_pair * tokens_each
        attention = context_tokens * (pair if pair > by_memory else by_memory)
        if self.pattern == "chain":
            return draft_len * (level + attention) + extra
        if self.pattern == "prompts":
            attention = attention + by_pair * tokens * tokens / (2.0 * requests)
        return level + attention + extra

    def run(self, low: int, high: int, context_tokens: int, num_requests: int, extra: float = 0.0) -> FloatArray:
        """Seconds of a target pass at sizes low, low + 1, …, high, `extra` added."""
        by_memory, by_pair = self._rates
        level = self._table.run(low, high)
        requests = max(num_requests, 1)
        if by_pair * (high / requests) <= by_memory:
            return level + context_tokens * by_memory + extra
        return level + self._attention(float(context_tokens), np.arange(low, high + 1) / requests) + extra

    @cached_property
    def _rates(self) -> tuple[float, float]:
        """Seconds per place of context: to read it, and to compute on it for one token of its request."""
        return self.kv_bytes / self.bytes_per_second, self.flops_per_pair / self.flops_per_second

    @cached_property
    def _table(self) -> IntegerTable:
        return IntegerTable(self.level)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to other processes without the table, which is soon made again.
        return {item.name: getattr(self, item.name) for item in fields(self)}


Part = Curve | Parametric | RooflinePass
"""Seconds of one part of an iteration."""

_KINDS: tuple[tuple[str, type[Part]], ...] = (
    ("curve", Curve),
    ("parametric", Parametric),
    ("roofline", RooflinePass),
)


def part_to_json(part: Part) -> dict[str, Any]:
    """JSON types only, with the part's `kind`."""
    return {"kind": next(name for name, kind in _KINDS if isinstance(part, kind)), **asdict(part)}


def part_from_json(document: Mapping[str, Any]) -> Part:
    """Inverse of `part_to_json`; without a `kind` it is a curve.

    Raises
    ------
    ValueError, KeyError, TypeError
        If it is not a part.
    """
    values = dict(document)
    name = values.pop("kind", "curve")
    kind = dict(_KINDS).get(name)
    if kind is None:
        raise ValueError(f"no part of kind {name!r}; known are {', '.join(known for known, _ in _KINDS)}")
    if kind is not Curve:
        return kind(**values)
    return Curve(
        tuple(values["knots"]),
        tuple(values["levels"]),
        tuple((feature, value) for feature, value in values["linear"]),
        tuple(values.get("captured", ())),
    )
