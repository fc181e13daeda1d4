"""Exact laws of what requests emit when their drafts are trees; see `enumeration`.

Trees come from the real builders, acceptance from the real walks (`tree_accept`), choices from the real policies; only
the laws of target and drafter are made up. In ``rejection`` every way to draw the children without replacement is
followed, in the matching modes every choice of the target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Literal

import numpy as np
import numpy.typing as npt

from dspark_sim.exactness.enumeration import Array, Law, Outcome, Path, World, chosen_lens
from dspark_sim.loop import Mode
from dspark_sim.policy import LoadView, SpeculationPolicy
from dspark_sim.tree import TokenTree, TreeBatch, never_rising
from dspark_sim.tree_accept import accept_matching_tree, judge_child
from dspark_sim.tree_builders import Frontier, grow
from dspark_sim.tree_shapes import BestFirst, DynamicTopK, TreeShape

Told = Literal["pre_token", "own_token"]
Drawn = Literal["without_replacement", "likeliest"]


@dataclass(frozen=True, eq=False)
class TreeDraft:
    """One request's tree: its nodes, their tokens, and what a policy is told of them."""

    tree: TokenTree
    tokens: Path
    survival: Array

    def __len__(self) -> int:
        return self.tree.num_nodes

    def before(self, node: int) -> Path:
        """Tokens from the anchor's child down to `node`; none for the anchor, which is -1."""
        return tuple(self.tokens[place] for place in self.tree.path(node))

    def batch(self) -> TreeBatch:
        """As a batch of one."""
        tree, tokens = self.tree, np.array(self.tokens, dtype=np.int64)
        return TreeBatch(
            np.array([len(self)]),
            tree.parents[None],
            tree.depths[None],
            tree.ranks[None],
            tokens[None],
            self.survival[None],
        )


