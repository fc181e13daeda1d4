from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Round, ToyRecording, algorithm_1, constant_cost, toy_cost, toy_trace

from dspark_sim.analysis.metrics import summary
from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import GlobalArgmax, Oracle, Tetris
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate import RecordedAnchors, ReplayExecutor, simulate
from dspark_sim.trace import SCHEMAS, Trace, TraceRecorder
from dspark_sim.workload import ClosedLoop, Poisson

COST = toy_cost()


def rounds_of(trace: Trace) -> dict[int, list[Round]]:
    columns = ["request_id", "position", "draft_len", "verify_len", "num_accepted", "num_emitted"]
    rounds: dict[int, list[Round]] = {request_id: [] for request_id in trace.requests["request_id"]}
    for request_id, *values in trace.drafts.sort_values("step", kind="stable")[columns].itertuples(index=False):
        rounds[request_id].append(Round(*values))
    return rounds


def tables(trace: Trace) -> str:
    return str({name: trace.tables[name].to_pylist() for name in SCHEMAS})


def round_seconds(cost: CostModel, survival: np.ndarray, context_tokens: int) -> np.ndarray:
    num_requests, draft_len = survival.shape
    return np.array(
        [
            cost.round_seconds(num_requests + i, context_tokens, num_requests, draft_len)
            for i in range(survival.size + 1)
        ]
    )


# ---- the oracle -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from([0.1, 0.7, 1]),
)
def test_fixed_replay_is_the_oracle(
    seed: int, block_size: int, verify_len: int, num_users: int, ragged: bool, acceptance: float
) -> None:
    recorded = toy_trace(5, 14, acceptance=acceptance, seed=seed, ragged=ragged)
    run = simulate(recorded, Fixed(verify_len), ClosedLoop(num_users), COST, block_size=block_size, num_requests=8)
    oracle = ToyRecording(recorded)
    rounds = rounds_of(run)
    assert len(rounds) == 8
    for request in run.requests.itertuples():
        # A fixed policy drafts no more than it verifies.
        width = min(block_size, verify_len)
        assert rounds[request.request_id] == oracle.walk(request.prompt_id, width, lambda _, c: verify_len)
        assert request.output_len == oracle.requests[request.prompt_id]["output_len"]
        assert request.finish_reason == oracle.requests[request.prompt_id]["finish_reason"]


@pytest.mark.parametrize("block_size", [1, 3, 5])
@pytest.mark.parametrize("ragged", [False, True])
def test_prefix_replay_of_one_user_is_the_oracle(block_size: int, ragged: bool) -> None:
    recorded = toy_trace(acceptance=(0.9, 0.8, 0.7, 0.5, 0.3), seed=3, ragged=ragged)
    run = simulate(recorded, PrefixScheduler(COST), ClosedLoop(1), COST, block_size=block_size)
    oracle, rounds = ToyRecording(recorded), rounds_of(run)
    for request in run.requests.itertuples():
        actual = rounds[request.request_id]

        def choose(number: int, confidence: list[float], actual: list[Round] = actual) -> int:
            survival = np.zeros((1, block_size))
            survival[0, : len(confidence)] = np.cumprod(confidence)
            return algorithm_1(survival, round_seconds(COST, survival, actual[number].position))[0]

        assert actual == oracle.walk(request.prompt_id, block_size, choose)


@pytest.mark.parametrize("num_users", [2, 4, 8])
def test_prefix_replay_of_a_batch_is_algorithm_1_and_the_oracle(num_users: int) -> None:
    recorded = toy_trace(8, acceptance=(0.9, 0.8, 0.6, 0.5, 0.3), seed=4)
    run = simulate(recorded, PrefixScheduler(COST), ClosedLoop(num_users), COST, num_requests=20)
    oracle = ToyRecording(recorded)
    request_of = {request.request_id: request for request in run.requests.itertuples()}
    for request_id, rounds in rounds_of(run).items():
        walked = oracle.walk(
            request_of[request_id].prompt_id, 5, lambda number, c, rounds=rounds: rounds[number].verify_len
        )
        assert rounds == walked
    lens = set()
    for _, batch in run.drafts.groupby("step"):
        survival = np.zeros((len(batch), 5))
        for row, entry in enumerate(batch.itertuples()):
            request = request_of[entry.request_id]
            block = oracle.blocks[request.prompt_id][entry.position - request.prompt_len]
            survival[row, : entry.draft_len] = np.cumprod(block["confidence"])[: entry.draft_len]
        expected = algorithm_1(survival, round_seconds(COST, survival, int(batch["position"].sum())))
        assert batch["verify_len"].tolist() == expected
        lens.update(expected)
    assert len(lens) > 2


