"""Writing a block drafter in DeepSpec's form, for programs that read that.

The form is flat and whole: embedding and head go into the file, the target's where the drafter borrows them. Three
things of ours have no place in it and are written beside it, so that `dialects` reads back the same drafter:

* A draft vocabulary comes as speculators stores it, ``draft_vocab_size`` in the config and tensors ``d2t`` (target id
  minus draft id, [Vd]) and ``t2d`` (mask, [V]). The head keeps its Vd rows; W1 gets a row for each of the target's V
  tokens, equal for all outside the draft vocabulary.
* Layers without norms of queries and keys, as our trainer makes them, have no class in DeepSpec; the architecture is
  then ``LlamaDSparkModel``.
* For such layers ``embedding_scale`` says by what the embedding is multiplied, where that is not 1 (Gemma).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.dialects import DEEPSPEC
from dspark_sim.engine.drafters.folder import write_checkpoint
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.rope import rope_parameters
from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError

ExportType = Literal["bfloat16", "float32"]


def export_deepspec(drafter: DraftNetwork, target: Target, folder: Path | str, dtype: ExportType = "bfloat16") -> None:
    """Write `config.json` and `model.safetensors` in DeepSpec's form.

    Parameters
    ----------
    drafter
        A block drafter, attached to `target`.
    target
        Its embedding and head are written where the drafter has none of its own.
    folder
        Made where it is missing.
    dtype
        Of the tensors; with ``float32`` a float32 drafter is read back bit for bit.

    Raises
    ------
    UserError
        If the form has no place for the drafter, or the folder cannot be written.
    """
    if dtype not in get_args(ExportType):
        raise UserError(f"dtype is {dtype!r}; export as one of {', '.join(get_args(ExportType))}")
    if not isinstance(drafter, BlockDrafter):
        raise UserError("DeepSpec's form has no place for an autoregressive drafter; export a dspark or dflash one")
    if drafter.config.layout != "anchor_first":
        raise UserError("DeepSpec's form has no place for the layout 1+N; export a drafter whose anchor slot predicts")
    kind = getattr(torch, dtype)
    tensors = {name: value.detach().to("cpu", kind) for name, value in _tensors(drafter, target).items()}
    if drafter.config.draft_vocab_size:
        ids = drafter.draft_token_ids.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(drafter.config.vocab_size, dtype=torch.bool)
        tensors["t2d"][ids] = True
    # Safetensors refuses tensors that share memory, as a tied embedding and head do.
    write_checkpoint(Path(folder), _config(drafter, target, dtype), {k: v.clone() for k, v in tensors.items()})


def _tensors(drafter: BlockDrafter, target: Target) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = dict(drafter.state_dict())
    config = drafter.config
    if not config.own_embedding:
        tensors["embed_tokens.weight"] = target.model.get_input_embeddings().weight
    if not config.own_head:
        head = target.model.get_output_embeddings().weight
        tensors["lm_head.weight"] = head[drafter.draft_token_ids] if config.draft_vocab_size else head
    if drafter.markov_head is not None and config.draft_vocab_size and config.markov_vocab == "draft":
        tensors["markov_head.markov_w1.weight"] = drafter.markov_head.markov_w1.weight[drafter.target_to_draft]
    return tensors


def _config(drafter: BlockDrafter, target: Target, dtype: ExportType) -> dict[str, Any]:
    config, text = drafter.config, target.config
    gemma = config.layer_family == "gemma4"
    cap = config.final_logit_softcapping
    document: dict[str, Any] = {
        "architectures": [next(name for name, family in DEEPSPEC.items() if family == config.layer_family)],
        "model_type": text.model_type,
        "target_model_type": target.model.config.model_type,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_target_layers": text.num_hidden_layers,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "rope_parameters": config.rope_parameters or rope_parameters(text.to_dict()),
        "tie_word_embeddings": False,
        "final_logit_softcapping": getattr(text, "final_logit_softcapping", None) if cap == "target" else cap,
        "block_size": config.block_size,
        "target_layer_ids": list(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
        "num_anchors": 0,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov and config.markov_rank > 0,
    }
    if gemma:
        document |= {
            "global_head_dim": config.head_dim,
            "num_global_key_value_heads": config.num_key_value_heads,
            "attention_k_eq_v": config.attention_k_eq_v,
        }
    scale = config.embedding_scale
    if scale == "target":
        table = target.model.get_input_embeddings()
        scale = float(getattr(table, "scalar_embed_scale", 1.0))
    if not gemma and scale != 1.0:
        document["embedding_scale"] = scale
    if config.draft_vocab_size:
        document["draft_vocab_size"] = config.draft_vocab_size
    return document
