"""Acceptance rules: greedy against brute force, rejection against the target's exact law, cutting by hand."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

torch = pytest.importorskip("torch")

from dspark_sim.engine.sampling import SamplingParams, draw, keyed_uniform  # noqa: E402
from dspark_sim.engine.verify import SampledRound, accept_block, accept_matching, accept_rejection, cut  # noqa: E402

GAMMA = 2
NUM_REQUESTS = 40_000
PARAMS = SamplingParams(temperature=1.0, seed=5)


@st.composite
def greedy_rounds(draw_):
    num_requests, width = draw_(st.integers(1, 5)), draw_(st.integers(0, 5))
    rows = st.lists(st.integers(0, 2), min_size=width + 1, max_size=width + 1)
    target = draw_(st.lists(rows, min_size=num_requests, max_size=num_requests))
    drafted = draw_(st.lists(rows, min_size=num_requests, max_size=num_requests))
    lens = draw_(st.lists(st.integers(0, width), min_size=num_requests, max_size=num_requests))
    return np.array(drafted)[:, :width], np.array(lens), np.array(target)


@given(greedy_rounds())
def test_greedy_equals_brute_force(case):
    drafted, lens, target = case
    accepted, following = accept_matching(drafted, lens, target)
    for row in range(len(lens)):
        count = 0
        while count < lens[row] and drafted[row, count] == target[row, count]:
            count += 1
        assert (accepted[row], following[row]) == (count, target[row, count])


@dataclass
class World:
    """Conditional tables: the law of the next token after each path of emitted tokens."""

    vocabulary: int
    target: dict[tuple[int, ...], np.ndarray]
    drafter: dict[tuple[int, ...], np.ndarray]

    @staticmethod
    def random(vocabulary: int, seed: int, outside: tuple[int, ...] = ()) -> "World":
        rng = np.random.default_rng(seed)
        paths = [path for depth in range(GAMMA + 1) for path in product(range(vocabulary), repeat=depth)]
        target = {path: rng.dirichlet(np.ones(vocabulary)) for path in paths}
        drafter = {path: rng.dirichlet(np.ones(vocabulary)) for path in paths}
        for law in drafter.values():
            law[list(outside)] = 0.0
            law /= law.sum()
        return World(vocabulary, target, drafter)

    def law(self) -> np.ndarray:
        """Exact joint law of the first γ+1 tokens under the target alone."""
        joint = np.zeros((self.vocabulary,) * (GAMMA + 1))
        for path in product(range(self.vocabulary), repeat=GAMMA + 1):
            joint[path] = np.prod([self.target[path[:k]][path[k]] for k in range(GAMMA + 1)])
        return joint.ravel()


def _decode(
    world: World, *, drafts: str, judged: str, draft_vocabulary: np.ndarray | None = None, rule=accept_rejection
) -> np.ndarray:
    """Decode γ+1 tokens of every request in speculative rounds; returns [R, γ+1].

    `drafts` is how they are chosen (sample or argmax), `judged` what the rule is told (probs or point).
    """
    ids = np.arange(world.vocabulary) if draft_vocabulary is None else draft_vocabulary
    outputs: list[list[int]] = [[] for _ in range(NUM_REQUESTS)]
    for _ in range(GAMMA + 1):
        waiting = np.array([r for r in range(NUM_REQUESTS) if len(outputs[r]) <= GAMMA])
        if not waiting.size:
            break
        paths = [tuple(outputs[r]) for r in waiting]
        positions = np.array([len(path) for path in paths])
        lens = np.minimum(GAMMA - positions, GAMMA)
        drafted = np.zeros((waiting.size, GAMMA), dtype=np.int64)
        laws = np.zeros((waiting.size, GAMMA, len(ids)), dtype=np.float32)
        ahead = list(paths)
        for depth in range(GAMMA):
            inside = [path if len(path) <= GAMMA else () for path in ahead]
            law = torch.tensor(np.array([world.drafter[path][ids] for path in inside]), dtype=torch.float32)
            u = keyed_uniform(PARAMS.seed, waiting, positions, "draft", depth)
            index = draw(law, u) if drafts == "sample" else law.argmax(dim=-1)
            laws[:, depth], drafted[:, depth] = law.numpy(), ids[index.numpy()]
            ahead = [(*path, int(token)) for path, token in zip(ahead, drafted[:, depth], strict=True)]
        rows = [
            world.target[(*path, *row[:k])]
            for path, row, length in zip(paths, drafted.tolist(), lens, strict=True)
            for k in range(length + 1)
        ]
        judged_round = SampledRound(
            drafted,
            lens,
            torch.tensor(np.array(rows), dtype=torch.float32),
            np.cumsum(lens + 1) - (lens + 1),
            torch.from_numpy(laws) if judged == "probs" else None,
            None if draft_vocabulary is None else torch.from_numpy(draft_vocabulary),
            waiting,
            positions,
            PARAMS,
        )
        accepted, following = rule(judged_round)
        for r, row, count, last in zip(waiting, drafted.tolist(), accepted, following, strict=True):
            outputs[r] += [*row[:count], int(last)]
    return np.array(outputs)


def _p_value(world: World, outputs: np.ndarray) -> float:
    """Chi-square of the joint counts against the target's law, cells of small expectation merged."""
    expected = NUM_REQUESTS * world.law()
    counts = np.bincount(
        np.ravel_multi_index(tuple(outputs.T), (world.vocabulary,) * (GAMMA + 1)), minlength=expected.size
    )
    small = expected < 8
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    return float(stats.chisquare(counts, expected).pvalue)


