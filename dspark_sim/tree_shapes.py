"""Shapes of token trees: how many nodes, and by what rule they are chosen.

A shape is **static** if every round has the same nodes and only tokens and survivals differ (`Chain`, `FixedWidth`,
`Sequoia`), and **dynamic** if the round's own probabilities choose them (`BestFirst`, `DynamicTopK`). Dynamic lists are
prefixes of each other: the list of a smaller budget is the beginning of the list of a larger one.

A drafter proposes up to γ tokens deep. `fitted` says what of a shape that drafter can make; shapes that are named by a
text (`parse_tree`) give the same text back as `label`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from dspark_sim.errors import UserError
from dspark_sim.tree import TokenTree
from dspark_sim.tree_sequoia import Acceptance, best_tree

Conditional = Literal["factorised", "markov"]

MOST_NODES = 1024
"""Most nodes of one tree: a wider one is a slip of the pen, and its ancestor mask alone would take a megabyte."""

DEFAULT_ACCEPTANCE: Acceptance = ((0.6, 0.15, 0.07, 0.04),)
"""Rates by rank that `sequoia:BUDGET` assumes where none are given; measure a drafter's own with
`analysis.tree_rates.rates_by_rank`."""


@dataclass(frozen=True)
class Chain:
    """The tree of width 1: the drafter's likeliest token at every slot.

    Parameters
    ----------
    depth
        Nodes; ``None`` is the drafter's whole block.
    """

    depth: int | None = None

    def __post_init__(self) -> None:
        if self.depth is not None:
            _at_least_one("depth", self.depth)

    @property
    def num_nodes(self) -> int:
        """Nodes of a fitted chain."""
        return _known(self.depth)

    @property
    def num_candidates(self) -> int:
        """Candidates wanted at every node."""
        return 1

    def fitted(self, block_size: int) -> Chain:
        """With the depth that a drafter of γ = `block_size` gives."""
        return replace(self, depth=_fitted_depth(self, self.depth, block_size))

    def tree(self) -> TokenTree:
        """The nodes of every round."""
        return TokenTree.chain(self.num_nodes)

    def label(self) -> str:
        """``chain`` or ``chain:DEPTH``."""
        return "chain" if self.depth is None else f"chain:{self.depth}"


@dataclass(frozen=True)
class FixedWidth:
    """Every node has `width` children, `depth` times; breadth first.

    Parameters
    ----------
    width, depth
        Children of a node, and levels. A path of the output is in the tree as far as all its ranks are below `width`.
    """

    width: int
    depth: int

    def __post_init__(self) -> None:
        _at_least_one("width", self.width)
        _at_least_one("depth", self.depth)
        _few_enough(self.label(), self.num_nodes)

    @property
    def num_nodes(self) -> int:
        """Σ width ** k for k = 1 .. depth."""
        return sum(self.width**k for k in range(1, min(self.depth, MOST_NODES + 1) + 1))

    @property
    def num_candidates(self) -> int:
        """Candidates wanted at every node."""
        return self.width

    def fitted(self, block_size: int) -> FixedWidth:
        """Itself, if the drafter is deep enough."""
        return replace(self, depth=_fitted_depth(self, self.depth, block_size))

    def tree(self) -> TokenTree:
        """The nodes of every round."""
        return _full_tree(self.width, self.depth)

    def label(self) -> str:
        """``width:WIDTH,DEPTH``."""
        return f"width:{self.width},{self.depth}"


@dataclass(frozen=True)
class BestFirst:
    """The `node_budget` nodes of largest survival (DDTree, Ringel and Romano 2026, on a block drafter's marginals).

    Parameters
    ----------
    node_budget
        Most nodes.
    candidates
        Candidates looked at below every node.
    conditional
        ``factorised``: the candidates of a depth are the same below every node of the depth before, as one pass of a
        block drafter gives them. ``markov``: the drafter's sequential head says anew what follows each node.
    depth
        Deepest node; ``None`` is the drafter's whole block.
    """

    node_budget: int
    candidates: int = 8
    conditional: Conditional = "factorised"
    depth: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("node_budget", self.node_budget)
        _at_least_one("candidates", self.candidates)
        if self.depth is not None:
            _at_least_one("depth", self.depth)
        _few_enough(self.label(), self.node_budget)

    @property
    def num_nodes(self) -> int:
        """The budget."""
        return self.node_budget

    @property
    def num_candidates(self) -> int:
        """Candidates wanted at every node."""
        return self.candidates

    def fitted(self, block_size: int) -> BestFirst:
        """With the depth that a drafter of γ = `block_size` gives."""
        return replace(self, depth=_fitted_depth(self, self.depth, block_size))

    def label(self) -> str:
        """``best-first:BUDGET`` or ``markov:BUDGET``, then ``,CANDIDATES`` and ``,DEPTH`` where they are not usual."""
        kind = "best-first" if self.conditional == "factorised" else "markov"
        values = [self.node_budget]
        if self.candidates != 8 or self.depth is not None:
            values.append(self.candidates)
        if self.depth is not None:
            values.append(self.depth)
        return f"{kind}:{','.join(map(str, values))}"


@dataclass(frozen=True)
class DynamicTopK:
    """EAGLE-2's tree (Li et al. 2024, arXiv 2406.16858): a beam grows it, then the likeliest of all its nodes stay.

    Parameters
    ----------
    top_k
        Nodes of each depth that are expanded, and candidates of each.
    depth
        Levels.
    node_budget
        Nodes that stay.
    """

    top_k: int
    depth: int
    node_budget: int

    def __post_init__(self) -> None:
        for name in ("top_k", "depth", "node_budget"):
            _at_least_one(name, getattr(self, name))
        _few_enough(self.label(), self.node_budget)

    @property
    def num_nodes(self) -> int:
        """The budget."""
        return self.node_budget

    @property
    def num_candidates(self) -> int:
        """Candidates wanted at every node."""
        return self.top_k

    def fitted(self, block_size: int) -> DynamicTopK:
        """Itself, if the drafter is deep enough."""
        return replace(self, depth=_fitted_depth(self, self.depth, block_size))

    def label(self) -> str:
        """``dynamic:TOP_K,DEPTH,BUDGET``."""
        return f"dynamic:{self.top_k},{self.depth},{self.node_budget}"


@dataclass(frozen=True)
class Sequoia:
    """The static tree that accepts most under given acceptance rates (Sequoia, Chen et al. 2024).

    Parameters
    ----------
    node_budget
        Most nodes.
    acceptance
        ``acceptance[d][k]``, probability that the candidate of rank k at depth d + 1 is accepted given its parent was;
        the last row holds for all deeper nodes.
    depth
        Deepest node; ``None`` is the drafter's whole block.
    """

    node_budget: int
    acceptance: Acceptance = DEFAULT_ACCEPTANCE
    depth: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("node_budget", self.node_budget)
        if self.depth is not None:
            _at_least_one("depth", self.depth)
        object.__setattr__(self, "acceptance", tuple(tuple(map(float, row)) for row in self.acceptance))
        for row in self.acceptance:
            if not row or not all(0.0 <= rate <= 1.0 for rate in row) or sum(row) > 1.0 + 1e-9:
                raise UserError(
                    f"acceptance rates {row} are not probabilities of different outcomes; give one or more rates from "
                    "0 to 1 whose sum is at most 1"
                )
        if not self.acceptance:
            raise UserError("acceptance has no rates; give one row of rates by rank, or one for every depth")
        _few_enough(self.label(), self.node_budget)

    @property
    def num_nodes(self) -> int:
        """Nodes of a fitted shape: the budget, or what the depth and the ranks allow."""
        return self.tree().num_nodes

    @property
    def num_candidates(self) -> int:
        """Candidates wanted at every node."""
        return max(map(len, self.acceptance))

    def fitted(self, block_size: int) -> Sequoia:
        """With the depth that a drafter of γ = `block_size` gives."""
        return replace(self, depth=_fitted_depth(self, self.depth, block_size))

    def tree(self) -> TokenTree:
        """The nodes of every round."""
        return best_tree(self.acceptance, self.node_budget, _known(self.depth))[0]

    def label(self) -> str:
        """``sequoia:BUDGET``, with the depth and the rates where they are not usual."""
        text = f"sequoia:{self.node_budget}"
        if self.depth is not None:
            text += f",{self.depth}"
        if self.acceptance != DEFAULT_ACCEPTANCE:
            text += "@" + "|".join("/".join(map(repr, row)) for row in self.acceptance)
        return text


StaticShape = Chain | FixedWidth | Sequoia
TreeShape = Chain | FixedWidth | BestFirst | DynamicTopK | Sequoia

_FORMS = (
    "chain, chain:DEPTH, width:WIDTH,DEPTH, best-first:BUDGET, markov:BUDGET (both with ,CANDIDATES and ,DEPTH if "
    "wanted), dynamic:TOP_K,DEPTH,BUDGET or sequoia:BUDGET (with @RATE/RATE/... by rank if wanted)"
)


def parse_tree(text: str) -> TreeShape:
    """A shape from its text, such as ``best-first:32``; the reverse of a shape's `label`.

    Raises
    ------
    UserError
        If the text names no shape or a number is out of range.
    """
    name, _, rest = text.strip().partition(":")
    values, at, rates = rest.partition("@")
    try:
        numbers = [int(value) for value in values.split(",")] if rest else []
        acceptance = tuple(tuple(float(rate) for rate in row.split("/")) for row in rates.split("|")) if at else None
    except ValueError:
        raise UserError(f"tree {text!r} holds something that is no number; give {_FORMS}") from None
    if acceptance is not None and name != "sequoia":
        raise UserError(f"tree {text!r} has acceptance rates and only sequoia takes them; give {_FORMS}")
    match name, numbers:
        case "chain", []:
            return Chain()
        case "chain", [depth]:
            return Chain(depth)
        case "width", [width, depth]:
            return FixedWidth(width, depth)
        case (("best-first" | "markov"), [budget, *more]) if len(more) <= 2:
            conditional: Conditional = "factorised" if name == "best-first" else "markov"
            return BestFirst(
                budget,
                candidates=more[0] if more else 8,
                conditional=conditional,
                depth=more[1] if len(more) == 2 else None,
            )
        case "dynamic", [top_k, depth, budget]:
            return DynamicTopK(top_k, depth, budget)
        case "sequoia", [budget, *more] if len(more) <= 1:
            return Sequoia(budget, acceptance or DEFAULT_ACCEPTANCE, more[0] if more else None)
    raise UserError(f"tree {text!r} is no shape; give {_FORMS}")


def recorded_shape(config: Mapping[str, Any]) -> TreeShape | None:
    """Shape of a run's drafts by its configuration, fitted to its drafter; ``None`` for chains.

    Raises
    ------
    UserError
        If its entry `tree` is no shape.
    """
    label = config.get("tree")
    shape = Chain() if label is None else parse_tree(str(label))
    return None if isinstance(shape, Chain) else shape.fitted(int(config.get("block_size") or 0))


def refuse_branches(shape: TreeShape, drafter: str) -> None:
    """Refuse a shape that branches, for a drafter that proposes one continuation.

    Raises
    ------
    UserError
        If the shape is not a chain.
    """
    if shape.num_candidates > 1:
        raise UserError(
            f"tree {shape.label()} branches and drafter {drafter} proposes one continuation; use --tree chain or "
            "another drafter"
        )


@lru_cache(maxsize=64)
def _full_tree(width: int, depth: int) -> TokenTree:
    parents = np.zeros(0, dtype=np.int64)
    above = np.array([-1])
    for _ in range(depth):
        first = len(parents)
        parents = np.concatenate((parents, np.repeat(above, width)))
        above = np.arange(first, len(parents))
    return TokenTree.of(parents)


def _known(depth: int | None) -> int:
    if depth is None:
        raise ValueError("the depth is the drafter's; call fitted(block_size) first")
    return depth


def _fitted_depth(shape: TreeShape, depth: int | None, block_size: int) -> int:
    if block_size < 1:
        raise UserError(f"tree {shape.label()} needs a drafter and its block has {block_size} tokens; choose a drafter")
    if depth is not None and depth > block_size:
        raise UserError(
            f"tree {shape.label()} is {depth} deep and the drafter proposes {block_size} tokens; give a depth of at "
            f"most {block_size}"
        )
    return block_size if depth is None else depth


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} of a tree is {value}; give 1 or more, or policy none to draft nothing")


def _few_enough(label: str, num_nodes: int) -> None:
    if num_nodes > MOST_NODES:
        raise UserError(f"tree {label} has {num_nodes} nodes; give at most {MOST_NODES}")