@pytest.mark.parametrize("policy", [Fixed(0), Fixed(3), PrefixScheduler(COST)])
def test_tokens_are_conserved_with_and_without_preemption(policy: SpeculationPolicy) -> None:
    recorded = toy_trace(6, acceptance=0.7, seed=5)
    limits = SchedulerConfig(max_num_seqs=6, num_pages=20, page_size=4)
    for scheduler in (None, limits):
        run = simulate(recorded, policy, ClosedLoop(6), COST, num_requests=18, scheduler=scheduler)
        requests = run.requests.set_index("request_id")
        emitted = run.drafts.groupby("request_id")["num_emitted"].sum().reindex(requests.index, fill_value=0)
        assert (emitted + 1 == requests["output_len"]).all()
        assert (run.drafts["num_emitted"] <= run.drafts["num_accepted"] + 1).all()
        assert (run.drafts["num_accepted"] <= run.drafts["verify_len"]).all()
        assert (run.drafts["verify_len"] <= run.drafts["draft_len"]).all()
        assert (requests["num_preemptions"].sum() > 0) == (scheduler is not None)
    assert run.steps["kv_usage"].max() <= 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 7), st.sampled_from(["coupled", "target_match"]))
def test_a_sampled_recording_replays_every_request_by_its_own_rows(
    seed: int, verify_len: int, num_users: int, mode: str
) -> None:
    """Two requests ask the same prompt and got different answers; ten are replayed, in recorded order."""
    recorded = toy_trace(4, 14, acceptance=0.7, seed=seed, copies=2, mode=mode)
    oracle = ToyRecording(recorded)
    assert oracle.requests["toy-0#0"]["output_tokens"] != oracle.requests["toy-0#4"]["output_tokens"]
    run = simulate(recorded, Fixed(verify_len), ClosedLoop(num_users), COST, num_requests=10)
    assert (run.config["mode"], run.config["biased"]) == (mode, False)
    rounds = rounds_of(run)
    for request in run.requests.itertuples():
        key = f"{request.prompt_id}#{request.request_id % 8}"
        width = min(5, verify_len)
        assert rounds[request.request_id] == oracle.walk(key, width, lambda _, c: verify_len)
        assert request.output_len == oracle.requests[key]["output_len"]


# ---- policies that know more than they should -----------------------------------------------------------------------


@pytest.mark.parametrize("num_users", [1, 4, 8])
def test_the_oracle_is_an_upper_bound_in_expectation(num_users: int) -> None:
    gains = []
    for seed in range(6):
        recorded = toy_trace(8, acceptance=(0.9, 0.8, 0.6, 0.5, 0.3), seed=seed)
        knows, estimates = (
            summary(simulate(recorded, policy, ClosedLoop(num_users), COST, num_requests=24))["output_throughput"]
            for policy in (Oracle(COST), PrefixScheduler(COST))
        )
        gains.append(np.log(knows / estimates))
    # Knowing pays by far more than the spread between recordings.
    assert np.mean(gains) > 2 * np.std(gains, ddof=1) / np.sqrt(len(gains)) > 0


def test_the_oracle_verifies_no_draft_that_will_be_rejected() -> None:
    run = simulate(toy_trace(8, acceptance=0.6, seed=2), Oracle(COST), ClosedLoop(3), COST)
    assert (run.drafts["num_accepted"] == run.drafts["verify_len"]).all()
    assert run.drafts["verify_len"].max() > 1 and run.config["biased"] is False


@pytest.mark.parametrize("policy", [GlobalArgmax(COST), Tetris(6)])
def test_what_would_bias_a_live_run_is_refused_or_labelled(policy: SpeculationPolicy) -> None:
    recorded = toy_trace(4, mode="rejection")
    with pytest.raises(UserError, match=f"policy {policy.label()} looks at sampled tokens.*mode rejection.*--allow-b"):
        simulate(recorded, policy, ClosedLoop(2), COST)
    run = simulate(recorded, policy, ClosedLoop(2), COST, allow_biased=True)
    assert run.config["biased"] is True
    for mode in ("greedy", "coupled", "target_match"):
        run = simulate(toy_trace(4, mode=mode), policy, ClosedLoop(2), COST, allow_biased=True)
        assert run.config["biased"] is False
    # True acceptance probabilities are nothing that a server could look at.
    assert simulate(recorded, Oracle(COST), ClosedLoop(2), COST).config["biased"] is False


