"""Every policy against a slow literal version of its rule, and the law that makes a rule lossless."""

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy import toy_cost

import dspark_sim
from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.policy import Controller, Fixed, LoadView, PrefixScheduler, parameters, round_seconds
from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked, goodputs
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler, Oracle, Tetris
from dspark_sim.policy_zoo import PolicyName, make_policy

GAMMA = 7
NAMES = get_args(PolicyName)
INFORMATION = {"threshold": "pre_token", "prefix": "pre_token", "lagged": "pre_token"} | dict.fromkeys(
    ("argmax", "tetris", "oracle"), "sampled_token"
)


def load(num_running: int, block_size: int = GAMMA, ids: tuple[int, ...] | None = None) -> LoadView:
    return LoadView(0, num_running, 0, 100, block_size, tuple(range(num_running)) if ids is None else ids)


def priced(seconds: np.ndarray, num_requests: int) -> CostModel:
    """A round that verifies i drafts takes seconds[i], exactly; drafting is free."""
    return CostModel(verify=Curve(tuple(float(num_requests + i) for i in range(len(seconds))), tuple(seconds)))


def falling(raw: np.ndarray) -> np.ndarray:
    """Multiples of 1/32 that do not rise along a row: sums are exact, ties and zeros are common."""
    return -np.sort(-raw, axis=-1) / 32.0


