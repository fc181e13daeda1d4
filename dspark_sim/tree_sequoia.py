"""The best static tree for given acceptance rates (Sequoia, Chen et al. 2024, arXiv 2402.12374, section 3.1).

``acceptance[d][k]`` is the probability that the candidate of rank k at depth d + 1 is the accepted token, given that
its parent was accepted. A node's survival is the product along its path, and the tree of n nodes that accepts most in
expectation is the one with the largest sum of survivals. Children are taken in order of rank, as candidates come.

Where rates fall with rank, taking the node of largest survival n times gives the same tree; measured rates need not
fall. The programme is exact for any rates.
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dspark_sim.tree import TokenTree

FloatArray = npt.NDArray[np.float64]
Acceptance = tuple[tuple[float, ...], ...]
"""Rates by depth and rank; depths beyond the last row have the last row's."""


@lru_cache(maxsize=64)
def best_tree(acceptance: Acceptance, node_budget: int, max_depth: int) -> tuple[TokenTree, tuple[float, ...]]:
    """The tree with the largest sum of survivals, and the survivals of its nodes in admission order.

    Parameters
    ----------
    acceptance
        Rates by depth and rank.
    node_budget
        Most nodes.
    max_depth
        Depth of the deepest node.

    Returns
    -------
    tree, survival
        Of fewer than `node_budget` nodes where candidates and depth allow no more.
    """
    below = np.full(node_budget + 1, -np.inf)
    below[0] = 0.0
    plans: list[list[npt.NDArray[np.int64]]] = []
    for depth in range(max_depth, 0, -1):
        rates = rates_at(acceptance, depth)
        # rest[m]: the most that m nodes give among the children of rank k and above and what is under them.
        rest = np.full(node_budget + 1, -np.inf)
        rest[0] = 0.0
        choices: list[npt.NDArray[np.int64]] = []
        for rate in reversed(rates):
            worth = np.where(np.isfinite(below), rate * (1.0 + np.maximum(below, 0.0)), -np.inf)
            value = np.concatenate(([-np.inf], worth[:node_budget]))
            rest, chosen = _shared(value, rest)
            choices.append(chosen)
        plans.append(choices[::-1])
        below = rest
    plans.reverse()
    reachable = int(np.flatnonzero(below > -np.inf)[-1])
    parents: list[int] = []
    ranks: list[int] = []
    _unfold(plans, 0, reachable, -1, parents, ranks)
    return _in_order(acceptance, parents, ranks)


def rates_at(acceptance: Acceptance, depth: int) -> tuple[float, ...]:
    """Rates by rank at a depth, from 1."""
    return acceptance[min(depth, len(acceptance)) - 1]


def _shared(first: FloatArray, rest: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Best way to share m = 0, 1, .. nodes between one child with its subtree and the children behind it.

    Children behind it are there only if it is: 0 nodes for it leave 0 for them.
    """
    count = len(first)
    best = np.full(count, -np.inf)
    chosen = np.zeros(count, dtype=np.int64)
    best[0] = 0.0
    for size in range(1, count):
        values = first[size] + rest[: count - size]
        better = values > best[size:]
        best[size:][better] = values[better]
        chosen[size:][better] = size
    return best, chosen


def _unfold(
    plans: list[list[npt.NDArray[np.int64]]], level: int, size: int, parent: int, parents: list[int], ranks: list[int]
) -> None:
    """Write down the nodes of the best way to place `size` nodes under `parent`."""
    for rank, chosen in enumerate(plans[level] if level < len(plans) else ()):
        taken = int(chosen[size])
        if taken == 0:
            return
        parents.append(parent)
        ranks.append(rank)
        _unfold(plans, level + 1, taken - 1, len(parents) - 1, parents, ranks)
        size -= taken


def _in_order(acceptance: Acceptance, parents: list[int], ranks: list[int]) -> tuple[TokenTree, tuple[float, ...]]:
    """Admission order: always the likeliest of the nodes whose parent and whose sibling before it are in."""
    depths: list[int] = []
    values: list[float] = []
    children: dict[tuple[int, int], int] = {}
    for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
        depths.append(1 if parent < 0 else depths[parent] + 1)
        values.append((1.0 if parent < 0 else values[parent]) * rates_at(acceptance, depths[node])[rank])
        children[parent, rank] = node
    heap = [(-values[children[-1, 0]], 1, 0, 0, children[-1, 0])] if parents else []
    place: dict[int, int] = {-1: -1}
    order: list[int] = []
    while heap:
        node = heapq.heappop(heap)[-1]
        place[node] = len(order)
        order.append(node)
        for parent, rank in ((parents[node], ranks[node] + 1), (node, 0)):
            found = children.get((parent, rank))
            if found is not None:
                heapq.heappush(heap, (-values[found], depths[found], place[parent], rank, found))
    tree = TokenTree.of([place[parents[node]] for node in order], [ranks[node] for node in order])
    return tree, tuple(values[node] for node in order)
