"""The sequential head: tokens of a block one after the other, from hidden states that are already there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.choose import Choose, Confidence


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


def run_head(
    drafter: BlockDrafter,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    choose: Choose,
    confidence: Confidence | None = None,
    *,
    with_prob: bool = False,
    base: torch.Tensor | None = None,
) -> HeadOutput:
    """Draft k tokens behind each anchor.

    Parameters
    ----------
    drafter
        The network.
    hidden
        [N, k, d] hidden states of the first k slots.
    anchors
        [N] anchor tokens.
    choose
        ``choose(slot, logits [N, Vd])`` returns draft-vocabulary indices [N] and the law they were drawn from.
    confidence
        Where confidence comes from; ``None`` means the confidence head.
    with_prob
        Whether `draft_prob` is wanted.
    base
        [N, k, Vd] logits before the sequential head, where they are known already.
    """
    judge = confidence or Confidence()
    base = drafter.base_logits(hidden) if base is None else base
    tokens, confidences, laws, probs = [], [], [], []
    previous = anchors
    for slot in range(hidden.shape[1]):
        embedding = drafter.previous_embedding(previous)
        logits = drafter.markov_logits(base[:, slot], embedding)
        index, law = choose(slot, logits)
        confidences.append(judge.estimate(drafter, hidden[:, slot], embedding, logits))
        if with_prob:
            whole = logits.float().softmax(dim=-1) if law is None else law
            probs.append(whole.gather(-1, index[:, None])[:, 0])
        previous = drafter.draft_token_ids[index]
        tokens.append(previous)
        laws.append(law)
    known = [c for c in confidences if c is not None]
    drawn = [law for law in laws if law is not None]
    return HeadOutput(
        torch.stack(tokens, dim=1),
        torch.stack(known, dim=1) if known else None,
        torch.stack(drawn, dim=1) if drawn else None,
        torch.stack(probs, dim=1) if probs else None,
    )


def greedy(_slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Choose the most probable token."""
    return logits.argmax(dim=-1), None
