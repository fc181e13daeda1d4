"""What every drafter network shares: the target's frozen embedding, head and rotary embedding, and a draft vocabulary.

With a draft vocabulary of Vd tokens the head is cut to Vd rows; what the target puts on other tokens can never be
accepted.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError


class DraftNetwork(nn.Module):
    """A drafter's weights; `attach` lends it the target's embedding, head and rotary embedding.

    Parameters
    ----------
    config
        Its shape: at least `hidden_size`, `vocab_size`, `block_size`, `target_layer_ids` and `draft_vocab_size`.
    draft_token_ids
        [Vd] ascending target ids, when there is a draft vocabulary.
    deepest_layer
        Whether the output of the target's last layer may be read too.
    """

    draft_token_ids: torch.Tensor
    target_to_draft: torch.Tensor

    def __init__(self, config: Any, draft_token_ids: torch.Tensor | None, *, deepest_layer: bool = False) -> None:
        super().__init__()
        self.config = config
        ids = torch.arange(config.head_size) if draft_token_ids is None else draft_token_ids.long()
        if len(ids) != config.head_size:
            raise UserError(f"the draft vocabulary has {len(ids)} ids and the config says {config.head_size}")
        to_draft = torch.full((config.vocab_size,), config.head_size, dtype=torch.long)
        to_draft[ids] = torch.arange(len(ids))
        self.register_buffer("draft_token_ids", ids, persistent=False)
        self.register_buffer("target_to_draft", to_draft, persistent=False)
        self._deepest_layer = deepest_layer
        self._target: Target | None = None
        self._head_weight: torch.Tensor | None = None

    def attach(self, target: Target) -> Self:
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
        limit = text.num_hidden_layers - (0 if self._deepest_layer else 1)
        wrong = [layer for layer in config.target_layer_ids if not -1 <= layer < limit]
        if wrong:
            raise UserError(f"the drafter reads target layer {wrong[0]}, and {target.name} has no such inner layer")
        self.to(target.device)
        self._target = target
        # Detached: a parameter would become one of the drafter's own.
        head = target.model.get_output_embeddings().weight.detach()
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
        return self._target.rotary(positions, like)

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., Vd] by the target's head, soft-capped where the target's logits are."""
        assert self._head_weight is not None and self._target is not None
        return self._target.cap_logits(F.linear(hidden, self._head_weight))

    def previous_embedding(self, previous: torch.Tensor) -> torch.Tensor | None:
        """What a sequential head knows of target token ids [...], [..., r]; ``None`` without one."""
        return None

    def confidence_logits(self, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor | None:
        """Logit of the confidence [...], or ``None`` without the head."""
        return None


class GatedMLP(nn.Module):
    """Down(act(gate x) ⊙ up x), with SiLU or the tanh form of GELU; names of parameters are transformers'."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., d]."""
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        out: torch.Tensor = self.down_proj(gate * self.up_proj(x))
        return out


def rotate(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of [..., H, D] by cos and sin [..., D]."""
    cos, sin = rotary[0].unsqueeze(-2), rotary[1].unsqueeze(-2)
    low, high = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-high, low), dim=-1) * sin
