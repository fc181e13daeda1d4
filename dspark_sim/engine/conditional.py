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
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.block_model import BlockDrafter
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


@dataclass(slots=True)
class OutputPath:
    """What the drafter says of M anchors' slots along the output itself.

    Parameters
    ----------
    hidden, base
        [M, γ, d] its hidden states, and [M, γ, Vd] their logits before the sequential head.
    embedding, logits
        Its embedding of the output's token before each slot ([M, γ, r], ``None`` for rank 0), and the logits given it.
    truth
        [M, γ] the output's tokens, -1 past its end.
    """

    hidden: torch.Tensor
    base: torch.Tensor
    embedding: torch.Tensor | None
    logits: torch.Tensor
    truth: torch.Tensor

    @staticmethod
    def of(network: BlockDrafter, hidden: torch.Tensor, anchor_tokens: torch.Tensor, truth: torch.Tensor) -> OutputPath:
        """From hidden states [M, γ, d], the tokens at the anchors [M] and the output's tokens behind them [M, γ]."""
        base = network.base_logits(hidden)
        embedding = network.previous_embedding(torch.cat((anchor_tokens[:, None], truth[:, :-1].clamp(min=0)), dim=1))
        return OutputPath(hidden, base, embedding, network.markov_logits(base, embedding), truth)


def conditional_blocks(
    drafter: RaggedBlockDrafter,
    path: OutputPath,
    target_law: torch.Tensor,
    rows: torch.Tensor,
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
    path
        What it says along the output.
    target_law, rows
        [L, V] the target's probabilities, and [M, γ] the row that judges each slot.
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
    num_anchors, gamma = path.truth.shape
    device = path.truth.device
    settled = torch.full((num_anchors, gamma), -1, dtype=torch.long)
    for row, one in enumerate(known):
        settled[row, : len(one.tokens)] = torch.tensor(one.tokens[:gamma], dtype=torch.long)
    settled = settled.to(device)
    settled_accepted = torch.tensor([one.num_accepted for one in known], device=device)

    law = probabilities(path.logits, params)
    p = target_law[:, ids][rows]
    accept_prob = torch.minimum(p, law).sum(dim=-1).double()
    index = network.target_to_draft[path.truth.clamp(min=0)]
    inside = path.truth >= 0
    in_draft = inside & (index < len(ids))
    q_y = law.gather(-1, index.clamp(max=len(ids) - 1)[..., None])[..., 0].double().masked_fill(~in_draft, 0.0)
    p_y = target_law[rows, path.truth.clamp(min=0)].double()

    def uniform(purpose: Literal["replay_accept", "replay_draft"], slot: int) -> npt.NDArray[np.float64]:
        return keyed_uniform(params.seed, request_ids, anchors, purpose, slot)

    alive = torch.ones(num_anchors, dtype=torch.bool, device=device)
    tokens = path.truth.clone()
    draft_prob = q_y.clone()
    num_accepted = torch.zeros(num_anchors, dtype=torch.long, device=device)
    confidences = []
    for slot in range(gamma):
        # u < min(1, q/p), also where rounding makes p(y) zero.
        u = torch.from_numpy(uniform("replay_accept", slot)).to(device)
        accepted = alive & in_draft[:, slot] & (u * p_y[:, slot] < q_y[:, slot])
        is_settled = settled[:, slot] >= 0
        accepted = torch.where(is_settled & alive, slot < settled_accepted, accepted)
        num_accepted += accepted
        # All other drafts are the drafter's: off the output's path its head runs on from what it drafted.
        off = (~alive).nonzero()[:, 0]
        q, logits = law[:, slot], path.logits[:, slot]
        embedding = None if path.embedding is None else path.embedding[:, slot]
        if len(off):
            own = network.previous_embedding(tokens[off, slot - 1])
            own_logits = network.markov_logits(path.base[off, slot], own)
            q[off] = probabilities(own_logits, params)
            if embedding is not None and own is not None:
                embedding, logits = embedding.index_put((off,), own), logits.index_put((off,), own_logits)
        confidences.append(drafter.confidence.estimate(network, path.hidden[:, slot], embedding, logits))
        drawn = (~accepted).nonzero()[:, 0]
        if len(drawn):
            rest = (q[drawn] - p[drawn, slot]).clamp(min=0.0)
            rejected = (alive & inside[:, slot])[drawn] & (rest.sum(dim=-1) > 0)
            weights = torch.where(rejected[:, None], rest, q[drawn])
            token = ids[draw(weights, uniform("replay_draft", slot)[drawn.cpu().numpy()])]
            token = torch.where(is_settled[drawn], settled[drawn, slot], token)
            tokens[drawn, slot] = token
            at = network.target_to_draft[token].clamp(max=len(ids) - 1)
            draft_prob[drawn, slot] = q[drawn, at].double()
        alive = accepted
    estimates = [one for one in confidences if one is not None]
    return ConditionalBlocks(
        tokens.cpu().numpy(),
        num_accepted.cpu().numpy(),
        accept_prob.cpu().numpy(),
        torch.stack(estimates, dim=1).cpu().numpy() if estimates else None,
        draft_prob.cpu().numpy(),
    )
