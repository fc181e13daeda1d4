"""The simulator's array loop against the plain loop, whole traces on random servers; and what it alone can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import constant_cost, toy_cost, toy_trace

from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop
from dspark_sim.mixes import DomainMix
from dspark_sim.policy import Fixed, LoadView, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler, Oracle, Tetris
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate import simulate
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.executor import ReplayExecutor
from dspark_sim.simulate.processes import RoundRobin, Server, source, user
from dspark_sim.trace import Trace, TraceRecorder
from dspark_sim.workload import ClosedLoop, Deterministic, Poisson

GAMMA = 5
PATIENCE = st.sampled_from([None, 0.05, 0.4])
COST = toy_cost()
POLICIES: dict[str, SpeculationPolicy] = {
    "none": Fixed(0),
    "fixed": Fixed(3),
    "whole": Fixed(GAMMA),
    "table": BatchSizeTable(((1, 4), (3, 2), (6, 0))),
    "ema": AcceptanceEMA((1, 3, 5)),
    "goodput": Goodput(COST),
    "prefix": PrefixScheduler(COST),
    "prefix-short": PrefixScheduler(COST, draft_len=3),
    "threshold": ConfidenceThreshold(0.75),
    "lagged": LaggedPrefixScheduler(COST, lag=2),
    "argmax": GlobalArgmax(COST),
    "tetris": Tetris(6),
    "oracle": Oracle(COST),
    "parked": Parked(PrefixScheduler(COST), COST),
}


def plainly(trace: Trace, policy: SpeculationPolicy, workload: Any, config: SchedulerConfig, num: int) -> Trace:
    """The same run by the plain loop and the lookup executor."""
    anchors = RecordedAnchors.from_trace(trace)
    recorder = TraceRecorder("virtual")
    loop = DecodeLoop(ReplayExecutor(anchors, COST), Scheduler(config, anchors.block_size), policy, recorder, COST)
    names = [anchors.request_prompts[place % len(anchors.request_prompts)] for place in range(num)]
    prompts = [anchors.prompts[name] for name in names]
    requests = [Request(i, p.prompt_id, p.domain, p.prompt_len, p.max_tokens) for i, p in enumerate(prompts)]
    env = simpy.Environment()
    route = RoundRobin([Server(env, loop)])
    if isinstance(workload, ClosedLoop):
        shared = iter(requests)
        for _ in range(min(workload.num_users, num)):
            env.process(user(env, route, shared, workload.think_times(num).tolist()))
    else:
        env.process(source(env, route, requests, workload.arrivals(num).tolist()))
    env.run()
    return recorder.trace()


def equal(left: Trace, right: Trace) -> None:
    """Every table to the bit."""
    for name in ("requests", "steps", "drafts"):
        one, two = (trace.tables[name].to_pandas() for trace in (left, right))
        pd.testing.assert_frame_equal(one, two, check_exact=True)


@settings(deadline=None, max_examples=120)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 10**6),
    ragged=st.booleans(),
    mode=st.sampled_from(["greedy", "target_match"]),
    workload=st.one_of(
        st.builds(ClosedLoop, st.integers(1, 9), st.sampled_from([0.0, 0.05])),
        st.builds(Poisson, st.sampled_from([0.5, 5.0, 80.0]), st.integers(0, 9)),
    ),
    max_num_seqs=st.integers(1, 9),
    num_pages=st.integers(9, 40),
    page_size=st.sampled_from([4, 7, 16]),
    max_num_batched_tokens=st.sampled_from([1, 40, 2048]),
    num=st.integers(1, 16),
)
def test_it_is_the_plain_loop(
    policy, seed, ragged, mode, workload, max_num_seqs, num_pages, page_size, max_num_batched_tokens, num
):
    trace = toy_trace(6, 14, GAMMA, 0.8, seed, ragged=ragged, mode=mode, copies=1 if mode == "greedy" else 2)
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max(num_pages, -(-52 // page_size)), page_size)
    if isinstance(workload, ClosedLoop):
        max_num_seqs = min(max_num_seqs, workload.num_users)
    plain = plainly(trace, POLICIES[policy], workload, config, num)
    for backend in ("arrays", "compiled"):
        ours = simulate(
            trace, POLICIES[policy], workload, COST, num_requests=num, scheduler=config, backend=backend
        )  # fmt: skip
        equal(ours, plain)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_it_is_so_for_every_policy_under_preemption(policy):
    trace = toy_trace(8, 24, GAMMA, 0.85, 3)
    config = SchedulerConfig(max_num_seqs=8, num_pages=24, page_size=4)
    plain = plainly(trace, POLICIES[policy], ClosedLoop(8), config, 24)
    assert plain.requests["num_preemptions"].sum() > 0
    for backend in ("arrays", "compiled"):
        ours = simulate(
            trace, POLICIES[policy], ClosedLoop(8), COST, num_requests=24, scheduler=config, backend=backend
        )  # fmt: skip
        equal(ours, plain)


def conserved(trace: Trace, *, chunked: bool = False) -> None:
    """Tokens in are tokens out, nothing is negative, every request ends once, pages come back."""
    requests, steps, drafts = trace.requests, trace.steps, trace.drafts
    assert requests["request_id"].is_unique
    assert requests["finish_reason"].isin(["stop", "length", "abort", "refused"]).all()
    assert ((steps["kv_usage"] >= -1e-12) & (steps["kv_usage"] <= 1 + 1e-12)).all()
    assert (drafts[["draft_len", "verify_len", "num_accepted"]] >= 0).all().all()
    assert (drafts["num_emitted"] >= 1).all()
    assert (drafts["verify_len"] <= drafts["draft_len"]).all()
    emitted = drafts.groupby("request_id")["num_emitted"].sum()
    first = (requests["output_len"] > 0).astype(int)
    expected = requests.set_index("request_id")["output_len"] - first.to_numpy()
    assert (emitted.reindex(expected.index, fill_value=0) == expected).all()
    verified = drafts.groupby("step")["verify_len"].sum() + drafts.groupby("step").size()
    per_step = verified.reindex(steps["step"], fill_value=0).to_numpy() + steps["num_prefill_tokens"].to_numpy()
    assert (per_step == steps["batch_tokens"]).all()
    if not requests["num_preemptions"].any() and not (requests["finish_reason"] == "abort").any():
        ran = requests[requests["finish_reason"] != "refused"]
        assert steps["num_prefill_tokens"].sum() == ran["prompt_len"].sum()
    context = drafts.groupby("step")["position"].sum().reindex(steps["step"], fill_value=0)
    assert (context.to_numpy() == steps["context_tokens"]).all()
    if chunked:
        assert (steps["num_prefill_tokens"] <= trace.config["scheduler"]["max_num_batched_tokens"]).all()


def littles_law(trace: Trace) -> None:
    """The time integral of requests in the system is the sum of their times in it."""
    requests = trace.requests
    points = np.concatenate((requests["arrival"], requests["finish"]))
    steps = np.concatenate((np.ones(len(requests)), -np.ones(len(requests))))
    order = np.argsort(points, kind="stable")
    inside = np.cumsum(steps[order])
    area = float((inside[:-1] * np.diff(points[order])).sum())
    assert area == pytest.approx(float((requests["finish"] - requests["arrival"]).sum()), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=150)
@given(
    policy=st.sampled_from(["none", "whole", "prefix", "lagged", "ema"]),
    seed=st.integers(0, 10**6),
    workload=st.one_of(
        st.builds(ClosedLoop, st.integers(1, 12), st.sampled_from([0.0, 0.1]), timeout_seconds=PATIENCE),
        st.builds(Poisson, st.sampled_from([2.0, 60.0]), st.integers(0, 9), timeout_seconds=PATIENCE),
    ),
    chunked=st.booleans(),
    max_num_seqs=st.integers(1, 9),
    num_pages=st.integers(5, 40),
    page_size=st.sampled_from([4, 16]),
    budget=st.sampled_from([3, 17, 2048]),
    replicas=st.integers(1, 3),
    router=st.sampled_from(["round_robin", "least_outstanding_tokens"]),
    load_lag=st.sampled_from([0, 3]),
)
def test_everything_is_conserved(
    policy, seed, workload, chunked, max_num_seqs, num_pages, page_size, budget, replicas, router, load_lag
):
    """Starvation, storms of preemption, requests longer than memory, impatient users, several servers."""
    trace = toy_trace(6, 24, GAMMA, 0.8, seed)
    config = SchedulerConfig(max_num_seqs, budget, num_pages, page_size, enable_chunked_prefill=chunked)
    options = {"num_replicas": replicas, "router": router, "load_lag": load_lag}
    try:
        ours = simulate(trace, POLICIES[policy], workload, COST, num_requests=20, scheduler=config, **options)
    except UserError as error:
        assert "context holds" in str(error)
        return
    assert len(ours.requests) == 20
    conserved(ours, chunked=chunked)
    littles_law(ours)
    again = simulate(
        trace, POLICIES[policy], workload, COST, num_requests=20, scheduler=config, backend="compiled", **options
    )
    # NaN, the first token of a request that got none, equals itself here.
    assert ours.requests.equals(again.requests) and ours.tables["drafts"].equals(again.tables["drafts"])
    limit = workload.timeout_seconds
    waits = ours.requests["finish"] - ours.requests["arrival"]
    if limit is not None:
        assert (waits <= limit + 1e-9).all()
        gone = ours.requests["finish_reason"] == "abort"
        np.testing.assert_allclose(waits[gone], limit)
    else:
        assert not (ours.requests["finish_reason"] == "abort").any()


def test_what_cannot_run_is_refused_and_the_others_are_served():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    lengths = trace.requests["prompt_len"] + trace.requests["max_tokens"] + GAMMA
    config = SchedulerConfig(max_num_seqs=4, max_model_len=int(lengths.median()))
    ours = simulate(trace, Fixed(2), ClosedLoop(3), COST, scheduler=config)
    refused = ours.requests.set_index("request_id")["finish_reason"] == "refused"
    assert (refused == (lengths > config.max_model_len)).all() and 0 < refused.sum() < len(refused)
    lost = ours.requests[refused.to_numpy()]
    assert (lost["output_len"] == 0).all() and lost["first_token"].isna().all()
    with pytest.raises(UserError, match="context holds"):
        simulate(trace, Fixed(2), ClosedLoop(3), COST, scheduler=SchedulerConfig(max_model_len=8))


def test_chunks_take_what_decoding_leaves_of_the_budget():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=20, enable_chunked_prefill=True)
    ours = simulate(trace, Fixed(GAMMA), ClosedLoop(4), COST, num_requests=18, scheduler=config)
    rounds = ours.drafts.groupby("step").size().reindex(ours.steps["step"], fill_value=0).to_numpy()
    prefill = ours.steps["num_prefill_tokens"].to_numpy()
    assert (prefill <= np.maximum(20 - rounds * (1 + GAMMA), 0)).all()
    assert ((prefill > 0) & (rounds > 0)).any()
    # The first prompt is read in the first iterations alone, 20 tokens at a time, as far as it goes.
    assert prefill[0] == 20 and ours.steps["num_running"].max() <= 4
    whole = simulate(trace, Fixed(GAMMA), ClosedLoop(4), COST, num_requests=18)
    keys = ["request_id", "position", "verify_len", "num_accepted", "num_emitted"]
    one, two = (run.drafts[keys].sort_values(keys[:2], ignore_index=True) for run in (ours, whole))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("router", ["round_robin", "least_outstanding_tokens"])
def test_replicas_share_the_requests(router):
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    options: dict[str, Any] = {"num_replicas": 3, "router": router}
    ours = simulate(trace, Fixed(2), Poisson(30.0), COST, num_requests=60, **options)
    conserved(ours)
    steps = ours.steps
    assert sorted(steps["replica"].unique()) == [0, 1, 2]
    assert steps["start"].is_monotonic_increasing and (steps["step"] == np.arange(len(steps))).all()
    for _, own in steps.groupby("replica"):
        assert (own["start"].to_numpy()[1:] >= (own["start"] + own["step_seconds"]).to_numpy()[:-1] - 1e-12).all()
    served = ours.drafts.merge(steps[["step", "replica"]], on="step").groupby("request_id")["replica"]
    assert (served.nunique() == 1).all()
    if router == "round_robin":
        assert (served.first() == served.first().index % 3).all()


def test_the_least_busy_server_gets_the_next_request():
    """One long request occupies a server; short ones that come meanwhile go to the other."""
    trace = toy_trace(2, 24, GAMMA, 0.0, 1)
    names = trace.requests["prompt_len"].tolist()
    ours = simulate(
        trace, Fixed(0), Poisson(1e6), constant_cost(1.0, 1.0), num_requests=8, num_replicas=2,
        router="least_outstanding_tokens",
    )  # fmt: skip
    owed, chosen = [0, 0], []
    for request in range(8):
        place = 0 if owed[0] <= owed[1] else 1
        owed[place] += names[request % 2] + 24
        chosen.append(place)
    served = ours.drafts.merge(ours.steps[["step", "replica"]], on="step").groupby("request_id")["replica"].first()
    assert all(served[request] == chosen[request] for request in served.index)


def test_a_policy_may_see_the_load_late():
    seen: list[LoadView] = []

    class Watching:
        def draft_len(self, load: LoadView) -> int:
            seen.append(load)
            return 2

        def verify_lens(self, load: LoadView, survival: Any) -> Any:
            assert survival.shape == (len(load.request_ids), 2)
            return np.full(survival.shape[0], 2)

        def observe(self, load: LoadView, verify_lens: Any, num_accepted: Any) -> None:
            pass

    class Policy(Fixed):
        def start(self) -> Any:
            return Watching()

    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    views = []
    for lag in (0, 4):
        seen.clear()
        simulate(trace, Policy(2), ClosedLoop(4), COST, num_requests=12, load_lag=lag)
        views.append(list(seen))
    now, late = views
    assert [view.request_ids for view in now] == [view.request_ids for view in late]
    for place, view in enumerate(late):
        then = now[max(place - 4, 0)]
        assert (view.num_running, view.num_waiting, view.context_tokens) == (
            then.num_running,
            then.num_waiting,
            then.context_tokens,
        )
    with pytest.raises(UserError, match="load_lag is -1"):
        simulate(trace, Fixed(2), ClosedLoop(4), COST, load_lag=-1)


def test_less_detail_is_the_same_run():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    whole, steps, requests = (
        simulate(trace, POLICIES["prefix"], ClosedLoop(4), COST, num_requests=30, detail=detail)
        for detail in ("rounds", "steps", "requests")
    )
    assert whole.tables["requests"].equals(requests.tables["requests"])
    assert len(requests.steps) == len(requests.drafts) == len(steps.drafts) == 0
    pd.testing.assert_frame_equal(
        whole.steps.drop(columns="predicted_throughput"), steps.steps.drop(columns="predicted_throughput")
    )


def test_a_mix_of_domains_is_what_was_asked_for():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    rows = trace.tables["requests"].to_pylist()
    for row in rows:
        row["domain"] = "odd" if row["request_id"] % 2 else "even"
    tables = {**trace.tables, "requests": trace.tables["requests"].from_pylist(rows, trace.tables["requests"].schema)}
    mixed = Trace(tables, trace.clock, trace.config, trace.provenance)
    ours = simulate(mixed, Fixed(2), ClosedLoop(4), COST, num_requests=40, mix=DomainMix({"odd": 1.0, "even": 0.0}))
    assert set(ours.requests["domain"]) == {"odd"} and len(ours.requests) == 40
    with pytest.raises(UserError, match="a mix of domains needs outputs that belong to prompts"):
        sampled = toy_trace(6, 24, GAMMA, 0.8, 1, mode="coupled")
        simulate(sampled, Fixed(2), ClosedLoop(4), COST, mix=DomainMix({"toy": 1.0}))


def test_the_live_engine_reads_whole_prompts():
    with pytest.raises(UserError, match="enable_chunked_prefill is set"):
        Scheduler(SchedulerConfig(enable_chunked_prefill=True), 3)


def test_a_mixed_iteration_costs_a_pass_over_all_its_tokens():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    cost = CostModel(verify=Curve((1.0, 8.0, 64.0), (0.010, 0.012, 0.050)), prefill=Curve((1.0,), (7.0,)))
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=20, enable_chunked_prefill=True)
    steps = simulate(trace, Fixed(GAMMA), ClosedLoop(4), cost, num_requests=18, scheduler=config).steps
    decoding = steps[steps["draft_len"] > 0]
    assert (decoding["num_prefill_tokens"] > 0).any()
    expected = [cost.step_seconds(tokens, 0, 0) for tokens in decoding["batch_tokens"]]
    np.testing.assert_array_equal(decoding["step_seconds"], expected)
    assert (steps.loc[steps["draft_len"] == 0, "step_seconds"] == 7.0).all()


def test_chunks_read_what_is_in_the_cache_already():
    """Context that a pass reads: that of the decoding requests, and of the prompts that it goes on with."""
    trace = toy_trace(1, 24, GAMMA, 0.8, 1)
    prompt_len = int(trace.requests["prompt_len"][0])
    cost = CostModel(verify=Curve(levels=(0.5,)), prefill=Curve((1.0,), (0.0,), (("context_tokens", 1.0),)))
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=5, enable_chunked_prefill=True)
    steps = simulate(trace, Fixed(0), ClosedLoop(1), cost, scheduler=config).steps
    reading = steps[steps["num_prefill_tokens"] > 0]
    assert reading["step_seconds"].tolist() == list(range(0, prompt_len, 5))


def test_a_mixed_pass_reads_the_prompts_that_it_goes_on_with():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    cost = CostModel(verify=Curve(linear=(("context_tokens", 1.0),)))
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=9, enable_chunked_prefill=True)
    run = simulate(trace, Fixed(GAMMA), ClosedLoop(2), cost, num_requests=18, scheduler=config)
    steps = run.steps
    # With two requests at most one is read beside a round, and prompts are read one after the other.
    ends = np.cumsum(run.requests.sort_values("request_id")["prompt_len"])
    before = np.cumsum(steps["num_prefill_tokens"]) - steps["num_prefill_tokens"]
    begun = before - np.concatenate(([0], ends))[np.searchsorted(ends, before, side="right")]
    mixed = (steps["draft_len"] > 0) & (steps["num_prefill_tokens"] > 0)
    assert (begun[mixed] > 0).any()
    np.testing.assert_array_equal(steps["verify_seconds"][mixed], (steps["context_tokens"] + begun)[mixed])


def test_a_server_that_has_answered_owes_nothing():
    trace = toy_trace(6, 24, GAMMA, 0.8, 1)
    apart = Deterministic(0.001)
    run = simulate(trace, Fixed(2), apart, COST, num_requests=12, num_replicas=2, router="least_outstanding_tokens")
    assert (run.steps["replica"] == 0).all()
