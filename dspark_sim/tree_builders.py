"""Builders: from what a drafter says to one round's trees, for the whole batch at once.

A drafter is asked once for each depth what follows the nodes of the depth before (`Frontier`), and answers with
candidates and their estimated acceptances. A block drafter without a sequential head has the answer for all depths
beforehand (`Candidates`): the same candidates below every node. A sequential head, or an autoregressive drafter, works
it out for each node.

**Dynamic trees** are grown exactly. Survival never rises along a path, so a node of the best b has all nodes above it
among the best b, and a node that is not among the best b found so far has no child that will be. Only nodes among the
best b so far are expanded. Nodes are ordered by survival; ties go by depth, then by the place of the parent, then by
rank, so that the order does not depend on b and the list of a smaller budget is the beginning of this one.

Estimated acceptances are logarithms, summed along a path in float64. Those of siblings must not rise with rank; where
they do, a dynamic tree takes each as at most the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dspark_sim.errors import UserError
from dspark_sim.tree import FloatArray, IntArray, TreeBatch
from dspark_sim.tree_shapes import BestFirst, DynamicTopK, StaticShape, TreeShape


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """Nodes of one depth whose children are wanted.

    Parameters
    ----------
    depth
        Of the children: 1 when the m nodes are anchors.
    requests
        [m], request of each node, rising.
    rows
        [m], row of each node's parent in the frontier before; -1 for anchors.
    ranks
        [m], rank of the node among the candidates of that row; -1 for anchors.
    tokens
        [m], the node's token; -1 for anchors.
    needed
        [m], logarithm of the acceptance that a candidate must exceed to enter the tree as it stands; minus infinity
        where anything may.
    """

    depth: int
    requests: IntArray
    rows: IntArray
    ranks: IntArray
    tokens: IntArray
    needed: FloatArray


Expand = Callable[[Frontier], tuple[IntArray, FloatArray]]
"""From m nodes to tokens [m, K] and logarithms of estimated acceptance [m, K], at most 0, of their candidates.

A node none of whose candidates can exceed what is needed may get minus infinity for all, whatever its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Factorised candidates: those of a slot are the same whatever was chosen before it.

    Parameters
    ----------
    tokens
        [R, γ, K], token ids of each slot's candidates by rank.
    log_acceptance
        [R, γ, K], logarithm of each one's estimated acceptance, at most 0.
    """

    tokens: IntArray
    log_acceptance: FloatArray

    def expand(self, frontier: Frontier) -> tuple[IntArray, FloatArray]:
        """Candidates of the frontier's slot."""
        slot = frontier.depth - 1
        return self.tokens[frontier.requests, slot], self.log_acceptance[frontier.requests, slot]

    def build(self, shape: TreeShape) -> TreeBatch:
        """One tree of a fitted shape for each request."""
        return grow(shape, self.expand, len(self.tokens))


def grow(shape: TreeShape, expand: Expand, num_requests: int) -> TreeBatch:
    """One tree of a fitted shape for each of R requests.

    Raises
    ------
    UserError
        If the drafter offers fewer candidates than a static shape needs.
    """
    if isinstance(shape, BestFirst):
        return _grow_dynamic(shape, expand, num_requests, _depth(shape.depth), shape.node_budget)
    if isinstance(shape, DynamicTopK):
        return _grow_dynamic(shape, expand, num_requests, shape.depth, shape.top_k)
    return _grow_static(shape, expand, num_requests)


def _depth(depth: int | None) -> int:
    if depth is None:
        raise ValueError("the depth is the drafter's; call fitted(block_size) first")
    return depth


def _anchors(num_requests: int) -> Frontier:
    nothing = np.full(num_requests, -1, dtype=np.int64)
    return Frontier(1, np.arange(num_requests), nothing, nothing, nothing, np.full(num_requests, -np.inf))


def _grow_static(shape: StaticShape, expand: Expand, num_requests: int) -> TreeBatch:
    tree = shape.tree()
    count = tree.num_nodes
    tokens = np.full((num_requests, count), -1, dtype=np.int64)
    survival = np.zeros((num_requests, count))
    frontier = _anchors(num_requests)
    # Nodes of the depth above that are expanded, each for every request: node-minor, as the frontier's rows.
    above = np.array([-1])
    for depth in range(1, tree.max_depth + 1):
        here = np.flatnonzero(tree.depths == depth)
        rows = np.searchsorted(above, tree.parents[here])
        candidates, logs = expand(frontier)
        needed = int(tree.ranks[here].max()) + 1
        if candidates.shape[1] < needed:
            raise UserError(
                f"tree {shape.label()} needs {needed} candidates at depth {depth} and the drafter gives "
                f"{candidates.shape[1]}; lower the width"
            )
        of_requests = np.arange(num_requests)[:, None] * len(above) + rows
        tokens[:, here] = candidates[of_requests, tree.ranks[here]]
        survival[:, here] = logs[of_requests, tree.ranks[here]]
        if depth > 1:
            survival[:, here] += survival[:, tree.parents[here]]
        inner = np.isin(here, tree.parents)
        above = here[inner]
        frontier = Frontier(
            depth + 1,
            np.repeat(np.arange(num_requests), len(above)),
            of_requests[:, inner].ravel(),
            np.tile(tree.ranks[above], num_requests),
            tokens[:, above].ravel(),
            np.full(num_requests * len(above), -np.inf),
        )

    def every(values: IntArray) -> IntArray:
        return np.tile(values, (num_requests, 1))

    return TreeBatch(
        np.full(num_requests, count, dtype=np.int64),
        every(tree.parents),
        every(tree.depths),
        every(tree.ranks),
        tokens,
        _single(np.exp(survival)),
    )


