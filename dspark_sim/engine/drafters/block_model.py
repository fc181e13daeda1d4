"""The block drafter as a network: a parallel backbone over the block and a light sequential head.

For anchor position a, block size γ and hidden size d, the block's inputs are [x_a, MASK × (γ-1)] at positions
a .. a+γ-1; slot k predicts the token at a+1+k. Each layer attends to the *context* (projected hidden states of
chosen target layers at positions before a) and to the whole block, without a causal mask. Embedding and language
model head are the target's, frozen. The sequential head (`markov`) adds what the token before a slot says; the
confidence head judges slot k from [h_k ; W1[x_{k-1}]]. Rank 0 has neither sequential head nor sequential pass: that is
DFlash. Names of parameters are DeepSpec's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from dspark_sim.engine.drafters.markov import MarkovHead, MarkovHeadType
from dspark_sim.engine.drafters.network import DraftNetwork, rotate
from dspark_sim.errors import UserError

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
    markov_head_type
        ``vanilla``, ``gated`` or ``rnn``.
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
        if self.markov_head_type not in get_args(MarkovHeadType):
            raise UserError(
                f"markov_head_type is {self.markov_head_type!r}; choose from {', '.join(get_args(MarkovHeadType))}"
            )

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
        return rotate(attention.heads(attention.k_proj(context)), rotary), attention.heads(attention.v_proj(context))

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x)
        queries = rotate(attention.heads(attention.q_proj(normed)), rotary)
        keys = rotate(attention.heads(attention.k_proj(normed)), rotary)
        values = attention.heads(attention.v_proj(normed))
        x = x + attention.o_proj(attend(queries, keys, values).flatten(-2))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
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
        rows = config.draft_vocab_size + 1 if config.draft_vocab_size else config.vocab_size
        kind = cast(MarkovHeadType, config.markov_head_type)
        self.markov_head = MarkovHead(kind, rows, config.head_size, rank, config.hidden_size) if rank else None
        self.confidence_head = _ConfidenceHead(config.hidden_size + rank) if config.enable_confidence_head else None

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

    def previous_embedding(self, previous: torch.Tensor) -> torch.Tensor | None:
        """W1[x_{k-1}] of target token ids, [..., r]; ``None`` for rank 0."""
        if self.markov_head is None:
            return None
        index = self.target_to_draft[previous] if self.config.draft_vocab_size else previous
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
        inputs = hidden if embedding is None else torch.cat((hidden, embedding), dim=-1)
        out: torch.Tensor = self.confidence_head.proj(inputs)[..., 0]
        return out