# The test's level is 1e-3. Its power, computed from the noncentral chi-square law for 40,000 requests and 27 cells:
# a law off by a total variation of 0.02 or more is found with probability above 0.98.
LEVEL = 1e-3


def test_the_chi_square_test_has_the_stated_power():
    degrees = 26
    critical = stats.chi2.isf(LEVEL, degrees)
    # sum (p - q)^2 / p is at least (2 TV)^2, by Cauchy-Schwarz.
    noncentrality = NUM_REQUESTS * (2 * 0.02) ** 2
    assert stats.ncx2.sf(critical, degrees, noncentrality) > 0.98


RULES = pytest.mark.parametrize("rule", [accept_rejection, accept_block])


@RULES
@pytest.mark.parametrize("seed", range(3))
def test_the_rules_have_the_law_of_the_target(seed, rule):
    world = World.random(3, seed)
    assert _p_value(world, _decode(world, drafts="sample", judged="probs", rule=rule)) > LEVEL


@RULES
@pytest.mark.parametrize("outside", [(1,), (0, 3)])
def test_a_draft_vocabulary_keeps_the_law_of_the_target(outside, rule):
    world = World.random(4, 11, outside)
    ids = np.array([token for token in range(4) if token not in outside])
    outputs = _decode(world, drafts="sample", judged="probs", draft_vocabulary=ids, rule=rule)
    assert _p_value(world, outputs) > LEVEL


@RULES
def test_deterministic_drafts_have_the_law_of_the_target(rule):
    world = World.random(3, 21)
    assert _p_value(world, _decode(world, drafts="argmax", judged="point", rule=rule)) > LEVEL


def test_greedy_drafts_judged_as_if_sampled_are_found_out():
    # The planted error: argmax drafts, but the rule is told the law they were not drawn from.
    world = World.random(3, 0)
    assert _p_value(world, _decode(world, drafts="argmax", judged="probs")) < 1e-12


def test_sampled_drafts_judged_as_point_masses_keep_the_law():
    # Given the draft, the rule for point masses is exact whatever chose the draft; it only accepts less often.
    world = World.random(3, 0)
    assert _p_value(world, _decode(world, drafts="sample", judged="point")) > LEVEL


@RULES
def test_equal_laws_accept_everything_and_disjoint_laws_nothing(rule):
    law = torch.tensor([0.5, 0.5, 0.0, 0.0])
    keys = np.arange(500)
    drafted = np.zeros((500, 1), dtype=np.int64)
    for target, accepted in ((law, 1), (law.flip(0), 0)):
        rows = target.expand(1000, -1)
        ones = np.ones(500, dtype=np.int64)
        count, token = rule(
            SampledRound(drafted, ones, rows, 2 * keys, law.expand(500, 1, -1), None, keys, keys * 0, PARAMS)
        )
        assert (count == accepted).all()
        assert (target[torch.from_numpy(token)] > 0).all()


