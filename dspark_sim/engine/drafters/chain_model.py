"""Autoregressive drafters as a network: one layer that is run once per drafted token.

Position t holds the pair (what the target knew at t, the token behind it): the layer reads [g_t ; x_{t+1}] and
predicts x_{t+2}. g_t comes from the target for committed positions and from the layer's own output while a chain is
being drafted: for anchor position a, step k reads [h_{k-1} ; x_{a+k}] at position a-1+k, with h_{-1} = g_{a-1}, and
predicts x_{a+1+k}. Keys and values of committed positions are the context that all steps attend to.

* ``eagle3`` (Li et al. 2025): g is a projection of three target layers; queries, keys and values read the normed token
  embedding and the normed g side by side; the residual stream is g.
* ``mtp`` (DeepSeek-V3, one module run k times): g is the target's last hidden state; a projection joins it with the
  embedding, and an ordinary decoder layer follows.

Embedding and language model head are the target's, frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from dspark_sim.engine.drafters.network import DraftNetwork, GatedMLP, rotate
from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError

ChainKind = Literal["eagle3", "mtp"]


@dataclass(frozen=True)
class ChainDrafterConfig:
    """Shape of an autoregressive drafter; stored as its `config.json`.

    Parameters
    ----------
    target
        Name of the target it was trained for.
    kind
        ``eagle3`` or ``mtp``.
    hidden_size, vocab_size
        Of the target.
    block_size
        Most tokens drafted per round, γ: the length of the chain.
    target_layer_ids
        Target layers whose raw outputs it reads, -1 is the embedding; `mtp` reads one, the last.
    num_attention_heads, num_key_value_heads, head_dim, intermediate_size, rms_norm_eps
        Of its layer.
    draft_vocab_size
        Vd; 0 means the target's vocabulary.
    """

    target: str
    kind: ChainKind
    hidden_size: int
    vocab_size: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    draft_vocab_size: int = 0
    architecture: str = "ChainDrafter"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"block_size is {self.block_size}; a drafter drafts at least 1 token")
        if self.kind not in get_args(ChainKind):
            raise UserError(f"kind is {self.kind!r}; choose from {', '.join(get_args(ChainKind))}")
        if self.kind == "mtp" and len(self.target_layer_ids) != 1:
            raise UserError(f"target_layer_ids is {self.target_layer_ids}; mtp reads the target's last layer alone")

    @property
    def head_size(self) -> int:
        """Rows of the language model head."""
        return self.draft_vocab_size or self.vocab_size


class ChainDrafter(DraftNetwork):
    """The network.

    Parameters
    ----------
    config
        Its shape.
    draft_token_ids
        [Vd] ascending target ids, when there is a draft vocabulary.
    """

    config: ChainDrafterConfig

    def __init__(self, config: ChainDrafterConfig, draft_token_ids: torch.Tensor | None = None) -> None:
        super().__init__(config, draft_token_ids, deepest_layer=config.kind == "mtp")
        size, eps = config.hidden_size, config.rms_norm_eps
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.hidden_norm = nn.RMSNorm(size, eps=eps)
        self.embed_norm = nn.RMSNorm(size, eps=eps)
        if config.kind == "eagle3":
            self.fc = nn.Linear(size * len(config.target_layer_ids), size, bias=False)
            width = 2 * size
        else:
            self.eh_proj = nn.Linear(2 * size, size, bias=False)
            self.input_layernorm = nn.RMSNorm(size, eps=eps)
            width = size
        self.q_proj = nn.Linear(width, query, bias=False)
        self.k_proj = nn.Linear(width, key, bias=False)
        self.v_proj = nn.Linear(width, key, bias=False)
        self.o_proj = nn.Linear(query, size, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)
        self.mlp = GatedMLP(size, config.intermediate_size)
        self.norm = nn.RMSNorm(size, eps=eps)

    def attach(self, target: Target) -> ChainDrafter:
        """Borrow the target's frozen parts; see `DraftNetwork.attach`."""
        last = target.config.num_hidden_layers - 1
        if self.config.kind == "mtp" and self.config.target_layer_ids != (last,):
            raise UserError(
                f"the drafter reads target layer {self.config.target_layer_ids[0]} and the last of {target.name} is "
                f"{last}; an mtp drafter reads the last one"
            )
        return super().attach(target)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Target features [..., n·d] to g [..., d]."""
        out: torch.Tensor = self.fc(features) if self.config.kind == "eagle3" else features
        return out

    def enter(self, known: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream [..., d] and the attention's input of pairs (g [..., d], token ids [...])."""
        pair = torch.cat((self.embed_norm(self.embed(tokens)), self.hidden_norm(known)), dim=-1)
        if self.config.kind == "eagle3":
            return known, pair
        joined = self.eh_proj(pair)
        return joined, self.input_layernorm(joined)

    def queries(self, entered: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[..., H, D]."""
        return rotate(self.q_proj(entered).unflatten(-1, (-1, self.config.head_dim)), rotary)

    def keys(
        self, entered: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., KV heads, D]."""
        shape = (-1, self.config.head_dim)
        return rotate(self.k_proj(entered).unflatten(-1, shape), rotary), self.v_proj(entered).unflatten(-1, shape)

    def leave(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output [..., d] of the layer from its residual stream and attention [..., H, D]: the next step's g."""
        x = residual + self.o_proj(attended.flatten(-2))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
