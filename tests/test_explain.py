"""Decisions made again from traces: as recorded for every policy, and not when anything is changed."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import algorithm_1, toy_cost, toy_trace

matplotlib.use("agg")

import matplotlib.pyplot as plt

from dspark_sim import cli
from dspark_sim.analysis import plots
from dspark_sim.analysis.decisions import check_decisions, decisions, policy_of, reaction
from dspark_sim.analysis.explain import explain
from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler, parameters, round_seconds
from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked
from dspark_sim.policy_ranked import LaggedPrefixScheduler, Oracle
from dspark_sim.policy_zoo import PolicyName, make_policy, policy_from_parameters
from dspark_sim.scheduler import SchedulerConfig
from dspark_sim.simulate import simulate
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop, Poisson

COST = toy_cost()
NAMES = get_args(PolicyName)
TABLE = ((2, 5), (4, 2), (5, 0))
SMALL = SchedulerConfig(max_num_seqs=5, num_pages=32, page_size=4, max_model_len=128)


def served(policy: Any, seed: int = 0, mode: str = "greedy", num_requests: int = 30) -> tuple[Trace, Trace]:
    """A run with queueing and preemptions, and the recording it replayed."""
    recorded = toy_trace(8, 24, seed=seed, mode=mode, copies=1 if mode == "greedy" else 2, ragged=True)
    run = simulate(
        *(recorded, policy, Poisson(25.0, seed), COST),
        **{"num_requests": num_requests, "scheduler": SMALL, "allow_biased": True},
    )
    return run, recorded


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_choices_by_a_late_load_on_several_servers_come_out_again(num_replicas: int) -> None:
    recorded = toy_trace(8, 24, seed=3)
    policy = make_policy("table", block_size=5, cost=COST, table=TABLE)
    options = {"num_requests": 60, "load_lag": 4, "num_replicas": num_replicas, "scheduler": SMALL}
    trace = simulate(recorded, policy, Poisson(40.0, 3), COST, **options)
    assert check_decisions(trace, recording=recorded)
    # By the load of the round itself they would be others.
    now = Trace(trace.tables, trace.clock, {**trace.config, "load_lag": 0}, trace.provenance)
    assert not check_decisions(now, recording=recorded)


def reread(trace: Trace, folder: Path) -> Trace:
    return Trace.read(trace.write(folder))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("park", [False, True])
def test_parameters_make_the_same_policy(name: PolicyName, park: bool) -> None:
    if name == "none" and park:
        return
    policy = make_policy(name, block_size=5, cost=COST, table=TABLE, park=park)
    written = json.loads(json.dumps(parameters(policy)))
    assert policy_from_parameters(written, COST) == policy
    other = replace(AcceptanceEMA((0, 2, 4), decay=0.5), interval=3)
    assert policy_from_parameters(json.loads(json.dumps(parameters(Parked(other, COST)))), COST) == Parked(other, COST)


@settings(deadline=None, max_examples=22)
@given(st.sampled_from(NAMES), st.booleans(), st.integers(0, 10**6), st.sampled_from(("greedy", "target_match")))
def test_every_choice_of_every_policy_comes_out_again(name: PolicyName, park: bool, seed: int, mode: str) -> None:
    policy = make_policy(name, block_size=5, cost=COST, table=TABLE, park=park and name != "none")
    trace, recorded = served(policy, seed, mode)
    found = check_decisions(trace, recording=recorded)
    assert found and found.num_rounds == trace.drafts["step"].nunique(), str(found)


@pytest.mark.parametrize("name", NAMES)
def test_and_from_a_file(name: PolicyName, tmp_path: Path) -> None:
    trace, recorded = served(make_policy(name, block_size=5, cost=COST, table=TABLE))
    assert check_decisions(reread(trace, tmp_path / "run"), recording=reread(recorded, tmp_path / "recording"))


@pytest.mark.parametrize(
    ("ran", "claimed"),
    [
        (PrefixScheduler(COST), LaggedPrefixScheduler(COST)),
        (LaggedPrefixScheduler(COST, 1), LaggedPrefixScheduler(COST, 2)),
        (Fixed(3), Fixed(4)),
        (Goodput(COST, decay=0.9), Goodput(COST, decay=0.2)),
        (AcceptanceEMA((1, 2, 5), 0.0, 0.0, 1, 0), AcceptanceEMA((1, 2, 5), 0.0, 1.0, 1, 0)),
        (BatchSizeTable(TABLE), BatchSizeTable(((3, 5), (5, 0)))),
        (Oracle(COST), PrefixScheduler(COST)),
    ],
)
def test_another_policy_is_found_out(ran: Any, claimed: Any) -> None:
    trace, recorded = served(ran)
    trace.config["policy_parameters"] = json.loads(json.dumps(parameters(claimed)))
    found = check_decisions(trace, recording=recorded)
    assert not found and found.first_difference is not None and "come out differently" in found.message


def test_a_planted_choice_is_found_where_it_is() -> None:
    trace, _ = served(LaggedPrefixScheduler(COST))
    table = trace.tables["drafts"]
    lens = table["verify_len"].to_numpy().copy()
    row = len(lens) // 2
    lens[row] += 1 if lens[row] < table["draft_len"].to_numpy()[row] else -1
    place = table.schema.get_field_index("verify_len")
    planted = Trace(
        {**trace.tables, "drafts": table.set_column(place, "verify_len", pa.array(lens))}, trace.clock, trace.config
    )
    found = check_decisions(planted)
    step = int(table["step"].to_numpy()[row])
    assert found.first_difference == step and f"1 of {found.num_rounds} choices" in found.message
    assert f"first at step {step}" in explain(planted, step).text()
    assert check_decisions(planted, last=step - 1)


def test_another_cost_table_is_found_out() -> None:
    trace, _ = served(PrefixScheduler(COST))
    dear = replace(COST, verify=Curve((1.0, 64.0), (0.001, 0.9)))
    assert check_decisions(trace, cost=COST)
    assert "cost table is not the run's" in check_decisions(trace, cost=dear).message


def decode_steps(trace: Trace) -> list[int]:
    return trace.drafts["step"].unique().tolist()


def test_the_curve_is_algorithm_1() -> None:
    """The choice read off the explained table is the paper's algorithm, line by line, on the survivals in it."""
    trace, recorded = served(PrefixScheduler(COST))
    for step in decode_steps(trace)[::4]:
        told = explain(trace, step, recording=recorded)
        decision = list(decisions(trace, last=step))[-1]
        seconds = round_seconds(COST, decision.load, *decision.survival.shape)
        lens = algorithm_1(decision.survival, seconds)
        drafted = decision.draft_lens
        assert told.requests["verify_len"].tolist() == np.minimum(lens, drafted).tolist()
        if not len(told.curve):
            continue
        curve, count = told.curve["throughput"].to_numpy(), told.facts["num_verified"]
        assert (np.diff(curve[: count + 1]) > 0).all()
        assert count == decision.survival.astype(bool).sum() or curve[count + 1] <= curve[count]
        assert told.facts["predicted_throughput"] == pytest.approx(curve[count])
        np.testing.assert_allclose(told.curve["seconds"], seconds)


