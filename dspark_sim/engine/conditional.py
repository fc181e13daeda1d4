"""Blocks given the output: the law of what a drafter proposed under rejection sampling, once the output is known.

Walk the slots of a block along the output. While everything so far was accepted, the target's law p and the drafter's
law q at slot k are those of the output's own prefix, P(accept and y) = min(p, q)(y) and P(y) = p(y), hence

    P(accepted | y) = min(1, q(y) / p(y)).

A rejected draft follows the normalised (q - p)₊, whatever y is, and later drafts follow the drafter from there (of a
block drafter only the sequential head runs on: the backbone's hidden states do not depend on drafted tokens). Random
numbers are keyed by (request, anchor, slot) under purposes of their own: the live run's decided the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.drafters.choose import Confidence, DraftRule
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.walk import Slots, WalkStart
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
    said
        [M, γ, ...].
    truth
        [M, γ] the output's tokens, -1 past its end.
    """

    said: Slots
    truth: torch.Tensor

    @staticmethod
    def of(start: WalkStart, anchor_tokens: torch.Tensor, truth: torch.Tensor) -> OutputPath:
        """From walks at the anchors, the tokens there [M] and the output's tokens behind them [M, γ]."""
        previous = torch.cat((anchor_tokens[:, None], truth[:, :-1].clamp(min=0)), dim=1)
        return OutputPath(start().along(previous), truth)


def conditional_blocks(
    network: DraftNetwork,
    confidence: Confidence,
    start: WalkStart,
    anchor_tokens: torch.Tensor,
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
    network, confidence
        A drafter, and where its confidence comes from.
    start, anchor_tokens
        Its walks at the anchors, and the tokens there [M].
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
    params = rule.params
    ids = network.draft_token_ids
    num_anchors, gamma = path.truth.shape
    device = path.truth.device
    settled = torch.full((num_anchors, gamma), -1, dtype=torch.long)
    for row, one in enumerate(known):
        settled[row, : len(one.tokens)] = torch.tensor(one.tokens[:gamma], dtype=torch.long)
    settled = settled.to(device)
    settled_accepted = torch.tensor([one.num_accepted for one in known], device=device)

    law = probabilities(path.said.logits, params)
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
    tokens = path.truth.clamp(min=0)
    draft_prob = q_y.clone()
    num_accepted = torch.zeros(num_anchors, dtype=torch.long, device=device)
    confidences = []
    walk, previous = start(), anchor_tokens
    for slot in range(gamma):
        # u < min(1, q/p), also where rounding makes p(y) zero.
        u = torch.from_numpy(uniform("replay_accept", slot)).to(device)
        accepted = alive & in_draft[:, slot] & (u * p_y[:, slot] < q_y[:, slot])
        is_settled = settled[:, slot] >= 0
        accepted = torch.where(is_settled & alive, slot < settled_accepted, accepted)
        num_accepted += accepted
        # Off the output's path, where a draft was rejected before, the drafter runs on from what it drafted.
        off = (~alive).nonzero()[:, 0]
        own = walk.step(previous, off)
        q, logits, hidden = law[:, slot], path.said.logits[:, slot], path.said.hidden[:, slot]
        embedding = None if path.said.embedding is None else path.said.embedding[:, slot]
        if len(off):
            q[off] = probabilities(own.logits, params)
            logits, hidden = logits.index_put((off,), own.logits), hidden.index_put((off,), own.hidden)
            if embedding is not None and own.embedding is not None:
                embedding = embedding.index_put((off,), own.embedding)
        confidences.append(confidence.estimate(network, hidden, embedding, logits))
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
        alive, previous = accepted, tokens[:, slot]
    estimates = [one for one in confidences if one is not None]
    return ConditionalBlocks(
        tokens.cpu().numpy(),
        num_accepted.cpu().numpy(),
        accept_prob.cpu().numpy(),
        confidence.calibrate(torch.stack(estimates, dim=1)).cpu().numpy() if estimates else None,
        draft_prob.cpu().numpy(),
    )
