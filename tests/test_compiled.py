"""The kernels of compiled rounds against the policies they stand for; `test_array_loop.py` compares whole runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_cost, toy_trace

from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler, admit_prefixes, admits_by_algorithm_1, fixed_length
from dspark_sim.policy_history import Parked
from dspark_sim.policy_ranked import GlobalArgmax
from dspark_sim.simulate import run, simulate
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
