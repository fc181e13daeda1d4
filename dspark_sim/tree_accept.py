"""Acceptance of trees as pure functions: which path of the verified nodes the target takes.

Row 0 of a request is its anchor, row i + 1 its node i; what the target says at a row judges the children of that node.

* ``greedy``, ``coupled``, ``target_match``: the target chooses its own token at every row. The walk starts at the
  anchor, looks for the chosen token among the children of the node it stands on, and goes there, until there is no such
  child; the token that was not found comes next. The output is the target's own, whatever the tree.
* ``rejection``: the children of a node are drawn from the drafter's law q without replacement and judged in order of
  rank. Child x is accepted with min(1, p(x)/q(x)); if it is not, p becomes (p - q)₊, normalised, and q loses x and is
  normalised again; behind the last child the next token is drawn from what p has become (SpecInfer's multi-step rule
  with the draws of Sequoia). The output has the target's law.

The rule min(1, p/q) for children that were *not* drawn, such as the k likeliest candidates, has another law: docs/
exactness.md, *Trees*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError
from dspark_sim.tree import NOWHERE, FloatArray, IntArray, TokenTree, TreeBatch

Laws = Callable[[IntArray, IntArray], tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]]


@dataclass(slots=True, eq=False)
class AcceptedPaths:
    """What R requests accepted.

    Parameters
    ----------
    nodes
        [R, D], the accepted path's nodes from the anchor's child down; -1 behind its end.
    num_accepted
        [R], nodes of the path.
    next_token
        [R], the token behind the path.
    """

    nodes: IntArray
    num_accepted: IntArray
    next_token: IntArray

    def tokens(self, tree: TreeBatch) -> IntArray:
        """Token ids along the paths, [R, D]; -1 behind their ends."""
        if not tree.tokens.shape[1]:
            return self.nodes
        return np.where(self.nodes < 0, -1, np.take_along_axis(tree.tokens, np.maximum(self.nodes, 0), axis=1))


def accept_matching_tree(tree: TreeBatch, verify_lens: IntArray, target_tokens: IntArray) -> AcceptedPaths:
    """The path that the target would have chosen itself.

    Parameters
    ----------
    tree
        The drafted nodes, [R, n].
    verify_lens
        [R], leading nodes that were verified.
    target_tokens
        [R, n + 1], the target's own token at the anchor and at every node; entries of nodes that were not verified are
        ignored.
    """
    num_requests, width = tree.tokens.shape
    verified = np.arange(width) < np.minimum(verify_lens, tree.num_nodes)[:, None]
    depth = int(tree.depths[verified].max(initial=0))
    nodes = np.full((num_requests, depth), -1, dtype=np.int64)
    requests = np.arange(num_requests)
    here = np.full(num_requests, -1, dtype=np.int64)
    moving = np.ones(num_requests, dtype=np.bool_)
    for level in range(depth):
        wanted = target_tokens[requests, here + 1]
        matches = verified & (tree.parents == here[:, None]) & (tree.tokens == wanted[:, None])
        moving &= matches.any(axis=1)
        here = np.where(moving, matches.argmax(axis=1), here)
        nodes[moving, level] = here[moving]
    return AcceptedPaths(nodes, (nodes >= 0).sum(axis=1, dtype=np.int64), target_tokens[requests, here + 1])


def path_places(tree: TreeBatch, tokens: IntArray) -> IntArray:
    """Places in the tree of the nodes along given tokens, [R, D]; rising, and `NOWHERE` from the first that is missing.

    A verification of b nodes accepts as many of them as are below b, if `tokens` [R, D] are what the target emits.
    """
    num_requests, depth = tokens.shape
    width = tree.tokens.shape[1]
    places = np.full((num_requests, depth), NOWHERE, dtype=np.int64)
    here = np.full(num_requests, -1, dtype=np.int64)
    moving = np.full(num_requests, width > 0)
    for level in range(depth if width else 0):
        matches = (tree.depths == level + 1) & (tree.parents == here[:, None])
        matches &= tree.tokens == tokens[:, level, None]
        moving &= matches.any(axis=1)
        here = np.where(moving, matches.argmax(axis=1), here)
        places[moving, level] = here[moving]
    return places


def judge_child(p: FloatArray, q: FloatArray, tokens: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Judge the next child of N nodes, drawn from q; p and q are what earlier rejections at the node left of them.

    Parameters
    ----------
    p, q
        [N, V] laws of target and drafter, float64. A row of q that is spent is all zeros: its children are rejected,
        and p stays.
    tokens
        [N], the children.

    Returns
    -------
    accept, p_rest, q_rest
        [N] probability of acceptance, and both laws for the next child if it is rejected.
    """
    rows = np.arange(len(tokens))
    at_p, at_q = p[rows, tokens], q[rows, tokens]
    drawn = at_q > 0
    accept = np.minimum(1.0, np.divide(at_p, at_q, out=np.zeros_like(at_p), where=drawn))
    rest = np.maximum(p - np.where(drawn[:, None], q, 0.0), 0.0)
    mass = rest.sum(axis=1, keepdims=True)
    # Where p and q agree to the last bit nothing is left over, and p itself is as good.
    p_rest = np.where(mass > 0, rest / np.where(mass > 0, mass, 1.0), p)
    q_rest = q.copy()
    q_rest[rows, tokens] = 0.0
    left = q_rest.sum(axis=1, keepdims=True)
    return accept, p_rest, q_rest / np.where(left > 0, left, 1.0)


