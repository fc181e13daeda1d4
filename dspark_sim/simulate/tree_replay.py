"""Trees from recorded anchors: another width, budget or policy, from one recording.

What decides about a tree is where the output's own tokens stand in it. `node_rank` has the place, in admission order,
of the output's node at every depth: verifying b nodes accepts as many of them as are below b. For a tree of fixed shape
the places follow from ranks along the output alone, so any such shape can be read off a recording of any other: the
drafter ranks what follows each node anew, and on the output's path that is what was recorded. For a tree that the
drafter's probabilities choose, the list of a smaller budget is the beginning of the list of a larger one.

T is the number of anchors, γ the drafter's block, n the most nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dspark_sim.anchor_arrays import lengths, padded
from dspark_sim.errors import UserError
from dspark_sim.tree import NOWHERE, TokenTree
from dspark_sim.tree_shapes import BestFirst, DynamicTopK, StaticShape, TreeShape, recorded_shape

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RecordedTree:
    """Trees at every anchor.

    Parameters
    ----------
    shape
        Fitted to the drafter.
    node_rank
        [T, γ], places of the output's nodes by depth, rising; `NOWHERE` where the tree does not hold them.
    drafted_nodes
        [T], nodes of each tree.
    first_at_depth
        [T, γ], place of the first node of each depth; `NOWHERE` where there is none.
    survival
        [T, n] of the nodes, as recorded; ``None`` where the recording does not have them.
    """

    shape: TreeShape
    node_rank: IntArray
    drafted_nodes: IntArray
    first_at_depth: IntArray
    survival: FloatArray | None

    @property
    def num_nodes(self) -> int:
        """Most nodes of a tree."""
        return self.shape.num_nodes

    @property
    def has_survival(self) -> bool:
        """Whether the nodes' survivals were recorded."""
        return self.survival is not None

    @property
    def parents(self) -> IntArray | None:
        """[n], if every anchor has the same tree."""
        return None if isinstance(self.shape, BestFirst | DynamicTopK) else self.shape.tree().parents

    def accepted(self, rows: IntArray, verify_lens: IntArray) -> IntArray:
        """Nodes accepted [R] when the first `verify_lens` [R] are verified at anchors [R]."""
        accepted: IntArray = (self.node_rank.take(rows, axis=0) < verify_lens[:, None]).sum(axis=1, dtype=np.int64)
        return accepted

    def drafted(self, rows: IntArray, draft_len: int, room: IntArray) -> IntArray:
        """Nodes drafted [R] when `draft_len` are asked for and `room` [R] tokens may still come as drafts.

        The list ends before its first node that is deeper than the room.
        """
        lens = np.minimum(self.drafted_nodes.take(rows), draft_len)
        depth = self.first_at_depth.shape[1]
        short = np.flatnonzero(room < depth)
        if short.size:
            first = self.first_at_depth[rows[short], np.maximum(room[short], 0)]
            lens[short] = np.minimum(lens[short], first)
        return lens


def read_tree(
    config: Mapping[str, Any], table: pa.Table, block_size: int
) -> tuple[IntArray | None, int | None, RecordedTree | None]:
    """Ranks along the output, how many candidates they tell apart, and the trees of a table `anchors`.

    Raises
    ------
    UserError
        If the run drafted trees and the table has none.
    """
    ranks = None if _missing(table, "target_rank") else _places(table, "target_rank", block_size)
    shape = recorded_shape(config)
    num_ranked = config.get("num_candidates")
    if shape is None:
        if num_ranked is None and config.get("mode", "greedy") == "coupled":
            # A chain's ranks are by probability, and coupled candidates are ranked by their race.
            ranks = None
        return ranks, num_ranked, None
    lacking = [name for name in ("node_rank", "node_survival", "first_at_depth") if _missing(table, name)]
    if lacking and table.num_rows:
        raise UserError(
            f"the trace drafted trees of shape {shape.label()} and its anchors have no {lacking[0]}; record it again "
            "with the dense pass, or replay a recording of chains"
        )
    survival: FloatArray = padded(table, "node_survival", shape.num_nodes, 0.0)
    tree = RecordedTree(
        shape,
        _places(table, "node_rank", block_size),
        lengths(table, "node_survival"),
        _places(table, "first_at_depth", block_size),
        survival,
    )
    return ranks, shape.num_candidates if num_ranked is None else int(num_ranked), tree


