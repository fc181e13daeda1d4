"""Laws of trees: what is emitted has the target's law, and what is not so is found."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy.stats import chisquare

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.exactness import battery  # noqa: E402
from dspark_sim.exactness.enumeration import World, output_law, total_variation  # noqa: E402
from dspark_sim.exactness.laws import LOOK_AHEAD  # noqa: E402
from dspark_sim.exactness.tree_cases import (  # noqa: E402
    children_accepted,
    node_interventions,
    tree_policies,
)
from dspark_sim.exactness.tree_laws import TreeDraft, Trees, acceptance_of_children  # noqa: E402
from dspark_sim.policy import Fixed  # noqa: E402
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, Oracle  # noqa: E402
from dspark_sim.runnable import require_runnable  # noqa: E402
from dspark_sim.tree import TokenTree, TreeBatch  # noqa: E402
from dspark_sim.tree_accept import accept_sampled_tree, judge_child, require_ordered_siblings  # noqa: E402
from dspark_sim.tree_shapes import Chain, FixedWidth, parse_tree  # noqa: E402


@pytest.fixture(scope="module")
def checks() -> list[battery.Check]:
    return list(battery.trees(True))


def test_every_exact_tree_has_the_law_of_the_target(checks: list[battery.Check]) -> None:
    laws = [check for check in checks if "every shape and policy" in check.case]
    assert {check.case.split(",")[0] for check in laws} == {"greedy", "target_match", "rejection", "coupled"}
    assert len(laws) == 7 and all(check.status == "pass" and check.num_cases >= 7 for check in laws), laws


def test_the_controls_are_biased(checks: list[battery.Check]) -> None:
    controls = [check for check in checks if check.group == "known bad"]
    assert len(controls) == 4 and {check.status for check in controls} == {"pass"}, controls


def test_on_the_toy_children_without_replacement_beat_independent_ones(checks: list[battery.Check]) -> None:
    (check,) = [check for check in checks if "one of 1, 2, 3 children" in check.case]
    assert check.status == "pass", check
    assert {check.status for check in checks} == {"pass"}


def test_a_tree_of_width_1_is_the_chain_of_the_other_enumeration() -> None:
    """The same outcomes with the same probabilities, not only the same law."""
    world = World(1, 3, 2, 5)
    trees = Trees(world, "rejection", Chain(2))
    from dspark_sim.exactness.enumeration import _outcomes

    for draft, weight in trees.drafts(0, (), 2, 2):
        tokens = draft.tokens
        assert weight == pytest.approx(world.drafter(0, ())[tokens[0]] * world.drafter(0, tokens[:1])[tokens[1]])
        for length in range(3):
            expected: Counter[tuple[int, tuple[int, ...]]] = Counter()
            for count, emitted, chance in _outcomes(world, 0, (), tokens[:length], "rejection"):
                expected[count, emitted] += chance  # type: ignore[assignment]
            found = {key[:2]: key[2] for key in trees.outcomes(0, (), draft, length) if key[2] > 0}
            assert found == pytest.approx({key: value for key, value in expected.items() if value > 0})


def test_no_policy_that_may_run_looks_at_a_nodes_own_token() -> None:
    assert sum(node_interventions(policy, 100) for policy in tree_policies()) == 0
    assert node_interventions(GlobalArgmax(tree_policies()[4].cost), 300) > 0  # type: ignore[attr-defined]


def test_one_more_node_changes_nothing_on_average() -> None:
    """Equation (1) of docs/exactness.md for nodes: given the tokens so far, averaged over the next one's."""
    world = World(1, 3, 2, 2)
    trees = Trees(world, "rejection", FixedWidth(2, 2))
    ways = trees.drafts(0, (), 6, 2)
    paths = list(product(range(3), repeat=3))

    def chances(draft: TreeDraft, count: int) -> np.ndarray:
        found = np.zeros(len(paths))
        for _, emitted, weight in trees.outcomes(0, (), draft, count):
            for place, path in enumerate(paths):
                if path[: len(emitted)] == emitted:
                    rest = [world.target(0, path[:k])[path[k]] for k in range(len(emitted), 3)]
                    found[place] += weight * float(np.prod(rest))
        return found

    for count in range(6):
        sums: dict[tuple[int, ...], tuple[float, np.ndarray, np.ndarray]] = {}
        for draft, weight in ways:
            total, fewer, more = sums.get(draft.tokens[:count], (0.0, np.zeros(27), np.zeros(27)))
            sums[draft.tokens[:count]] = (
                total + weight,
                fewer + weight * chances(draft, count),
                more + weight * chances(draft, count + 1),
            )
        for _, fewer, more in sums.values():
            assert np.allclose(fewer, more, atol=1e-14)


def test_children_without_replacement_beat_independent_ones() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        p, q = rng.dirichlet(np.full(4, rng.uniform(0.2, 2)), 2)
        (one, same), *more = children_accepted([p], [q])
        assert one == pytest.approx(same, abs=1e-12) == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)
        assert all(without >= replaced - 1e-12 for without, replaced in more)
        # With as many children as tokens one of them is the target's.
        assert acceptance_of_children(p, q, 4) == pytest.approx(1.0)


