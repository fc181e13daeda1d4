"""DSpark's loss.

Σ_k w_k (0.1·CE + 0.9·‖q - p‖₁ + 1.0·BCE(c_k, 1 - ½‖q - p‖₁)), w_k = exp(-k/4) with k from 0, as in the released code
(the paper prints exp(-(k-1)/γ)). p is the target's law, q the drafter's, c_k the confidence. With a draft vocabulary,
q is zero outside it, so the target's mass there enters the distance and can never be accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class LossTerms:
    """Loss and its parts, scalars; `acceptance` is the mean of 1 - ½‖q - p‖₁ over valid slots."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    distance: torch.Tensor
    confidence: torch.Tensor
    acceptance: torch.Tensor


def dspark_loss(
    draft_logits: torch.Tensor,
    target_probs: torch.Tensor,
    labels: torch.Tensor,
    confidence_logits: torch.Tensor | None,
    valid: torch.Tensor,
) -> LossTerms:
    """Loss over blocks.

    Parameters
    ----------
    draft_logits
        [N, γ, Vd].
    target_probs
        [N, γ, Vd] float32, the target's probabilities of the draft vocabulary (they may sum to less than 1).
    labels
        [N, γ] draft-vocabulary index of the sequence's token, -100 where it is not in the vocabulary.
    confidence_logits
        [N, γ], or ``None`` without a confidence head.
    valid
        [N, γ], whether the slot lies inside the sequence.
    """
    depth = torch.arange(draft_logits.shape[1], device=draft_logits.device)
    weight = torch.exp(-depth / 4.0) * valid
    norm = weight.sum().clamp(min=1.0)
    log_q = draft_logits.float().log_softmax(dim=-1)
    cross_entropy = F.nll_loss(log_q.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    cross_entropy = cross_entropy.view_as(weight)
    outside = (1.0 - target_probs.sum(dim=-1)).clamp(min=0.0)
    distance = (log_q.exp() - target_probs).abs().sum(dim=-1) + outside
    acceptance = (1.0 - 0.5 * distance).detach().clamp(0.0, 1.0)
    total = 0.1 * cross_entropy + 0.9 * distance
    judged = torch.zeros_like(total)
    if confidence_logits is not None:
        judged = F.binary_cross_entropy_with_logits(confidence_logits.float(), acceptance, reduction="none")
        total = total + judged

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * weight).sum() / norm

    return LossTerms(
        mean(total),
        mean(cross_entropy).detach(),
        mean(distance).detach(),
        mean(judged).detach(),
        (acceptance * valid).sum() / valid.sum().clamp(min=1),
    )
