"""The block drafter as a network: a parallel backbone over the block and a light sequential head.

For anchor position a, block size γ and hidden size d, the block's inputs are [x_a, MASK × (γ-1)] at positions
a .. a+γ-1; slot k predicts the token at a+1+k. Each layer attends to the *context* (projected hidden states of
chosen target layers at positions before a) and to the whole block, without a causal mask. Embedding and language
model head are the target's, frozen. The Markov head adds W2·W1[x_{k-1}] to the logits of slot k, where x_{k-1} is
the token before it; the confidence head judges slot k from [h_k ; W1[x_{k-1}]]. Rank 0 has neither Markov head nor
sequential pass: that is DFlash.

With a draft vocabulary of Vd tokens the head is cut to Vd rows; what the target puts on other tokens can never be
accepted. Names of parameters are DeepSpec's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError, explain_os_errors

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BlockDrafterConfig:
    """Shape of a block drafter; stored as its `config.json`.

    Parameters
    ----------
    target
        Name of the target it was trained for.
    hidden_size, vocab_size
        Of the target.
    block_size
        Most tokens drafted per round, γ.
    target_layer_ids
        Target layers whose raw outputs are the context; -1 is the embedding, the last layer is not allowed.
    mask_token_id
        Token whose embedding fills slots 1..γ-1.
    num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, intermediate_size, rms_norm_eps
        Of the drafter's layers.
    markov_rank
        r; 0 is DFlash.
    enable_confidence_head
        Whether it estimates acceptance.
    draft_vocab_size
        Vd; 0 means the target's vocabulary.
    """

    target: str
    hidden_size: int
    vocab_size: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    markov_rank: int
    enable_confidence_head: bool
    draft_vocab_size: int = 0
    markov_head_type: str = "vanilla"
    architecture: str = "BlockDrafter"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"block_size is {self.block_size}; a block drafter drafts at least 1 token")
        if self.markov_head_type != "vanilla":
            raise UserError(f"markov_head_type {self.markov_head_type!r} is not supported; use vanilla")

    @property
    def head_size(self) -> int:
        """Rows of the language model head."""
        return self.draft_vocab_size or self.vocab_size


class _Attention(nn.Module):
    def __init__(self, config: BlockDrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (-1, self.head_dim))


class _MLP(nn.Module):
    def __init__(self, config: BlockDrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, config: BlockDrafterConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def context_keys(
        self, context: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., KV heads, D] of projected context [..., d]; it is not layer-normed again."""
        attention = self.self_attn
        return _rotate(attention.heads(attention.k_proj(context)), rotary), attention.heads(attention.v_proj(context))

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x)
        queries = _rotate(attention.heads(attention.q_proj(normed)), rotary)
        keys = _rotate(attention.heads(attention.k_proj(normed)), rotary)
        values = attention.heads(attention.v_proj(normed))
        x = x + attention.o_proj(attend(queries, keys, values).flatten(-2))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def _rotate(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of [..., H, D] by cos and sin [..., D]."""
    cos, sin = rotary[0].unsqueeze(-2), rotary[1].unsqueeze(-2)
    low, high = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-high, low), dim=-1) * sin


class _MarkovHead(nn.Module):
    def __init__(self, num_rows: int, head_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(num_rows, rank)
        self.markov_w2 = nn.Linear(rank, head_size, bias=False)


class _ConfidenceHead(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 1)


class BlockDrafter(nn.Module):
    """The network; `attach` lends it the target's embedding, head and rotary embedding.

    Parameters
    ----------
    config
        Its shape.
    draft_token_ids
        [Vd] ascending target ids, when there is a draft vocabulary.
    """

    def __init__(self, config: BlockDrafterConfig, draft_token_ids: torch.Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.hidden_size * len(config.target_layer_ids), config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rank = config.markov_rank
        # One row more than the draft vocabulary: all other tokens share it.
        rows = config.draft_vocab_size + 1 if config.draft_vocab_size else config.vocab_size
        self.markov_head = _MarkovHead(rows, config.head_size, rank) if rank else None
        self.confidence_head = _ConfidenceHead(config.hidden_size + rank) if config.enable_confidence_head else None
        ids = torch.arange(config.head_size) if draft_token_ids is None else draft_token_ids.long()
        if len(ids) != config.head_size:
            raise UserError(f"the draft vocabulary has {len(ids)} ids and the config says {config.head_size}")
        to_draft = torch.full((config.vocab_size,), config.head_size, dtype=torch.long)
        to_draft[ids] = torch.arange(len(ids))
        self.register_buffer("draft_token_ids", ids, persistent=False)
        self.register_buffer("target_to_draft", to_draft, persistent=False)
        self._target: Target | None = None
        self._head_weight: torch.Tensor | None = None

    def attach(self, target: Target) -> BlockDrafter:
        """Borrow the target's frozen parts and move to its device.

        Raises
        ------
        UserError
            If the shapes or the layer numbers do not fit the target.
        """
        config, text = self.config, target.config
        for name in ("hidden_size", "vocab_size"):
            if getattr(config, name) != getattr(text, name):
                raise UserError(
                    f"the drafter was made for a target with {name} {getattr(config, name)} and {target.name} has "
                    f"{getattr(text, name)}; choose the drafter of this target"
                )
        wrong = [layer for layer in config.target_layer_ids if not -1 <= layer < text.num_hidden_layers - 1]
        if wrong:
            raise UserError(f"the drafter reads target layer {wrong[0]}, and {target.name} has no such inner layer")
        self.to(target.device)
        self._target = target
        head = target.model.get_output_embeddings().weight
        self._head_weight = head if not config.draft_vocab_size else head[self.draft_token_ids].contiguous()
        return self

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids by the target's table."""
        assert self._target is not None
        out: torch.Tensor = self._target.model.get_input_embeddings()(tokens)
        return out

    def rotary(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [..., D] at positions [...]."""
        assert self._target is not None
        flat = positions.reshape(1, -1)
        cos, sin = self._target.model.get_decoder().rotary_emb(like, flat)
        return cos.view(*positions.shape, -1), sin.view(*positions.shape, -1)

    def project_context(self, features: torch.Tensor) -> torch.Tensor:
        """Target features [..., n·d] to context [..., d]."""
        out: torch.Tensor = self.hidden_norm(self.fc(features))
        return out

    def block_tokens(self, anchors: torch.Tensor) -> torch.Tensor:
        """[...] anchor tokens to [..., γ] block inputs."""
        block = torch.full(
            (*anchors.shape, self.config.block_size), self.config.mask_token_id, device=anchors.device, dtype=torch.long
        )
        block[..., 0] = anchors
        return block

    def backbone(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [..., d] of block inputs; `attend(layer, queries, keys, values)` knows the layout."""
        x = self.embed(tokens)
        rotary = self.rotary(positions, x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, lambda q, k, v, index=index: attend(index, q, k, v))
        out: torch.Tensor = self.norm(x)
        return out

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., Vd] by the target's head."""
        assert self._head_weight is not None
        return F.linear(hidden, self._head_weight)

    def previous_embedding(self, previous: torch.Tensor) -> torch.Tensor | None:
        """W1[x_{k-1}] of target token ids, [..., r]; ``None`` for rank 0."""
        if self.markov_head is None:
            return None
        index = self.target_to_draft[previous] if self.config.draft_vocab_size else previous
        out: torch.Tensor = self.markov_head.markov_w1(index)
        return out

    def markov_logits(self, base: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
        """Logits given the previous token."""
        if self.markov_head is None or embedding is None:
            return base
        out: torch.Tensor = base + self.markov_head.markov_w2(embedding)
        return out

    def confidence_logits(self, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor | None:
        """Logit of the confidence [...], or ``None`` without the head."""
        if self.confidence_head is None:
            return None
        inputs = hidden if embedding is None else torch.cat((hidden, embedding), dim=-1)
        out: torch.Tensor = self.confidence_head.proj(inputs)[..., 0]
        return out


def save_drafter(drafter: BlockDrafter, folder: Path | str, notes: Mapping[str, Any] | None = None) -> None:
    """Write `config.json` and `model.safetensors` in bfloat16; `notes` go to the config under ``training``."""
    folder = Path(folder)
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in drafter.state_dict().items()
    }
    if drafter.config.draft_vocab_size:
        tensors["draft_token_ids"] = drafter.draft_token_ids.to("cpu", torch.int32)
    with explain_os_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".model.safetensors.partial"
        save_file(tensors, partial)
        partial.rename(folder / "model.safetensors")
        document = {**asdict(drafter.config), "training": dict(notes or {})}
        (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n")


def load_drafter(folder: Path | str, target: Target) -> BlockDrafter:
    """Read a drafter folder and attach it to its target.

    Raises
    ------
    UserError
        If a file is missing or damaged, a tensor is missing or unknown, or the target does not fit.
    """
    folder = Path(folder)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"no drafter at {folder}: {path.name} is missing; train one with `dspark-sim train`")
    try:
        document = json.loads(config_path.read_text())
        known = {field.name for field in fields(BlockDrafterConfig)}
        values = {name: value for name, value in document.items() if name in known}
        values["target_layer_ids"] = tuple(values["target_layer_ids"])
        config = BlockDrafterConfig(**values)
        tensors = load_file(weights_path)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the drafter at {folder} is damaged ({error}); train or download it again") from error
    drafter = BlockDrafter(config, tensors.pop("draft_token_ids", None))
    try:
        missing, unknown = drafter.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the drafter at {folder} does not match its config ({reason}); train it again") from error
    if missing or unknown:
        strange = [*missing, *unknown][0]
        raise UserError(f"the drafter at {folder} does not match its config (tensor {strange}); train it again")
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)
