"""Blocks at many anchors of known sequences in one pass: for training and for dense anchors.

All blocks of a sequence share its context: the keys are [context (L) ; blocks (M·γ)], and a mask lets block m see
the context before its anchor and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F

from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.chain_model import ChainDrafter
from dspark_sim.engine.drafters.chain_walk import ChainWalk
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.walk import BlockWalk, WalkStart
from dspark_sim.engine.models import Target


class _DeepEnough(Exception):
    """Ends a forward pass that has all it was for."""


def _stop(*_: object) -> None:
    raise _DeepEnough


@torch.no_grad()
def dense_target(
    target: Target, tokens: torch.Tensor, layers: Sequence[int], *, with_hidden: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states [S, L, d] and features [S, L, n·d] of whole sequences [S, L], right-padded with anything.

    `Target.head` turns the former into logits. Without them (`with_hidden` ``False``, the tensor is empty) nothing
    above the deepest of `layers` is computed.
    """
    captured: dict[int, torch.Tensor] = {}
    hooks = [target.capture(layer, captured) for layer in set(layers)]
    hidden = torch.zeros((*tokens.shape, 0), dtype=target.dtype, device=tokens.device)
    try:
        if with_hidden:
            hidden = target.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        elif layers:
            if max(layers) >= 0:
                hooks.append(target.layers[max(layers)].register_forward_hook(_stop))
            with suppress(_DeepEnough):
                target.model.get_decoder()(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    features = [captured[layer] for layer in layers]
    return hidden, torch.cat(features, dim=-1) if features else hidden[..., :0]


def dense_hidden(
    drafter: BlockDrafter, tokens: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """Hidden states of the blocks at given anchors.

    Parameters
    ----------
    drafter
        The network.
    tokens
        [S, L] token ids.
    features
        [S, L, n·d] target features.
    anchors
        [S, M] positions; each block sees context strictly before its anchor.

    Returns
    -------
    tensor
        [S, M, γ, d].
    """
    num_sequences, num_anchors = anchors.shape
    gamma = drafter.config.block_size
    context = drafter.project_context(features.to(drafter.fc.weight.dtype))
    length = context.shape[1]
    places = torch.arange(length, device=tokens.device).expand(num_sequences, -1)
    context_rotary = drafter.rotary(places, context)
    kept = [layer.context_keys(context, context_rotary) for layer in drafter.layers]

    block = drafter.block_tokens(tokens.gather(1, anchors)).flatten(1)
    positions = (anchors[..., None] + torch.arange(gamma, device=tokens.device)).flatten(1)
    owner = torch.arange(num_anchors, device=tokens.device).repeat_interleave(gamma)
    sees_context = places[:, None, :] < anchors.repeat_interleave(gamma, dim=1)[..., None]
    sees_block = (owner[:, None] == owner).expand(num_sequences, -1, -1)
    mask = torch.cat((sees_context, sees_block), dim=-1)[:, None]
    groups = drafter.config.num_attention_heads // drafter.config.num_key_value_heads

    def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        all_keys = torch.cat((kept[layer][0], keys), dim=1).transpose(1, 2)
        all_values = torch.cat((kept[layer][1], values), dim=1).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            all_keys.repeat_interleave(groups, dim=1),
            all_values.repeat_interleave(groups, dim=1),
            attn_mask=mask,
        )
        return out.transpose(1, 2)

    return drafter.backbone(block, positions, attend).unflatten(1, (num_anchors, gamma))


def dense_walks(
    drafter: DraftNetwork, tokens: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor
) -> WalkStart:
    """Walks from given anchors of one sequence: each call of the result starts afresh.

    Parameters
    ----------
    drafter
        The network.
    tokens, features
        [L] token ids and [L, n·d] target features.
    anchors
        [M] positions.
    """
    if isinstance(drafter, ChainDrafter):
        return lambda: ChainWalk(drafter, tokens[None], features[None], anchors[None])
    assert isinstance(drafter, BlockDrafter)
    hidden = dense_hidden(drafter, tokens[None], features[None], anchors[None])[0]
    base = drafter.base_logits(hidden)
    return lambda: BlockWalk(drafter, hidden, base)


def teacher_forced(
    drafter: DraftNetwork, tokens: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What training needs: blocks along the sequences' own tokens.

    Parameters
    ----------
    drafter
        The network.
    tokens, features
        [S, L] token ids and [S, L, n·d] target features.
    anchors
        [S, M] positions.

    Returns
    -------
    logits
        [S, M, γ, Vd]; slot k of anchor a predicts position a + 1 + k. Slots past the sequence mean nothing.
    confidence_logits
        [S, M, γ], or ``None`` without a confidence head.
    """
    places = anchors[..., None] + torch.arange(drafter.config.block_size, device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    previous = tokens[rows, places.clamp(max=tokens.shape[1] - 1)]
    if isinstance(drafter, ChainDrafter):
        said = ChainWalk(drafter, tokens, features, anchors).along(previous.flatten(0, 1))
        return said.logits.unflatten(0, anchors.shape), None
    assert isinstance(drafter, BlockDrafter)
    hidden = dense_hidden(drafter, tokens, features, anchors)
    embedding = drafter.previous_embedding(previous)
    logits = drafter.block_logits(drafter.base_logits(hidden), hidden, embedding)
    return logits, drafter.confidence_logits(hidden, embedding)