def _grow_dynamic(
    shape: BestFirst | DynamicTopK, expand: Expand, num_requests: int, max_depth: int, beam: int
) -> TreeBatch:
    """The shape's best nodes of all those below the `beam` best of each depth."""
    node_budget = shape.node_budget
    # Best nodes so far in order, [R, b]: logarithm of survival, and what they are. `node` numbers all nodes ever seen.
    logs = np.zeros((num_requests, 0))
    facts = np.zeros((5, num_requests, 0), dtype=np.int64)
    frontier, source = _anchors(num_requests), np.full(num_requests, -1, dtype=np.int64)
    above = np.zeros(num_requests)
    num_seen = 0
    for depth in range(1, max_depth + 1):
        tokens, said = (values[:, : shape.num_candidates] for values in expand(frontier))
        num_candidates = tokens.shape[1]
        new_logs = (above[:, None] + np.minimum.accumulate(np.minimum(said, 0.0), axis=1)).ravel()
        counts = np.bincount(frontier.requests, minlength=num_requests)
        width = int(counts.max(initial=0)) * num_candidates
        # Ragged children into rows: those of a request stand by parent, then by rank.
        owner = np.repeat(frontier.requests, num_candidates)
        first = np.repeat((np.cumsum(counts) - counts) * num_candidates, counts * num_candidates)
        column = np.arange(len(owner)) - first
        level = np.full((num_requests, width), -np.inf)
        level[owner, column] = new_logs
        level_facts = np.full((5, num_requests, width), -1, dtype=np.int64)
        level_facts[:, owner, column] = (
            num_seen + np.arange(len(owner)),
            np.repeat(source, num_candidates),
            np.full(len(owner), depth),
            np.tile(np.arange(num_candidates), len(frontier.requests)),
            tokens.ravel(),
        )
        joined = np.concatenate((logs, level), axis=1)
        order = np.argsort(-joined, axis=1, kind="stable")[:, :node_budget]
        logs = np.take_along_axis(joined, order, axis=1)
        facts = np.take_along_axis(np.concatenate((facts, level_facts), axis=2), order[None], axis=2)
        if depth == max_depth:
            break
        expandable = (facts[2] == depth) & (logs > -np.inf)
        expandable &= np.cumsum(expandable, axis=1) <= beam
        if not expandable.any():
            break
        source, rows = facts[0][expandable], facts[0][expandable] - num_seen
        above, owners = logs[expandable], np.nonzero(expandable)[0]
        last = logs[:, -1] if logs.shape[1] == node_budget else np.full(num_requests, -np.inf)
        frontier = Frontier(
            depth + 1,
            owners,
            rows // num_candidates,
            rows % num_candidates,
            facts[4][expandable],
            last[owners] - above,
        )
        num_seen += len(owner)
    return _assemble(logs, facts)


def _assemble(logs: FloatArray, facts: IntArray) -> TreeBatch:
    real = logs > -np.inf
    width = int(real.sum(axis=1).max(initial=0))
    real, logs, facts = real[:, :width], logs[:, :width], facts[..., :width]
    node, parent, depth, rank, token = (np.where(real, values, -1) for values in facts)
    # Places of nodes in their rows: every node number occurs once.
    places = np.full(int(node.max(initial=-1)) + 2, -1, dtype=np.int64)
    places[node] = np.broadcast_to(np.arange(logs.shape[1]), node.shape)
    places[-1] = -1
    return TreeBatch(
        real.sum(axis=1, dtype=np.int64),
        np.where(real, places[parent], -1),
        np.where(real, depth, 0),
        rank,
        token,
        _single(np.where(real, np.exp(logs), 0.0)),
    )


def _single(survival: FloatArray) -> FloatArray:
    """Rounded to float32, as a trace holds it: a replay then orders and sums the very numbers of the live run."""
    return survival.astype(np.float32).astype(np.float64)
