"""Drafting trees along a walk: what the drafter says goes to the builders of `tree_builders`.

``factorised`` trees need no more than a chain does: the drafter walks along its own first candidates, and the
candidates of a slot stand below every node of the slot before. All other trees ask anew behind each node, level by
level and for all requests at once: of a block drafter only the sequential head runs again, an autoregressive drafter
makes a pass of its layer over each level.

The live batch and the dense pass grow trees by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.drafters import Drafted
from dspark_sim.engine.drafters.candidates import CandidateRule, with_confidence
from dspark_sim.engine.drafters.choose import Confidence
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.walk import Branch, Walk
from dspark_sim.tree import FloatArray, IntArray, TokenTree, TreeBatch
from dspark_sim.tree_builders import Candidates, Frontier, grow
from dspark_sim.tree_shapes import BestFirst, DynamicTopK, TreeShape

# Logits of a level are made in parts of so many numbers.
_LOGITS_AT_ONCE = 2**23
# Rounding must not leave out a node that is as good as the last one.
_SLACK = 1e-6


@dataclass(slots=True, eq=False)
class ChildLaws:
    """Laws that the children of nodes were drawn from, in mode ``rejection``.

    Parameters
    ----------
    law
        [M, Vd], float32.
    rows
        [n + 1, R], row of each node's children in `law`, the anchor's first; -1 for a node without children.
    """

    law: torch.Tensor
    rows: IntArray


@dataclass(slots=True, eq=False)
class GrownTrees:
    """Trees of R requests, and the laws of their draws, if they were drawn."""

    trees: TreeBatch
    laws: ChildLaws | None = None


def shortened(shape: TreeShape, num_nodes: int) -> TreeShape:
    """A fitted shape whose lists begin with the same `num_nodes` nodes, and that asks for no more than it must."""
    if isinstance(shape, BestFirst | DynamicTopK):
        budget = min(shape.node_budget, num_nodes)
        return replace(shape, node_budget=budget, depth=budget if shape.depth is None else min(shape.depth, budget))
    return shape


def tree_depth(shape: TreeShape) -> int:
    """Slots of a block that a fitted shape asks for."""
    if isinstance(shape, BestFirst | DynamicTopK):
        return shape.node_budget if shape.depth is None else shape.depth
    return shape.tree().max_depth


def in_order(grown: GrownTrees, draft_len: int, limits: IntArray) -> Drafted:
    """The first `draft_len` nodes of every tree as proposals, up to the first that is deeper than `limits` [R]."""
    trees = grown.trees.prefix(np.full_like(limits, draft_len))
    return Drafted(trees.tokens, np.minimum(trees.num_nodes, trees.within(limits)), trees=trees, laws=grown.laws)


def grow_trees(
    network: DraftNetwork,
    walk: Walk,
    anchors: torch.Tensor,
    shape: TreeShape,
    rule: CandidateRule,
    confidence: Confidence,
) -> GrownTrees:
    """One tree behind each anchor.

    Parameters
    ----------
    network
        The drafter.
    walk
        At the anchors, with as many slots as `tree_depth` has.
    anchors
        [R] anchor tokens.
    shape
        Fitted to the drafter.
    rule
        How to find candidates.
    confidence
        Where P(accept the first candidate) comes from; with neither a head nor another source the drafter's own
        probabilities stand.
    """
    if isinstance(shape, BestFirst) and shape.conditional == "factorised":
        return GrownTrees(_factorised(network, walk, anchors, tree_depth(shape), rule, confidence).build(shape))
    growth = _Growth(network, walk, anchors, rule, confidence)
    trees = grow(shape, growth.expand, len(anchors))
    if rule.rule.mode != "rejection":
        return GrownTrees(trees)
    return GrownTrees(trees, growth.laws(shape))


def _factorised(
    network: DraftNetwork,
    walk: Walk,
    anchors: torch.Tensor,
    depth: int,
    rule: CandidateRule,
    confidence: Confidence,
) -> Candidates:
    """Candidates of every slot along the first ones."""
    previous = anchors
    tokens, shares = [], []
    for slot in range(depth):
        said = walk.step(previous)
        found = rule.at(slot, said.logits)
        sure = confidence.estimate(network, said.hidden, said.embedding, said.logits)
        sure = None if sure is None else confidence.calibrate_slot(sure, slot)
        tokens.append(found.tokens)
        shares.append(with_confidence(found.shares, sure))
        previous = found.tokens[:, 0]
    return Candidates(_numpy(torch.stack(tokens, dim=1)), _numpy(torch.stack(shares, dim=1).log()))


@dataclass(eq=False)
class _Growth:
    """Answers a builder's questions from a walk that branches."""

    network: DraftNetwork
    walk: Walk
    anchors: torch.Tensor
    rule: CandidateRule
    confidence: Confidence
    _laws: list[torch.Tensor] = field(default_factory=list)

    def expand(self, frontier: Frontier) -> tuple[IntArray, FloatArray]:
        """Candidates below the nodes of a level; see `tree_builders.Expand`."""
        slot, device = frontier.depth - 1, self.anchors.device
        index = torch.from_numpy(np.stack((frontier.requests, frontier.rows, frontier.tokens))).to(device)
        rows, parents, previous = index[0], None if slot == 0 else index[1], index[2]
        branch = self.walk.branch(rows, parents, self.anchors[rows] if slot == 0 else previous)
        num = min(self.rule.num_candidates, len(self.rule.token_ids))
        tokens = np.zeros((len(rows), num), dtype=np.int64)
        shares = np.full((len(rows), num), -np.inf)
        # Ways of one request, numbered over all levels: their draws must not be the same.
        ways = sum(len(law) for law in self._laws) // len(self.anchors) + _places(frontier.requests)
        sure = self._sure(slot, branch)
        wanted = np.arange(len(rows))
        if sure is not None:
            # The first candidate's acceptance is known before the head has run: some nodes need not be asked.
            wanted = np.flatnonzero(np.log(_numpy(sure) + _SLACK) > frontier.needed)
        size = max(1, _LOGITS_AT_ONCE // len(self.rule.token_ids))
        for part in np.split(wanted, range(size, len(wanted), size)):
            chosen = torch.from_numpy(part).to(device)
            logits = branch.logits(chosen)
            found = self.rule.at(slot, logits, frontier.requests[part], ways[part])
            here = self._sure(slot, branch, chosen, logits) if sure is None else sure[chosen]
            tokens[part] = _numpy(found.tokens)
            shares[part] = _numpy(with_confidence(found.shares, here).log())
            if found.law is not None:
                self._laws.append(found.law)
        return tokens, shares

    def _sure(
        self, slot: int, branch: Branch, part: torch.Tensor | None = None, logits: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Estimates of P(accept the first candidate) of some ways; of all from the head, which needs no logits."""
        hidden, embedding = branch.hidden, branch.embedding
        if logits is None:
            if self.confidence.kind != "head":
                return None
            sure = self.confidence.from_head(self.network, hidden, embedding)
        else:
            embedding = None if embedding is None else embedding[part]
            sure = self.confidence.estimate(self.network, hidden[part], embedding, logits)
        return None if sure is None else self.confidence.calibrate_slot(sure, slot)

    def laws(self, shape: TreeShape) -> ChildLaws:
        """Which law is whose, for a static shape: a level has its nodes with children, request by request."""
        assert not isinstance(shape, BestFirst | DynamicTopK)
        tree, num_requests = shape.tree(), len(self.anchors)
        rows = np.full((tree.num_nodes + 1, num_requests), -1, dtype=np.int64)
        offset = 0
        for depth in range(tree.max_depth):
            inner = [node for node in range(-1, tree.num_nodes) if tree.children[node] and _depth(tree, node) == depth]
            for number, node in enumerate(inner):
                rows[node + 1] = offset + np.arange(num_requests) * len(inner) + number
            offset += len(inner) * num_requests
        return ChildLaws(torch.cat(self._laws), rows)


def _depth(tree: TokenTree, node: int) -> int:
    return 0 if node < 0 else int(tree.depths[node])


def _places(requests: IntArray) -> IntArray:
    """Number of each row among those of its request; `requests` rise."""
    places: IntArray = np.arange(len(requests)) - np.searchsorted(requests, requests)
    return places


def _numpy(values: torch.Tensor) -> npt.NDArray:
    return values.cpu().numpy()
