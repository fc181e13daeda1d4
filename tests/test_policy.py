from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy import algorithm_1, toy_cost, toy_trace

from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop, DraftBatch, survival_of
from dspark_sim.policy import Fixed, LoadView, PrefixScheduler, admit_prefixes, parameters, ranked
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate import RecordedAnchors, ReplayExecutor


def load(num_running: int, block_size: int = 5) -> LoadView:
    return LoadView(step=0, num_running=num_running, num_waiting=0, context_tokens=100, block_size=block_size)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Survivals that are multiples of 1/32 (sums are exact, ties and zeros common) and rising step times."""
    num_requests, draft_len = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    raw = draw(arrays(np.int64, (num_requests, draft_len), elements=st.integers(0, 32)))
    survival = -np.sort(-raw, axis=1) / 32.0
    growth = draw(arrays(np.int64, num_requests * draft_len, elements=st.integers(0, 6)))
    seconds = (draw(st.integers(1, 40)) + np.concatenate(([0], np.cumsum(growth)))) / 64.0
    return survival, seconds


@given(rounds())
def test_admission_is_algorithm_1(case: tuple[np.ndarray, np.ndarray]) -> None:
    survival, seconds = case
    assert admit_prefixes(survival, seconds).tolist() == algorithm_1(survival, seconds)


@given(rounds(), st.integers(0, 2**32 - 1))
def test_admission_never_depends_on_its_own_future(case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    """Resample what is known only after token k (survivals past k): whether k is admitted must not change."""
    survival, seconds = case
    before = admit_prefixes(survival, seconds)
    rng = np.random.default_rng(seed)
    r, k = int(rng.integers(survival.shape[0])), int(rng.integers(survival.shape[1]))
    changed = survival.copy()
    later = rng.integers(0, int(survival[r, k] * 32) + 1, survival.shape[1] - k - 1)
    changed[r, k + 1 :] = -np.sort(-later) / 32.0
    after = admit_prefixes(changed, seconds)
    assert (before[r] > k) == (after[r] > k)


@given(rounds())
def test_zero_survival_is_never_admitted(case: tuple[np.ndarray, np.ndarray]) -> None:
    survival, seconds = case
    assert (admit_prefixes(survival, seconds) <= (survival > 0).sum(axis=1)).all()


@given(rounds())
def test_ranking_is_by_survival_then_position_then_request(case: tuple[np.ndarray, np.ndarray]) -> None:
    survival, _ = case
    num_requests, draft_len = survival.shape
    pairs = sorted((-survival[r, j], j, r) for r in range(num_requests) for j in range(draft_len))
    order, expected = ranked(survival)
    assert order.tolist() == [j * num_requests + r for _, j, r in pairs]
    assert expected.tolist() == [num_requests - sum(pair[0] for pair in pairs[:i]) for i in range(len(pairs) + 1)]


def test_an_undrafted_position_is_not_admitted_where_a_larger_batch_is_faster() -> None:
    assert admit_prefixes(np.array([[0.5, 0.0], [0.0, 0.0]]), np.array([1.0, 0.9, 0.5, 0.4, 0.3])).tolist() == [1, 0]


def test_free_tokens_are_all_admitted_and_costly_ones_not() -> None:
    survival = np.full((3, 4), 0.5)
    assert admit_prefixes(survival, np.ones(13)).tolist() == [4, 4, 4]
    assert admit_prefixes(survival, np.arange(3.0, 16.0)).tolist() == [0, 0, 0]
    assert admit_prefixes(np.zeros((0, 4)), np.ones(1)).tolist() == []
    assert admit_prefixes(np.zeros((2, 0)), np.ones(1)).tolist() == [0, 0]


def test_busier_server_verifies_less() -> None:
    controller = PrefixScheduler(toy_cost()).start()
    means = []
    for num_running in (1, 4, 16, 64):
        survival = np.cumprod(np.full((num_running, 5), 0.8), axis=1)
        means.append(controller.verify_lens(load(num_running), survival).mean())
    assert means == sorted(means, reverse=True)
    assert means[-1] < means[0]


@pytest.mark.parametrize("verify_len", [0, 1, 4])
def test_fixed_is_fixed(verify_len: int) -> None:
    policy = Fixed(verify_len)
    controller = policy.start()
    assert controller.draft_len(load(2)) == verify_len
    assert controller.verify_lens(load(2), np.zeros((2, verify_len))).tolist() == [verify_len] * 2
    assert policy.label() == (f"fixed-{verify_len}" if verify_len else "none")
    assert (policy.information, policy.signal, policy.needs_confidence) == ("history", "confidence", False)


def test_fixed_refuses_a_negative_length() -> None:
    with pytest.raises(UserError, match="verify_len is -1"):
        Fixed(-1)


@pytest.mark.parametrize(("draft_len", "expected"), [(None, 5), (3, 3), (9, 5)])
def test_prefix_draft_len(draft_len: int | None, expected: int) -> None:
    assert PrefixScheduler(toy_cost(), draft_len).start().draft_len(load(1)) == expected


def test_parameters_leave_the_cost_table_out() -> None:
    traits = {"signal": "confidence"}
    expected = {"kind": "Fixed", "verify_len": 3, "information": "history", "needs_confidence": False}
    assert parameters(Fixed(3)) == expected | traits
    expected = {"kind": "PrefixScheduler", "draft_len": 2, "information": "pre_token", "needs_confidence": True}
    assert parameters(PrefixScheduler(toy_cost(), 2)) == expected | traits


def test_survival_is_a_falling_product_and_zero_past_the_draft() -> None:
    confidence = np.array([[0.5, 0.5, 0.5], [0.9, np.nan, np.nan]])
    assert survival_of(DraftBatch(np.array([2, 1]), confidence)).tolist() == [[0.5, 0.25, 0.0], [0.9, 0.0, 0.0]]


def test_loop_refuses_a_confidence_policy_without_confidences() -> None:
    def build(policy: Any, confidence: bool) -> DecodeLoop:
        executor = ReplayExecutor(RecordedAnchors.from_trace(toy_trace(confidence=confidence)), toy_cost())
        return DecodeLoop(executor, Scheduler(SchedulerConfig(), executor.block_size), policy)

    build(PrefixScheduler(toy_cost()), confidence=True)
    build(Fixed(3), confidence=False)
    with pytest.raises(UserError, match="policy prefix needs confidence estimates"):
        build(PrefixScheduler(toy_cost()), confidence=False)


def test_an_odd_size_that_is_slow_does_not_stop_the_scheduler():
    """A kernel may take longer for 2 and 3 tokens than for 4; with every draft sure to be accepted all 3 pay."""
    cost = CostModel(verify=Curve((1.0, 2.0, 3.0, 4.0), (1.0, 2.05, 2.05, 1.5)))
    one = LoadView(0, 1, 0, 0, 3, (0,))
    survival = np.ones((1, 3))
    assert admit_prefixes(survival, np.array([1.0, 2.05, 2.05, 1.5])).tolist() == [0]
    assert PrefixScheduler(cost).start().verify_lens(one, survival).tolist() == [3]


def test_a_draft_that_leaves_the_throughput_as_it_is_is_not_verified():
    survival = np.array([[0.5, 0.5]])
    # 1 / 1, then 1.5 / 1.5, which does not rise strictly; the second would.
    assert admit_prefixes(survival, np.array([1.0, 1.5, 1.5])).tolist() == [0]
