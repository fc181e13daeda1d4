"""Keyed random numbers and sampling.

Every uniform is a pure function of (seed, request, absolute position, purpose): no generator is shared, so the
composition of a batch cannot change a request's output. Probabilities are float32; a draft token is drawn from the
very tensor that later enters the acceptance ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.errors import UserError

Purpose = Literal["draft", "accept", "residual", "bonus"]
_PURPOSES: dict[Purpose, int] = {"draft": 1, "accept": 2, "residual": 3, "bonus": 4}
_UINT64 = np.uint64


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
    value = (value ^ (value >> _UINT64(30))) * _UINT64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _UINT64(27))) * _UINT64(0x94D049BB133111EB)
    return value ^ (value >> _UINT64(31))


def keyed_uniform(
    seed: int, request_ids: npt.ArrayLike, positions: npt.ArrayLike, purpose: Purpose
) -> npt.NDArray[np.float64]:
    """Uniforms in (0, 1), one per (request, position) pair.

    Parameters
    ----------
    seed
        Of the run.
    request_ids, positions
        Broadcast against each other; positions are absolute.
    purpose
        Distinguishes draws at the same position; the draft and the residual never share one.
    """
    with np.errstate(over="ignore"):
        golden = _UINT64(0x9E3779B97F4A7C15)
        state = _mix(np.asarray(seed % 2**64, dtype=_UINT64) + golden)
        for part in (request_ids, positions, _PURPOSES[purpose]):
            state = _mix((state ^ np.asarray(part).astype(_UINT64)) + golden)
    return ((state >> _UINT64(11)).astype(np.float64) + 0.5) * 2.0**-53


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Float32 probabilities [..., V] after temperature, top-k and top-p; `params.temperature` must be positive."""
    scaled = logits.float() / params.temperature
    if params.top_k and params.top_k < scaled.shape[-1]:
        floor = scaled.topk(params.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    probs = scaled.softmax(dim=-1)
    if params.top_p < 1.0:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


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
