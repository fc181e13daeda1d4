"""DSpark's loss.

Σ_k w_k (0.1·CE + 0.9·‖q - p‖₁ + 1.0·BCE(c_k, 1 - ½‖q - p‖₁)), w_k = exp(-k/4) with k from 0, as in the released code
(the paper prints exp(-(k-1)/γ)). p is the target's law, q the drafter's, c_k the confidence. With a draft vocabulary,
q is zero outside it, so the target's mass there enters the distance and can never be accepted.

Laws in float32 are the largest tensors of training. They are made for some blocks at a time and made again in the
backward pass, so that memory holds the logits and the target's law of every distinct position, and little else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Entries of one float32 law that is held at a time: 256 MB.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Norm:
    """What sums over slots are divided by: the sum of w_k over valid slots, and the number of these."""

    weight: float | torch.Tensor
    count: float | torch.Tensor

    @staticmethod
    def of(valid: np.ndarray) -> Norm:
        """From [N, γ] bool, on the host."""
        weight = np.exp(-np.arange(valid.shape[1]) / 4.0) * valid
        return Norm(max(float(weight.sum()), 1.0), max(float(valid.sum()), 1.0))


@dataclass(slots=True)
class LossTerms:
    """Loss and its parts, scalars; `acceptance` is the mean of 1 - ½‖q - p‖₁ over valid slots.

    Terms of parts of an update that share a `Norm` add up to those of the whole.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    distance: torch.Tensor
    confidence: torch.Tensor
    acceptance: torch.Tensor

    def values(self) -> torch.Tensor:
        """[5], without gradients."""
        terms = (self.loss, self.cross_entropy, self.distance, self.confidence, self.acceptance)
        return torch.stack([term.detach() for term in terms])


def dspark_loss(
    draft_logits: torch.Tensor,
    target_probs: torch.Tensor,
    labels: torch.Tensor,
    confidence_logits: torch.Tensor | None,
    valid: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    norm: Norm | None = None,
    chunk: int = _CHUNK,
) -> LossTerms:
    """Loss over blocks.

    Parameters
    ----------
    draft_logits
        [N, γ, Vd].
    target_probs
        [N, γ, Vd] float32, the target's probabilities of the draft vocabulary (they may sum to less than 1); with
        `rows`, [P, Vd] of the distinct positions.
    labels
        [N, γ] draft-vocabulary index of the sequence's token, -100 where it is not in the vocabulary.
    confidence_logits
        [N, γ], or ``None`` without a confidence head.
    valid
        [N, γ], whether the slot lies inside the sequence.
    rows
        [N, γ] row of `target_probs` that each slot is compared with.
    norm
        Of the whole update, where this is a part of one; ``None`` means that of `valid`.
    chunk
        Entries of a law that are held in float32 at a time.
    """
    depth = torch.arange(draft_logits.shape[1], device=draft_logits.device)
    weight = torch.exp(-depth / 4.0) * valid
    if norm is None:
        norm = Norm(weight.sum().clamp(min=1.0), valid.sum().clamp(min=1))
    if rows is None:
        rows = torch.arange(valid.numel(), device=valid.device).view_as(valid)
        target_probs = target_probs.flatten(0, 1)
    logits, flat_labels, flat_rows = draft_logits.flatten(0, 1), labels.flatten(), rows.flatten()
    size = max(1, chunk // logits.shape[1])
    if len(logits) <= size:
        cross_entropy, distance = _compare(logits, target_probs, flat_labels, flat_rows)
    else:
        parts = zip(logits.split(size), flat_labels.split(size), flat_rows.split(size), strict=True)
        compared = [
            checkpoint(_compare, part, target_probs, label, row, use_reentrant=False, preserve_rng_state=False)
            for part, label, row in parts
        ]
        cross_entropy, distance = (torch.cat(values) for values in zip(*compared, strict=True))
    cross_entropy, distance = cross_entropy.view_as(weight), distance.view_as(weight)
    acceptance = (1.0 - 0.5 * distance).detach().clamp(0.0, 1.0)
    total = 0.1 * cross_entropy + 0.9 * distance
    judged = torch.zeros_like(total)
    if confidence_logits is not None:
        judged = F.binary_cross_entropy_with_logits(
            confidence_logits.to(acceptance.dtype), acceptance, reduction="none"
        )
        total = total + judged

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * weight).sum() / norm.weight

    return LossTerms(
        mean(total),
        mean(cross_entropy).detach(),
        mean(distance).detach(),
        mean(judged).detach(),
        (acceptance * valid).sum() / norm.count,
    )


def _compare(
    draft_logits: torch.Tensor, target_probs: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and distance [n] of slots: logits [n, Vd], probabilities [P, Vd], labels and rows [n]."""
    wide = torch.promote_types(draft_logits.dtype, torch.float32)
    log_q = draft_logits.log_softmax(dim=-1, dtype=wide)
    cross_entropy = F.nll_loss(log_q, labels, ignore_index=-100, reduction="none")
    probs = target_probs[rows]
    outside = (1.0 - probs.sum(dim=-1)).clamp(min=0.0)
    return cross_entropy, (log_q.exp() - probs).abs().sum(dim=-1) + outside