def test_candidates_and_outcomes_are_the_rounds() -> None:
    trace, recorded = served(LaggedPrefixScheduler(COST), mode="target_match")
    for step in decode_steps(trace)[::5]:
        told = explain(trace, step, recording=recorded)
        rows = trace.drafts[trace.drafts["step"] == step].set_index("request_id")
        assert len(told.candidates) == rows["draft_len"].sum()
        if told.candidates.empty:
            continue
        assert told.candidates["survival"].is_monotonic_decreasing
        for request_id, part in told.candidates.groupby("request_id"):
            row = rows.loc[request_id]
            part = part.sort_values("depth")
            np.testing.assert_allclose(part["confidence"], row["confidence"])
            np.testing.assert_allclose(part["survival"], np.cumprod(row["confidence"].astype(float)))
            words = part["outcome"].tolist()
            accepted, verified = int(row["num_accepted"]), int(row["verify_len"])
            assert words[:accepted] == ["accepted"] * accepted
            assert words[verified:] == ["not verified"] * (len(words) - verified)
            unkept = ["rejected", *["after a rejection"] * (verified - accepted)]
            assert words[accepted:verified] == unkept[: verified - accepted]
        np.testing.assert_allclose(told.candidates["accept_prob"], 0.8)


def test_lagged_sees_older_survivals() -> None:
    trace, _ = served(LaggedPrefixScheduler(COST, lag=1))
    made = list(decisions(trace))
    for before, now in pairwise(made):
        if not now.draft_len:
            continue
        kept = dict(zip(before.load.request_ids, before.survival, strict=True))
        for request_id, seen in zip(now.load.request_ids, now.seen, strict=True):
            np.testing.assert_array_equal(seen, kept.get(request_id, np.ones(now.draft_len)))
    told = explain(trace, made[9].load.step)
    count = told.facts["num_verified"]
    assert count == min(int(told.curve["seen_throughput"].argmax()), int((made[9].survival > 0).sum()))


