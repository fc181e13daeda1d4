"""Keyed random numbers and sampling.

Every random number is a pure function of (seed, request, absolute position, purpose): no generator is shared, so the
composition of a batch cannot change a request's output. Draws for drafted tokens are keyed by the block's anchor and
the slot in the block: a block that starts elsewhere draws afresh, and nothing a policy saw of an earlier block says
anything about a later one. Probabilities are float32; a draft token is drawn from the very tensor that later enters
the acceptance ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.errors import UserError

Purpose = Literal["draft", "accept", "residual", "bonus", "gumbel", "replay_draft", "replay_accept"]
_PURPOSES: dict[Purpose, int] = {
    **{"draft": 1, "accept": 2, "residual": 3, "bonus": 4, "gumbel": 5},
    **{"replay_draft": 6, "replay_accept": 7},
}
_NUCLEUS_CANDIDATES = 256
_UINT64 = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, applied alike to target and drafter.

    Parameters
    ----------
    temperature
        0 is greedy.
    top_k
        Keep the k most probable tokens; 0 keeps all.
    top_p
        Keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
    seed
        Keys the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a number in (0, 1]")


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit integers with full avalanche."""
    value = (value ^ (value >> _UINT64(30))) * _UINT64(_FACTORS[0])
    value = (value ^ (value >> _UINT64(27))) * _UINT64(_FACTORS[1])
    return value ^ (value >> _UINT64(31))


def _state(seed: int, *parts: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        golden = _UINT64(_GOLDEN)
        state = _mix(np.asarray(seed % 2**64, dtype=_UINT64) + golden)
        for part in parts:
            state = _mix((state ^ np.asarray(part).astype(_UINT64)) + golden)
    return state


def keyed_uniform(
    seed: int,
    request_ids: npt.ArrayLike,
    positions: npt.ArrayLike,
    purpose: Purpose,
    slots: npt.ArrayLike = 0,
) -> npt.NDArray[np.float64]:
    """Uniforms in (0, 1), one per (request, position, slot).

    Parameters
    ----------
    seed
        Of the run.
    request_ids, positions
        Broadcast against each other; positions are absolute.
    purpose
        Distinguishes draws at the same position; the draft and the residual never share one.
    slots
        Place in the block, where `positions` are anchors; broadcast too.
    """
    state = _state(seed, request_ids, positions, _PURPOSES[purpose], slots)
    return ((state >> _UINT64(11)).astype(np.float64) + 0.5) * 2.0**-53


def keyed_exponential(
    seed: int,
    request_ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    token_ids: torch.Tensor,
    purpose: Literal["gumbel", "draft"] = "gumbel",
    slots: npt.NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """Standard exponential noise of every token, [N, V] float64, on the device of `token_ids`.

    The token that minimises noise / probability has exactly that probability (the exponential race; -log noise is
    Gumbel noise). Target and drafter that race with the same noise choose the same token as often as their laws
    allow without talking to each other.

    Parameters
    ----------
    seed, request_ids, positions
        Keys: [N] requests and the absolute positions that their tokens are for.
    token_ids
        [V] target ids, so that a draft vocabulary meets the noise of its own tokens.
    purpose, slots
        ``gumbel`` is the noise that target and drafter share at a position. ``draft``, with `positions` of anchors and
        [N] places in the block, is the drafter's own.
    """
    parts = (_PURPOSES[purpose],) if slots is None else (_PURPOSES[purpose], slots)
    keys = _state(seed, request_ids, positions, *parts).view(np.int64)
    state = torch.from_numpy(keys).to(token_ids.device)[:, None] ^ token_ids
    # SplitMix64 once more, in signed integers that wrap around; shifts are made logical by masks.
    state = state + _signed(_GOLDEN)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    state = state ^ _shift_right(state, 31)
    uniform = (_shift_right(state, 11).double() + 0.5) * 2.0**-53
    return -uniform.log()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def race(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Index of the token that wins the exponential race, per row of probabilities [N, V] and noise [N, V]."""
    return (probs.double() / noise).argmax(dim=-1)


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Float32 probabilities [..., V] after temperature, top-k and top-p; `params.temperature` must be positive."""
    scaled = logits.float() / params.temperature
    if params.top_k and params.top_k < scaled.shape[-1]:
        floor = scaled.topk(params.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    probs = scaled.softmax(dim=-1)
    return probs if params.top_p == 1.0 else _nucleus(probs, params.top_p)


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the most probable tokens of each row [..., V] until their mass reaches `top_p`; the rest gets zero."""

    def kept(rows: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        ordered, index = rows.topk(num_candidates, dim=-1)
        before = ordered.cumsum(dim=-1) - ordered
        enough = before[:, -1] >= top_p
        return torch.zeros_like(rows).scatter_(-1, index, ordered.masked_fill(before >= top_p, 0.0)), enough

    rows = probs.flatten(0, -2)
    # A sort of the whole vocabulary costs more than a pass of a small target; few candidates nearly always hold it.
    few = min(_NUCLEUS_CANDIDATES, rows.shape[-1])
    out, enough = kept(rows, few)
    if few < rows.shape[-1] and not bool(enough.all()):
        out[~enough] = kept(rows[~enough], rows.shape[-1])[0]
    return (out / out.sum(dim=-1, keepdim=True)).view_as(probs)


def draw(weights: torch.Tensor, uniforms: npt.NDArray[np.float64]) -> torch.Tensor:
    """Inverse-CDF draw: one index per row of non-negative weights [R, V]; they need not sum to one.

    The cumulative sum is taken in float64, so that the law is that of the float32 weights to 1e-12.
    """
    cumulative = weights.double().cumsum(dim=-1)
    u = torch.from_numpy(np.asarray(uniforms)).to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, u, right=True)[:, 0]
    # u < total, yet rounding may reach the end; step back onto the last token that has weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(index, last)