@pytest.mark.parametrize(
    ("policy", "column", "remedy"),
    [(Tetris(6), "draft_prob", "choose another policy"), (Oracle(COST), "accept_prob", "only a simulation of a rec")],
)
def test_a_signal_that_was_not_recorded_is_one_sentence(policy: SpeculationPolicy, column: str, remedy: str) -> None:
    recorded = toy_trace(4)
    anchors = recorded.tables["anchors"]
    place = anchors.schema.get_field_index(column)
    nothing = pa.nulls(anchors.num_rows, anchors.schema.field(column).type)
    without = recorded.with_anchors(anchors.set_column(place, column, nothing))
    with pytest.raises(UserError, match=f"^the policy needs {column}, which this run does not have; {remedy}"):
        simulate(without, policy, ClosedLoop(2), COST)


# ---- time -----------------------------------------------------------------------------------------------------------


def test_the_simulated_server_is_the_plain_loop() -> None:
    """Without SimPy: submit N, step, add up seconds, and submit one more for every one that finished."""
    recorded = toy_trace(6, acceptance=0.8, seed=6)
    anchors = RecordedAnchors.from_trace(recorded)
    run = simulate(anchors, PrefixScheduler(COST), ClosedLoop(3), COST, num_requests=25)
    executor, recorder = ReplayExecutor(anchors, COST), TraceRecorder("virtual")
    loop = DecodeLoop(executor, Scheduler(SchedulerConfig(max_num_seqs=3), 5), PrefixScheduler(COST), recorder, COST)
    names = islice(cycle(anchors.request_prompts), 25)
    prompts = [anchors.prompts[name] for name in names]
    todo = [Request(i, p.prompt_id, p.domain, p.prompt_len, p.max_tokens) for i, p in enumerate(prompts)]
    for request in todo[:3]:
        loop.submit(request)
    del todo[:3]
    now = 0.0
    while loop.has_work:
        before = len(loop.finished)
        now += loop.step(now)
        for _ in loop.finished[before:]:
            if todo:
                request = todo.pop(0)
                request.arrival = now
                loop.submit(request)
    assert tables(run) == tables(recorder.trace())


def test_requests_keep_their_order_and_users_never_overlap() -> None:
    run = simulate(toy_trace(5, seed=7), Fixed(2), ClosedLoop(4), COST, num_requests=23)
    requests = run.requests
    assert requests["request_id"].tolist() == list(range(23))
    assert requests["prompt_id"].tolist() == [f"toy-{i % 5}" for i in range(23)]
    assert (requests["arrival"][:4] == 0).all()
    # Request N + j is asked at the very instant of the j-th answer.
    assert requests["arrival"][4:].tolist() == sorted(requests["finish"])[: 23 - 4]
    assert (run.steps["num_running"] + run.steps["num_waiting"]).max() == 4
    assert run.steps["num_running"].max() == 4


def test_steps_are_contiguous_and_cost_what_the_model_says() -> None:
    run = simulate(toy_trace(5, seed=8), PrefixScheduler(COST), ClosedLoop(3), COST)
    steps = run.steps
    assert steps["start"].tolist()[1:] == (steps["start"] + steps["step_seconds"]).tolist()[:-1]
    decode = steps[steps["num_prefill_tokens"] == 0]
    assert decode["step_seconds"].to_numpy() == pytest.approx(decode["predicted_step_seconds"])
    prefill = steps[steps["num_prefill_tokens"] > 0]
    expected = [COST.prefill_seconds(n) + 0.002 for n in prefill["num_prefill_tokens"]]
    assert prefill["step_seconds"].to_numpy() == pytest.approx(expected)
    assert (run.drafts.groupby("step")["position"].sum() == decode.set_index("step")["context_tokens"]).all()


