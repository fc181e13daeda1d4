"""Replays of trees: the rounds that a live run of another width, budget or policy would make, from one recording."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array_loop import equal
from toy import toy_cost, toy_trace
from toy_trees import GAMMA, ToyTrees

from dspark_sim import simulate as replay
from dspark_sim.analysis.decisions import check_decisions
from dspark_sim.analysis.explain import explain
from dspark_sim.analysis.metrics import conditional_acceptance
from dspark_sim.analysis.tree_rates import rates_by_rank
from dspark_sim.commands.replay import Simulate
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy, admit_prefixes
from dspark_sim.policy_history import BatchSizeTable, Goodput
from dspark_sim.policy_ranked import ConfidenceThreshold, LaggedPrefixScheduler, Oracle, Tetris
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate import simulate
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.executor import ReplayExecutor
from dspark_sim.trace import Trace, TraceRecorder
from dspark_sim.tree_shapes import Sequoia, TreeShape, parse_tree
from dspark_sim.workload import ClosedLoop

COST = toy_cost()
TREES = ToyTrees()
# Recorded and replayed.
PAIRS = [
    ("width:4,4", "width:4,4"),
    ("width:4,4", "width:2,4"),
    ("width:4,4", "width:1,3"),
    ("width:4,4", "sequoia:9"),
    ("width:2,4", "sequoia:9@0.5/0.3"),
    ("width:2,4", "chain:3"),
    ("sequoia:12", "chain"),
    ("best-first:30,4", "best-first:30,4"),
    ("best-first:30,4", "best-first:7,4"),
    ("best-first:30,4", "chain"),
    ("dynamic:3,4,20", "dynamic:3,4,5"),
    ("dynamic:3,4,20", "chain:2"),
    ("chain", "chain"),
    ("chain", "width:3,2"),
    ("best-first:9,4", "width:2,3"),
    ("dynamic:3,4,20", "sequoia:9"),
]
# Their nodes were not all recorded, so there are no survivals to go by.
UNSEEN = PAIRS[-3:]


def fitted(text: str) -> TreeShape:
    return parse_tree(text).fitted(GAMMA)


def recorded(text: str) -> Trace:
    return TREES.trace(None if text == "chain" else fitted(text))


def rounds_of(trace: Trace, request_id: int) -> list[tuple[int, ...]]:
    rows = trace.drafts[trace.drafts["request_id"] == request_id].sort_values("step")
    names = ["position", "draft_len", "verify_len", "num_accepted", "num_emitted"]
    return [tuple(row) for row in rows[names].to_numpy().tolist()]


@pytest.mark.parametrize(("was", "wanted"), PAIRS)
@pytest.mark.parametrize("verify_len", [0, 1, 5, 400])
def test_a_replay_has_the_rounds_of_a_live_run_of_that_shape(was: str, wanted: str, verify_len: int) -> None:
    shape = fitted(wanted)
    count = min(verify_len, shape.num_nodes)
    trace = simulate(recorded(was), Fixed(count), ClosedLoop(3), COST, tree=shape)
    for request in TREES.requests:
        # A policy that verifies nothing drafts nothing.
        expected = TREES.rounds(request["request_id"], shape, lambda survival: count)
        found = rounds_of(trace, request["request_id"])
        assert [(a, min(b, count), *rest) for a, b, *rest, _ in expected] == found
        if shape.num_candidates > 1:
            rows = trace.drafts[trace.drafts["request_id"] == request["request_id"]]
            assert [list(path) for path in rows["accepted_path"]] == [path for *_, path in expected]


@pytest.mark.parametrize(("was", "wanted"), [pair for pair in PAIRS if pair not in UNSEEN])
def test_a_policy_goes_by_the_survivals_of_the_replayed_shape(was: str, wanted: str) -> None:
    """One user, so that the choice follows from the request's own survivals: Algorithm 1 on the live run's."""
    shape = fitted(wanted)
    policy = PrefixScheduler(COST)
    trace = simulate(recorded(was), policy, ClosedLoop(1), COST, tree=shape)
    steps = trace.steps.set_index("step")
    for request in TREES.requests:
        rows = trace.drafts[trace.drafts["request_id"] == request["request_id"]].sort_values("step")
        contexts = iter(steps.loc[rows["step"], "context_tokens"])

        def choose(survival: np.ndarray, contexts=contexts) -> int:
            seconds = COST.round_table(1, shape.num_nodes, int(next(contexts)))
            told = np.zeros(shape.num_nodes)
            told[: len(survival)] = survival
            return int(admit_prefixes(told[None], seconds)[0])

        assert [row[:-1] for row in TREES.rounds(request["request_id"], shape, choose)] == rounds_of(
            trace, request["request_id"]
        )
    if was == wanted and shape.num_candidates > 1:
        one = trace.drafts.iloc[0]
        anchor = int(one["position"]) - TREES.requests[one["request_id"]]["prompt_len"]
        tree = TREES.tree(int(one["request_id"]), anchor, shape)
        assert one["confidence"].tolist() == tree.survival[0, : one["draft_len"]].tolist()
        assert one["parents"] is None or one["parents"].tolist() == tree.parents[0, : one["draft_len"]].tolist()


def plainly(
    trace: Trace, shape: TreeShape, policy: SpeculationPolicy, num_users: int, config: SchedulerConfig
) -> Trace:
    """The plain loop over the lookup executor, users asking one after the other."""
    anchors = RecordedAnchors.from_trace(trace).with_tree(shape)
    recorder = TraceRecorder("virtual")
    loop = DecodeLoop(ReplayExecutor(anchors, COST), Scheduler(config, anchors.round_size), policy, recorder, COST)
    requests = [
        Request(
            place,
            anchors.prompts[key].prompt_id,
            "toy",
            anchors.prompts[key].prompt_len,
            anchors.prompts[key].max_tokens,
        )
        for place, key in enumerate(anchors.request_prompts)
    ]
    waiting, now = iter(requests), 0.0
    for request in list(requests)[:num_users]:
        next(waiting)
        loop.submit(request)
    while loop.has_work:
        now += loop.step(now)
        for _ in range(len(loop.finished)):
            following = next(waiting, None)
            if following is not None:
                following.arrival = now
                loop.submit(following)
        loop.finished.clear()
    return recorder.trace()


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["width:2,3", "sequoia:9", "best-first:9,4", "dynamic:3,4,12", "chain:3"]),
    st.sampled_from(
        [Fixed(5), PrefixScheduler(COST), LaggedPrefixScheduler(COST), BatchSizeTable(((1, 6), (2, 2), (3, 0)))]
    ),
    st.integers(1, 4),
    st.integers(9, 40),
)
def test_the_array_loop_is_the_plain_loop(text: str, policy: SpeculationPolicy, num_users: int, num_pages: int) -> None:
    shape = fitted(text)
    trace = TREES.trace(shape if shape.num_candidates > 1 else fitted("width:2,3"))
    config = SchedulerConfig(max_num_seqs=num_users, num_pages=num_pages * 8, page_size=8, max_model_len=512)
    twin = simulate(trace, policy, ClosedLoop(num_users), COST, scheduler=config, tree=shape)
    plain = plainly(trace, shape, policy, num_users, config)
    equal(plain, twin)


def test_a_replay_of_what_was_recorded_needs_no_shape_to_be_named(tmp_path: Path) -> None:
    trace = TREES.trace(fitted("best-first:9,4"))
    as_recorded = simulate(trace, Fixed(9), ClosedLoop(2), COST)
    assert as_recorded.config["tree"] == "best-first:9,4,4" and as_recorded.config["block_size"] == GAMMA
    equal(as_recorded, replay(Trace.read(trace.write(tmp_path / "trace")), policy=Fixed(9), cost=COST, concurrency=2))
    chains = TREES.trace(None)
    equal(
        simulate(chains, Fixed(4), ClosedLoop(2), COST),
        replay(trace, policy=Fixed(4), cost=COST, concurrency=2, tree="chain"),
    )
    assert simulate(chains, Fixed(4), ClosedLoop(2), COST).config["tree"] == "chain"


def test_more_nodes_accept_no_less() -> None:
    lengths = [
        simulate(TREES.trace(None), Fixed(shape.num_nodes), ClosedLoop(2), COST, tree=shape)
        .drafts["num_accepted"]
        .mean()
        for shape in (fitted(f"width:{width},4") for width in (1, 2, 3, 4))
    ]
    assert all(later > earlier for earlier, later in pairwise(lengths))


def test_tokens_deeper_than_the_output_may_become_are_not_drafted() -> None:
    trace = simulate(TREES.trace(None), Fixed(30), ClosedLoop(2), COST, tree=fitted("width:2,4"))
    rows = trace.drafts.merge(trace.requests, on="request_id")
    room = rows["prompt_len"] + rows["max_tokens"] - rows["position"] - 2
    assert (rows["draft_len"] == np.array([0, 2, 6, 14, 30])[np.minimum(room, 4)]).all()
    assert (room < 4).any()


def test_a_server_must_hold_every_node() -> None:
    """A budget above the KV reserve is refused by what it would need."""
    config = SchedulerConfig(num_pages=8, page_size=8, max_model_len=512)
    with pytest.raises(UserError, match=r"340 draft tokens\) but the context holds 64"):
        simulate(TREES.trace(None), Fixed(4), ClosedLoop(2), COST, scheduler=config, tree=fitted("width:4,4"))


@pytest.mark.parametrize(
    ("was", "wanted", "said"),
    [
        ("best-first:9,4", "best-first:12,4", "has a budget of 12 nodes and the recording 9"),
        ("best-first:9,4", "best-first:9,3", "differs in more than its budget"),
        ("best-first:9,4", "markov:9,4", "differs in more than its budget"),
        ("best-first:9,4", "dynamic:2,4,5", "is another kind; record dynamic:2,4,5"),
        ("width:2,4", "width:3,4", "takes 3 candidates and the recording ranks 2"),
        ("chain", "width:5,2", "takes 5 candidates and the recording ranks 4"),
        ("chain", "best-first:4", "is another kind"),
    ],
)
def test_what_a_recording_cannot_give_is_one_sentence(was: str, wanted: str, said: str) -> None:
    trace = recorded(was)
    if was == "width:2,4":
        trace = Trace(trace.tables, trace.clock, {**trace.config, "num_candidates": 2})
    with pytest.raises(UserError, match=said):
        RecordedAnchors.from_trace(trace).with_tree(parse_tree(wanted))


def test_other_refusals_are_one_sentence() -> None:
    with pytest.raises(UserError, match="has no ranks to replay tree width:2,2 by"):
        simulate(TREES.trace(None, ranks=False), Fixed(2), ClosedLoop(2), COST, tree=fitted("width:2,2"))
    with pytest.raises(UserError, match="has no ranks"):
        simulate(toy_trace(), Fixed(2), ClosedLoop(2), COST, tree=fitted("width:2,2"))
    for was, wanted in UNSEEN:
        with pytest.raises(UserError, match="goes by the survivals of nodes"):
            simulate(recorded(was), PrefixScheduler(COST), ClosedLoop(2), COST, tree=fitted(wanted))
    with pytest.raises(UserError, match="is 5 deep and the drafter proposes 4"):
        simulate(TREES.trace(None), Fixed(2), ClosedLoop(2), COST, tree=parse_tree("width:2,5"))
    trees = TREES.trace(fitted("width:2,4"))
    with pytest.raises(UserError, match="block_size is 2 and the recording's drafts are trees of shape width:2,4"):
        simulate(trees, Fixed(2), ClosedLoop(2), COST, block_size=2)
    for policy, said in ((ConfidenceThreshold(0.5), "need not be its parent"), (Oracle(COST), "recorded for chains")):
        with pytest.raises(UserError, match=said):
            simulate(trees, policy, ClosedLoop(2), COST)
    with pytest.raises(UserError, match="policy fixed-31 drafts 31 tokens and blocks have at most 30"):
        replay(trees, policy=Fixed(31), cost=COST)
    frame = trees.anchors.assign(node_rank=None)
    import pyarrow as pa

    bare = trees.with_anchors(pa.Table.from_pandas(frame, schema=trees.tables["anchors"].schema))
    with pytest.raises(UserError, match="have no node_rank; record it again"):
        simulate(bare, Fixed(2), ClosedLoop(2), COST)
    sampled = replace(RecordedAnchors.from_trace(TREES.trace(None)), mode="rejection")
    with pytest.raises(UserError, match="cannot be replayed from a recording of mode rejection"):
        sampled.with_tree(fitted("width:2,2"))
    coupled = TREES.trace(None)
    config = {name: value for name, value in coupled.config.items() if name != "num_candidates"}
    coupled = Trace(coupled.tables, "wall", {**config, "mode": "coupled"})
    with pytest.raises(UserError, match="has no ranks"):
        RecordedAnchors.from_trace(coupled).with_tree(fitted("width:2,2"))


def test_goodput_and_tetris_count_nodes() -> None:
    trees = TREES.trace(fitted("best-first:9,4"))
    for policy in (Goodput(COST), Tetris(6)):
        trace = simulate(trees, policy, ClosedLoop(3), COST)
        assert (trace.drafts["verify_len"] <= 9).all() and trace.drafts["num_accepted"].sum() > 0


def test_the_command_replays_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = TREES.trace(fitted("width:3,4"))
    COST.write(tmp_path / "cost.json")
    from dspark_sim.options import PolicyChoice

    Simulate(
        trace.write(tmp_path / "trace"),
        tmp_path / "cost.json",
        PolicyChoice("fixed"),
        tree="width:2,3",
        out=tmp_path / "out",
    ).run()
    out = Trace.read(tmp_path / "out")
    assert out.config["tree"] == "width:2,3" and out.drafts["verify_len"].max() == 14
    assert capsys.readouterr().out
    pd.testing.assert_series_equal(
        out.drafts["num_accepted"],
        simulate(trace, Fixed(14), ClosedLoop(4), COST, tree=fitted("width:2,3")).drafts["num_accepted"],
    )


def test_traces_of_the_version_before_are_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = simulate(toy_trace(), Fixed(3), ClosedLoop(2), COST).write(tmp_path / "trace")
    for path in folder.iterdir():
        table = pq.read_table(path)
        metadata = {**table.schema.metadata, b"dspark_sim.schema_version": b"1"}
        names = {"parents", "accepted_path", "node_survival", "first_at_depth"}
        kept = table.drop_columns([name for name in table.schema.names if name in names])
        pq.write_table(kept.replace_schema_metadata(metadata), path)
    equal(Trace.read(folder), simulate(toy_trace(), Fixed(3), ClosedLoop(2), COST))


@pytest.mark.parametrize("policy", [PrefixScheduler(COST), LaggedPrefixScheduler(COST), Tetris(6)])
def test_choices_among_nodes_come_out_again(policy: SpeculationPolicy) -> None:
    trace = simulate(TREES.trace(fitted("best-first:9,4")), policy, ClosedLoop(3), COST)
    assert check_decisions(trace)
    assert trace.steps["predicted_throughput"].notna().any()
    with pytest.raises(UserError, match="explain shows drafts of chains"):
        explain(trace, 3)
    with pytest.raises(UserError, match="how deep their verified nodes reach"):
        conditional_acceptance(trace)


@pytest.mark.parametrize("was", ["chain", "best-first:9,4"])
def test_rates_by_rank_are_counted_along_the_outputs(was: str) -> None:
    trace = recorded(was)
    hits, places = np.zeros((GAMMA, 3)), np.zeros(GAMMA)
    for request in TREES.requests:
        output = request["output_tokens"]
        for anchor in range(len(output) - 1):
            block = TREES.blocks[request["request_id"]][anchor].tokens[0]
            for depth, token in enumerate(output[anchor + 1 : anchor + 1 + GAMMA]):
                places[depth] += 1
                if token not in block[depth, :3]:
                    break
                hits[depth, block[depth].tolist().index(token)] += 1
    rates = rates_by_rank(trace, 3)
    assert np.array(rates) == pytest.approx(hits / places[:, None])
    (together,) = rates_by_rank(trace, 3, by_depth=False)
    assert together == pytest.approx(hits.sum(axis=0) / places.sum())
    assert Sequoia(9, rates).fitted(GAMMA).num_nodes == 9
    with pytest.raises(UserError, match="has no ranks along its outputs"):
        rates_by_rank(TREES.trace(None, ranks=False))
    with pytest.raises(UserError, match="num_candidates is 0"):
        rates_by_rank(trace, 0)


def test_compiled_kernels_leave_trees_to_the_arrays() -> None:
    pytest.importorskip("numba")
    trace = TREES.trace(fitted("best-first:9,4"))
    runs = [
        simulate(trace, PrefixScheduler(COST), ClosedLoop(3), COST, num_requests=20, backend=backend)
        for backend in ("arrays", "compiled")
    ]
    equal(*runs)


def test_requests_drawn_with_replacement_keep_their_trees() -> None:
    anchors = RecordedAnchors.from_trace(TREES.trace(fitted("width:2,3"))).bootstrap(12, seed=1)
    trace = simulate(anchors, Fixed(14), ClosedLoop(3), COST)
    for request_id, prompt in zip(trace.requests["request_id"], trace.requests["prompt_id"], strict=True):
        (known,) = [request for request in TREES.requests if request["prompt_id"] == prompt]
        expected = TREES.rounds(known["request_id"], fitted("width:2,3"), lambda survival: 14)
        assert rounds_of(trace, request_id) == [row[:-1] for row in expected]