def replayed_tree(
    shape: TreeShape, recorded: RecordedTree | None, ranks: IntArray | None, num_ranked: int | None, mode: str
) -> RecordedTree:
    """Trees of a fitted shape that branches, from what was recorded.

    Raises
    ------
    UserError
        If the recording does not hold them.
    """
    label = shape.label()
    was = "chain" if recorded is None else recorded.shape.label()
    if mode == "rejection":
        raise UserError(
            f"tree {label} cannot be replayed from a recording of mode rejection: which children are accepted "
            "depends on how many were drawn; record it live, or replay a recording of another mode"
        )
    if recorded is not None and recorded.shape == shape:
        return recorded
    if isinstance(shape, BestFirst | DynamicTopK):
        return _shorter(shape, recorded, was)
    if ranks is None:
        raise UserError(
            f"the recording has no ranks to replay tree {label} by; record it with --tree {label}, or with a drafter "
            "that offers several candidates"
        )
    if num_ranked is not None and shape.num_candidates > num_ranked:
        raise UserError(
            f"tree {label} takes {shape.num_candidates} candidates and the recording ranks {num_ranked}; lower the "
            "width or record a wider tree"
        )
    return _by_ranks(shape, ranks, recorded)


def _shorter(shape: BestFirst | DynamicTopK, recorded: RecordedTree | None, was: str) -> RecordedTree:
    label, budget = shape.label(), shape.node_budget
    if recorded is None or not isinstance(recorded.shape, type(shape)):
        raise UserError(f"the recording's drafts are of shape {was} and tree {label} is another kind; record {label}")
    if replace(recorded.shape, node_budget=budget) != shape:
        raise UserError(
            f"the recording has trees of shape {was} and {label} differs in more than its budget; record {label}"
        )
    if budget > recorded.shape.num_nodes:
        raise UserError(
            f"tree {label} has a budget of {budget} nodes and the recording {recorded.shape.num_nodes}; lower the "
            "budget or record a larger tree"
        )
    return RecordedTree(
        shape,
        recorded.node_rank,
        np.minimum(recorded.drafted_nodes, budget),
        recorded.first_at_depth,
        None if recorded.survival is None else recorded.survival[:, :budget],
    )


def _by_ranks(shape: StaticShape, ranks: IntArray, recorded: RecordedTree | None) -> RecordedTree:
    tree = shape.tree()
    count, depth = len(ranks), ranks.shape[1]
    places = np.full((count, depth), NOWHERE, dtype=np.int64)
    child = _children(tree)
    here = np.full(count, -1, dtype=np.int64)
    for level in range(min(depth, tree.max_depth)):
        rank = ranks[:, level]
        here = np.where(rank < child.shape[1], child[here, np.minimum(rank, child.shape[1] - 1)], NOWHERE)
        places[:, level] = here
        # A path that has left the tree stays outside: node n has no children.
        here = np.minimum(here, tree.num_nodes)
    first = np.full(depth, NOWHERE, dtype=np.int64)
    first[: tree.max_depth] = [int((tree.depths == level + 1).argmax()) for level in range(tree.max_depth)]
    survival = None
    if (
        recorded is not None
        and recorded.survival is not None
        and not isinstance(recorded.shape, BestFirst | DynamicTopK)
    ):
        columns = _columns(tree, recorded.shape.tree())
        survival = None if columns is None else np.ascontiguousarray(recorded.survival[:, columns])
    return RecordedTree(
        shape,
        places,
        np.full(count, tree.num_nodes, dtype=np.int64),
        np.ascontiguousarray(np.broadcast_to(first, (count, depth))),
        survival,
    )


def _children(tree: TokenTree) -> IntArray:
    """[n + 2, K]: child of each node by rank, `NOWHERE` if it has none; row n has none, the last is the anchor."""
    child = np.full((tree.num_nodes + 2, int(tree.ranks.max()) + 1), NOWHERE, dtype=np.int64)
    child[tree.parents, tree.ranks] = np.arange(tree.num_nodes)
    return child


def _columns(tree: TokenTree, other: TokenTree) -> list[int] | None:
    """Places in the other tree of this one's nodes, or ``None`` if it lacks one."""
    child, found = _children(other), list[int]()
    for parent, rank in zip(tree.parents.tolist(), tree.ranks.tolist(), strict=True):
        place = child[found[parent] if parent >= 0 else -1, rank] if rank < child.shape[1] else NOWHERE
        if place == NOWHERE:
            return None
        found.append(int(place))
    return found


def _missing(table: pa.Table, name: str) -> bool:
    return bool(table[name].null_count == table.num_rows)


def _places(table: pa.Table, name: str, block_size: int) -> IntArray:
    places: IntArray = padded(table, name, block_size, np.int64(NOWHERE))
    return places
