"""Token trees: what holds for every tree, and builders against exhaustive search."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sim.errors import UserError
from dspark_sim.policy import admit_prefixes
from dspark_sim.tree import NOWHERE, TokenTree, TreeBatch, never_rising, paying_nodes
from dspark_sim.tree_accept import accept_matching_tree, path_places
from dspark_sim.tree_builders import Candidates, Frontier, grow
from dspark_sim.tree_sequoia import best_tree
from dspark_sim.tree_shapes import (
    BestFirst,
    Chain,
    DynamicTopK,
    FixedWidth,
    Sequoia,
    TreeShape,
    parse_tree,
    refuse_branches,
)

Path = tuple[int, ...]
SHAPES = ["chain", "width:2,3", "width:3,1", "best-first:9", "best-first:30,3", "dynamic:2,3,7", "sequoia:9"]


def candidates(seed: int, num_requests: int, gamma: int, width: int, *, tied: bool = False) -> Candidates:
    """Random acceptances falling with rank; `tied` makes many of them equal."""
    rng = np.random.default_rng(seed)
    chance = rng.dirichlet(np.full(width + 1, 0.7), (num_requests, gamma))[..., :width]
    if tied:
        chance = np.round(chance * 4) / 8
    tokens = np.argsort(rng.random((num_requests, gamma, 50)), axis=-1)[..., :width]
    with np.errstate(divide="ignore"):
        return Candidates(tokens, np.log(-np.sort(-chance, axis=-1)))


def every_path(given: Candidates, request: int) -> dict[Path, float]:
    """Survival by ranks along a path, of all nodes there are."""
    _, gamma, width = given.tokens.shape
    chance = np.exp(given.log_acceptance[request])
    return {
        path: float(np.prod([chance[k, rank] for k, rank in enumerate(path)]))
        for depth in range(1, gamma + 1)
        for path in product(range(width), repeat=depth)
    }


def rank_paths(tree: TokenTree) -> list[Path]:
    return [tuple(tree.ranks[tree.path(node)].tolist()) for node in range(tree.num_nodes)]


@pytest.mark.parametrize("text", SHAPES)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31), tied=st.booleans())
def test_every_built_tree_is_a_tree_in_admission_order(text: str, seed: int, tied: bool) -> None:
    shape = parse_tree(text).fitted(4)
    given_ = candidates(seed, 3, 4, 8, tied=tied)
    batch = given_.build(shape)
    assert batch.parents.shape[1] <= shape.num_nodes
    for request in range(3):
        tree = batch.tree(request)  # validated as it is made
        survival = batch.survival[request, : tree.num_nodes]
        paths = every_path(given_, request)
        for node, path in enumerate(rank_paths(tree)):
            assert batch.tokens[request, node] == given_.tokens[request, len(path) - 1, path[-1]]
            assert survival[node] == pytest.approx(paths[path], rel=1e-6)
        if isinstance(shape, BestFirst | DynamicTopK):
            assert (survival[1:] <= survival[:-1]).all()
        # Any prefix is a tree as well.
        for count in range(tree.num_nodes + 1):
            tree.prefix(count)
        mask = batch.ancestor_mask()[request, : tree.num_nodes, : tree.num_nodes]
        assert all(set(np.flatnonzero(row)) == set(tree.path(node)) for node, row in enumerate(mask))
        assert np.array_equal(mask, tree.ancestor_mask())
    assert (batch.tokens[batch.depths == 0] == -1).all() and (batch.survival[batch.depths == 0] == 0).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_best_first_is_the_best_connected_tree(seed: int, budget: int) -> None:
    given_ = candidates(seed, 2, 2, 3)
    batch = given_.build(BestFirst(budget, candidates=3).fitted(2))
    for request in range(2):
        paths = every_path(given_, request)
        best = max(
            sum(paths[path] for path in chosen)
            for chosen in combinations(paths, budget)
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
        )
        assert batch.survival[request].sum() == pytest.approx(best, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from(["best-first:{}", "dynamic:3,4,{}", "best-first:{},8,2"]))
def test_smaller_budgets_are_beginnings_of_larger_ones(seed: int, tied: bool, text: str) -> None:
    given_ = candidates(seed, 3, 4, 8, tied=tied)
    large = given_.build(parse_tree(text.format(30)).fitted(4))
    for budget in (1, 2, 7, 16):
        small = given_.build(parse_tree(text.format(budget)).fitted(4))
        cut = large.prefix(np.full(3, budget))
        for name in TreeBatch.__slots__:
            assert np.array_equal(getattr(small, name), getattr(cut, name)), name


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_dynamic_top_k_is_eagle_2(seed: int, budget: int) -> None:
    top_k, gamma = 2, 4
    given_ = candidates(seed, 1, gamma, top_k)
    paths = every_path(given_, 0)
    # Its expansion and its reranking, as the paper has them.
    layer: list[Path] = [()]
    seen: list[Path] = []
    for _ in range(gamma):
        children = [(*path, rank) for path in layer for rank in range(top_k)]
        seen += children
        layer = sorted(children, key=lambda path: -paths[path])[:top_k]
    best = sorted(seen, key=lambda path: -paths[path])[:budget]
    batch = given_.build(DynamicTopK(top_k, gamma, budget))
    assert set(rank_paths(batch.tree(0))) == set(best)


def test_a_conditional_drafter_is_asked_once_a_depth_with_its_own_rows() -> None:
    """Each node's candidates hang on its whole path; the answer must be that of expanding everything."""
    rng = np.random.default_rng(0)
    laws: dict[tuple[int, Path], np.ndarray] = {}

    def law(request: int, path: Path) -> np.ndarray:
        return laws.setdefault((request, path), -np.sort(-rng.dirichlet(np.ones(4))))

    asked: list[int] = []
    history: list[list[tuple[int, Path]]] = []

    def expand(frontier: Frontier) -> tuple[np.ndarray, np.ndarray]:
        asked.append(frontier.depth)
        if frontier.depth == 1:
            rows: list[tuple[int, Path]] = [(int(request), ()) for request in frontier.requests]
        else:
            rows = [
                (history[-1][row][0], (*history[-1][row][1], rank))
                for row, rank in zip(frontier.rows.tolist(), frontier.ranks.tolist(), strict=True)
            ]
            assert [request for request, _ in rows] == frontier.requests.tolist()
            assert frontier.tokens.tolist() == [10 * len(path) + path[-1] for _, path in rows]
        history.append(rows)
        tokens = np.array([[10 * frontier.depth + rank for rank in range(4)] for _ in rows])
        return tokens, np.log([law(*row) for row in rows])

    for shape in (BestFirst(12, candidates=4, conditional="markov").fitted(3), FixedWidth(2, 3)):
        asked.clear(), history.clear()
        batch = grow(shape, expand, 2)
        assert asked == [1, 2, 3]
        for request in range(2):
            every = {
                path: float(np.prod([law(request, path[:k])[rank] for k, rank in enumerate(path)]))
                for depth in (1, 2, 3)
                for path in product(range(4), repeat=depth)
            }
            paths = rank_paths(batch.tree(request))
            for path, survival in zip(paths, batch.survival[request], strict=True):
                assert survival == pytest.approx(every[path], rel=1e-6)
            if isinstance(shape, BestFirst):
                assert set(paths) == set(sorted(every, key=lambda path: -every[path])[:12])


