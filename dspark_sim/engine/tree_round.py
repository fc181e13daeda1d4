"""A round of trees in the live engine: which rows the target sees, and which path it accepts.

The rules are those of `tree_accept`. What the target says is worked out along the walk alone: of the many rows of a
tree only those on the accepted path choose a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.attention import TreeRows
from dspark_sim.engine.drafters import Drafted, Drafter, TreeDrafter
from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.grow import tree_depth
from dspark_sim.engine.sampling import SamplingParams, draw, keyed_uniform, probabilities
from dspark_sim.errors import UserError
from dspark_sim.tree import FloatArray, IntArray, TreeBatch
from dspark_sim.tree_accept import AcceptedPaths, accept_matching_tree, accept_sampled_tree, require_ordered_siblings
from dspark_sim.tree_shapes import BestFirst, Chain, DynamicTopK, Sequoia, TreeShape, refuse_branches

Own = Callable[[IntArray, IntArray, int], IntArray]
"""From requests [N], their nodes (-1 the anchor) and the nodes' depth to the target's own tokens behind them [N]."""

_NOT_ASKED = -2


def fit_tree(shape: TreeShape, drafter: Drafter | None, name: str) -> TreeShape:
    """The shape as a drafter can make it; one that does not branch becomes the chain that it is.

    Parameters
    ----------
    shape
        Of the trees.
    drafter, name
        What proposes, and what it is called.

    Raises
    ------
    UserError
        If the drafter cannot branch, or proposes fewer tokens or candidates than the shape needs.
    """
    if drafter is None:
        raise UserError(f"tree {shape.label()} needs a drafter and drafter none proposes nothing; choose a drafter")
    if not isinstance(drafter, TreeDrafter):
        refuse_branches(shape, name)
        return _as_chain(shape.fitted(drafter.block_size))
    network = drafter.network
    headless = isinstance(network, BlockDrafter) and network.markov_head is None
    if headless and isinstance(shape, BestFirst) and shape.conditional == "markov":
        raise UserError(
            f"tree {shape.label()} asks the sequential head what follows each node and drafter {name} has none; "
            f"use best-first:{shape.node_budget}"
        )
    vocabulary = len(network.draft_token_ids)
    if shape.num_candidates > vocabulary and not isinstance(shape, BestFirst | DynamicTopK):
        raise UserError(
            f"tree {shape.label()} takes {shape.num_candidates} candidates and drafter {name} knows {vocabulary} "
            "tokens; lower the width"
        )
    return _as_chain(shape.fitted(drafter.block_size))


def _as_chain(shape: TreeShape) -> TreeShape:
    return shape if shape.num_candidates > 1 else Chain(min(tree_depth(shape), shape.num_nodes))


def usual_label(shape: TreeShape | None, block_size: int) -> str | None:
    """Label of a fitted shape, without the depth where it is the drafter's whole block; ``None`` for chains of it."""
    if shape is None or shape == Chain(block_size):
        return None
    if isinstance(shape, BestFirst | Sequoia) and shape.depth == block_size:
        return replace(shape, depth=None).label()
    return shape.label()


def tree_rows(trees: TreeBatch, positions: IntArray, verify_lens: IntArray) -> TreeRows | None:
    """Layout of anchors at `positions` [R] with their first nodes; ``None`` if all that is verified are chains."""
    width = int(verify_lens.max(initial=0))
    nodes = np.arange(width)
    if not ((trees.parents[:, :width] != nodes - 1) & (nodes < verify_lens[:, None])).any():
        return None
    return TreeRows.of(positions, trees.parents, trees.depths, verify_lens)


def accept_matching_paths(trees: TreeBatch, verify_lens: IntArray, own: Own) -> AcceptedPaths:
    """`accept_matching_tree` with the target's tokens asked for one depth after the other, where the walk stands."""
    num_requests, width = trees.tokens.shape
    said = np.full((num_requests, width + 1), _NOT_ASKED, dtype=np.int64)
    walking, here, depth = np.arange(num_requests), np.full(num_requests, -1, dtype=np.int64), 0
    while True:
        said[walking, here + 1] = own(walking, here, depth)
        paths = accept_matching_tree(trees, verify_lens, said)
        depth += 1
        walking = np.flatnonzero(paths.num_accepted == depth)
        if not walking.size:
            return paths
        here = paths.nodes[walking, depth - 1]


def accept_sampled_paths(
    drafted: Drafted,
    verify_lens: IntArray,
    logits: torch.Tensor,
    row_starts: IntArray,
    token_ids: torch.Tensor | None,
    ids: IntArray,
    positions: IntArray,
    params: SamplingParams,
) -> AcceptedPaths:
    """Mode ``rejection``: children drawn without replacement, judged one after the other.

    Parameters
    ----------
    drafted
        Trees of a static shape with the laws of their draws.
    verify_lens
        [R], leading nodes that were verified.
    logits, row_starts
        [B, V] the target's, and [R] the row of each anchor.
    token_ids
        [Vd] ids of the draft vocabulary, or ``None`` when it is the target's.
    ids, positions
        [R], keys of the random numbers; `positions` are the anchors'.
    params
        Sampling.
    """
    trees, laws = drafted.trees, drafted.laws
    assert trees is not None and laws is not None
    device, size = logits.device, logits.shape[1]

    def both(requests: IntArray, nodes: IntArray) -> tuple[FloatArray, FloatArray]:
        rows = torch.from_numpy(row_starts[requests] + 1 + nodes).to(device)
        p = probabilities(logits[rows], params).double().cpu().numpy()
        at = laws.rows[nodes + 1, requests]
        q = laws.law[torch.from_numpy(np.maximum(at, 0)).to(device)].double().cpu().numpy()
        # A law is that of float32 numbers, whose sum is 1 but for rounding.
        q = q / q.sum(axis=1, keepdims=True) * (at >= 0)[:, None]
        if token_ids is None:
            return p, q
        whole = np.zeros((len(requests), size))
        whole[:, token_ids.cpu().numpy()] = q
        return p, whole

    def following(law: FloatArray, rejected: npt.NDArray[np.bool_], num_accepted: IntArray) -> IntArray:
        at = positions + 1 + num_accepted
        bonus, residual = (keyed_uniform(params.seed, ids, at, purpose) for purpose in ("bonus", "residual"))
        drawn: IntArray = draw(torch.from_numpy(law), np.where(rejected, residual, bonus)).numpy()
        return drawn

    nodes = np.arange(trees.tokens.shape[1])
    uniforms = keyed_uniform(params.seed, ids[:, None], positions[:, None], "accept", nodes)
    return accept_sampled_tree(trees, verify_lens, both, uniforms, following)


def require_drawn_in_order(shape: TreeShape) -> None:
    """Refuse a static shape that leaves out ranks, for mode ``rejection``; see `require_ordered_siblings`."""
    if not isinstance(shape, BestFirst | DynamicTopK):
        require_ordered_siblings(shape.tree(), shape.label())