def test_oracle_at_temperature_0_takes_drafts_that_are_right() -> None:
    """With a flat cost every right draft pays and no wrong one is worth its place."""
    flat = replace(COST, verify=Curve((1.0, 2.0), (0.01, 0.01001)))
    recorded = toy_trace(6, 24)
    trace = simulate(recorded, PrefixScheduler(flat), ClosedLoop(4), flat)
    for step in decode_steps(trace)[::3]:
        told = explain(trace, step, recording=recorded)
        if "oracle" not in told.requests:
            continue
        for row in told.requests.to_dict("records"):
            right = told.candidates[told.candidates["request_id"] == row["request_id"]].sort_values("depth")
            assert row["oracle"] == np.cumprod(right["accept_prob"]).sum()
        assert told.facts["oracle_throughput"] >= told.facts["realised_throughput"] * 0.99


def test_the_oracle_needs_the_recording() -> None:
    trace, _ = served(PrefixScheduler(COST))
    told = explain(trace, decode_steps(trace)[3])
    assert "oracle" not in told.requests and any("acceptance probabilities" in note for note in told.notes)
    assert np.isnan(told.facts["oracle_throughput"])


def test_json_is_json_and_text_names_everything() -> None:
    for policy in (PrefixScheduler(COST), Fixed(0), Fixed(3), Parked(LaggedPrefixScheduler(COST), COST), Goodput(COST)):
        trace, recorded = served(policy)
        step = decode_steps(trace)[-1]
        told = explain(trace, step, recording=recorded)
        document = json.loads(json.dumps(told.to_json(), allow_nan=False))
        assert document["check"]["equal"] is True and len(document["requests"]) == told.facts["num_running"]
        text = told.text()
        assert f"Step {step} of policy {policy.label()}" in text and "come out as recorded" in text
    assert "learnt before: acceptance" in text


def spike() -> Trace:
    """Two users' worth of load, then twenty requests at once, then two users again."""
    recorded = toy_trace(6, 24)
    calm = np.arange(40) * 0.15
    arrivals = np.sort(np.concatenate((calm, 2.0 + np.arange(20) * 1e-3)))

    class Burst(Poisson):
        def arrivals(self, num_requests: int) -> np.ndarray:
            return arrivals[:num_requests]

    return simulate(recorded, PrefixScheduler(COST), Burst(1.0), COST, num_requests=60)


def test_reaction_shows_fewer_drafts_under_a_spike() -> None:
    trace = spike()
    frame = reaction(trace)
    assert frame["step"].tolist() == decode_steps(trace)
    calm, busy = frame[frame["num_running"] <= 3], frame[frame["num_running"] >= 12]
    assert len(calm) > 20 and len(busy) > 5
    assert busy["mean_verify_len"].mean() < 0.6 * calm["mean_verify_len"].mean()
    assert busy["realised_throughput"].mean() > calm["realised_throughput"].mean()
    rounds = trace.drafts.groupby("step")["num_emitted"].sum()
    steps = trace.steps.set_index("step")["step_seconds"]
    np.testing.assert_allclose(frame["realised_throughput"], rounds / steps[rounds.index])
    last = frame.tail(15)
    emitted, seconds = rounds[last["step"]].sum(), steps[last["step"]].sum()
    assert frame["smoothed_throughput"].iloc[-1] == pytest.approx(emitted / seconds)


def test_figures_have_units_and_what_was_chosen() -> None:
    trace, recorded = served(LaggedPrefixScheduler(COST))
    told = explain(trace, decode_steps(trace)[8], recording=recorded)
    figure = plots.policy_decision(told, "Toy.")
    left, right = figure.axes
    assert (
        "tokens per second" in left.get_ylabel()
        and "tokens" in left.get_xlabel()
        and "drafted tokens" in right.get_ylabel()
    )
    assert f"verified: {told.facts['num_verified']}" in [text.get_text() for text in left.get_legend().get_texts()]
    assert sum(bar.get_height() for bar in right.patches) == told.requests["draft_len"].sum()
    plt.close(figure)
    figure = plots.policy_reaction(spike(), "Toy.")
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert (
        labels == ["requests", "tokens per request", "tokens per second"] and "seconds" in figure.axes[2].get_xlabel()
    )
    plt.close(figure)
    nothing = explain(served(Fixed(0))[0], 1)
    plt.close(plots.policy_decision(nothing))
    with pytest.raises(UserError, match="no decode round begins"):
        plots.policy_reaction(trace, start=1e6)


@pytest.mark.parametrize("draw", [lambda: plots.policy_reaction(spike(), "Toy."), lambda: _decision_figure()])
def test_nothing_runs_off_the_paper(draw: Any) -> None:
    figure = draw()
    figure.canvas.draw()
    paper, texts = figure.bbox, [text.get_window_extent() for text in figure.texts]
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    for box in (*texts, *boxes):
        assert box.x0 >= paper.x0 - 1 and box.x1 <= paper.x1 + 1 and box.y0 >= paper.y0 - 1 and box.y1 <= paper.y1 + 1
    assert not any(text.overlaps(box) for text in texts for box in boxes)
    plt.close(figure)