@pytest.mark.parametrize("scheduler", [None, SchedulerConfig(max_num_seqs=2)])
def test_littles_law(scheduler: SchedulerConfig | None) -> None:
    """Requests in the system, integrated over time step by step, are the sum of all times in the system."""
    run = simulate(toy_trace(5, seed=9), Fixed(2), ClosedLoop(4), COST, num_requests=30, scheduler=scheduler)
    integral = ((run.steps["num_running"] + run.steps["num_waiting"]) * run.steps["step_seconds"]).sum()
    assert integral == pytest.approx((run.requests["finish"] - run.requests["arrival"]).sum())


def test_think_time_is_waited() -> None:
    run = simulate(toy_trace(5, seed=9), Fixed(2), ClosedLoop(1, think_seconds=2.5), COST)
    pauses = run.requests["arrival"].to_numpy()[1:] - run.requests["finish"].to_numpy()[:-1]
    assert pauses == pytest.approx(np.full(4, 2.5))


def poisson_run(rate: float, service_seconds: float, num_requests: int) -> Trace:
    """One server, one request at a time, one iteration each."""
    recorded = toy_trace(1, output_len=1)
    cost, limits = constant_cost(1.0, service_seconds), SchedulerConfig(max_num_seqs=1)
    return simulate(recorded, Fixed(0), Poisson(rate, 2), cost, num_requests=num_requests, scheduler=limits)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_m_d_1_waits(load: float) -> None:
    service_seconds = 0.04
    run = poisson_run(load / service_seconds, service_seconds, 3000)
    arrival = run.requests["arrival"].to_numpy()
    waits = run.requests["first_token"].to_numpy() - arrival - service_seconds
    # Lindley's recursion, request by request.
    free_at, expected = 0.0, []
    for time in arrival:
        start = max(time, free_at)
        expected.append(start - time)
        free_at = start + service_seconds
    assert waits == pytest.approx(np.array(expected), abs=1e-9)
    # Pollaczek-Khinchine, within four standard errors from the means of 30 batches.
    batches = waits.reshape(30, -1).mean(axis=1)
    error = batches.std(ddof=1) / np.sqrt(30)
    assert waits.mean() == pytest.approx(load * service_seconds / (2 * (1 - load)), abs=4 * error)


def test_open_loop_arrives_at_its_times_whatever_the_server_does() -> None:
    recorded = toy_trace(4, seed=1)
    slow = simulate(recorded, Fixed(0), Poisson(20.0, 3), COST, num_requests=12)
    fast = simulate(recorded, Fixed(4), Poisson(20.0, 3), COST, num_requests=12)
    assert slow.requests["arrival"].to_numpy() == pytest.approx(Poisson(20.0, 3).arrivals(12))
    assert slow.requests["arrival"].tolist() == fast.requests["arrival"].tolist()
    assert (slow.requests["first_token"] > slow.requests["arrival"]).all()


# ---- determinism, configuration, refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("workload", [ClosedLoop(3), Poisson(30.0)])
def test_runs_repeat_and_seeds_differ(workload: Any) -> None:
    recorded = toy_trace(5, seed=2)
    first, again, other = (simulate(recorded, Fixed(3), workload, COST, seed=seed) for seed in (1, 1, 2))
    assert tables(first) == tables(again)
    assert (tables(first) == tables(other)) == isinstance(workload, ClosedLoop)


def test_config_says_what_was_run() -> None:
    run = simulate(toy_trace(4), PrefixScheduler(COST, 3), ClosedLoop(2), COST, block_size=4)
    assert run.clock == "virtual"
    config = run.config
    assert (config["policy"], config["block_size"], config["num_requests"]) == ("prefix-3", 4, 4)
    assert config["policy_parameters"]["draft_len"] == 3
    assert config["workload"] == {
        "kind": "ClosedLoop",
        "num_users": 2,
        "think_seconds": 0.0,
        "think_law": {"kind": "ConstantGaps"},
        "seed": 0,
        "timeout_seconds": None,
    }
    assert config["acceptance_source"] == {"kind": "recorded_anchors", "num_prompts": 4, "block_size": 5}
    assert CostModel.from_json(config["cost"]) == COST
    assert run.provenance["packages"]["simpy"]


