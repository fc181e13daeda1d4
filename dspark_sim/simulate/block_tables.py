"""What the array loop looks up by the row of an anchor: accepted drafts, and survivals as a policy wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_sim.loop import signal_of
from dspark_sim.policy import Signal, SpeculationPolicy, full
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.tree_replay import RecordedTree
from dspark_sim.tree import never_rising

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BlockTables:
    """Arrays of T rows, one for each anchor.

    Parameters
    ----------
    num_accepted
        [T], of the whole block.
    whole
        [T], drafts proposed, or ``None`` where every block is whole.
    survival_rows
        [T, γ], survival of each draft by the policy's signal; ``None`` for a policy that does not look at it.
    block_size
        Most drafts of a round: γ, or the nodes of a tree.
    tree
        What is drafted, if it branches.
    """

    num_accepted: IntArray
    whole: IntArray | None
    survival_rows: FloatArray | None
    block_size: int
    tree: RecordedTree | None = None
    _blanks: dict[tuple[int, int], FloatArray] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(anchors: RecordedAnchors, policy: SpeculationPolicy) -> BlockTables:
        """Of a recording and the signal that a policy looks at.

        Raises
        ------
        UserError
            If the signal was not recorded.
        """
        gamma = anchors.round_size
        ragged = anchors.tree is None and bool((anchors.draft_len < gamma).any())
        survival = None
        if policy.information != "history":
            survival = signal_survival(anchors, policy.signal)
        return BlockTables(
            np.ascontiguousarray(anchors.num_accepted, dtype=np.int64),
            np.ascontiguousarray(anchors.draft_len, dtype=np.int64) if ragged else None,
            survival,
            gamma,
            anchors.tree,
        )

    def drafted(self, rows: IntArray, draft_len: int, room: IntArray) -> IntArray:
        """Drafts [R] at anchors [R] when `draft_len` are asked for and `room` [R] tokens may still come as drafts."""
        if self.tree is not None:
            return self.tree.drafted(rows, draft_len, room)
        return np.minimum(room, self.draft_lens(rows, draft_len))

    def draft_lens(self, rows: IntArray, draft_len: int) -> IntArray:
        """Drafts proposed at anchors [R] when `draft_len` are asked for."""
        if self.whole is None:
            return full(len(rows), draft_len)
        return np.minimum(self.whole.take(rows), draft_len)

    def accepted(self, rows: IntArray, verify: IntArray) -> IntArray:
        """Drafts accepted [R] of the first `verify` ones [R] of the blocks at anchors [R]."""
        if self.tree is not None:
            return self.tree.accepted(rows, verify)
        return np.minimum(verify, self.num_accepted.take(rows))

    def survival(self, rows: IntArray, draft_len: int, drafted: IntArray) -> FloatArray:
        """[R, draft_len], 0 behind the `drafted` ones of a row."""
        assert self.survival_rows is not None
        values = self.survival_rows.take(rows, axis=0)
        if draft_len < self.block_size:
            values = values[:, :draft_len]
        if draft_len and np.minimum.reduce(drafted) < draft_len:
            values = np.where(np.arange(draft_len) < drafted[:, None], values, 0.0)
        return values

    def blank(self, num_requests: int, draft_len: int) -> FloatArray:
        """[R, draft_len] zeros that are shared: for controllers that take the shape alone."""
        found = self._blanks.get((num_requests, draft_len))
        if found is None:
            found = self._blanks[num_requests, draft_len] = np.zeros((num_requests, draft_len))
            found.setflags(write=False)
        return found


def signal_survival(anchors: RecordedAnchors, signal: Signal) -> FloatArray:
    """Survival [T, γ] of all recorded drafts by a signal.

    Raises
    ------
    UserError
        If the signal was not recorded.
    """

    def made() -> FloatArray:
        if anchors.tree is not None:
            return _node_survival(anchors.tree)
        values, lens = signal_of(anchors, signal), anchors.draft_len
        # Column by column: these arrays are long and narrow. The bits are those of `survival_of`.
        out = np.empty(values.shape)
        for depth in range(values.shape[1]):
            column = np.where(lens > depth, values[:, depth], 0.0)
            out[:, depth] = column if depth == 0 else out[:, depth - 1] * column
        return out

    survival: FloatArray = _kept(anchors, f"survival by {signal}", made)
    return survival


def expected_accepted(anchors: RecordedAnchors, signal: Signal) -> FloatArray:
    """Expected accepted drafts [T, γ + 1] when the first 0, 1, .. γ drafts of a block are verified.

    Raises
    ------
    UserError
        If the signal was not recorded.
    """

    def made() -> FloatArray:
        survival = signal_survival(anchors, signal)
        out = np.zeros((len(survival), survival.shape[1] + 1))
        for depth in range(survival.shape[1]):
            np.add(out[:, depth], survival[:, depth], out=out[:, depth + 1])
        return out

    expected: FloatArray = _kept(anchors, f"expected by {signal}", made)
    return expected


def _node_survival(tree: RecordedTree) -> FloatArray:
    """[T, n], as policies get it, which is as `survival_of` has it; not a number where it was not recorded."""
    values = np.nan if tree.survival is None else tree.survival
    drafted = np.arange(tree.num_nodes) < tree.drafted_nodes[:, None]
    return never_rising(np.where(drafted, values, 0.0))


def single_confidence(anchors: RecordedAnchors) -> npt.NDArray[np.float32]:
    """Confidences [T, γ] as traces hold them; the survivals of nodes [T, n] where trees are replayed."""

    def made() -> npt.NDArray[np.float32]:
        values = anchors.confidence
        if anchors.tree is not None:
            shape = len(values), anchors.tree.num_nodes
            values = np.full(shape, np.nan) if anchors.tree.survival is None else anchors.tree.survival
        return np.ascontiguousarray(values, dtype=np.float32)

    single: npt.NDArray[np.float32] = _kept(anchors, "single confidence", made)
    return single


def _kept(anchors: RecordedAnchors, name: str, make: Callable[[], Any]) -> Any:
    """A table of a recording, made once: runs that share the recording share it."""
    if name not in anchors.derived:
        anchors.derived[name] = make()
    return anchors.derived[name]
