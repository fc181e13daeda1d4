"""The kernels of compiled rounds against the policies they stand for; `test_array_loop.py` compares whole runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_cost, toy_trace

from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler, admit_prefixes, admits_by_algorithm_1, fixed_length
from dspark_sim.policy_history import Parked
from dspark_sim.policy_ranked import GlobalArgmax
from dspark_sim.simulate import array_recorder, run, simulate
from dspark_sim.simulate.kernels import NUM_COLUMNS, ROOM, ROW, compiled_kernels, plain_kernels
from dspark_sim.workload import ClosedLoop

COST = toy_cost()


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(["plain", "compiled"]),
    num=st.integers(1, 12),
    gamma=st.integers(1, 6),
    levels=st.integers(1, 5),
    falls=st.booleans(),
    ragged=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_heap_admits_what_algorithm_1_admits(kind, num, gamma, levels, falls, ragged, seed):
    """Survivals of few values, so that most are tied, some 0 and some 1; flat, rising and falling seconds."""
    rng = np.random.default_rng(seed)
    kernels = plain_kernels() if kind == "plain" else compiled_kernels()
    table = np.cumprod(rng.integers(0, levels + 1, (num + 5, gamma)) / levels, axis=1)
    whole = rng.integers(0, gamma + 1, num + 5) if ragged else np.zeros(0, dtype=np.int64)
    draft_len = int(rng.integers(1, gamma + 1))
    state = np.zeros((NUM_COLUMNS, num + 3), dtype=np.int64)
    state[ROW, :num] = rng.integers(0, num + 5, num)
    state[ROOM, :num] = rng.integers(0, gamma + 2, num)
    steps = rng.choice([0.0, 0.01, 0.2], num * draft_len)
    seconds = 1.0 + np.concatenate(([0.0], np.cumsum(steps - (0.05 if falls else 0.0))))
    seconds = np.maximum(seconds, 0.1)
    drafted = np.minimum(state[ROOM, :num], draft_len)
    if ragged:
        drafted = np.minimum(drafted, whole[state[ROW, :num]])
    survival = np.where(np.arange(draft_len) < drafted[:, None], table[state[ROW, :num], :draft_len], 0.0)
    lens, heap, heads = np.zeros(num + 3, np.int64), np.zeros(num + 3, np.int64), np.zeros(num + 3)
    done = kernels.admit(state, num, draft_len, table, whole, seconds, lens, heap, heads)
    assert done == bool((np.diff(seconds) >= 0).all())
    if done:
        np.testing.assert_array_equal(lens[:num], admit_prefixes(survival, seconds))


def test_only_the_controllers_that_the_kernels_know_are_taken_for_them():
    assert fixed_length(Fixed(3).start()) == 3 and fixed_length(PrefixScheduler(COST).start()) is None
    assert admits_by_algorithm_1(PrefixScheduler(COST, draft_len=2).start())
    for policy in (GlobalArgmax(COST), Parked(PrefixScheduler(COST), COST), Fixed(2)):
        assert not admits_by_algorithm_1(policy.start())


@pytest.mark.parametrize("policy", [Fixed(0), Fixed(5), PrefixScheduler(COST)], ids=lambda policy: policy.label())
def test_plain_kernels_make_the_same_run(monkeypatch, policy):
    trace = toy_trace(6, 24, 5, 0.8, 1)
    arrays = simulate(trace, policy, ClosedLoop(4), COST, num_requests=24, backend="arrays")
    monkeypatch.setattr(run, "compiled_kernels", plain_kernels)
    ours = simulate(trace, policy, ClosedLoop(4), COST, num_requests=24, backend="compiled")
    for name in ("requests", "steps", "drafts"):
        pd.testing.assert_frame_equal(ours.tables[name].to_pandas(), arrays.tables[name].to_pandas(), check_exact=True)


@pytest.mark.parametrize("policy", [Fixed(5), PrefixScheduler(COST)], ids=lambda policy: policy.label())
def test_a_late_load_is_seen_by_known_policies_too(policy):
    """Context counts in the price, so that a load of three rounds ago chooses otherwise."""
    cost = CostModel(verify=Curve((1.0, 40.0), (1.0, 8.0), (("context_tokens", 0.01),)))
    policy = PrefixScheduler(cost) if isinstance(policy, PrefixScheduler) else policy
    trace = toy_trace(6, 24, 5, 0.8, 1)
    runs = {
        (backend, lag): simulate(trace, policy, ClosedLoop(4), cost, num_requests=24, backend=backend, load_lag=lag)
        for backend in ("arrays", "compiled")
        for lag in (0, 3)
    }
    for lag in (0, 3):
        assert runs["arrays", lag].tables["drafts"].equals(runs["compiled", lag].tables["drafts"])
    differ = not runs["arrays", 0].tables["drafts"].equals(runs["arrays", 3].tables["drafts"])
    assert differ == isinstance(policy, PrefixScheduler)


def test_seconds_that_fall_are_smoothed_as_the_policy_does():
    """A size that is slower than the next one: Algorithm 1 goes by the nearest curve that does not fall."""
    cost = CostModel(verify=Curve((1.0, 6.0, 7.0, 8.0, 40.0), (1.0, 1.1, 1.6, 1.2, 2.0)))
    assert (np.diff(cost.round_table(2, 5, 0)) < 0).any()
    trace = toy_trace(6, 24, 5, 0.8, 1)
    runs = [
        simulate(trace, PrefixScheduler(cost), ClosedLoop(2), cost, num_requests=24, backend=backend)
        for backend in ("arrays", "compiled")
    ]
    assert runs[0].tables["drafts"].equals(runs[1].tables["drafts"]) and len(runs[0].drafts)


def test_full_buffers_lose_nothing(monkeypatch):
    trace = toy_trace(6, 24, 5, 0.8, 1)
    whole = simulate(trace, Fixed(2), ClosedLoop(6), COST, num_requests=24)
    # Less room than rounds of one iteration, and room for two iterations.
    for size in (4, 14):
        monkeypatch.setattr(array_recorder, "_ROUNDS", size)
        for backend in ("arrays", "compiled"):
            ours = simulate(trace, Fixed(2), ClosedLoop(6), COST, num_requests=24, backend=backend)
            assert ours.tables["drafts"].equals(whole.tables["drafts"])


def test_without_numba_the_arrays_serve_and_asking_for_it_is_refused(monkeypatch):
    trace = toy_trace(6, 24, 5, 0.8, 1)
    monkeypatch.setattr(run, "has_numba", lambda: False)
    assert len(simulate(trace, Fixed(2), ClosedLoop(4), COST, num_requests=600).requests) == 600
    with pytest.raises(UserError, match="numba is not installed"):
        simulate(trace, Fixed(2), ClosedLoop(4), COST, backend="compiled")


def test_long_runs_are_compiled_and_short_ones_are_not(monkeypatch):
    trace = toy_trace(6, 24, 5, 0.8, 1)
    asked = []
    monkeypatch.setattr(run, "compiled_kernels", lambda: asked.append(1) or compiled_kernels())
    simulate(trace, Fixed(2), ClosedLoop(4), COST, num_requests=20)
    assert not asked
    simulate(trace, Fixed(2), ClosedLoop(4), COST, num_requests=500)
    assert asked