@dataclass(eq=False)
class Trees:
    """Rounds of trees in a world, for `enumeration.output_law`.

    Parameters
    ----------
    world, mode
        Whose laws; how drafts are accepted.
    shape
        Fitted. Under ``rejection`` a static one, whose children are drawn.
    factorised
        The drafter says at every depth what it says behind its own likeliest path, instead of behind each node.
    told
        ``pre_token``: survivals are made of confidences of the nodes above and of ranks. ``own_token``: of the
        drafter's probability of the very token that was drawn, as a control.
    drawn
        ``likeliest``: under ``rejection`` the children are the likeliest tokens but judged as if drawn, as a control.
    """

    world: World
    mode: Mode
    shape: TreeShape
    factorised: bool = False
    told: Told = "pre_token"
    drawn: Drawn = "without_replacement"
    _built: dict[tuple[int, Path], TreeDraft] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Most nodes."""
        return self.shape.num_nodes

    def law(self, request: int, output: Path, path: Path) -> Array:
        """The drafter's law behind a node, [V]."""
        if self.factorised:
            likeliest: Path = ()
            for _ in path:
                likeliest = (*likeliest, int(self.world.drafter(request, (*output, *likeliest)).argmax()))
            path = likeliest
        return self.world.drafter(request, (*output, *path))

    def drafts(self, request: int, output: Path, draft_len: int, room: int) -> list[tuple[TreeDraft, float]]:
        """See `enumeration.Rounds`."""
        if self.mode == "rejection" and self.drawn == "without_replacement":
            return self._sampled(request, output, draft_len, room)
        return [(self.best(request, output, draft_len, room), 1.0)]

    def best(
        self,
        request: int,
        output: Path,
        draft_len: int,
        room: int,
        ranked: Callable[[Array, int], npt.NDArray[np.int64]] | None = None,
    ) -> TreeDraft:
        """The tree of candidates in the order of ``ranked(law, depth)``; by default the likeliest come first."""
        whole = self._built.get((request, output))
        if whole is None or ranked is not None:
            whole = self._grown(request, output, ranked)
            if ranked is None:
                self._built[request, output] = whole
        return _cut(whole, draft_len, room)

    def _grown(
        self, request: int, output: Path, ranked: Callable[[Array, int], npt.NDArray[np.int64]] | None
    ) -> TreeDraft:
        paths: list[list[Path]] = []
        width = min(self.shape.num_candidates, self.world.vocab_size)

        def expand(frontier: Frontier) -> tuple[npt.NDArray[np.int64], Array]:
            rows: list[Path] = [()]
            if frontier.depth > 1:
                above = zip(frontier.rows.tolist(), frontier.tokens.tolist(), strict=True)
                rows = [(*paths[-1][row], token) for row, token in above]
            paths.append(rows)
            laws = [self.law(request, output, path) for path in rows]
            order = [np.argsort(-law) if ranked is None else ranked(law, frontier.depth - 1) for law in laws]
            confidence = np.array([self.world.confidence(request, (*output, *path)) for path in rows])
            logs = np.log(confidence[:, None]) + np.log1p(-confidence[:, None]) * np.arange(width)
            return np.array([places[:width] for places in order]), logs

        batch = grow(self.shape, expand, 1)
        return TreeDraft(batch.tree(0), tuple(batch.tokens[0].tolist()), batch.survival[0])

    def _sampled(self, request: int, output: Path, draft_len: int, room: int) -> list[tuple[TreeDraft, float]]:
        assert not isinstance(self.shape, BestFirst | DynamicTopK)
        tree = self.shape.tree()
        tree = tree.prefix(_count(tree, draft_len, room))
        # Tokens so far, their probability, and what is left of the drafter's law at every node and the anchor.
        ways: list[tuple[Path, float]] = [((), 1.0)]
        for node in range(tree.num_nodes):
            following = []
            for tokens, weight in ways:
                draft = TreeDraft(tree, tokens, np.zeros(0))
                parent = int(tree.parents[node])
                left = self.law(request, output, draft.before(parent)).copy()
                left[[tokens[sibling] for sibling in tree.children[parent] if sibling < node]] = 0.0
                total = left.sum()
                following += [((*tokens, token), weight * float(q / total)) for token, q in enumerate(left) if q > 0]
            ways = following
        return [
            (TreeDraft(tree, tokens, self._estimate(request, output, tree, tokens)), weight) for tokens, weight in ways
        ]

    def _estimate(self, request: int, output: Path, tree: TokenTree, tokens: Path) -> Array:
        draft = TreeDraft(tree, tokens, np.zeros(0))
        survival = np.zeros(tree.num_nodes)
        for node in range(tree.num_nodes):
            parent = int(tree.parents[node])
            path = (*output, *draft.before(parent))
            confidence = self.world.confidence(request, path)
            share = confidence * (1 - confidence) ** int(tree.ranks[node])
            if self.told == "own_token":
                share = float(self.world.drafter(request, path)[tokens[node]])
            survival[node] = share * (1.0 if parent < 0 else survival[parent])
        return survival

    def survival(self, request: int, output: Path, draft: TreeDraft) -> Array:
        """See `enumeration.Rounds`."""
        return never_rising(draft.survival)

    def outcomes(self, request: int, output: Path, draft: TreeDraft, verify_len: int) -> list[Outcome]:
        """See `enumeration.Rounds`."""
        found: dict[tuple[int, Path], float] = defaultdict(float)
        if self.mode == "rejection":
            self._judged(request, output, draft, verify_len, -1, 1.0, found)
        else:
            self._matched(request, output, draft, verify_len, found)
        return [(count, emitted, weight) for (count, emitted), weight in found.items()]

    def _judged(
        self,
        request: int,
        output: Path,
        draft: TreeDraft,
        verify_len: int,
        node: int,
        weight: float,
        found: dict[tuple[int, Path], float],
    ) -> None:
        above = draft.before(node)
        p = self.world.target(request, (*output, *above))[None]
        q = self.law(request, output, above)[None]
        for child in draft.tree.children[node]:
            if child >= verify_len:
                break
            accept, p_rest, q_rest = judge_child(p, q, np.array([draft.tokens[child]]))
            if accept[0] > 0:
                self._judged(request, output, draft, verify_len, child, weight * float(accept[0]), found)
            weight, p, q = weight * (1.0 - float(accept[0])), p_rest, q_rest
        for token, chance in enumerate(p[0]):
            found[len(above), (*above, token)] += weight * float(chance)

    def _matched(
        self, request: int, output: Path, draft: TreeDraft, verify_len: int, found: dict[tuple[int, Path], float]
    ) -> None:
        depth = draft.tree.prefix(verify_len).max_depth
        batch = draft.batch()
        for said in product(range(self.world.vocab_size), repeat=depth + 1):
            weight = 1.0
            for k, token in enumerate(said):
                law = self.world.target(request, (*output, *said[:k]))
                weight *= float(token == law.argmax()) if self.mode == "greedy" else float(law[token])
            if weight:
                # What the target says behind a node off this path decides nothing.
                rows = np.array([said[0], *(said[min(k, depth)] for k in draft.tree.depths)])
                taken = accept_matching_tree(batch, np.array([verify_len]), rows[None])
                count = int(taken.num_accepted[0])
                emitted = (*taken.tokens(batch)[0, :count].tolist(), int(taken.next_token[0]))
                found[count, emitted] += weight


