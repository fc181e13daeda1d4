"""New networks of every kind, from a training configuration."""

from __future__ import annotations

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig
from dspark_sim.engine.drafters.chain_model import ChainDrafter, ChainDrafterConfig
from dspark_sim.engine.models import Target
from dspark_sim.training.config import TrainConfig

AnyDrafter = BlockDrafter | ChainDrafter


def new_drafter(config: TrainConfig, target: Target, draft_token_ids: torch.Tensor | None) -> AnyDrafter:
    """A drafter with random weights, the same for the same seed, attached to its target.

    Parameters
    ----------
    config
        Its kind and shape.
    target
        The target.
    draft_token_ids
        [Vd] ascending target ids, or ``None`` for the whole vocabulary.

    Raises
    ------
    UserError
        If the shape is impossible or the target has not the layers that it reads.
    """
    torch.manual_seed(config.seed)
    drafter: AnyDrafter
    if config.drafter in ("dspark", "dflash"):
        drafter = BlockDrafter(_block_shape(config, target), draft_token_ids)
    else:
        drafter = ChainDrafter(_chain_shape(config, target), draft_token_ids)
    for name, parameter in drafter.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        if name.endswith("markov_w2.weight"):
            torch.nn.init.zeros_(parameter)
    return drafter.attach(target)


def _block_shape(config: TrainConfig, target: Target) -> BlockDrafterConfig:
    text, headless = target.config, config.drafter == "dflash"
    return BlockDrafterConfig(
        target=config.target,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        block_size=config.block_size,
        target_layer_ids=config.target_layer_ids,
        # An id that ordinary text does not use; its embedding only has to differ from those of real tokens.
        mask_token_id=text.vocab_size - 1 if target.tokenizer.unk_token_id is None else target.tokenizer.unk_token_id,
        num_hidden_layers=config.num_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=target.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=text.rms_norm_eps,
        markov_rank=0 if headless else config.markov_rank,
        enable_confidence_head=config.confidence_head and not headless,
        draft_vocab_size=config.draft_vocab_size,
        markov_head_type=config.markov_head_type,
    )


def _chain_shape(config: TrainConfig, target: Target) -> ChainDrafterConfig:
    text = target.config
    return ChainDrafterConfig(
        target=config.target,
        kind="mtp" if config.drafter == "mtp" else "eagle3",
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        block_size=config.block_size,
        target_layer_ids=(text.num_hidden_layers - 1,) if config.drafter == "mtp" else config.target_layer_ids,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=target.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=text.rms_norm_eps,
        draft_vocab_size=config.draft_vocab_size,
    )
