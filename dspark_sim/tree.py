"""Token trees: several continuations of one anchor, verified in one pass of the target.

A tree is kept as a list of nodes in **admission order**: every parent stands before its children, and siblings stand by
rank. The first b nodes are therefore always a connected tree, so that one number, how many nodes of a request are
verified, says which. A chain is the tree in which every node is the child of the one before it, and everything that
holds for drafts of a chain (``verify_len`` counts them, a policy admits a prefix of them) holds for nodes.

The **survival** of a node is the estimated probability that it is on the accepted path: the product of the estimated
acceptances along its own path. The expected number of accepted drafts of the first b nodes is the sum of their
survivals, because the accepted path holds at most one node of each depth.

Nodes are numbered from 0, depths from 1 (a child of the anchor), ranks from 0 (the drafter's likeliest candidate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NOWHERE = np.iinfo(np.int32).max
"""The place of a node that is not in a tree."""


@dataclass(frozen=True, eq=False)
class TokenTree:
    """One request's nodes in admission order.

    Parameters
    ----------
    parents
        [n], number of the parent node, smaller than the node's own; -1 for a child of the anchor.
    depths
        [n], 1 for a child of the anchor, else one more than its parent.
    ranks
        [n], place among the drafter's candidates at the parent, 0 for the likeliest; rising among siblings.

    Raises
    ------
    UserError
        If the arrays contradict each other.
    """

    parents: IntArray
    depths: IntArray
    ranks: IntArray

    def __post_init__(self) -> None:
        for name in ("parents", "depths", "ranks"):
            values = np.asarray(getattr(self, name), dtype=np.int64)
            if values.ndim != 1 or len(values) != len(np.atleast_1d(np.asarray(self.parents))):
                raise UserError(
                    f"{name} of a tree has shape {values.shape} and {len(np.atleast_1d(self.parents))} parents are "
                    "given; give one value for every node"
                )
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        last: dict[int, int] = {}
        for node, (parent, depth, rank) in enumerate(self._rows()):
            if not -1 <= parent < node:
                raise UserError(
                    f"node {node} of a tree has parent {parent}; give -1 for the anchor or the number of a node "
                    "before it"
                )
            expected = 1 if parent < 0 else int(self.depths[parent]) + 1
            if depth != expected:
                raise UserError(f"node {node} of a tree has depth {depth} and its parent makes it {expected}")
            if rank <= last.get(parent, -1):
                raise UserError(
                    f"node {node} of a tree has rank {rank} behind a sibling of rank {last.get(parent, -1)}; ranks are "
                    "0 or more and rise among siblings"
                )
            last[parent] = rank

    def _rows(self) -> list[tuple[int, int, int]]:
        return list(zip(self.parents.tolist(), self.depths.tolist(), self.ranks.tolist(), strict=True))

    @staticmethod
    def of(parents: Sequence[int] | IntArray, ranks: Sequence[int] | IntArray | None = None) -> TokenTree:
        """A tree from its parents alone; ranks count the siblings unless they are given.

        Raises
        ------
        UserError
            If a parent does not stand before its child.
        """
        depths: list[int] = []
        counted: list[int] = []
        seen: dict[int, int] = {}
        for node, parent in enumerate(np.asarray(parents, dtype=np.int64).tolist()):
            depths.append(1 + (depths[parent] if 0 <= parent < node else 0))
            counted.append(seen.get(parent, 0))
            seen[parent] = counted[-1] + 1
        return TokenTree(
            np.asarray(parents, dtype=np.int64),
            np.array(depths, dtype=np.int64),
            np.array(counted if ranks is None else ranks, dtype=np.int64),
        )

    @staticmethod
    def chain(num_nodes: int) -> TokenTree:
        """The tree of width 1."""
        nodes = np.arange(num_nodes)
        return TokenTree(nodes - 1, nodes + 1, np.zeros(num_nodes, dtype=np.int64))

    @property
    def num_nodes(self) -> int:
        """Nodes; the anchor is none of them."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; 0 without nodes."""
        return int(self.depths.max(initial=0))

    @property
    def is_chain(self) -> bool:
        """Whether every node is the child of the one before it."""
        return bool((self.parents == np.arange(self.num_nodes) - 1).all())

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of every node by rank; those of the anchor come last, so that index -1 finds them."""
        lists: list[list[int]] = [[] for _ in range(self.num_nodes + 1)]
        for node, parent in enumerate(self.parents.tolist()):
            lists[parent].append(node)
        return tuple(map(tuple, lists))

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the anchor down to `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def prefix(self, num_nodes: int) -> TokenTree:
        """The first `num_nodes` nodes, or all where there are fewer."""
        return TokenTree(self.parents[:num_nodes], self.depths[:num_nodes], self.ranks[:num_nodes])

    def ancestor_mask(self) -> BoolArray:
        """[n, n]: whether the row's node sees the column's, which it does if that is itself or above it."""
        mask: BoolArray = ancestors(self.parents[None])[0]
        return mask


@dataclass(slots=True, eq=False)
class TreeBatch:
    """One round's trees of R requests, each row in admission order and padded to n nodes.

    Parameters
    ----------
    num_nodes
        [R], nodes of each tree; entries behind them are padding.
    parents, depths, ranks
        [R, n], as in `TokenTree`; padding is -1, 0 and -1.
    tokens
        [R, n], token ids; padding is -1.
    survival
        [R, n], estimated probability that the node is on the accepted path; padding is 0. Values are those of float32,
        as a trace holds them.
    """

    num_nodes: IntArray
    parents: IntArray
    depths: IntArray
    ranks: IntArray
    tokens: IntArray
    survival: FloatArray

    @property
    def num_requests(self) -> int:
        """Trees (R)."""
        return len(self.num_nodes)

    def tree(self, request: int) -> TokenTree:
        """One row as a tree, without padding."""
        count = int(self.num_nodes[request])
        return TokenTree(self.parents[request, :count], self.depths[request, :count], self.ranks[request, :count])

    def prefix(self, num_nodes: IntArray) -> TreeBatch:
        """The first `num_nodes` [R] nodes of every tree, or all where there are fewer; padded to the largest."""
        counts = np.minimum(num_nodes, self.num_nodes)
        width = int(counts.max(initial=0))
        kept = np.arange(width) < counts[:, None]
        return TreeBatch(
            counts,
            np.where(kept, self.parents[:, :width], -1),
            np.where(kept, self.depths[:, :width], 0),
            np.where(kept, self.ranks[:, :width], -1),
            np.where(kept, self.tokens[:, :width], -1),
            np.where(kept, self.survival[:, :width], 0.0),
        )

    def ancestor_mask(self) -> BoolArray:
        """[R, n, n]: whether the row's node sees the column's; padding sees itself alone."""
        return ancestors(self.parents)

    def first_at_depth(self, max_depth: int) -> IntArray:
        """Place of the first node of depth 1 .. `max_depth`, [R, max_depth]; `NOWHERE` where there is none."""
        places = np.full((self.num_requests, max_depth), NOWHERE, dtype=np.int64)
        for depth in range(1, max_depth + 1):
            found = self.depths == depth
            if found.size:
                np.copyto(places[:, depth - 1], found.argmax(axis=1), where=found.any(axis=1))
        return places

    def within(self, limits: IntArray) -> IntArray:
        """Leading nodes that are no deeper than `limits` [R], [R].

        Tokens below a request's longest output are never emitted; the list is cut at the first node that deep. For a
        chain these are the first `limits` nodes.
        """
        deeper = self.depths > limits[:, None]
        if not deeper.size:
            return self.num_nodes
        return np.where(deeper.any(axis=1), deeper.argmax(axis=1), self.num_nodes)


def ancestors(parents: IntArray) -> BoolArray:
    """Ancestor masks [..., n, n] of parents [..., n]: the row's node sees itself and the nodes above it."""
    shape = parents.shape
    flat = parents.reshape(-1, shape[-1])
    num_trees, count = flat.shape
    mask = np.zeros((num_trees, count, count), dtype=np.bool_)
    above = np.broadcast_to(np.arange(count), flat.shape)
    while (seen := above >= 0).any():
        tree, node = np.nonzero(seen)
        mask[tree, node, above[seen]] = True
        above = np.where(seen, np.take_along_axis(flat, np.maximum(above, 0), axis=1), -1)
    return mask.reshape(*shape, count)