def trees_of(size: int, width: int, depth: int) -> list[frozenset[Path]]:
    """All trees of `size` nodes whose children are taken in order of rank."""
    grown: set[frozenset[Path]] = {frozenset()}
    for _ in range(size):
        following = set()
        for tree in grown:
            for path in ((), *tree):
                rank = sum(other[:-1] == path and len(other) == len(path) + 1 for other in tree)
                if rank < width and len(path) < depth:
                    following.add(tree | {(*path, rank)})
        grown = following
    return list(grown)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(0.0, 0.33), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_sequoia_is_the_best_of_all_trees(rates: list[list[float]], size: int, depth: int) -> None:
    acceptance = tuple(tuple(row) for row in rates)

    def value(path: Path) -> float:
        return float(np.prod([acceptance[min(k, len(acceptance) - 1)][rank] for k, rank in enumerate(path)]))

    tree, survival = best_tree(acceptance, size, depth)
    possible = trees_of(tree.num_nodes, 3, depth)
    assert tree.num_nodes == min(size, {1: 3, 2: 12, 3: 39}[depth])
    assert sum(survival) == pytest.approx(max(sum(map(value, chosen)) for chosen in possible), abs=1e-12)
    assert [value(path) for path in rank_paths(tree)] == pytest.approx(survival)


def test_where_rates_fall_sequoia_is_best_first() -> None:
    rates = (0.5, 0.2, 0.1, 0.05)
    fixed = Candidates(np.tile(np.arange(4), (1, 5, 1)), np.log(np.tile(rates, (1, 5, 1))))
    for budget in (1, 5, 20, 64):
        best = fixed.build(BestFirst(budget, candidates=4).fitted(5)).survival.sum()
        tree, survival = best_tree((rates,), budget, 5)
        assert Sequoia(budget, (rates,)).fitted(5).tree() is tree
        assert sum(survival) == pytest.approx(best, rel=1e-6)
        # The beginning of a larger tree's list is as good.
        assert sum(best_tree((rates,), 100, 5)[1][:budget]) == pytest.approx(best, rel=1e-6)


