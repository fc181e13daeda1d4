"""Acceptance rules as pure functions: what the target's pass says about the drafted tokens.

Row 0 of a request is its anchor, row k the k-th drafted token; the logits of row k judge drafted token k+1 (1-based)
or, behind the last accepted one, give the bonus token.

* ``greedy``: token k is accepted iff it equals the target's argmax. The output is the target's greedy output.
* ``rejection`` (Leviathan et al. 2023; Chen et al. 2023): token x ~ q is accepted iff u < min(1, p(x)/q(x)); the
  first rejected one is replaced by a draw from the normalised (p - q)₊. The output has exactly the target's law.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.sampling import SamplingParams, draw, keyed_uniform

Mode = Literal["greedy", "rejection"]
IntArray = npt.NDArray[np.int64]


def accept_greedy(drafted: IntArray, verify_lens: IntArray, target_tokens: IntArray) -> tuple[IntArray, IntArray]:
    """Longest prefix of the drafts that the target would have chosen itself.

    Parameters
    ----------
    drafted
        [R, γ] drafted token ids; entries past `verify_lens` are ignored.
    verify_lens
        [R], drafts verified.
    target_tokens
        [R, γ+1] the target's argmax at row 0..γ; entries past a request's rows are ignored.

    Returns
    -------
    num_accepted, next_token
        [R] each; `next_token` is the target's own token behind the accepted prefix.
    """
    width = drafted.shape[1]
    matches = (drafted == target_tokens[:, :width]) & (np.arange(width) < verify_lens[:, None])
    num_accepted = np.cumprod(matches, axis=1).sum(axis=1).astype(np.int64)
    return num_accepted, target_tokens[np.arange(len(verify_lens)), num_accepted]


def accept_rejection(
    drafted: IntArray,
    verify_lens: IntArray,
    target_probs: torch.Tensor,
    row_starts: IntArray,
    draft_probs: torch.Tensor | None,
    draft_token_ids: torch.Tensor | None,
    request_ids: IntArray,
    positions: IntArray,
    params: SamplingParams,
) -> tuple[IntArray, IntArray]:
    """Rejection sampling of drafted prefixes.

    Parameters
    ----------
    drafted, verify_lens
        As in `accept_greedy`.
    target_probs
        [B, V] float32, rows of all requests one after the other.
    row_starts
        [R], row of each request's anchor.
    draft_probs
        [R, γ, Vd] float32 that the drafts were drawn from, or ``None`` when drafts are deterministic (point mass).
    draft_token_ids
        [Vd] target ids of the draft vocabulary, or ``None`` when it is the target's.
    request_ids, positions
        [R], keys of the random numbers; `positions` are the anchors'.
    params
        Seed of the random numbers.

    Returns
    -------
    num_accepted, next_token
        [R] each; `next_token` is the residual draw after a rejection, else the bonus draw.
    """
    width = drafted.shape[1]
    device = target_probs.device
    depth = np.arange(width)
    tokens = torch.from_numpy(np.where(depth < verify_lens[:, None], drafted, 0)).to(device)
    rows = np.minimum(row_starts[:, None] + depth, len(target_probs) - 1)
    p = target_probs[torch.from_numpy(rows).to(device), tokens].double().cpu().numpy()
    q = np.ones_like(p) if draft_probs is None else _gather_draft(draft_probs, draft_token_ids, tokens)
    u = keyed_uniform(params.seed, request_ids[:, None], positions[:, None] + 1 + depth, "accept")
    accepted = (u * q < p) & (depth < verify_lens[:, None])
    num_accepted = np.cumprod(accepted, axis=1).sum(axis=1).astype(np.int64)

    weights = target_probs[torch.from_numpy(row_starts + num_accepted).to(device)].clone()
    rejected = np.flatnonzero(num_accepted < verify_lens)
    if rejected.size:
        index = torch.from_numpy(rejected).to(device)
        at = torch.from_numpy(num_accepted[rejected]).to(device)
        if draft_probs is None:
            weights[index, tokens[index, at]] = 0.0
        else:
            ids = torch.arange(weights.shape[-1], device=device) if draft_token_ids is None else draft_token_ids
            weights[index[:, None], ids] -= draft_probs[index, at]
            weights[index] = weights[index].clamp_(min=0.0)
    at_position = positions + 1 + num_accepted
    bonus = keyed_uniform(params.seed, request_ids, at_position, "bonus")
    residual = keyed_uniform(params.seed, request_ids, at_position, "residual")
    uniforms = np.where(num_accepted < verify_lens, residual, bonus)
    return num_accepted, draw(weights, uniforms).cpu().numpy()


def _gather_draft(
    draft_probs: torch.Tensor, draft_token_ids: torch.Tensor | None, tokens: torch.Tensor
) -> npt.NDArray[np.float64]:
    """Q of each drafted token, [R, γ]."""
    if draft_token_ids is None:
        index = tokens
    else:
        # The ids are ascending, and every drafted token is among them.
        index = torch.searchsorted(draft_token_ids, tokens).clamp_(max=len(draft_token_ids) - 1)
    q: npt.NDArray[np.float64] = draft_probs.gather(-1, index[..., None])[..., 0].double().cpu().numpy()
    return q


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
