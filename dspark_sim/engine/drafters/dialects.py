"""Other projects' checkpoints of block drafters, recognised by what they say and never by a guess.

* *DeepSpec*: ``architectures`` is ``Qwen3DSparkModel`` or ``Gemma4DSparkModel`` (``LlamaDSparkModel`` is this
  package's own, for layers that DeepSpec has no class for; see `export`). Flat tensor names, embedding and head
  included; DFlash is the same with ``markov_rank`` 0. Slot k predicts position a+1+k.
* *speculators* (vLLM): ``speculators_model_type`` is ``dspark`` or ``dflash``. The layers' shape is nested under
  ``transformer_layer_config``, which leaves out transformers' defaults; ``aux_hidden_state_layer_ids`` count the
  embedding as 0 and are ours + 1; ``sample_from_anchor`` says which position slot k predicts; a draft vocabulary comes
  as ``d2t`` (target id minus draft id) and ``t2d`` (a mask). Layers are Qwen3's; the target's embedding is used as it
  is stored, and logits are not capped.
* *z-lab DFlash*: ``dflash_config``; layout "1+N", neither embedding nor head.

What the checkpoint says must fit the target (vocabulary, hidden size, layers, family where it is named), every tensor
is used and none may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig, LayerFamily, Source
from dspark_sim.engine.drafters.folder import fill, read_tensors
from dspark_sim.engine.drafters.rope import rope_parameters
from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError

DEEPSPEC: dict[str, LayerFamily] = {
    "Qwen3DSparkModel": "qwen3",
    "Gemma4DSparkModel": "gemma4",
    "LlamaDSparkModel": "llama",
}
Dialect = Literal["deepspec", "speculators", "dflash"]
_SPECULATORS = ("dspark", "dflash")
_ACTIVATIONS = {"llama": "silu", "qwen3": "silu", "gemma4": "gelu_pytorch_tanh"}


def detect(document: Mapping[str, Any]) -> Dialect:
    """Whose checkpoint a `config.json` belongs to.

    Raises
    ------
    UserError
        If none of the three; the text has no folder in it.
    """
    kind = document.get("speculators_model_type")
    architecture = (document.get("architectures") or ["none"])[0]
    if kind is not None:
        if kind not in _SPECULATORS:
            raise UserError(f"it is a speculators checkpoint of type {kind!r}; supported are {', '.join(_SPECULATORS)}")
        return "speculators"
    if architecture in DEEPSPEC:
        return "deepspec"
    if architecture == "DFlashDraftModel":
        return "dflash"
    if "dspark_block_size" in document:
        raise UserError("it is a whole target with a drafter inside; take a checkpoint of the drafter alone")
    raise UserError(
        f"its architecture {architecture} is not known; supported are {', '.join(DEEPSPEC)}, speculators' dspark and "
        "dflash, and DFlashDraftModel"
    )


def load_foreign(folder: Path, document: Mapping[str, Any], target: Target) -> BlockDrafter:
    """Read another project's checkpoint and attach it to its target.

    Raises
    ------
    UserError
        If it is not recognised, has a feature that is not supported, is damaged, or does not fit the target.
    """
    readers = {"deepspec": _deepspec, "speculators": _speculators, "dflash": _dflash}
    try:
        dialect = detect(document)
        tensors = read_tensors(folder)
        ids = _draft_ids(tensors)
        values = readers[dialect](document, tensors, target)
        values |= _common(document, tensors, dialect, target)
        _check_vocabulary(ids, values["draft_vocab_size"], values["vocab_size"])
        network = BlockDrafter(BlockDrafterConfig(**values), ids)
        network.to(target.dtype).attach(target)
    except UserError as error:
        raise UserError(f"cannot use the drafter at {folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(
            f"cannot use the drafter at {folder}: its config.json is incomplete or damaged ({missing}); download it "
            "again"
        ) from error
    fill(network, tensors, folder)
    return network.eval().requires_grad_(False)


def describe(network: BlockDrafter, folder: Path) -> str:
    """One line on what a checkpoint was recognised as."""
    config = network.config
    slot = "slot k predicts position a+1+k" if config.layout == "anchor_first" else "slot k predicts position a+k"
    head = f"{config.markov_head_type} head of rank {config.markov_rank}" if config.markov_rank else "no Markov head"
    sure = "a confidence head" if config.enable_confidence_head else "no confidence head"
    parts = [
        name
        for name, own in (("its own embedding", config.own_embedding), ("its own language model head", config.own_head))
        if own
    ]
    return (
        f"Drafter {folder}: {config.source} checkpoint, {config.num_hidden_layers} {config.layer_family} layers, "
        f"{config.num_drafts} drafts from {config.block_size} slots ({slot}), reads target layers "
        f"{', '.join(map(str, config.target_layer_ids))}; {', '.join([head, sure, *parts])}."
    )


def _common(
    document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dialect: Source, target: Target
) -> dict[str, Any]:
    """What all three say in the same words, and what the tensors' names say."""
    if document.get("quantization_config"):
        raise UserError("its weights are quantised; take the unquantised checkpoint")
    layers = document.get("num_target_layers")
    if layers is not None and layers != target.config.num_hidden_layers:
        raise UserError(
            f"it was made for a target of {layers} layers and {target.name} has {target.config.num_hidden_layers}; "
            "choose the drafter of this target"
        )
    rank = int(document.get("markov_rank") or 0)
    kind = str(document.get("markov_head_type") or "vanilla")
    sure = bool(document.get("enable_confidence_head"))
    projection = {"gated": "gate_proj", "rnn": "joint_proj"}.get(kind)
    with_markov = bool(document.get("confidence_head_with_markov"))
    if sure and with_markov and not rank:
        raise UserError("its confidence head reads a Markov head that it does not have; download it again")
    return {
        "target": target.name,
        "source": dialect,
        "markov_rank": rank,
        "markov_head_type": kind,
        "markov_head_bias": projection is None or f"markov_head.{projection}.bias" in tensors,
        "markov_vocab": "target",
        "enable_confidence_head": sure,
        "confidence_head_with_markov": with_markov,
        "own_embedding": "embed_tokens.weight" in tensors,
        "own_head": "lm_head.weight" in tensors,
    }


