"""The block drafter as a network: a parallel backbone over the block and a light sequential head.

For anchor position a, block size γ and hidden size d, the block's inputs are [x_a, MASK × (γ-1)] at positions
a .. a+γ-1; slot k predicts the token at a+1+k. Each layer attends to the *context* (projected hidden states of
chosen target layers at positions before a) and to the whole block, without a causal mask. Embedding and language
model head are the target's, frozen. The sequential head (`markov`) adds what the token before a slot says; the
confidence head judges slot k from [h_k ; W1[x_{k-1}]]. Rank 0 has neither sequential head nor sequential pass: that is
DFlash. Names of parameters are DeepSpec's.

Checkpoints of others differ from this in what `BlockDrafterConfig` lists: the layers' norms, an embedding, a head or a
rotary embedding of their own, and DFlash's first layout "1+N", where slot k predicts the token at a+k and slot 0, the
anchor's, predicts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from dspark_sim.engine.drafters.markov import MarkovHead, MarkovHeadType
from dspark_sim.engine.drafters.network import DraftNetwork, GatedMLP, rotate
from dspark_sim.engine.drafters.rope import Rope
from dspark_sim.engine.models import Target, softcap
from dspark_sim.errors import UserError

LayerFamily = Literal["llama", "qwen3", "gemma4"]
Layout = Literal["anchor_first", "one_plus_n"]
Source = Literal["dspark_sim", "deepspec", "speculators", "dflash"]
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
        Slots of a block; see `num_drafts`.
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
    markov_head_type
        ``vanilla``, ``gated`` or ``rnn``.
    source
        Whose checkpoint it was.
    layout
        ``anchor_first``: slot k predicts position a+1+k. ``one_plus_n``: position a+k, and slot 0 predicts nothing.
    layer_family
        ``qwen3`` norms queries and keys per head; ``gemma4`` norms values and both branches' outputs too, scales each
        layer's output, does not scale attention scores, and uses GELU.
    attention_bias
        Whether the projections of attention have one.
    attention_k_eq_v
        Whether values are the projected keys (Gemma 4).
    own_embedding, own_head
        Whether it brings its own embedding and language model head.
    embedding_scale
        Factor of the embedding; ``target`` means as the target does.
    final_logit_softcapping
        Cap of the draft logits before the sequential head, ``None`` for none, ``target`` for the target's.
    rope_parameters
        See `rope.rope_parameters`; ``None`` means the target's.
    confidence_head_with_markov
        Whether the confidence head reads W1[x_{k-1}].
    markov_head_bias
        Whether the projection of a ``gated`` or ``rnn`` head has one.
    markov_vocab
        Rows of W1: ``draft`` has one for each token of the draft vocabulary and one for all others, ``target`` one
        for each token of the target.
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
    source: Source = "dspark_sim"
    layout: Layout = "anchor_first"
    layer_family: LayerFamily = "llama"
    attention_bias: bool = False
    attention_k_eq_v: bool = False
    own_embedding: bool = False
    own_head: bool = False
    embedding_scale: float | Literal["target"] = "target"
    final_logit_softcapping: float | Literal["target"] | None = "target"
    rope_parameters: dict[str, Any] | None = None
    confidence_head_with_markov: bool = True
    markov_head_bias: bool = True
    markov_vocab: Literal["draft", "target"] = "draft"

    def __post_init__(self) -> None:
        if self.num_drafts < 1:
            raise UserError(f"block_size is {self.block_size}; a block drafter drafts at least 1 token")
        if self.markov_head_type not in get_args(MarkovHeadType):
            raise UserError(
                f"markov_head_type is {self.markov_head_type!r}; choose from {', '.join(get_args(MarkovHeadType))}"
            )

    @property
    def num_drafts(self) -> int:
        """Most tokens drafted per round, γ."""
        return self.block_size - (self.layout == "one_plus_n")

    @property
    def head_size(self) -> int:
        """Rows of the language model head."""
        return self.draft_vocab_size or self.vocab_size


class _Attention(nn.Module):
    def __init__(self, config: BlockDrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=bias)
        self.v_proj = None if config.attention_k_eq_v else nn.Linear(config.hidden_size, key, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)
        normed = config.layer_family != "llama"
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if normed else nn.Identity()
        gemma = config.layer_family == "gemma4"
        self.v_norm = (
            nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps, elementwise_affine=False) if gemma else nn.Identity()
        )
        # Scores are divided by √D everywhere; queries undo it where the family does not scale.
        self.query_scale = math.sqrt(config.head_dim) if gemma else 1.0

    def queries(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[..., H, D]."""
        rotated = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), rotary)
        return rotated if self.query_scale == 1.0 else rotated * self.query_scale

    def keys(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., KV heads, D]."""
        keys = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        values = keys if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(keys), rotary), self.v_norm(values)


class _Layer(nn.Module):
    def __init__(self, config: BlockDrafterConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, gelu=config.layer_family == "gemma4")
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gemma = config.layer_family == "gemma4"
        if self.gemma:
            self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def context_keys(
        self, context: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., KV heads, D] of projected context [..., d]; it is not layer-normed again."""
        return self.self_attn.keys(context, rotary)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x)
        attended = attend(attention.queries(normed, rotary), *attention.keys(normed, rotary))
        attended = attention.o_proj(attended.flatten(-2))
        out: torch.Tensor
        if self.gemma:
            x = x + self.post_attention_layernorm(attended)
            out = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
            return out * self.layer_scalar
        x = x + attended
        out = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _ConfidenceHead(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 1)


