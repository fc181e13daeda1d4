"""Drafting: tokens of blocks one after the other, along a walk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dspark_sim.engine.drafters import Drafted, IntArray
from dspark_sim.engine.drafters.choose import Choose, Confidence
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.walk import Walk


@dataclass(slots=True)
class HeadOutput:
    """Drafted blocks.

    Parameters
    ----------
    tokens
        [N, k] target token ids.
    confidence
        [N, k] estimated conditional acceptance, or ``None``.
    probs
        [N, k, Vd] float32 law each token was drawn from, or ``None`` when they were not drawn.
    draft_prob
        [N, k] the drafter's probability of each token, or ``None`` when not asked for.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor | None
    probs: torch.Tensor | None
    draft_prob: torch.Tensor | None = None

    def drafted(self, limits: IntArray) -> Drafted:
        """The same on the host, as proposals of at most `limits` [N] tokens."""
        tokens: IntArray = self.tokens.cpu().numpy()
        confidence, prob = (None if x is None else x.double().cpu().numpy() for x in (self.confidence, self.draft_prob))
        return Drafted(tokens, np.minimum(tokens.shape[1], limits), confidence, self.probs, prob)


def run_head(
    drafter: DraftNetwork,
    walk: Walk,
    anchors: torch.Tensor,
    num_slots: int,
    choose: Choose,
    confidence: Confidence | None = None,
    *,
    with_prob: bool = False,
) -> HeadOutput:
    """Draft k tokens behind each anchor.

    Parameters
    ----------
    drafter
        The network.
    walk
        At the anchors.
    anchors
        [N] anchor tokens.
    num_slots
        k.
    choose
        ``choose(slot, logits [N, Vd])`` returns draft-vocabulary indices [N] and the law they were drawn from.
    confidence
        Where confidence comes from; ``None`` means the confidence head.
    with_prob
        Whether `draft_prob` is wanted.
    """
    judge = confidence or Confidence()
    tokens, confidences, laws, probs = [], [], [], []
    previous = anchors
    for slot in range(num_slots):
        said = walk.step(previous)
        index, law = choose(slot, said.logits)
        confidences.append(judge.estimate(drafter, said.hidden, said.embedding, said.logits))
        if with_prob:
            whole = said.logits.float().softmax(dim=-1) if law is None else law
            probs.append(whole.gather(-1, index[:, None])[:, 0])
        previous = drafter.draft_token_ids[index]
        tokens.append(previous)
        laws.append(law)
    known = [c for c in confidences if c is not None]
    drawn = [law for law in laws if law is not None]
    return HeadOutput(
        torch.stack(tokens, dim=1),
        judge.calibrate(torch.stack(known, dim=1)) if known else None,
        torch.stack(drawn, dim=1) if drawn else None,
        torch.stack(probs, dim=1) if probs else None,
    )


def greedy(_slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Choose the most probable token."""
    return logits.argmax(dim=-1), None
