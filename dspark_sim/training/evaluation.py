"""Acceptance on held-out text at temperature 0.

At temperature 0 a draft is accepted if it is the target's own token, and draft k counts only if all before it were
accepted. So what a drafter says along the text itself is what it would say while drafting, and no drafting is needed.
"""

from __future__ import annotations

import numpy as np
import torch

from dspark_sim.engine.drafters.dense import dense_target, teacher_forced
from dspark_sim.engine.models import Target
from dspark_sim.training.build import AnyDrafter
from dspark_sim.training.data import Sequence
from dspark_sim.training.parallel import Processes


def evaluate(
    drafter: AnyDrafter, target: Target, sequences: list[Sequence], group: Processes | None = None
) -> dict[str, float]:
    """Acceptance by walking held-out greedy answers block by block.

    Parameters
    ----------
    drafter, target
        The networks.
    sequences
        Held-out text; answers that were not greedy are left out.
    group
        Processes that share the work, if there are several; all must call.

    Returns
    -------
    dict
        ``mean_acceptance_length``, bonus included, and ``acceptance_1`` .. ``acceptance_γ``: of the rounds that
        accepted all drafts before the k-th, the share that accepted it too (NaN without such rounds). A draft behind
        the end of the text counts for neither.
    """
    gamma = drafter.config.block_size
    rank, world = (0, 1) if group is None else (group.rank, group.world)
    greedy = sorted((s for s in sequences if s.temperature == 0.0), key=lambda s: len(s.tokens))
    own = greedy[rank::world]
    # Rounds, tokens; then drafts accepted and drafts that were reached, by position.
    sums = np.zeros(2 + 2 * gamma)
    size = 8 if target.device.type == "cuda" else 2
    for start in range(0, len(own), size):
        for accepted in greedy_acceptance(drafter, target, own[start : start + size]):
            at = 0
            while at < len(accepted):
                count, left = int(accepted[at]), min(gamma, len(accepted) - at)
                sums[:2] += 1, count + 1
                sums[2 : 2 + count] += 1
                sums[2 + gamma : 2 + gamma + min(count + 1, left)] += 1
                at += count + 1
    if group is not None:
        total = torch.from_numpy(sums).to(target.device)
        group.add_up([total])
        sums = total.cpu().numpy()
    shares = [
        yes / seen if seen else float("nan") for yes, seen in zip(sums[2 : 2 + gamma], sums[2 + gamma :], strict=True)
    ]
    return {
        "mean_acceptance_length": float(sums[1] / max(sums[0], 1.0)),
        **{f"acceptance_{place}": float(share) for place, share in enumerate(shares, 1)},
    }


@torch.no_grad()
def greedy_acceptance(drafter: AnyDrafter, target: Target, sequences: list[Sequence]) -> list[np.ndarray]:
    """Drafts accepted at every anchor of greedy answers, at T = 0: for each, [answer length - 1]."""
    device, gamma = target.device, drafter.config.block_size
    length = max(len(sequence.tokens) for sequence in sequences)
    # Behind a text stands no token, so nothing can be accepted there.
    text = np.full((len(sequences), length + gamma), -1, dtype=np.int64)
    num_anchors = [len(sequence.tokens) - 1 - sequence.prompt_len for sequence in sequences]
    anchors = np.zeros((len(sequences), max(num_anchors)), dtype=np.int64)
    for row, (sequence, count) in enumerate(zip(sequences, num_anchors, strict=True)):
        text[row, : len(sequence.tokens)] = sequence.tokens
        # Anchors that fill up the row repeat its last one.
        anchors[row] = sequence.prompt_len + np.minimum(np.arange(anchors.shape[1]), count - 1)
    truth = torch.from_numpy(
        text[np.arange(len(sequences))[:, None, None], anchors[..., None] + 1 + np.arange(gamma)]
    ).to(device)
    tokens = torch.from_numpy(text[:, :length].clip(min=0)).to(device)
    _, features = dense_target(target, tokens, drafter.config.target_layer_ids, with_hidden=False)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=target.dtype == torch.bfloat16):
        logits, _ = teacher_forced(drafter, tokens, features, torch.from_numpy(anchors).to(device))
    drafts = drafter.draft_token_ids[logits.argmax(dim=-1)]
    accepted = (drafts == truth).cumprod(dim=-1).sum(dim=-1).cpu().numpy()
    return [row[:count] for row, count in zip(accepted, num_anchors, strict=True)]