def never_rising(survival: FloatArray) -> FloatArray:
    """Survivals [..., n] as a policy gets them: each at most the one before it.

    A policy admits a prefix of the list, so a node cannot be had without those before it. Lists of best-first trees
    fall anyway; in a list whose order is fixed a likely node may stand behind an unlikely one, and then counts as no
    likelier. Only nodes before it in the list have a say, which keeps a choice as uninformed as it was.
    """
    falling: FloatArray = np.minimum.accumulate(survival, axis=-1)
    return falling


def paying_nodes(survival: FloatArray, seconds: FloatArray) -> int:
    """How many nodes pay: nodes are added while (R + expected accepted) / seconds rises, and no further.

    Parameters
    ----------
    survival
        [R, n] survivals of R requests that all verify equally many nodes; [n] for one request.
    seconds
        [n + 1], entry b is the time of a round in which every request verifies b nodes.

    Raises
    ------
    UserError
        If the lengths do not go together or a time is not positive.
    """
    falling = never_rising(np.atleast_2d(survival))
    if len(seconds) != falling.shape[1] + 1 or not (seconds > 0).all():
        raise UserError(
            f"{len(seconds)} step times go with {falling.shape[1]} nodes; give one positive time for each number of "
            "nodes from 0"
        )
    rate = (len(falling) + np.concatenate(([0.0], np.cumsum(falling.sum(axis=0))))) / seconds
    rises = rate[1:] > rate[:-1]
    return rises.size if rises.all() else int(rises.argmin())