def _count(tree: TokenTree, draft_len: int, room: int) -> int:
    """Nodes of a list that ends before its first node deeper than `room`."""
    deeper = np.flatnonzero(tree.depths > room)
    return min(draft_len, int(deeper[0]) if deeper.size else tree.num_nodes)


def _cut(draft: TreeDraft, draft_len: int, room: int) -> TreeDraft:
    count = _count(draft.tree, draft_len, room)
    return TreeDraft(draft.tree.prefix(count), draft.tokens[:count], draft.survival[:count])


def coupled_tree_law(rounds: Trees, policy: SpeculationPolicy, num_tokens: int) -> Law:
    """Target and drafter choose by one number a position: the token whose share of [0, 1) it falls in.

    The drafter's other candidates follow by probability. Each position's number is cut into the cells in which no
    choice changes, and each combination of cells is decoded.
    """
    world = rounds.world
    cells: list[list[tuple[float, float]]] = []
    for request in range(world.num_requests):
        for position in range(num_tokens):
            cuts = {0.0, 1.0}
            for path in product(range(world.vocab_size), repeat=position):
                laws = [world.target(request, path), world.drafter(request, path)]
                cuts |= {float(cut) for law in laws for cut in np.cumsum(law)[:-1]}
            cells.append(list(pairwise(sorted(cuts))))
    law: Law = defaultdict(float)
    for combination in product(*cells):
        middle = [(low + high) / 2 for low, high in combination]
        noise = [middle[r * num_tokens : (r + 1) * num_tokens] for r in range(world.num_requests)]
        law[_decode(rounds, policy, num_tokens, noise)] += float(np.prod([high - low for low, high in combination]))
    return dict(law)


def _decode(rounds: Trees, policy: SpeculationPolicy, num_tokens: int, noise: list[list[float]]) -> tuple[Path, ...]:
    world, controller, step = rounds.world, policy.start(), 0
    outputs: list[Path] = [() for _ in range(world.num_requests)]

    def chosen(law: Array, request: int, position: int) -> int:
        return min(int(np.searchsorted(np.cumsum(law), noise[request][position], side="right")), len(law) - 1)

    while running := [r for r in range(world.num_requests) if len(outputs[r]) < num_tokens]:
        load = LoadView(step, len(running), 0, 10 * len(running), rounds.size, tuple(running))
        draft_len = min(controller.draft_len(load), rounds.size)
        drafts = []
        for r in running:

            def ranked(law: Array, depth: int, r: int = r) -> npt.NDArray[np.int64]:
                position = len(outputs[r]) + depth
                order = np.argsort(-law)
                if position >= num_tokens:
                    return order
                first = chosen(law, r, position)
                return np.concatenate(([first], order[order != first]))

            drafts.append(rounds.best(r, outputs[r], draft_len, num_tokens - len(outputs[r]) - 1, ranked))
        told = [never_rising(draft.survival) for draft in drafts]
        verify_lens = chosen_lens(controller, load, told, drafts, draft_len)
        accepted = []
        for r, draft, length in zip(running, drafts, verify_lens.tolist(), strict=True):
            said = []
            for node in range(-1, len(draft)):
                path = (*outputs[r], *draft.before(node))
                said.append(chosen(world.target(r, path), r, len(path)) if len(path) < num_tokens else -1)
            taken = accept_matching_tree(draft.batch(), np.array([length]), np.array([said]))
            count = int(taken.num_accepted[0])
            accepted.append(count)
            outputs[r] = (*outputs[r], *taken.tokens(draft.batch())[0, :count].tolist(), int(taken.next_token[0]))
        controller.observe(load, verify_lens, np.array(accepted))
        step += 1
    return tuple(outputs)


def acceptance_of_children(p: Array, q: Array, num_children: int, *, replaced: bool = False) -> float:
    """Probability that one of a node's children is accepted, exactly.

    Parameters
    ----------
    p, q
        [V], laws of target and drafter.
    num_children
        Children drawn and judged in turn.
    replaced
        Draw each child from the whole q (SpecInfer) instead of without replacement (Sequoia).
    """
    if num_children == 0:
        return 0.0
    total = 0.0
    for token in np.flatnonzero(q > 0).tolist():
        accept, p_rest, q_rest = judge_child(p[None], q[None], np.array([token]))
        rest = acceptance_of_children(p_rest[0], q if replaced else q_rest[0], num_children - 1, replaced=replaced)
        total += float(q[token]) * (float(accept[0]) + (1.0 - float(accept[0])) * rest)
    return total
