"""The sequential head: what the token before a slot adds to the slot's logits.

With W1 [V, r], W2 [Vd, r], the hidden state h_k of slot k and the token x_{k-1} before it,

* ``vanilla``: W2 W1[x_{k-1}];
* ``gated``: W2 (σ(G [h_k ; W1[x_{k-1}]]) ⊙ W1[x_{k-1}]);
* ``rnn``: g, c, o = split(J [s_{k-1} ; W1[x_{k-1}] ; h_k]); s_k = σ(g) ⊙ s_{k-1} + (1 - σ(g)) ⊙ tanh(c); W2 tanh(o);
  s_0 = 0, so a slot knows every token of the block before it.

Each is W2 times a *feature* of size r. Names of parameters are DeepSpec's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

MarkovHeadType = Literal["vanilla", "gated", "rnn"]


class MarkovHead(nn.Module):
    """The head.

    Parameters
    ----------
    kind
        Of the three.
    num_rows
        Tokens that it tells apart.
    head_size
        Vd.
    rank
        r.
    hidden_size
        d.
    bias
        Whether the projection of a ``gated`` or ``rnn`` head has one.
    """

    def __init__(
        self, kind: MarkovHeadType, num_rows: int, head_size: int, rank: int, hidden_size: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.kind = kind
        self.rank = rank
        self.markov_w1 = nn.Embedding(num_rows, rank)
        self.markov_w2 = nn.Linear(rank, head_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank, bias=bias)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank, bias=bias)

    def feature(
        self, hidden: torch.Tensor, embedding: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Feature [..., r] of one slot and the state behind it, from hidden states [..., d] and W1[x_{k-1}] [..., r].

        `state` is ``None`` at the first slot and, for the heads that have none, always.
        """
        if self.kind == "vanilla":
            return embedding, None
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((hidden, embedding), dim=-1))) * embedding, None
        state = torch.zeros_like(embedding) if state is None else state
        gate, candidate, output = self.joint_proj(torch.cat((state, embedding, hidden), dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1.0 - gate) * torch.tanh(candidate)

    def along(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Features [..., k, r] of whole blocks, from [..., k, d] and [..., k, r]."""
        if self.kind != "rnn":
            return self.feature(hidden, embedding, None)[0]
        state, features = None, []
        for slot in range(hidden.shape[-2]):
            feature, state = self.feature(hidden[..., slot, :], embedding[..., slot, :], state)
            features.append(feature)
        return torch.stack(features, dim=-2)

    def logits(self, base: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Base logits [..., Vd] and what the token before adds."""
        out: torch.Tensor = base + self.markov_w2(feature)
        return out