def _decision_figure() -> Any:
    trace, recorded = served(LaggedPrefixScheduler(COST))
    return plots.policy_decision(explain(trace, decode_steps(trace)[8], recording=recorded), "Toy.")


# Refusals and commands


def refusals() -> list[tuple[Any, str]]:
    trace, recorded = served(PrefixScheduler(COST))
    bare = Trace(trace.tables, trace.clock, {"block_size": 5})
    live = Trace(trace.tables, "wall", {key: value for key, value in trace.config.items() if key != "cost"})
    tetris, _ = served(make_policy("tetris", block_size=5, cost=None))
    damaged = Trace(trace.tables, trace.clock, {**trace.config, "cost": {"verify": 1}})
    last = int(trace.steps["step"].max())
    prefill = int(trace.steps.loc[trace.steps["num_prefill_tokens"] > 0, "step"].iloc[0])
    other = toy_trace(8, 24, seed=99, ragged=True)
    return [
        (lambda: explain(trace, 10**6), f"its steps are 0 to {last}"),
        (lambda: explain(trace, prefill), "is a prefill"),
        (lambda: policy_of(bare), "does not say which policy ran"),
        (lambda: check_decisions(live), "give --cost"),
        (lambda: check_decisions(damaged), "cost model cannot be read"),
        (lambda: check_decisions(tetris), "draft_prob is not in the trace"),
        (lambda: check_decisions(tetris, recording=other), "give the recording that"),
        (lambda: policy_from_parameters({"kind": "Best"}, None), "policy kind 'Best'"),
        (lambda: policy_from_parameters({"kind": "Fixed", "verify_len": 2, "size": 1}, None), "no parameter size"),
        (lambda: policy_from_parameters({"kind": "Fixed"}, None), "cannot be made"),
        (lambda: policy_from_parameters({"kind": "Fixed", "verify_len": -1}, None), "verify_len is -1"),
        (lambda: reaction(recorded), "no decode round"),
    ]


@pytest.mark.parametrize(("call", "words"), refusals())
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


def test_explain_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, recorded = served(PrefixScheduler(COST))
    run, recording, step = trace.write(tmp_path / "run"), recorded.write(tmp_path / "recording"), decode_steps(trace)[5]
    files = [tmp_path / name for name in ("why.json", "why.png", "reaction.png")]
    flags = ["--recording", str(recording), "--json", str(files[0])]
    flags += ["--figure", str(files[1]), "--reaction", str(files[2])]
    cli.main(["explain", str(run), "--step", str(step), *flags])
    out = capsys.readouterr().out
    assert f"Step {step} of policy prefix" in out and "oracle" in out and "come out as recorded" in out
    assert all(path.stat().st_size > 500 for path in files)
    assert json.loads(files[0].read_text())["facts"]["step"] == step
    with pytest.raises(SystemExit):
        cli.main(["explain", str(run), "--step", str(step), "--figure", str(tmp_path / "why.xyz")])
    assert "no known picture format" in capsys.readouterr().err


def test_live_traces_take_the_cost_table_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, _ = served(PrefixScheduler(COST))
    config = {key: value for key, value in trace.config.items() if key != "cost"}
    Trace(trace.tables, "wall", config).write(tmp_path / "live")
    COST.write(tmp_path / "cost.json")
    step = str(decode_steps(trace)[5])
    cli.main(["explain", str(tmp_path / "live"), "--step", step, "--cost", str(tmp_path / "cost.json")])
    assert "come out as recorded" in capsys.readouterr().out
    assert CostModel.read(tmp_path / "cost.json") == COST


def test_metrics_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(served(Fixed(2), seed)[0].write(tmp_path / f"run{seed}")) for seed in range(2)]
    cli.main(["metrics", *paths, "--slo", "ttft:0.5 tpot:0.05", "--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    rows = pd.DataFrame(json.loads((tmp_path / "rows.json").read_text())["rows"]).set_index(["metric", "domain"])
    assert "t over 2 replications" in out and "slo_attainment_tpot" in out
    assert rows.loc[("goodput", "all"), "unit"] == "requests/s" and rows.loc[("ttft", "all"), "num"] == 60
    cli.main(["metrics", paths[0], "--window", "steady", "--goodput", "ttft:500 tpot:50"])
    assert "(steady)" in capsys.readouterr().out
    for flags, words in (
        (("--slo", "ttft:1", "--goodput", "ttft:1"), "give one of them"),
        (("--window", "steady", "--warmup-seconds", "1"), "finds its own warm-up"),
        (("--warmup-seconds", "1e9"), "trim less"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["metrics", paths[0], *flags])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