def _layers(config: Mapping[str, Any], family: LayerFamily) -> dict[str, Any]:
    """Shape of the draft layers."""
    kinds = set(config.get("layer_types") or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise UserError(f"its layers are of kind {min(kinds)}; only drafters with full attention are supported")
    if config.get("is_causal"):
        raise UserError("its blocks attend causally; only drafters whose blocks attend both ways are supported")
    activation = config.get("hidden_activation") if family == "gemma4" else config.get("hidden_act", "silu")
    if activation != _ACTIVATIONS[family]:
        raise UserError(f"its activation is {activation}; {family} layers with {_ACTIVATIONS[family]} are supported")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    shape = {
        "hidden_size": hidden,
        "vocab_size": config["vocab_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate_size": config["intermediate_size"],
        "rms_norm_eps": config["rms_norm_eps"],
        "layer_family": family,
        "attention_bias": bool(config.get("attention_bias")),
        "rope_parameters": rope_parameters(config),
    }
    if family == "gemma4":
        if config.get("enable_moe_block") or config.get("hidden_size_per_layer_input"):
            raise UserError("its layers have experts or per-layer inputs; only dense drafters are supported")
        shape["head_dim"] = config["global_head_dim"]
        shape["attention_k_eq_v"] = bool(config["attention_k_eq_v"])
        if shape["attention_k_eq_v"]:
            shape["num_key_value_heads"] = config["num_global_key_value_heads"]
    return shape


def _deepspec(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: Target) -> dict[str, Any]:
    family = DEEPSPEC[document["architectures"][0]]
    made_for = document.get("target_text_model_type") or document.get("model_type")
    if made_for is not None and made_for != target.config.model_type:
        raise UserError(
            f"it was made for a target of family {made_for} and {target.name} is of {target.config.model_type}; choose "
            "the drafter of this target"
        )
    scale: Any = document.get("embedding_scale", float(document["hidden_size"]) ** 0.5 if family == "gemma4" else 1.0)
    return {
        **_layers(document, family),
        "block_size": document["block_size"],
        "target_layer_ids": tuple(document["target_layer_ids"]),
        "mask_token_id": document["mask_token_id"],
        "draft_vocab_size": document.get("draft_vocab_size") or 0,
        "embedding_scale": scale if "embed_tokens.weight" in tensors else "target",
        "final_logit_softcapping": document.get("final_logit_softcapping"),
    }


def _speculators(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: Target) -> dict[str, Any]:
    from transformers import AutoConfig

    nested = dict(document["transformer_layer_config"])
    layers = AutoConfig.for_model(nested.pop("model_type", "qwen3"), **nested).to_dict()
    made_for = ((document.get("speculators_config") or {}).get("verifier") or {}).get("architectures") or []
    ours = type(target.model).__name__
    if made_for and ours not in made_for:
        raise UserError(
            f"it was made for a target of class {made_for[0]} and {target.name} is a {ours}; choose the drafter of "
            "this target"
        )
    read = document.get("target_hidden_size")
    if read not in (None, layers["hidden_size"]):
        raise UserError(f"it reads hidden states of {read} in layers of {layers['hidden_size']}; sizes must agree")
    anchor_first = bool(document.get("sample_from_anchor", document["speculators_model_type"] == "dspark"))
    rank, kind = document.get("markov_rank") or 0, document.get("markov_head_type")
    if not anchor_first and rank and kind == "rnn":
        raise UserError("its rnn head starts at a slot that predicts nothing; take one with sample_from_anchor")
    size, whole = document["draft_vocab_size"], layers["vocab_size"]
    return {
        **_layers(layers, "qwen3"),
        "block_size": document["block_size"],
        "layout": "anchor_first" if anchor_first else "one_plus_n",
        "target_layer_ids": tuple(layer - 1 for layer in document["aux_hidden_state_layer_ids"]),
        "mask_token_id": document["mask_token_id"],
        "draft_vocab_size": 0 if size == whole else size,
        "embedding_scale": 1.0,
        "final_logit_softcapping": None,
    }


def _dflash(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: Target) -> dict[str, Any]:
    del target
    merged = {**document, **(document.get("dflash_config") or {})}
    if any(name.startswith("markov_head.") for name in tensors) or merged.get("markov_rank"):
        raise UserError(
            "it is labelled DFlashDraftModel and has a Markov head, and nothing says which position slot k predicts; "
            "set architectures in its config.json to Qwen3DSparkModel if slot k predicts the token at a+1+k"
        )
    if float(merged.get("output_multiplier") or 1.0) != 1.0:
        raise UserError(f"it multiplies logits by {merged['output_multiplier']}, which is not supported")
    return {
        **_layers(document, "qwen3"),
        "block_size": merged["block_size"],
        "layout": "one_plus_n",
        "target_layer_ids": tuple(merged["target_layer_ids"]),
        "mask_token_id": merged["mask_token_id"],
        "draft_vocab_size": 0,
        "embedding_scale": float(merged.get("input_embedding_scale") or 1.0),
        "final_logit_softcapping": merged.get("final_logit_softcapping") or None,
    }


def _draft_ids(tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Take a draft vocabulary's tables out of the tensors: [Vd] ascending target ids, or ``None``."""
    shift, mask = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if shift is None:
        if mask is not None:
            raise UserError("it has a t2d and no d2t; download it again")
        return None
    ids = shift.long() + torch.arange(len(shift))
    if (ids.diff() <= 0).any() or (mask is not None and not torch.equal(mask.nonzero()[:, 0], ids)):
        raise UserError("its tables d2t and t2d do not say the same; download it again")
    return ids


def _check_vocabulary(ids: torch.Tensor | None, size: int, whole: int) -> None:
    """Refuse a draft vocabulary that config and tables do not agree on."""
    found = 0 if ids is None else len(ids)
    if found != size:
        raise UserError(f"its d2t has {found} tokens and its config a draft vocabulary of {size}; download it again")
    if ids is not None and (ids[0] < 0 or ids[-1] >= whole):
        raise UserError(f"its d2t leads to token {int(ids[-1])} and the vocabulary has {whole}; download it again")