def accept_sampled_tree(
    tree: TreeBatch,
    verify_lens: IntArray,
    laws: Laws,
    uniforms: FloatArray,
    draw_next: Callable[[FloatArray, npt.NDArray[np.bool_], IntArray], IntArray],
) -> AcceptedPaths:
    """Sampling without replacement at every node of the walk.

    Parameters
    ----------
    tree, verify_lens
        As for `accept_matching_tree`; siblings in the order in which they were drawn.
    laws
        From requests [N] and nodes [N] (-1 is the anchor) to the target's law behind each node and the law its children
        were drawn from, [N, V] both. The drafter's is asked for only where children were verified.
    uniforms
        [R, n], one number for each node, used at most once.
    draw_next
        From laws [R, V], whether a child was rejected there [R], and nodes accepted [R] to the tokens that come next.
    """
    num_requests, width = tree.tokens.shape
    verified = np.arange(width) < np.minimum(verify_lens, tree.num_nodes)[:, None]
    depth = int(tree.depths[verified].max(initial=0))
    nodes = np.full((num_requests, depth), -1, dtype=np.int64)
    here = np.full(num_requests, -1, dtype=np.int64)
    rejected = np.zeros(num_requests, dtype=np.bool_)
    last: list[FloatArray | None] = [None] * num_requests
    moving = np.arange(num_requests)
    for level in range(depth + 1):
        children = verified[moving] & (tree.parents[moving] == here[moving, None])
        p, q = (np.asarray(law, dtype=np.float64) for law in laws(moving, here[moving]))
        undecided = np.arange(len(moving))
        taken = np.full(len(moving), -1, dtype=np.int64)
        refused = np.zeros(len(moving), dtype=np.bool_)
        for number in range(int(children.sum(axis=1).max(initial=0))):
            undecided = undecided[children[undecided].sum(axis=1) > number]
            places = np.nonzero(np.cumsum(children[undecided], axis=1) == number + 1)
            child = np.full(len(undecided), width)
            np.minimum.at(child, places[0], places[1])
            requests = moving[undecided]
            accept, p_rest, q_rest = judge_child(p[undecided], q[undecided], tree.tokens[requests, child])
            accepted = uniforms[requests, child] < accept
            taken[undecided[accepted]] = child[accepted]
            undecided = undecided[~accepted]
            p[undecided], q[undecided] = p_rest[~accepted], q_rest[~accepted]
            refused[undecided] = True
        for row in np.flatnonzero(taken < 0).tolist():
            last[moving[row]], rejected[moving[row]] = p[row], refused[row]
        moving, taken = moving[taken >= 0], taken[taken >= 0]
        if not len(moving):
            break
        here[moving] = nodes[moving, level] = taken
    num_accepted = (nodes >= 0).sum(axis=1, dtype=np.int64)
    return AcceptedPaths(
        nodes, num_accepted, draw_next(np.stack([law for law in last if law is not None]), rejected, num_accepted)
    )


def require_ordered_siblings(tree: TokenTree, label: str) -> None:
    """Refuse a tree whose siblings are not the first ranks: children drawn one after the other leave no rank out.

    Raises
    ------
    UserError
        If a rank is left out.
    """
    for children in tree.children:
        ranks = tree.ranks[list(children)].tolist()
        if ranks != list(range(len(ranks))):
            raise UserError(
                f"tree {label} has siblings of ranks {ranks}; under rejection children are drawn one after the other "
                "and no rank may be left out"
            )