def test_restriction_cuts_every_row() -> None:
    anchors = RecordedAnchors.from_trace(toy_trace(ragged=True))
    cut = anchors.restricted(2)
    assert (cut.block_size, cut.draft_tokens.shape[1], cut.confidence.shape[1]) == (2, 2, 2)
    assert (cut.num_accepted == np.minimum(anchors.num_accepted, 2)).all()
    assert (cut.num_accepted <= cut.draft_len).all()
    for name in ("accept_prob", "draft_prob"):
        whole = getattr(anchors, name)
        assert whole is not None and (getattr(cut, name) == whole[:, :2]).all()
    for size in (-1, 6):
        with pytest.raises(UserError, match=f"block_size is {size} but the anchors were recorded with 5"):
            anchors.restricted(size)


def test_anchors_of_repeated_prompts_are_kept_once() -> None:
    once, twice = (RecordedAnchors.from_trace(toy_trace(4, copies=copies)) for copies in (1, 2))
    assert twice.request_prompts == once.request_prompts * 2
    assert (twice.num_accepted == once.num_accepted).all()
    assert twice.prompts == once.prompts


@pytest.mark.parametrize("confidence", [True, False])
def test_confidence_is_declared_or_seen(confidence: bool) -> None:
    trace = toy_trace(confidence=confidence)
    assert RecordedAnchors.from_trace(trace).has_confidence == confidence
    trace.config = {}
    anchors = RecordedAnchors.from_trace(trace)
    assert (anchors.has_confidence, anchors.block_size) == (confidence, 5)


def test_impossible_input_is_refused() -> None:
    recorded = toy_trace(4)
    with pytest.raises(UserError, match="num_requests is 0"):
        simulate(recorded, Fixed(1), ClosedLoop(1), COST, num_requests=0)
    with pytest.raises(UserError, match="block_size is 6"):
        simulate(recorded, Fixed(1), ClosedLoop(1), COST, block_size=6)
    with pytest.raises(UserError, match="needs confidence"):
        simulate(toy_trace(confidence=False), PrefixScheduler(COST), ClosedLoop(1), COST)
    with pytest.raises(UserError, match="the context holds 10"):
        simulate(recorded, Fixed(1), ClosedLoop(1), COST, scheduler=SchedulerConfig(max_model_len=10))
    with pytest.raises(UserError, match="no anchors"):
        simulate(simulate(recorded, Fixed(1), ClosedLoop(1), COST), Fixed(1), ClosedLoop(1), COST)
    with pytest.raises(UserError, match="no finished request"):
        RecordedAnchors.from_trace(TraceRecorder("wall").trace())


def test_damaged_anchors_are_refused() -> None:
    trace = toy_trace(4)
    anchors = trace.tables["anchors"]
    with pytest.raises(UserError, match=r"request 0 \(prompt toy-0\) has 22 anchors"):
        RecordedAnchors.from_trace(trace.with_anchors(anchors.slice(1)))
    with pytest.raises(UserError, match="prompt toy-0 has no anchors"):
        RecordedAnchors.from_trace(trace.with_anchors(anchors.filter(np.asarray(anchors["request_id"]) > 0)))
    frame = anchors.to_pandas()
    frame.loc[22, "num_accepted"] = 2
    with pytest.raises(UserError, match="num_accepted 2 at output token 22, where at most 1"):
        RecordedAnchors.from_trace(trace.with_anchors(anchors.from_pandas(frame, schema=anchors.schema)))


def test_requests_that_were_not_recorded_are_refused() -> None:
    anchors = RecordedAnchors.from_trace(toy_trace(2, output_len=10))
    executor = ReplayExecutor(anchors, COST)
    with pytest.raises(UserError, match="prompt poem was not recorded"):
        executor.prefill([Request(0, "poem", "toy", 3, 10)])
    with pytest.raises(UserError, match="recorded only up to 10"):
        executor.prefill([Request(0, "toy-0", "toy", 3, 11)])


def test_a_shorter_request_is_a_cut_recording() -> None:
    recorded = toy_trace(1, output_len=20, acceptance=0.9)
    loop = DecodeLoop(
        ReplayExecutor(RecordedAnchors.from_trace(recorded), COST), Scheduler(SchedulerConfig(), 5), Fixed(5)
    )
    request = Request(0, "toy-0", "toy", 3, 7)
    loop.submit(request)
    while loop.has_work:
        loop.step(0.0)
    assert (request.num_generated, request.finish_reason) == (7, "length")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(toy_trace(3), Fixed(1), ClosedLoop(1), COST, progress=True)
    captured = capsys.readouterr()
    assert "fixed-1" in captured.err
    assert captured.out == ""
