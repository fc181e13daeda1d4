"""Drafters: each proposes a few tokens behind every request's anchor.

A drafter's proposals for `draft_len` tokens are the first `draft_len` of its proposals for a whole block, so that a
recorded block replays at every smaller size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.timing import SpanTimer
from dspark_sim.tree import TreeBatch
from dspark_sim.tree_shapes import TreeShape

if TYPE_CHECKING:
    from dspark_sim.engine.drafters.choose import DraftRule
    from dspark_sim.engine.drafters.grow import ChildLaws
    from dspark_sim.engine.drafters.network import DraftNetwork

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class SequenceState:
    """Tokens of one running request (prompt and output, the anchor last) and its KV slot."""

    request_id: int
    prompt_len: int
    tokens: list[int]
    slot: int

    @property
    def position(self) -> int:
        """Absolute position of the anchor."""
        return len(self.tokens) - 1


@dataclass(slots=True)
class Drafted:
    """Proposals of one round.

    Parameters
    ----------
    tokens
        [R, k] target token ids; entries past `lens` mean nothing.
    lens
        [R], tokens proposed.
    confidence
        [R, k], or ``None`` when the drafter does not estimate it.
    probs
        [R, k, Vd] float32 law of each draft on the device, or ``None`` when drafts are deterministic.
    draft_prob
        [R, k] the drafter's probability of each token, or ``None`` when not asked for.
    trees
        Where the proposals are trees: their nodes, whose tokens `tokens` are.
    laws
        What the nodes of trees were drawn from, or ``None``.
    """

    tokens: IntArray
    lens: IntArray
    confidence: npt.NDArray[np.float64] | None = None
    probs: torch.Tensor | None = None
    draft_prob: npt.NDArray[np.float64] | None = None
    trees: TreeBatch | None = None
    laws: ChildLaws | None = None


class Drafter(Protocol):
    """Proposes tokens; sees the target's features of committed tokens if it asks for layers."""

    name: str
    block_size: int
    has_confidence: bool
    feature_layers: tuple[int, ...]
    draft_token_ids: torch.Tensor | None

    def observe(self, slots: IntArray, starts: IntArray, lens: IntArray, features: torch.Tensor) -> None:
        """Take target features [Σ lens, n·d] of committed tokens at positions starts .. starts+lens-1."""
        ...

    def draft(
        self,
        states: Sequence[SequenceState],
        draft_len: int,
        limits: IntArray,
        rule: DraftRule,
        timer: SpanTimer,
    ) -> Drafted:
        """Propose min(draft_len, limits) tokens for each request, chosen by `rule`."""
        ...


@runtime_checkable
class TreeDrafter(Drafter, Protocol):
    """A drafter that offers several candidates."""

    network: DraftNetwork

    def draft_trees(
        self,
        states: Sequence[SequenceState],
        shape: TreeShape,
        draft_len: int,
        limits: IntArray,
        rule: DraftRule,
        timer: SpanTimer,
    ) -> Drafted:
        """Propose the first `draft_len` nodes of trees of a fitted shape, up to the first deeper than `limits` [R]."""
        ...
