"""Trees at every anchor of a recorded output, by the code that grows them live, and where the output stands in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.conditional import OutputPath
from dspark_sim.engine.drafters.candidates import CandidateRule
from dspark_sim.engine.drafters.choose import Confidence
from dspark_sim.engine.drafters.grow import grow_trees
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.walk import WalkStart
from dspark_sim.tree import IntArray
from dspark_sim.tree_accept import path_places
from dspark_sim.tree_shapes import TreeShape


@dataclass(slots=True)
class DenseTrees:
    """Trees at M anchors.

    Parameters
    ----------
    node_rank
        [M, γ], place of the output's node at each depth; `NOWHERE` if the tree does not hold it.
    num_nodes
        [M].
    node_survival
        [M, n], of all nodes in admission order.
    first_at_depth
        [M, γ], place of the first node of each depth.
    """

    node_rank: IntArray
    num_nodes: IntArray
    node_survival: npt.NDArray[np.float64]
    first_at_depth: IntArray


def dense_trees(
    network: DraftNetwork,
    confidence: Confidence,
    start: WalkStart,
    anchor_tokens: torch.Tensor,
    truth: IntArray,
    shape: TreeShape,
    rule: CandidateRule,
) -> DenseTrees:
    """Grow a tree at every anchor.

    Parameters
    ----------
    network, confidence
        A drafter, and where its confidence comes from.
    start, anchor_tokens
        Its walks at the anchors, and the tokens there [M].
    truth
        [M, γ], the output's tokens behind the anchors; -1 past its end.
    shape
        Fitted to the drafter.
    rule
        How candidates are found at these anchors.
    """
    trees = grow_trees(network, start(), anchor_tokens, shape, rule, confidence).trees
    survival = np.zeros((len(truth), shape.num_nodes))
    survival[:, : trees.survival.shape[1]] = trees.survival
    return DenseTrees(path_places(trees, truth), trees.num_nodes, survival, trees.first_at_depth(truth.shape[1]))


def target_rank(network: DraftNetwork, path: OutputPath, rule: CandidateRule) -> IntArray:
    """Rank of the output's token among the candidates at each depth, along the output's own path, [M, γ].

    Tokens outside the draft vocabulary, and depths past the output's end, rank behind every candidate.
    """
    worst = network.config.head_size
    index = network.target_to_draft[path.truth.clamp(min=0)].masked_fill(path.truth < 0, worst)
    known = index.clamp(max=worst - 1)
    columns = [rule.rank(slot, path.said.logits[:, slot], known[:, slot]) for slot in range(index.shape[1])]
    ranks: IntArray = torch.stack(columns, dim=1).masked_fill(index == worst, worst).cpu().numpy()
    return ranks