def test_a_chain_is_the_tree_of_width_1() -> None:
    given_ = candidates(3, 4, 5, 6)
    chain = given_.build(Chain().fitted(5))
    assert chain.tree(0).is_chain and not given_.build(FixedWidth(2, 2)).tree(0).is_chain
    assert np.array_equal(chain.tokens, given_.tokens[:, :, 0])
    assert np.allclose(chain.survival, np.exp(given_.log_acceptance[:, :, 0].cumsum(axis=1)))
    for shape in (FixedWidth(1, 5), Sequoia(5, ((0.9,),)).fitted(5), BestFirst(5, candidates=1).fitted(5)):
        other = given_.build(shape)
        for name in TreeBatch.__slots__:
            assert np.array_equal(getattr(chain, name), getattr(other, name)), name


def walk(tree: TokenTree, tokens: np.ndarray, count: int, said: np.ndarray) -> list[int]:
    here, path = -1, []
    while True:
        found = [c for c in tree.children[here] if c < count and tokens[c] == said[here + 1]]
        if not found:
            return path
        here = found[0]
        path.append(here)


@pytest.mark.parametrize("text", SHAPES)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31))
def test_the_walk_down_and_the_places_of_the_output(text: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given_ = candidates(seed, 4, 4, 8)
    batch = given_.build(parse_tree(text).fitted(4))
    width = batch.tokens.shape[1]
    verify = np.array([rng.integers(0, count + 1) for count in batch.num_nodes])
    # The target says what some child is, mostly.
    said = np.where(rng.random((4, width + 1)) < 0.3, 77, 0)
    for request in range(4):
        children = batch.tree(request).children
        for row in range(width + 1):
            below = children[row - 1] if row - 1 < batch.num_nodes[request] else ()
            if said[request, row] == 0 and below:
                said[request, row] = batch.tokens[request, rng.choice(below)]
    found = accept_matching_tree(batch, verify, said)
    whole = accept_matching_tree(batch, batch.num_nodes, said)
    outputs = np.concatenate((whole.tokens(batch), whole.next_token[:, None]), axis=1)
    outputs = np.where(outputs < 0, whole.next_token[:, None], outputs)
    for request in range(4):
        path = walk(batch.tree(request), batch.tokens[request], int(verify[request]), said[request])
        assert found.nodes[request, : len(path)].tolist() == path and (found.nodes[request, len(path) :] == -1).all()
        assert found.num_accepted[request] == len(path)
        assert found.next_token[request] == said[request, path[-1] + 1 if path else 0]
    places = path_places(batch, outputs)
    assert (np.diff(np.minimum(places, width + np.arange(places.shape[1])), axis=1) > 0).all()
    assert np.array_equal((places < verify[:, None]).sum(axis=1), found.num_accepted)


def test_the_walk_down_a_chain_is_the_longest_prefix() -> None:
    pytest.importorskip("torch")
    from dspark_sim.engine.verify import accept_matching

    rng = np.random.default_rng(0)
    batch = candidates(0, 200, 4, 2).build(Chain().fitted(4))
    said = np.where(rng.random((200, 5)) < 0.7, np.pad(batch.tokens, ((0, 0), (0, 1))), 99)
    verify = rng.integers(0, 5, 200)
    count, following = accept_matching(batch.tokens, verify, said)
    found = accept_matching_tree(batch, verify, said)
    assert np.array_equal(found.num_accepted, count) and np.array_equal(found.next_token, following)


def test_a_list_is_cut_before_its_first_node_that_is_too_deep() -> None:
    batch = candidates(5, 6, 4, 8).build(parse_tree("best-first:20").fitted(4))
    first = batch.first_at_depth(4)
    for limit in range(6):
        cut = batch.within(np.full(6, limit))
        for request in range(6):
            depths = batch.tree(request).depths
            expected = next((node for node, depth in enumerate(depths) if depth > limit), len(depths))
            assert cut[request] == expected
            assert limit >= 4 or min(first[request, limit], batch.num_nodes[request]) == expected
    chain = candidates(5, 6, 4, 8).build(Chain().fitted(4))
    assert chain.within(np.arange(6)).tolist() == [0, 1, 2, 3, 4, 4]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_nodes_are_added_while_the_rate_rises(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    survival = -np.sort(-rng.random(count))
    seconds = 1 + np.cumsum(np.concatenate(([0.0], rng.random(count) * 0.4)))
    assert paying_nodes(survival, seconds) == admit_prefixes(survival[None], seconds)[0]
    both = np.stack((survival, survival[::-1]))
    together = paying_nodes(both, seconds)
    worth = (2 + np.concatenate(([0.0], never_rising(both).sum(axis=0).cumsum()))) / seconds
    assert all(worth[b + 1] > worth[b] for b in range(together))
    assert together == count or worth[together + 1] <= worth[together]


def test_step_times_that_do_not_fit_are_one_sentence() -> None:
    for seconds in (np.ones(3), np.array([1.0, 0.0, 1.0, 1.0])):
        with pytest.raises(UserError, match="step times go with 3 nodes; give one positive time for each"):
            paying_nodes(np.array([0.5, 0.4, 0.3]), seconds)


def test_what_a_policy_sees_never_rises_and_looks_back_only() -> None:
    rng = np.random.default_rng(1)
    raw = rng.random((5, 9))
    seen = never_rising(raw)
    assert (np.diff(seen, axis=1) <= 0).all() and (seen <= raw).all()
    changed = raw.copy()
    changed[:, 5:] = rng.random((5, 4))
    assert np.array_equal(never_rising(changed)[:, :5], seen[:, :5])


@pytest.mark.parametrize(
    "text",
    [
        *SHAPES,
        "chain:3",
        "markov:64",
        "markov:64,4",
        "sequoia:20,3",
        "sequoia:20@0.5/0.25|0.5/0.125",
        "best-first:8,4,2",
    ],
)
def test_labels_are_read_back(text: str) -> None:
    shape = parse_tree(text)
    assert parse_tree(shape.label()) == shape
    assert parse_tree(shape.fitted(5).label()) == shape.fitted(5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("width:0,3", "width of a tree is 0; give 1 or more"),
        ("width:2,0", "depth of a tree is 0"),
        ("best-first:0", "node_budget of a tree is 0"),
        ("dynamic:0,2,3", "top_k of a tree is 0"),
        ("width:2", "is no shape; give chain"),
        ("width:two,3", "holds something that is no number"),
        ("beam:3", "is no shape"),
        ("chain@0.5", "is no shape"),
        ("width:2,2@0.5", "only sequoia takes them"),
        ("sequoia:8@0.9/0.3", "whose sum is at most 1"),
        ("width:2,40", "give at most 1024"),
        ("best-first:5000", "give at most 1024"),
    ],
)
def test_shapes_that_make_no_sense_are_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_tree(text)


def test_what_a_drafter_cannot_make_is_one_sentence() -> None:
    with pytest.raises(UserError, match="is 5 deep and the drafter proposes 4"):
        FixedWidth(2, 5).fitted(4)
    with pytest.raises(UserError, match="its block has 0 tokens; choose a drafter"):
        Chain().fitted(0)
    with pytest.raises(UserError, match="branches and drafter ngram proposes one continuation"):
        refuse_branches(FixedWidth(2, 2), "ngram")
    refuse_branches(FixedWidth(1, 2), "ngram")
    with pytest.raises(UserError, match="needs 3 candidates at depth 1 and the drafter gives 2"):
        candidates(0, 1, 2, 2).build(FixedWidth(3, 1))


@pytest.mark.parametrize(
    ("parents", "depths", "ranks", "said"),
    [
        ([-1, 1], [1, 2], [0, 0], "node 1 of a tree has parent 1"),
        ([-2], [1], [0], "node 0 of a tree has parent -2"),
        ([-1, 0], [1, 1], [0, 0], "has depth 1 and its parent makes it 2"),
        ([-1, -1], [1, 1], [1, 1], "has rank 1 behind a sibling of rank 1"),
        ([-1], [1], [-1], "has rank -1"),
        ([-1, 0], [1], [0, 0], "give one value for every node"),
        ([[-1]], [[1]], [[0]], "give one value for every node"),
    ],
)
def test_lists_that_are_no_tree_are_one_sentence(parents: list, depths: list, ranks: list, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TokenTree(np.array(parents), np.array(depths), np.array(ranks))


def test_every_shape_is_a_shape() -> None:
    shapes: list[TreeShape] = [parse_tree(text).fitted(4) for text in SHAPES]
    assert [shape.num_nodes for shape in shapes] == [4, 14, 3, 9, 30, 7, 9]
    assert [shape.num_candidates for shape in shapes] == [1, 2, 3, 8, 3, 2, 4]
    assert path_places(candidates(0, 1, 2, 2).build(Chain().fitted(2)), np.array([[-5, -5]])).tolist() == [
        [NOWHERE] * 2
    ]