def test_a_child_that_was_never_drawn_is_rejected_and_changes_nothing() -> None:
    p, spent = np.array([[0.2, 0.8]]), np.zeros((1, 2))
    accept, p_rest, q_rest = judge_child(p, spent, np.array([1]))
    assert accept[0] == 0 and np.array_equal(p_rest, p) and np.array_equal(q_rest, spent)
    # Equal laws leave nothing over; the target's own is as good.
    accept, p_rest, q_rest = judge_child(p, p, np.array([0]))
    assert accept[0] == 1 and np.array_equal(p_rest, p) and q_rest.tolist() == [[0.0, 1.0]]


def sampled(world: World, shape: FixedWidth, num: int, verify_len: int) -> list[tuple[int, ...]]:
    """What the engine's rule emits from trees drawn at random, by numbers of its own."""
    rng = np.random.default_rng(7)
    tree = shape.tree()
    tokens = np.zeros((num, tree.num_nodes), dtype=np.int64)
    left: dict[tuple[int, int], np.ndarray] = {}
    above: dict[tuple[int, int], tuple[int, ...]] = {}
    for request in range(num):
        for node in range(tree.num_nodes):
            parent = int(tree.parents[node])
            path = above.get((request, parent), ())
            law = left.setdefault((request, parent), world.drafter(0, path).copy())
            tokens[request, node] = rng.choice(3, p=law / law.sum())
            law[tokens[request, node]] = 0.0
            above[request, node] = (*path, int(tokens[request, node]))

    def rows(values: np.ndarray) -> np.ndarray:
        return np.tile(values, (num, 1))

    batch = TreeBatch(
        np.full(num, tree.num_nodes),
        rows(tree.parents),
        rows(tree.depths),
        rows(tree.ranks),
        tokens,
        np.ones((num, tree.num_nodes)),
    )

    def laws(requests: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        paths = [above.get((r, n), ()) for r, n in zip(requests.tolist(), nodes.tolist(), strict=True)]
        return np.stack([world.target(0, path) for path in paths]), np.stack([world.drafter(0, path) for path in paths])

    def draw_next(law: np.ndarray, rejected: np.ndarray, num_accepted: np.ndarray) -> np.ndarray:
        assert np.allclose(law.sum(axis=1), 1) and rejected.shape == num_accepted.shape == (num,)
        return (law.cumsum(axis=1) > rng.random(num)[:, None]).argmax(axis=1)

    found = accept_sampled_tree(batch, np.full(num, verify_len), laws, rng.random(tokens.shape), draw_next)
    path_tokens = found.tokens(batch)
    return [
        (count, *path_tokens[request, :count].tolist(), int(found.next_token[request]))
        for request, count in enumerate(found.num_accepted.tolist())
    ]


@pytest.mark.parametrize("verify_len", [1, 4, 6])
def test_the_engines_rule_draws_the_enumerated_outcomes(verify_len: int) -> None:
    world, shape, num = World(1, 3, 2, 4), FixedWidth(2, 2), 3000
    trees = Trees(world, "rejection", shape)
    expected: Counter[tuple[int, ...]] = Counter()
    for draft, weight in trees.drafts(0, (), 6, 2):
        for count, emitted, chance in trees.outcomes(0, (), draft, verify_len):
            expected[count, *emitted] += weight * chance  # type: ignore[assignment]
    seen = Counter(sampled(world, shape, num, verify_len))
    assert set(seen) <= {key for key, value in expected.items() if value > 0}
    keys = [key for key, value in expected.items() if value * num >= 5]
    rest = num - sum(seen[key] for key in keys)
    left_over = num - sum(expected[key] for key in keys) * num
    counts, wanted = [seen[key] for key in keys], [expected[key] * num for key in keys]
    if left_over > 5:
        counts, wanted = [*counts, rest], [*wanted, left_over]
    wanted = np.array(wanted) * sum(counts) / sum(wanted)
    assert chisquare(counts, wanted).pvalue > 1e-4


def test_a_wrong_residual_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter's law must lose the rejected child: children drawn without replacement, judged as if replaced."""
    from dspark_sim.exactness import tree_laws

    def replaced(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        accept, p_rest, _ = judge_child(p, q, tokens)
        return accept, p_rest, q

    monkeypatch.setattr(tree_laws, "judge_child", replaced)
    world = World(1, 3, 2, 1)
    law = output_law(world, Fixed(6), "rejection", 3, Trees(world, "rejection", FixedWidth(2, 2)))
    assert total_variation(law, world.law(3)) > 0.01


@pytest.mark.parametrize(
    ("text", "mode", "policy", "said"),
    [
        ("best-first:8", "rejection", Fixed(2), "judging tokens that were not drawn by their probabilities biases"),
        ("dynamic:2,2,8", "rejection", Fixed(2), "biases the output under mode rejection"),
        ("width:2,2", "block", Fixed(2), "mode block judges the drafts of a chain together"),
        ("width:2,2", "greedy", ConfidenceThreshold(0.5), "need not be its parent"),
        ("width:2,2", "greedy", Oracle(LOOK_AHEAD), "recorded for chains only"),
        ("width:2,2", "rejection", GlobalArgmax(LOOK_AHEAD), "looks at sampled tokens"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(text: str, mode: str, policy: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_runnable(policy, mode, True, False, parse_tree(text))  # type: ignore[arg-type]


def test_siblings_that_leave_a_rank_out_are_refused() -> None:
    require_ordered_siblings(FixedWidth(2, 2).tree(), "width:2,2")
    with pytest.raises(UserError, match=r"siblings of ranks \[0, 2\]"):
        require_ordered_siblings(TokenTree.of([-1, -1], [0, 2]), "odd")