@st.composite
def rounds(draw: st.DrawFn, most: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Survivals and positive round seconds, which may fall."""
    num_requests, draft_len = draw(st.integers(1, most)), draw(st.integers(1, most))
    raw = draw(arrays(np.int64, (num_requests, draft_len), elements=st.integers(0, 32)))
    seconds = draw(arrays(np.int64, num_requests * draft_len + 1, elements=st.integers(8, 40)))
    return falling(raw), (np.sort(seconds) if draw(st.booleans()) else seconds) / 64.0


def by_rank(survival: np.ndarray) -> list[tuple[float, int, int]]:
    """(-survival, position, request) of all drafted positions, best first."""
    num_requests, draft_len = survival.shape
    pairs = [(-survival[r, j], j, r) for r in range(num_requests) for j in range(draft_len)]
    return sorted(pair for pair in pairs if pair[0] < 0)


def lens_of(pairs: list[tuple[float, int, int]], num_requests: int) -> list[int]:
    return [sum(r == pair[2] for pair in pairs) for r in range(num_requests)]


def best_prefix(survival: np.ndarray, seconds: np.ndarray) -> int:
    """Pairs of the ranked list to admit for the largest Θ; the fewest of equals."""
    best, expected = (survival.shape[0] / seconds[0], 0), float(survival.shape[0])
    for count, (negative, _, _) in enumerate(by_rank(survival), start=1):
        expected -= negative
        if expected / seconds[count] > best[0]:
            best = (expected / seconds[count], count)
    return best[1]


# --- ranked policies against their definitions ---


@given(rounds(most=3), st.sampled_from([GlobalArgmax, Oracle]))
def test_argmax_beats_every_other_allocation(case: tuple[np.ndarray, np.ndarray], kind: Any) -> None:
    survival, seconds = case
    num_requests, draft_len = survival.shape
    lens = kind(priced(seconds, num_requests)).start().verify_lens(load(num_requests, draft_len), survival)
    rates = {}
    for choice in product(*(range(int((row > 0).sum()) + 1) for row in survival)):
        expected = num_requests + sum(float(row[:k].sum()) for row, k in zip(survival, choice, strict=True))
        rates[choice] = (expected / seconds[sum(choice)], -sum(choice))
    assert rates[tuple(lens.tolist())] == max(rates.values())


@given(rounds(), st.integers(1, 20))
def test_tetris_takes_the_likeliest_positions(case: tuple[np.ndarray, np.ndarray], capacity: int) -> None:
    survival, _ = case
    lens = Tetris(capacity).start().verify_lens(load(len(survival)), survival)
    assert lens.tolist() == lens_of(by_rank(survival)[:capacity], len(survival))


@given(
    arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(0, 10)), st.integers(0, 10)
)
def test_threshold_stops_at_the_first_low_confidence(tenths: np.ndarray, threshold: int) -> None:
    lens = []
    for row in tenths.tolist():
        passes = [tenth >= threshold and tenth > 0 for tenth in row]
        lens.append(passes.index(False) if False in passes else len(passes))
    survival = np.cumprod(tenths / 10.0, axis=1)
    controller = ConfidenceThreshold(threshold / 10.0).start()
    assert controller.verify_lens(load(len(lens)), survival).tolist() == lens


def test_threshold_by_hand() -> None:
    confidence = [[0.9, 0.8, 0.5, 1.0], [0.7, 1.0, 1.0, 1.0], [0.8, 0.8, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
    survival = np.cumprod(confidence, axis=1)
    controller = ConfidenceThreshold(0.8).start()
    assert controller.draft_len(load(4)) == GAMMA
    assert controller.verify_lens(load(4), survival).tolist() == [2, 0, 2, 0]
    assert ConfidenceThreshold(0.0).start().verify_lens(load(4), survival).tolist() == [4, 4, 2, 0]
    assert controller.verify_lens(load(2), np.zeros((2, 0))).tolist() == [0, 0]


class SlowLagged:
    """The definition, with dictionaries."""

    def __init__(self, cost: CostModel, lag: int) -> None:
        self.cost, self.lag, self.rounds = cost, lag, []

    def verify_lens(self, load: LoadView, survival: np.ndarray) -> list[int]:
        num_requests, draft_len = survival.shape
        if draft_len == 0:
            return [0] * num_requests
        then = self.rounds[-self.lag] if len(self.rounds) >= self.lag else {}
        lagged = np.array([then.get(request, [1.0] * draft_len) for request in load.request_ids])
        seconds = [
            self.cost.round_seconds(num_requests + i, load.context_tokens, num_requests, draft_len)
            for i in range(num_requests * draft_len + 1)
        ]
        count = best_prefix(lagged, np.array(seconds))
        self.rounds.append(dict(zip(load.request_ids, survival.tolist(), strict=True)))
        return lens_of(by_rank(survival)[:count], num_requests)


def batches(rng: np.random.Generator, num_rounds: int, draft_len: int = 4) -> Iterator[tuple[LoadView, np.ndarray]]:
    """Rounds of a server whose requests come and go; some rounds do not draft."""
    for _ in range(num_rounds):
        ids = tuple(rng.permutation(8)[: rng.integers(1, 7)].tolist()) if rng.random() < 0.6 else (3, 1, 4)
        width = draft_len if rng.random() < 0.9 else 0
        yield load(len(ids), draft_len, ids), falling(rng.integers(0, 33, (len(ids), width)))


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_lagged_is_its_definition(lag: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = np.cumsum(rng.integers(0, 5, 32)) / 64.0 + 0.25
    cost = CostModel(verify=Curve(tuple(np.arange(1.0, 33.0).tolist()), tuple(levels.tolist())))
    fast, slow = LaggedPrefixScheduler(cost, lag).start(), SlowLagged(cost, lag)
    seen = set()
    for view, survival in batches(rng, 150):
        lens = fast.verify_lens(view, survival)
        assert lens.tolist() == slow.verify_lens(view, survival)
        seen.add(int(lens.sum()))
    assert len(seen) > 5


def test_lagged_takes_how_many_from_the_past_and_which_from_now() -> None:
    controller = LaggedPrefixScheduler(priced(np.array([1.0, 1.1, 1.2, 1.3, 2.4]), 2), lag=1).start()
    sure, split = np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([[1.0, 0.5], [0.125, 0.125]])
    view = load(2, 2)
    # No history: all four count 1, and three are worth their time. Zeros are left alone.
    assert controller.verify_lens(view, sure).tolist() == [2, 1]
    assert controller.verify_lens(view, split).tolist() == [2, 1]
    # After `split` two are worth it; now the second request has the better ones.
    assert controller.verify_lens(view, split[::-1]).tolist() == [0, 2]
    assert controller.verify_lens(view, np.array([[0.5, 0.0], [0.0, 0.0]])).tolist() == [1, 0]


def test_lagged_forgets_and_needs_ids() -> None:
    controller: Any = LaggedPrefixScheduler(toy_cost(), lag=2).start()
    for step in range(10):
        controller.verify_lens(load(2, ids=(step, step + 1)), np.full((2, GAMMA), 0.5))
    assert [ids for ids, _ in controller.history] == [(8, 9), (9, 10)]
    with pytest.raises(ValueError, match="one request id per row"):
        controller.verify_lens(LoadView(0, 2, 0, 100, GAMMA), np.full((2, GAMMA), 0.5))


# --- losslessness: what comes after a token never decides on the token ---


def started(kind: str, cost: CostModel, draft_len: int, seed: int, ids: tuple[int, ...]) -> Controller:
    """A controller with a past, the same for the same seed."""
    if kind == "threshold":
        return ConfidenceThreshold(0.5).start()
    if kind != "lagged":
        return (PrefixScheduler if kind == "prefix" else GlobalArgmax)(cost).start()
    rng = np.random.default_rng(seed)
    controller = LaggedPrefixScheduler(cost, 1 + seed % 2).start()
    for _ in range(seed % 4):
        controller.verify_lens(load(len(ids), draft_len, ids), falling(rng.integers(0, 33, (len(ids), draft_len))))
    return controller


@pytest.mark.parametrize("kind", ["threshold", "prefix", "lagged"])
@given(rounds(), st.integers(0, 2**32 - 1))
def test_admission_never_depends_on_its_own_future(kind: str, case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    survival, seconds = case
    num_requests, draft_len = survival.shape
    rng = np.random.default_rng(seed)
    r, k = int(rng.integers(num_requests)), int(rng.integers(draft_len))
    changed = survival.copy()
    changed[r, k + 1 :] = falling(rng.integers(0, int(survival[r, k] * 32) + 1, draft_len - k - 1))
    view = load(num_requests, draft_len)
    before, after = (
        started(kind, priced(seconds, num_requests), draft_len, seed, view.request_ids).verify_lens(view, matrix)
        for matrix in (survival, changed)
    )
    assert (before[r] > k) == (after[r] > k)


def test_argmax_breaks_the_law() -> None:
    """Verify two or none: the second confidence, computed from the first token, decides about the first token."""
    controller = GlobalArgmax(priced(np.array([1.0, 1.9, 1.95]), 1)).start()
    assert controller.verify_lens(load(1, 2), np.array([[0.5, 0.5]])).tolist() == [2]
    assert controller.verify_lens(load(1, 2), np.array([[0.5, 0.125]])).tolist() == [0]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in INFORMATION])
def test_history_policies_never_look_at_survival(name: PolicyName) -> None:
    controllers = [make_policy(name, block_size=GAMMA, cost=toy_cost()).start() for _ in range(2)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        view = load(int(rng.integers(1, 30)))
        draft_len, again = (controller.draft_len(view) for controller in controllers)
        lens, other = (
            controller.verify_lens(view, falling(rng.integers(0, 33, (view.num_running, draft_len))))
            for controller in controllers
        )
        assert draft_len == again and lens.tolist() == other.tolist() == [draft_len] * view.num_running
        accepted = rng.integers(0, lens + 1)
        for controller in controllers:
            controller.observe(view, lens, accepted)


# --- history policies ---


def drive(controller: Controller, num_rounds: int, accept: Callable[[int], int], num_running: int = 4) -> list[int]:
    """Draft lengths of rounds in which every request accepts `accept(verify_len)`."""
    view, lens = load(num_running), []
    for _ in range(num_rounds):
        lens.append(controller.draft_len(view))
        verify_lens = controller.verify_lens(view, np.ones((num_running, lens[-1])))
        controller.observe(view, verify_lens, np.array([accept(k) for k in verify_lens.tolist()], dtype=np.int64))
    return lens


def test_table_by_hand() -> None:
    controller = BatchSizeTable(((1, 9), (4, 3), (8, 0), (16, 2))).start()
    asked = {size: controller.draft_len(load(size)) for size in (1, 2, 4, 5, 8, 9, 16, 17, 1000)}
    assert asked == {1: 7, 2: 3, 4: 3, 5: 0, 8: 0, 9: 2, 16: 2, 17: 2, 1000: 2}
    assert controller.verify_lens(load(3), np.zeros((3, 2))).tolist() == [2, 2, 2]


def test_ema_rises_when_all_is_accepted_and_falls_when_nothing_is() -> None:
    controller = AcceptanceEMA().start()
    rising = drive(controller, 60, lambda k: k)
    assert rising[:14] == [3] * 14 and rising[-1] == 7 and rising == sorted(rising)
    dropping = drive(controller, 80, lambda k: 0)
    assert dropping[-1] == 1 and dropping == sorted(dropping, reverse=True) and 3 in dropping
    assert drive(controller, 60, lambda k: k)[-1] == 7


@pytest.mark.parametrize(
    ("accepted", "settles"), [(0.0, 1), (0.2, 1), (0.3, 3), (1.0, 3), (2.4, 3), (2.6, 7), (7.0, 7)]
)
def test_ema_thresholds(accepted: float, settles: int) -> None:
    """Down from 3 at or below 1 - 0.5 - 0.25, up from 3 above 3 - 0.5; in between nothing moves."""
    controller: Any = AcceptanceEMA(decay=0.0, warmup=0, interval=1).start()
    assert controller.draft_len(load(10)) == 3
    lens, tenths = np.full(10, 7), round(accepted * 10)
    controller.observe(load(10), lens, np.array([tenths // 10 + (i < tenths % 10) for i in range(10)]))
    assert controller.draft_len(load(10)) == settles


def test_ema_does_not_oscillate_between_its_thresholds() -> None:
    controller = AcceptanceEMA(candidates=(1, 3)).start()
    # Two of three accepted: below 2.5, above 0.25. From 1, where at most one can be, it must come back once.
    assert set(drive(controller, 200, lambda k: min(k, 2))[50:]) == {3}


def test_ema_leaves_zero_to_try_again() -> None:
    lens = drive(AcceptanceEMA(candidates=(0, 1, 3)).start(), 200, lambda k: 0)
    assert lens.count(0) > 80 and 0 < lens[100:].count(1) <= 60 and lens[100:].count(3) == 0


@given(st.floats(0.0, 1.0), st.integers(1, 80), st.integers(0, 7))
def test_goodput_is_the_best_length(acceptance: float, num_running: int, block_size: int) -> None:
    cost, view = toy_cost(), load(num_running, block_size)
    rates = []
    for k in range(block_size + 1):
        emitted = sum(acceptance**i for i in range(k + 1))
        rates.append(num_running * emitted / cost.round_seconds(num_running * (1 + k), 100, num_running, k))
    assert goodputs(cost, view, acceptance) == pytest.approx(rates, rel=1e-12)
    chosen = Goodput(cost, prior=acceptance).start().draft_len(view)
    assert rates[chosen] == pytest.approx(max(rates), rel=1e-12)


def test_goodput_prefers_the_smaller_of_equals() -> None:
    free = CostModel(verify=Curve(levels=(1.0,)))
    assert Goodput(free, prior=0.0).start().draft_len(load(3)) == 0
    assert Goodput(free, prior=1.0).start().draft_len(load(3)) == GAMMA


def test_goodput_learns_from_examined_positions() -> None:
    controller: Any = Goodput(toy_cost(), decay=0.5, prior=0.4).start()
    controller.draft_len(load(3))
    # Of 3, 3 and 2 drafts 1, 3 and 0 were accepted; 2, 3 and 1 were examined.
    controller.observe(load(3), np.array([3, 3, 2]), np.array([1, 3, 0]))
    assert controller.acceptance == pytest.approx(0.5 * 0.4 + 0.5 * 4 / 6)


def test_goodput_adapts_to_acceptance_and_to_load() -> None:
    controller = Goodput(toy_cost()).start()
    assert drive(controller, 50, lambda k: k, num_running=1)[-1] == GAMMA
    assert drive(controller, 50, lambda k: 0, num_running=1)[-1] == 0
    chosen = [Goodput(toy_cost()).start().draft_len(load(size)) for size in (1, 2, 4, 8, 16, 64)]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1]


def test_goodput_probes_when_it_drafts_nothing() -> None:
    controller = Goodput(priced(np.linspace(1.0, 50.0, 40), 4), probe_every=16).start()
    lens = drive(controller, 100, lambda k: 0)
    assert [step for step, k in enumerate(lens) if k] == [16, 33, 50, 67, 84]
    assert set(lens) == {0, 1}
    # Cheap again and accepted: the probes find out.
    useful = Goodput(toy_cost(), prior=0.0, probe_every=4).start()
    assert drive(useful, 200, lambda k: k, num_running=1)[-1] == GAMMA


# --- parking ---


def expensive() -> CostModel:
    """Drafting takes as long as the target; verifying is free."""
    return CostModel(verify=Curve(levels=(1.0,)), draft=Curve(levels=(1.0,)))


def test_parked_stops_when_drafts_never_pay_and_keeps_probing() -> None:
    lens = drive(Parked(Fixed(5), expensive()).start(), 200, lambda k: 0)
    assert lens[:10] == [5] * 10
    assert [step for step, k in enumerate(lens) if k][10:] == [42, 75, 108, 141, 174]


def test_parked_comes_back_when_drafts_pay() -> None:
    controller = Parked(Fixed(5), expensive(), probe_every=8).start()
    assert drive(controller, 40, lambda k: 0)[-1] == 0
    lens = drive(controller, 100, lambda k: k)
    assert set(lens[30:]) == {5}
    assert set(drive(controller, 40, lambda k: 0)[-8:]) != {5}


def test_parked_breaks_even_at_the_exact_rate() -> None:
    """With a draft a round takes 2 s instead of 1: one accepted draft per round gains nothing, two do."""
    assert 0 in drive(Parked(Fixed(5), expensive()).start(), 40, lambda k: 1)
    assert set(drive(Parked(Fixed(5), expensive()).start(), 40, lambda k: 2)) == {5}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parked_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, decay, probe_every = toy_cost(), 0.8, 6
    controller = Parked(PrefixScheduler(cost), cost, decay, probe_every).start()
    seen: list[tuple[float, float]] = []
    idle, states = 0, set()
    for _ in range(400):
        view = load(int(rng.integers(1, 12)))
        weights = decay ** np.arange(len(seen))[::-1]
        emitted, verified = (np.average([row[i] for row in seen], weights=weights) if seen else 0.0 for i in (0, 1))
        size = view.num_running
        batch: Any = size * (1.0 + verified)
        drafting = emitted / cost.round_seconds(batch, 100, size, GAMMA)
        pays = drafting > 1.0 / cost.round_seconds(size, 100, size, 0)
        expected = GAMMA if len(seen) < 5 or pays or idle >= probe_every else 0
        assert controller.draft_len(view) == expected
        states.add((expected, pays))
        survival = np.cumprod(rng.uniform(0.2, 1.0, (size, expected)), axis=1)
        lens = controller.verify_lens(view, survival)
        accepted = (lens * rng.random(size) * 0.7).astype(np.int64)
        controller.observe(view, lens, accepted)
        if expected:
            seen.append((1.0 + accepted.mean(), float(lens.mean())))
        idle = 0 if expected else idle + 1
    assert states >= {(GAMMA, True), (0, False)}


def test_parked_leaves_an_idle_inner_policy_alone() -> None:
    """The inner policy's own rounds without drafts are its own: it counts them and probes."""
    inner = Goodput(priced(np.linspace(1.0, 50.0, 40), 4), probe_every=16)
    assert drive(Parked(inner, inner.cost).start(), 100, lambda k: 0) == drive(inner.start(), 100, lambda k: 0)


def test_parked_is_what_its_inner_policy_is() -> None:
    for name in NAMES[1:]:
        inner = make_policy(name, block_size=GAMMA, cost=toy_cost())
        parked = make_policy(name, block_size=GAMMA, cost=toy_cost(), park=True)
        assert isinstance(parked, Parked) and parked.inner == inner
        for trait in ("information", "signal", "needs_confidence"):
            assert getattr(parked, trait) == getattr(inner, trait)
        assert parked.label() == f"{inner.label()} parked"


# --- names, parameters, errors ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, GAMMA])
def test_every_name_makes_a_policy_that_runs(name: PolicyName, block_size: int) -> None:
    policy = make_policy(name, block_size=block_size, cost=toy_cost())
    assert policy.information == INFORMATION.get(name, "history")
    assert policy.signal == {"tetris": "draft_prob", "oracle": "accept_prob"}.get(name, "confidence")
    assert policy.needs_confidence == (name in ("threshold", "prefix", "lagged", "argmax"))
    controller = policy.start()
    rng = np.random.default_rng(0)
    for num_running in (1, 3, 40, 2):
        view = load(num_running, block_size)
        draft_len = controller.draft_len(view)
        assert 0 <= draft_len <= block_size
        lens = controller.verify_lens(view, falling(rng.integers(0, 33, (num_running, draft_len))))
        assert lens.shape == (num_running,) and lens.dtype == np.int64
        assert (lens >= 0).all() and (lens <= draft_len).all()
        controller.observe(view, lens, lens // 2)


@pytest.mark.parametrize("name", ["threshold", "prefix", "lagged", "argmax", "tetris", "oracle"])
def test_undrafted_positions_are_never_verified(name: PolicyName) -> None:
    rng = np.random.default_rng(0)
    controller = make_policy(name, block_size=GAMMA, cost=toy_cost(), threshold=0.0, capacity=1000).start()
    for size in rng.integers(1, 9, 100).tolist():
        survival = falling(rng.integers(0, 33, (size, GAMMA)))
        survival[np.arange(GAMMA) >= rng.integers(0, GAMMA + 1, (size, 1))] = 0.0
        assert (controller.verify_lens(load(size), survival) <= (survival > 0).sum(axis=1)).all()


def test_the_price_of_a_round_is_the_cost_models() -> None:
    cost, view = toy_cost(), load(3)
    expected = [cost.round_seconds(3 + i, 100, 3, 4) for i in range(13)]
    assert round_seconds(cost, view, 3, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES[1:])
def test_parameters_are_json_and_name_nested_policies(name: PolicyName) -> None:
    policy = make_policy(name, block_size=GAMMA, cost=toy_cost())
    plain = parameters(policy)
    assert plain["kind"] == type(policy).__name__ and "cost" not in plain
    nested = parameters(make_policy(name, block_size=GAMMA, cost=toy_cost(), park=True))
    assert nested == {"kind": "Parked", "inner": plain, "decay": 0.9, "probe_every": 32}
    assert json.loads(json.dumps(nested))["inner"]["kind"] == plain["kind"]


def test_labels_tell_policies_apart() -> None:
    cost = toy_cost()
    policies = [make_policy(name, block_size=GAMMA, cost=cost) for name in NAMES]
    policies += [
        LaggedPrefixScheduler(cost, 1),
        LaggedPrefixScheduler(cost, 2, 3),
        GlobalArgmax(cost, 3),
        Oracle(cost, 3),
        ConfidenceThreshold(0.75),
        Tetris(8),
        Parked(policies[6], cost),
    ]
    labels = [policy.label() for policy in policies]
    assert len(set(labels)) == len(labels)
    assert labels[: len(NAMES)] == [
        *("none", "fixed-7", "threshold-0.5", "table", "ema", "goodput"),
        *("prefix", "lagged-2", "argmax", "tetris-32", "oracle"),
    ]


def test_the_package_exports_every_policy() -> None:
    for kind in (AcceptanceEMA, BatchSizeTable, ConfidenceThreshold, Fixed, GlobalArgmax, Goodput):
        assert getattr(dspark_sim, kind.__name__) is kind
    for kind in (LaggedPrefixScheduler, Oracle, Parked, PrefixScheduler, Tetris):
        assert getattr(dspark_sim, kind.__name__) is kind
    assert dspark_sim.make_policy is make_policy


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PrefixScheduler(toy_cost(), 0), "draft_len is 0; give 1 or more"),
        (lambda: GlobalArgmax(toy_cost(), -1), "draft_len is -1"),
        (lambda: Oracle(toy_cost(), 0), "draft_len is 0"),
        (lambda: LaggedPrefixScheduler(toy_cost(), 2, 0), "draft_len is 0"),
        (lambda: LaggedPrefixScheduler(toy_cost(), 0), "lag is 0; give 1 or more"),
        (lambda: ConfidenceThreshold(1.5), "threshold is 1.5; give a confidence between 0 and 1"),
        (lambda: ConfidenceThreshold(float("nan")), "threshold is nan"),
        (lambda: Tetris(0), "capacity is 0; give 1 or more"),
        (lambda: BatchSizeTable(()), "table is empty; give pairs"),
        (lambda: BatchSizeTable(((4, 2), (4, 1))), r"num_running \[4, 4\]; give numbers that rise"),
        (lambda: BatchSizeTable(((0, 2),)), r"num_running \[0\]"),
        (lambda: BatchSizeTable(((4, -2),)), "negative verify_len; give 0 or more"),
        (lambda: AcceptanceEMA(candidates=()), r"candidates are \(\); give draft lengths"),
        (lambda: AcceptanceEMA(candidates=(3, 1)), r"candidates are \(3, 1\)"),
        (lambda: AcceptanceEMA(candidates=(-1, 1)), r"candidates are \(-1, 1\)"),
        (lambda: AcceptanceEMA(decay=1.0), "decay is 1.0; give at least 0 and less than 1"),
        (lambda: AcceptanceEMA(hysteresis=-0.5), "hysteresis is -0.5"),
        (lambda: AcceptanceEMA(interval=0), "interval is 0; give 1 or more rounds"),
        (lambda: AcceptanceEMA(warmup=-1), "warmup is -1"),
        (lambda: Goodput(toy_cost(), decay=-0.1), "decay is -0.1"),
        (lambda: Goodput(toy_cost(), prior=2.0), "prior is 2.0"),
        (lambda: Goodput(toy_cost(), probe_every=0), "probe_every is 0"),
        (lambda: Parked(Fixed(3), toy_cost(), decay=2.0), "decay is 2.0"),
        (lambda: Parked(Fixed(3), toy_cost(), probe_every=0), "probe_every is 0"),
        (lambda: Parked(PrefixScheduler(toy_cost()), expensive()), "two different cost tables"),
        (lambda: make_policy("fixed", block_size=7, cost=None, verify_len=-1), "verify_len is -1"),
        (lambda: make_policy("none", block_size=7, cost=toy_cost(), park=True), "policy none never drafts"),
        (lambda: make_policy("fixed", block_size=7, cost=None, park=True), "parking needs a cost table; give --cost"),
        (lambda: make_policy("frugal", block_size=7, cost=None), "no policy 'frugal'; choose from none, fixed"),
    ],
)
def test_bad_values_are_named_with_their_remedy(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["goodput", "prefix", "lagged", "argmax", "oracle"])
def test_a_missing_cost_table_is_asked_for(name: PolicyName) -> None:
    with pytest.raises(UserError) as error:
        make_policy(name, block_size=GAMMA, cost=None)
    assert str(error.value) == f"policy {name} needs a cost table; give --cost, made by `dspark-sim profile`"
