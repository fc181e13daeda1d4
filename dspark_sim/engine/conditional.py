"""Blocks given the output: the law of what a drafter proposed under rejection sampling, once the output is known.

Walk the slots of a block along the output. While everything so far was accepted, the target's law p and the drafter's
law q at slot k are those of the output's own prefix, P(accept and y) = min(p, q)(y) and P(y) = p(y), hence

    P(accepted | y) = min(1, q(y) / p(y)).

A rejected draft follows the normalised (q - p)₊, whatever y is, and later drafts follow the drafter from there; only
the sequential head runs on, since the backbone's hidden states do not depend on drafted tokens. Random numbers are
keyed by (request, anchor, slot) under purposes of their own: the live run's decided the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.sampling import draw, keyed_uniform, probabilities

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class Known:
    """What a live round showed of the block at its anchor.

    Parameters
    ----------
    tokens
        Drafted tokens whose place in the block's law is settled: all of them behind a rejection, else the verified
        ones (a draft behind the verified prefix met no output token yet).
    num_accepted
        Leading ones that were accepted.
    """

    tokens: list[int] = field(default_factory=list)
    num_accepted: int = 0

    @staticmethod
    def of_round(draft_tokens: Sequence[int], verify_len: int, num_accepted: int) -> Known:
        """From a row of the table `drafts`."""
        rejected = num_accepted < verify_len
        return Known(list(draft_tokens) if rejected else list(draft_tokens[:verify_len]), num_accepted)


@dataclass(slots=True)
class ConditionalBlocks:
    """Blocks at M anchors, all [M, γ] but `num_accepted`, [M]."""

    tokens: IntArray
    num_accepted: IntArray
    accept_prob: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float32] | None
    draft_prob: npt.NDArray[np.float64]


def conditional_blocks(
    drafter: RaggedBlockDrafter,
    hidden: torch.Tensor,
    anchor_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    rows: torch.Tensor,
    truth: IntArray,
    known: Sequence[Known],
    rule: DraftRule,
    request_ids: IntArray,
    anchors: IntArray,
) -> ConditionalBlocks:
    """Draw a block at every anchor, given the output.

    Parameters
    ----------
    drafter
        A block drafter.
    hidden
        [M, γ, d] its hidden states at the anchors.
    anchor_tokens
        [M] tokens at the anchors.
    target_logits, rows
        [L, V] of the whole sequence, and [M, γ] the row that judges each slot.
    truth
        [M, γ] the output's tokens, -1 past its end.
    known
        What live rounds settled, by anchor.
    rule
        Sampling.
    request_ids, anchors
        [M], keys of the random numbers.

    Returns
    -------
    blocks
        `accept_prob` is 1 - TV(p, q) on the output's path, the probability before the output was known.
    """
    network, params = drafter.network, rule.params
    ids = network.draft_token_ids
    device = hidden.device
    num_anchors, gamma = truth.shape
    outputs = torch.from_numpy(truth).to(device)
    settled = torch.full((num_anchors, gamma), -1, dtype=torch.long)
    for row, one in enumerate(known):
        settled[row, : len(one.tokens)] = torch.tensor(one.tokens[:gamma], dtype=torch.long)
    settled = settled.to(device)
    settled_accepted = torch.tensor([one.num_accepted for one in known], device=device)

    base = network.base_logits(hidden)
    previous, path = anchor_tokens, anchor_tokens
    alive = torch.ones(num_anchors, dtype=torch.bool, device=device)
    num_accepted = torch.zeros(num_anchors, dtype=torch.long, device=device)
    tokens, confidences, accept_probs, draft_probs = [], [], [], []
    for slot in range(gamma):
        # On the output's path, for accept_prob; while alive the drafted path is the same.
        embedding = network.previous_embedding(previous)
        logits = network.markov_logits(base[:, slot], embedding)
        confidences.append(drafter.confidence.estimate(network, hidden[:, slot], embedding, logits))
        q = probabilities(logits, params)
        q_path = q
        if not bool(alive.all()):
            on_path = network.markov_logits(base[:, slot], network.previous_embedding(path))
            q_path = probabilities(on_path, params)
        p_all = probabilities(target_logits[rows[:, slot]], params)
        p = p_all[:, ids]
        accept_probs.append(torch.minimum(p, q_path).double().sum(dim=-1))

        y = outputs[:, slot]
        inside = y >= 0
        index = network.target_to_draft[y.clamp(min=0)]
        in_draft = index < len(ids)
        index = index.clamp(max=len(ids) - 1)
        q_y = torch.where(in_draft, q.gather(-1, index[:, None])[:, 0], 0.0).double()
        p_y = p_all.gather(-1, y.clamp(min=0)[:, None])[:, 0].double()
        u = torch.from_numpy(keyed_uniform(params.seed, request_ids, anchors, "replay_accept", slot)).to(device)
        # u < min(1, q/p), also where rounding makes p(y) zero.
        accepted = alive & inside & in_draft & (u * p_y < q_y)
        is_settled = settled[:, slot] >= 0
        accepted = torch.where(is_settled & alive, slot < settled_accepted, accepted)

        rest = (q - p).clamp(min=0.0)
        rejected = alive & inside & (rest.sum(dim=-1) > 0)
        law = torch.where(rejected[:, None], rest, q)
        drawn = ids[draw(law, keyed_uniform(params.seed, request_ids, anchors, "replay_draft", slot))]
        token = torch.where(accepted, y, drawn)
        token = torch.where(is_settled, settled[:, slot], token)
        tokens.append(token)
        at = network.target_to_draft[token].clamp(max=len(ids) - 1)
        draft_probs.append(q.gather(-1, at[:, None])[:, 0].double())
        num_accepted += accepted
        alive = accepted
        previous, path = token, torch.where(inside, y, path)
    estimates = [one for one in confidences if one is not None]
    return ConditionalBlocks(
        torch.stack(tokens, dim=1).cpu().numpy(),
        num_accepted.cpu().numpy(),
        torch.stack(accept_probs, dim=1).cpu().numpy(),
        torch.stack(estimates, dim=1).cpu().numpy() if estimates else None,
        torch.stack(draft_probs, dim=1).cpu().numpy(),
    )