def test_block_verification_accepts_more():
    """On random laws, and never less than the known bound of one: Sun et al., theorem 2."""
    rng = np.random.default_rng(3)
    num, width, size = 4000, 4, 6
    lens = np.full(num, width)
    laws = rng.dirichlet(np.ones(size), (num, width))
    drafted = (laws.cumsum(axis=-1) < rng.random((num, width, 1))).sum(axis=-1).clip(0, size - 1)
    rows = rng.dirichlet(np.ones(size), (num, width + 1)).reshape(-1, size)
    keys = np.arange(num)
    round_ = SampledRound(
        drafted, lens, torch.from_numpy(rows), keys * (width + 1), torch.from_numpy(laws), None, keys, keys * 0, PARAMS
    )
    by_block, by_token = accept_block(round_)[0], accept_rejection(round_)[0]
    gain = by_block - by_token
    assert gain.mean() > 3 * gain.std() / np.sqrt(num)


@RULES
def test_a_request_keeps_its_outcome_in_every_batch(rule):
    rng = np.random.default_rng(0)
    num, width, size = 12, 3, 5
    lens = rng.integers(0, width + 1, num)
    drafted = rng.integers(0, size, (num, width))
    probs = torch.from_numpy(rng.dirichlet(np.ones(size), (num, width + 1))).float()
    laws = torch.from_numpy(rng.dirichlet(np.ones(size), (num, width))).float()
    ids, positions = rng.permutation(100)[:num], rng.integers(0, 50, num)

    def outcome(chosen):
        rows = torch.cat([probs[r, : lens[r] + 1] for r in chosen])
        starts = np.cumsum(lens[chosen] + 1) - (lens[chosen] + 1)
        return rule(
            SampledRound(
                drafted[chosen],
                lens[chosen],
                rows,
                starts,
                laws[torch.from_numpy(chosen)],
                None,
                ids[chosen],
                positions[chosen],
                PARAMS,
            )
        )

    whole = np.stack(outcome(np.arange(num)), axis=1)
    order = rng.permutation(num)
    np.testing.assert_array_equal(np.stack(outcome(order), axis=1), whole[order])
    for row in range(num):
        np.testing.assert_array_equal(np.stack(outcome(np.array([row])), axis=1)[0], whole[row])


EOS = frozenset([9])


@pytest.mark.parametrize(
    ("drafted", "num_accepted", "next_token", "remaining", "expected"),
    [
        # nothing to cut
        ([1, 2, 3], 3, 4, 10, (3, 4, False, [1, 2, 3, 4])),
        ([1, 2, 3], 1, 4, 10, (1, 2, False, [1, 4])),
        ([1, 2, 3], 0, 4, 10, (0, 1, False, [4])),
        # an end token among the accepted drafts: the bonus is dropped, the end token counts as accepted
        ([1, 9, 3], 3, 4, 10, (2, 2, True, [1, 9])),
        # an end token behind the accepted prefix means nothing
        ([1, 2, 9], 2, 4, 10, (2, 3, False, [1, 2, 4])),
        # the bonus is the end token
        ([1, 2, 3], 2, 9, 10, (2, 3, True, [1, 2, 9])),
        # the length limit
        ([1, 2, 3], 3, 4, 2, (2, 2, False, [1, 2])),
        ([1, 2, 3], 3, 4, 4, (3, 4, False, [1, 2, 3, 4])),
        # the end token lies behind the length limit, or exactly on it
        ([1, 2, 9], 3, 4, 2, (2, 2, False, [1, 2])),
        ([1, 2, 9], 3, 4, 3, (3, 3, True, [1, 2, 9])),
    ],
)
def test_cut(drafted, num_accepted, next_token, remaining, expected):
    accepted, emitted, stopped, tokens = cut(
        np.array([drafted]), np.array([num_accepted]), np.array([next_token]), np.array([remaining]), EOS
    )
    assert (accepted[0], emitted[0], bool(stopped[0]), tokens[0]) == expected


@given(st.lists(st.integers(0, 4), min_size=0, max_size=6), st.integers(1, 8), st.data())
def test_cut_keeps_a_prefix_that_ends_where_it_must(row, remaining, data):
    count = data.draw(st.integers(0, len(row)))
    accepted, emitted, stopped, tokens = cut(
        np.array([row], dtype=np.int64), np.array([count]), np.array([1]), np.array([remaining]), frozenset([0])
    )
    whole, new = [*row[:count], 1], tokens[0]
    assert new == whole[: len(new)]
    assert len(new) == emitted[0] <= remaining
    assert 0 not in new[:-1]
    assert bool(stopped[0]) == (new[-1] == 0)
    assert accepted[0] == min(count, len(new))
    assert stopped[0] or len(new) == min(len(whole), remaining)
