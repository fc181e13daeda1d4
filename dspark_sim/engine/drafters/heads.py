"""The sequential head: tokens of a block one after the other, from hidden states that are already there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter


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
        [N, k, Vd] float32 law each token was drawn from, or ``None`` when greedy.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor | None
    probs: torch.Tensor | None


def run_head(
    drafter: BlockDrafter,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    choose: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
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
    """
    base = drafter.base_logits(hidden)
    tokens, confidences, laws = [], [], []
    previous = anchors
    for slot in range(hidden.shape[1]):
        embedding = drafter.previous_embedding(previous)
        index, law = choose(slot, drafter.markov_logits(base[:, slot], embedding))
        confidence = drafter.confidence_logits(hidden[:, slot], embedding)
        previous = drafter.draft_token_ids[index]
        tokens.append(previous)
        confidences.append(confidence)
        laws.append(law)
    known = [c for c in confidences if c is not None]
    drawn = [law for law in laws if law is not None]
    return HeadOutput(
        torch.stack(tokens, dim=1),
        torch.stack(known, dim=1).float().sigmoid() if known else None,
        torch.stack(drawn, dim=1) if drawn else None,
    )


def greedy(_slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Choose the most probable token."""
    return logits.argmax(dim=-1), None