class BlockDrafter(DraftNetwork):
    """The network.

    Parameters
    ----------
    config
        Its shape.
    draft_token_ids
        [Vd] ascending target ids, when there is a draft vocabulary.
    """

    config: BlockDrafterConfig

    def __init__(self, config: BlockDrafterConfig, draft_token_ids: torch.Tensor | None = None) -> None:
        super().__init__(config, draft_token_ids)
        self.fc = nn.Linear(config.hidden_size * len(config.target_layer_ids), config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rank = config.markov_rank
        # One row more than the draft vocabulary: all other tokens share it.
        self._cut_markov = bool(config.draft_vocab_size) and config.markov_vocab == "draft"
        rows = config.draft_vocab_size + 1 if self._cut_markov else config.vocab_size
        kind = cast(MarkovHeadType, config.markov_head_type)
        self.markov_head = None
        if rank:
            self.markov_head = MarkovHead(
                kind, rows, config.head_size, rank, config.hidden_size, bias=config.markov_head_bias
            )
        judged = config.hidden_size + (rank if config.confidence_head_with_markov else 0)
        self.confidence_head = _ConfidenceHead(judged) if config.enable_confidence_head else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.own_embedding else None
        self.lm_head = nn.Linear(config.hidden_size, config.head_size, bias=False) if config.own_head else None
        self._rope = Rope(config.rope_parameters, config.head_dim) if config.rope_parameters else None

    def attach(self, target: Target) -> Self:
        """Borrow what is the target's; see `DraftNetwork.attach`."""
        super().attach(target)
        if self.lm_head is not None:
            self._head_weight = None
        return self

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., d] of token ids."""
        scale = self.config.embedding_scale
        if scale == "target" and self.embed_tokens is None:
            return super().embed(tokens)
        assert self._target is not None
        table = self._target.model.get_input_embeddings() if self.embed_tokens is None else self.embed_tokens
        out = F.embedding(tokens, table.weight)
        # The factor is rounded to the weights' type, as transformers' scaled embeddings do.
        return out if scale in ("target", 1.0) else out * torch.tensor(scale, device=out.device).to(out.dtype)

    def rotary(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [..., D] at positions [...]."""
        return super().rotary(positions, like) if self._rope is None else self._rope(positions, like)

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., Vd], before the sequential head."""
        cap = self.config.final_logit_softcapping
        if cap == "target" and self.lm_head is None:
            return super().base_logits(hidden)
        weight = self._head_weight if self.lm_head is None else self.lm_head.weight
        assert weight is not None and self._target is not None
        logits = F.linear(hidden, weight)
        return self._target.cap_logits(logits) if isinstance(cap, str) else softcap(logits, cap)

    def project_context(self, features: torch.Tensor) -> torch.Tensor:
        """Target features [..., n·d] to context [..., d]."""
        out: torch.Tensor = self.hidden_norm(self.fc(features))
        return out

    def block_tokens(self, anchors: torch.Tensor) -> torch.Tensor:
        """[...] anchor tokens to [..., slots] block inputs."""
        block = torch.full(
            (*anchors.shape, self.config.block_size), self.config.mask_token_id, device=anchors.device, dtype=torch.long
        )
        block[..., 0] = anchors
        return block

    def backbone(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [..., d] of block inputs; `attend(layer, queries, keys, values)` knows who sees whom.

        They come in the order of the positions that they predict: row k of a block predicts position a+1+k. A slot
        that predicts nothing goes last, where nothing reads it.
        """
        x = self.embed(tokens)
        rotary = self.rotary(positions, x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, lambda q, k, v, index=index: attend(index, q, k, v))
        out: torch.Tensor = self.norm(x)
        if self.config.layout == "one_plus_n":
            out = out.unflatten(-2, (-1, self.config.block_size)).roll(-1, dims=-2).flatten(-3, -2)
        return out

    def previous_embedding(self, previous: torch.Tensor) -> torch.Tensor | None:
        """W1[x_{k-1}] of target token ids, [..., r]; ``None`` for rank 0."""
        if self.markov_head is None:
            return None
        index = self.target_to_draft[previous] if self._cut_markov else previous
        out: torch.Tensor = self.markov_head.markov_w1(index)
        return out

    def block_logits(self, base: torch.Tensor, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
        """Logits [..., k, Vd] of whole blocks, given the embeddings [..., k, r] of the tokens before each slot."""
        if self.markov_head is None or embedding is None:
            return base
        return self.markov_head.logits(base, self.markov_head.along(hidden, embedding))

    def confidence_logits(self, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor | None:
        """Logit of the confidence [...], or ``None`` without the head."""
        if self.confidence_head is None:
            return None
        alone = embedding is None or not self.config.confidence_head_with_markov
        inputs = hidden if alone else torch.cat((hidden, embedding), dim=-1)
        out: torch.Tensor = self.confidence_head.proj(inputs)[..., 0]
        return out
