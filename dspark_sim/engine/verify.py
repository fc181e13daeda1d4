"""Acceptance rules as pure functions: what the target's pass says about the drafted tokens.

Row 0 of a request is its anchor, row k the k-th drafted token; the logits of row k judge drafted token k+1 (1-based)
or, behind the last accepted one, give the bonus token. Write p for the target's law at a row and q for the
drafter's law of the token it judges.

* ``greedy``, ``coupled``, ``target_match``: the target chooses its own token at every row, and drafted token k is
  accepted iff it is that token. The modes differ in the choice: the argmax; the winner of an exponential race whose
  noise is keyed by position and shared with the drafter; an independent draw keyed by position. Either way the
  output is the target's own, whatever was drafted and verified.
* ``rejection`` (Leviathan et al. 2023; Chen et al. 2023): token x ~ q is accepted iff u < min(1, p(x)/q(x)); the
  first rejected one is replaced by a draw from the normalised (p - q)₊. The output has exactly the target's law.
* ``block`` (Sun et al. 2025, *Block verification accelerates speculative decoding*): the drafts are judged together,
  so that a lucky later token makes up for an unlucky earlier one. Longer accepted prefixes, same law.

docs/exactness.md argues each; `dspark-sim verify` checks each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.sampling import SamplingParams, draw, keyed_uniform
from dspark_sim.loop import Mode

MATCHING_MODES: tuple[Mode, ...] = ("greedy", "coupled", "target_match")
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def accept_matching(drafted: IntArray, verify_lens: IntArray, target_tokens: IntArray) -> tuple[IntArray, IntArray]:
    """Longest prefix of the drafts that the target would have chosen itself.

    Parameters
    ----------
    drafted
        [R, γ] drafted token ids; entries past `verify_lens` are ignored.
    verify_lens
        [R], drafts verified.
    target_tokens
        [R, γ+1] the target's own token at row 0..γ; entries past a request's rows are ignored.

    Returns
    -------
    num_accepted, next_token
        [R] each; `next_token` is the target's own token behind the accepted prefix.
    """
    width = drafted.shape[1]
    matches = (drafted == target_tokens[:, :width]) & (np.arange(width) < verify_lens[:, None])
    num_accepted = np.cumprod(matches, axis=1).sum(axis=1).astype(np.int64)
    return num_accepted, target_tokens[np.arange(len(verify_lens)), num_accepted]


@dataclass(slots=True, eq=False)
class SampledRound:
    """What `rejection` and `block` judge.

    Parameters
    ----------
    drafted, verify_lens
        As in `accept_matching`.
    target_probs
        [B, V] float32, rows of all requests one after the other.
    row_starts
        [R], row of each request's anchor.
    draft_probs
        [R, γ, Vd] float32 that the drafts were drawn from, or ``None`` when drafts are deterministic (point mass).
    draft_token_ids
        [Vd] ascending target ids of the draft vocabulary, or ``None`` when it is the target's.
    request_ids, positions
        [R], keys of the random numbers; `positions` are the anchors'.
    params
        Seed of the random numbers.
    """

    drafted: IntArray
    verify_lens: IntArray
    target_probs: torch.Tensor
    row_starts: IntArray
    draft_probs: torch.Tensor | None
    draft_token_ids: torch.Tensor | None
    request_ids: IntArray
    positions: IntArray
    params: SamplingParams

    def verified_probs(self) -> tuple[FloatArray, FloatArray, torch.Tensor]:
        """P and q of every drafted token, [R, γ] each (1 past the verified ones), and the tokens on the device."""
        depth = np.arange(self.drafted.shape[1])
        verified = depth < self.verify_lens[:, None]
        device = self.target_probs.device
        tokens = torch.from_numpy(np.where(verified, self.drafted, 0)).to(device)
        rows = np.minimum(self.row_starts[:, None] + depth, len(self.target_probs) - 1)
        p = self.target_probs[torch.from_numpy(rows).to(device), tokens].double().cpu().numpy()
        if self.draft_probs is None:
            q = np.ones_like(p)
        else:
            index = tokens
            if self.draft_token_ids is not None:
                # Every drafted token is among the ids.
                index = torch.searchsorted(self.draft_token_ids, tokens).clamp_(max=len(self.draft_token_ids) - 1)
            q = self.draft_probs.gather(-1, index[..., None])[..., 0].double().cpu().numpy()
        return np.where(verified, p, 1.0), np.where(verified, q, 1.0), tokens

    def uniforms(self) -> FloatArray:
        """Those that decide on acceptance, [R, γ]."""
        slots = np.arange(self.drafted.shape[1])
        return keyed_uniform(self.params.seed, self.request_ids[:, None], self.positions[:, None], "accept", slots)

    def excess(self, requests: IntArray, depths: IntArray, weights: FloatArray, tokens: torch.Tensor) -> torch.Tensor:
        """(weight · p - q)₊ of the token at 0-based `depths` of `requests`, [N, V] like `target_probs`.

        With weight 1 it is what a rejected token is replaced from.
        """
        device = self.target_probs.device
        index, at = torch.from_numpy(requests).to(device), torch.from_numpy(depths).to(device)
        rows = torch.from_numpy(self.row_starts[requests] + depths).to(device)
        scale = torch.from_numpy(weights).to(device, self.target_probs.dtype)
        law = self.target_probs[rows] * scale[:, None]
        if self.draft_probs is None:
            law[torch.arange(len(requests), device=device), tokens[index, at]] -= 1.0
        elif self.draft_token_ids is None:
            law -= self.draft_probs[index, at]
        else:
            law[:, self.draft_token_ids] -= self.draft_probs[index, at]
        return law.clamp_(min=0.0)


def accept_rejection(judged: SampledRound) -> tuple[IntArray, IntArray]:
    """Rejection sampling of drafted prefixes.

    Returns
    -------
    num_accepted, next_token
        [R] each; `next_token` is the residual draw after a rejection, else the bonus draw.
    """
    p, q, tokens = judged.verified_probs()
    accepted = judged.uniforms() < acceptance(p, q)
    accepted &= np.arange(p.shape[1]) < judged.verify_lens[:, None]
    num_accepted = np.cumprod(accepted, axis=1).sum(axis=1).astype(np.int64)
    return num_accepted, _next_token(judged, num_accepted, np.ones(len(num_accepted)), tokens)


def acceptance(p: FloatArray, q: FloatArray) -> FloatArray:
    """min(1, p/q): how often a token of draft probability q > 0 and target probability p is accepted."""
    return np.minimum(1.0, p / q)


def accept_block(judged: SampledRound) -> tuple[IntArray, IntArray]:
    """Block verification.

    The weight w_k = min(1, w_{k-1} · p/q) is the part of the drafted path's probability that the target can take;
    prefix k < ℓ is kept with h_k = S_k / (S_k + 1 - w_k), S_k = Σ (w_k · p - q)₊ over the next token, and the whole
    with h_ℓ = w_ℓ. The longest kept prefix is accepted, and the next token is drawn from (w_k · p - q)₊, or from p
    behind the whole.

    Returns
    -------
    num_accepted, next_token
        [R] each.
    """
    p, q, tokens = judged.verified_probs()
    weights = block_weights(p, q)
    num_requests, width = p.shape
    lens = judged.verify_lens
    mass = np.zeros((num_requests, width + 1))
    inner = np.argwhere(np.arange(1, width) < lens[:, None])
    if inner.size:
        requests, depths = inner[:, 0], inner[:, 1] + 1
        rest = judged.excess(requests, depths, weights[requests, depths], tokens)
        mass[requests, depths] = rest.double().sum(dim=-1).cpu().numpy()
    kept = np.ones((num_requests, width + 1), dtype=np.bool_)
    depth = np.arange(1, width + 1)
    kept[:, 1:] = (judged.uniforms() < block_acceptance(weights, mass, lens)[:, 1:]) & (depth <= lens[:, None])
    num_accepted = (np.arange(width + 1) * kept).max(axis=1).astype(np.int64)
    return num_accepted, _next_token(judged, num_accepted, weights[np.arange(num_requests), num_accepted], tokens)


def block_weights(p: FloatArray, q: FloatArray) -> FloatArray:
    """w_0 = 1, w_k = min(1, w_{k-1} · p_k/q_k), [R, γ+1]."""
    weights = np.ones((p.shape[0], p.shape[1] + 1))
    for k in range(p.shape[1]):
        weights[:, k + 1] = np.minimum(1.0, weights[:, k] * p[:, k] / q[:, k])
    return weights


def block_acceptance(weights: FloatArray, mass: FloatArray, lens: IntArray) -> FloatArray:
    """h_k of `accept_block`, [R, γ+1], from w_k, S_k (used for k < ℓ) and ℓ [R]; entry 0 is never asked."""
    total = mass + 1.0 - weights
    inner = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
    return np.where(np.arange(weights.shape[1]) < lens[:, None], inner, weights)


def _next_token(judged: SampledRound, num_accepted: IntArray, weights: FloatArray, tokens: torch.Tensor) -> IntArray:
    rows = torch.from_numpy(judged.row_starts + num_accepted).to(judged.target_probs.device)
    law = judged.target_probs[rows]
    short = num_accepted < judged.verify_lens
    if short.any():
        requests = np.flatnonzero(short)
        rest = judged.excess(requests, num_accepted[requests], weights[requests], tokens)
        index = torch.from_numpy(requests).to(law.device)
        # Where p and q agree to the last bit nothing is left over, and p itself is as good.
        law[index] = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, law[index])
    at_position = judged.positions + 1 + num_accepted
    seed, ids = judged.params.seed, judged.request_ids
    bonus, residual = (keyed_uniform(seed, ids, at_position, purpose) for purpose in ("bonus", "residual"))
    drawn: IntArray = draw(law, np.where(short, residual, bonus)).cpu().numpy()
    return drawn


def cut(
    drafted: IntArray, num_accepted: IntArray, next_token: IntArray, remaining: IntArray, eos: frozenset[int]
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], list[list[int]]]:
    """Cut a round's tokens at the first end-of-sequence token and at the length limit.

    Returns
    -------
    num_accepted, num_emitted, stopped, tokens
        [R] each and the emitted token ids; accepted drafts behind the cut are not counted.
    """
    accepted, emitted, stopped, tokens = [], [], [], []
    for row, count, last, limit in zip(
        drafted.tolist(), num_accepted.tolist(), next_token.tolist(), remaining.tolist(), strict=True
    ):
        new = [*row[:count], last][:limit]
        end = next((index for index, token in enumerate(new) if token in eos), None)
        if end is not None:
            new = new[: end + 1]
        accepted.append(min(count, len(new)))
        emitted.append(len(new))
        stopped.append(end is not None)
        tokens.append(new)
    return np.array(accepted), np.array(emitted), np.array(stopped, dtype=np.bool_), tokens
