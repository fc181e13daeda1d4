"""Walking along blocks: slot after slot, each knowing the tokens chosen before it.

A *walk* stands at many anchors at once, a block per row. `step` takes the tokens before a slot and says what the
drafter thinks of the slot; what a drafter carries from slot to slot (the state of a sequential head, or the keys,
values and hidden state of an autoregressive one) lives in the walk. The live batch, the dense pass and training by
known tokens walk by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter


@dataclass(slots=True)
class Slots:
    """What the drafter says of slots.

    Parameters
    ----------
    logits
        [..., Vd].
    hidden
        [..., d].
    embedding
        [..., r] of the token before, for drafters with a sequential head.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    embedding: torch.Tensor | None

    @staticmethod
    def stack(parts: list[Slots], dim: int) -> Slots:
        """Slots of single steps side by side."""
        embeddings = [part.embedding for part in parts if part.embedding is not None]
        return Slots(
            torch.stack([part.logits for part in parts], dim=dim),
            torch.stack([part.hidden for part in parts], dim=dim),
            torch.stack(embeddings, dim=dim) if embeddings else None,
        )


@dataclass(slots=True, eq=False)
class Branch:
    """What the drafter says where its ways go on; logits of as many of them as fit into memory.

    Parameters
    ----------
    hidden
        [M, d].
    embedding
        [M, r], or ``None``; see `Slots`.
    logits
        From numbers [m] of ways to theirs, [m, Vd].
    """

    hidden: torch.Tensor
    embedding: torch.Tensor | None
    logits: Callable[[torch.Tensor], torch.Tensor]


class Walk(Protocol):
    """One block per row, from the first slot on."""

    def step(self, previous: torch.Tensor, rows: torch.Tensor | None = None) -> Slots:
        """Go to the next slot.

        Parameters
        ----------
        previous
            [N] token ids before the slot, of every row.
        rows
            [n] rows whose slot is wanted; ``None`` wants all.

        Returns
        -------
        slots
            [n, ...]
        """
        ...

    def along(self, previous: torch.Tensor) -> Slots:
        """Slots [N, k, ...] along known tokens before them [N, k]."""
        ...

    def branch(self, rows: torch.Tensor, parents: torch.Tensor | None, previous: torch.Tensor) -> Branch:
        """Go to the next slot of every row at once by many ways: a walk either steps or branches.

        Parameters
        ----------
        rows
            [M], the row that each way is of.
        parents
            [M], which way of the last call each one goes on from; ``None`` at the first slot.
        previous
            [M] token ids before the slot.
        """
        ...


WalkStart = Callable[[], Walk]


class BlockWalk:
    """Walk of a block drafter: hidden states are there already, and only the sequential head runs.

    Parameters
    ----------
    network
        The drafter.
    hidden
        [N, k, d].
    base
        [N, k, Vd], their logits before the sequential head, where known.
    """

    def __init__(self, network: BlockDrafter, hidden: torch.Tensor, base: torch.Tensor | None = None) -> None:
        self.network = network
        self.hidden = hidden
        self.base = network.base_logits(hidden) if base is None else base
        self._slot = 0
        self._state: torch.Tensor | None = None
        self._states: torch.Tensor | None = None

    def step(self, previous: torch.Tensor, rows: torch.Tensor | None = None) -> Slots:
        """Go to the next slot; see `Walk`."""
        slot, head = self._slot, self.network.markov_head
        self._slot += 1
        hidden, base = self.hidden[:, slot], self.base[:, slot]
        if head is None:
            return Slots(base, hidden, None) if rows is None else Slots(base[rows], hidden[rows], None)
        if rows is not None and head.kind != "rnn":
            hidden, base, previous, rows = hidden[rows], base[rows], previous[rows], None
        embedding = self.network.previous_embedding(previous)
        assert embedding is not None
        feature, self._state = head.feature(hidden, embedding, self._state)
        if rows is not None:
            hidden, base, embedding, feature = hidden[rows], base[rows], embedding[rows], feature[rows]
        return Slots(head.logits(base, feature), hidden, embedding)

    def along(self, previous: torch.Tensor) -> Slots:
        """All of them at once; see `Walk`."""
        base, hidden = self.base[:, : previous.shape[1]], self.hidden[:, : previous.shape[1]]
        embedding = self.network.previous_embedding(previous)
        return Slots(self.network.block_logits(base, hidden, embedding), hidden, embedding)

    def branch(self, rows: torch.Tensor, parents: torch.Tensor | None, previous: torch.Tensor) -> Branch:
        """Go to the next slot by many ways, which only the sequential head tells apart; see `Walk`."""
        slot, head = self._slot, self.network.markov_head
        self._slot += 1
        hidden, base = self.hidden[rows, slot], self.base[:, slot]
        if head is None:
            return Branch(hidden, None, lambda part: base[rows[part]])
        embedding = self.network.previous_embedding(previous)
        assert embedding is not None
        state = None if self._states is None or parents is None else self._states[parents]
        feature, self._states = head.feature(hidden, embedding, state)
        return Branch(hidden, embedding, lambda part: head.logits(base[rows[part]], feature[part]))
