"""A trace in other tools' forms: vLLM's result file by vLLM's own arithmetic, and timelines whose spans nest."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import by_hand
from toy import toy_cost, toy_trace

from dspark_sim import cli
from dspark_sim.analysis.metrics import per_request, summary
from dspark_sim.analysis.slo import SLO, Objectives
from dspark_sim.analysis.timeline import timeline, write_timeline
from dspark_sim.analysis.vllm_export import bench_serve, per_request_metrics, scheduled_instants
from dspark_sim.analysis.window import Window
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler
from dspark_sim.scheduler import SchedulerConfig
from dspark_sim.simulate import simulate
from dspark_sim.trace import SPANS, Trace
from dspark_sim.workload import ClosedLoop, Poisson

COST = toy_cost()
VLLM = {
    *("endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness"),
    *("max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "input_lens"),
    *("output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors", "max_output_tokens_per_s"),
    *("max_concurrent_requests", "spec_decode_acceptance_rate", "spec_decode_acceptance_length"),
    *("spec_decode_num_drafts", "spec_decode_draft_tokens", "spec_decode_accepted_tokens"),
    "spec_decode_per_position_acceptance_rates",
    *(f"{what}_{name}_ms" for what in ("mean", "median", "std", "p50", "p90", "p95", "p99") for name in ("ttft",)),
    *(f"{what}_{name}_ms" for what in ("mean", "median", "std", "p99") for name in ("tpot", "itl", "e2el")),
}


def served(seed: int = 0, num_requests: int = 30) -> Trace:
    """A run with queueing, preemptions, and a policy that verifies nothing at times."""
    limits = SchedulerConfig(max_num_seqs=4, num_pages=24, page_size=4, max_model_len=96)
    recorded = toy_trace(6, 24, seed=seed)
    return simulate(
        recorded, PrefixScheduler(COST), Poisson(30.0, seed), COST, num_requests=num_requests, scheduler=limits
    )


def test_vllm_result_by_vllms_own_arithmetic() -> None:
    """From the detailed lists alone, as `vllm bench serve` computes them from its clients' notes."""
    trace = served()
    assert trace.requests["num_preemptions"].sum() > 0
    result = json.loads(json.dumps(bench_serve(trace, Objectives(SLO(ttft=0.6, e2e=1.5))), allow_nan=False))
    assert set(result) >= VLLM
    ttfts, itls, lens = np.array(result["ttfts"]), result["itls"], np.array(result["output_lens"])
    latency = ttfts + np.array([sum(gaps) for gaps in itls])
    np.testing.assert_allclose(latency, per_request(trace)["e2e_latency"])
    tpots = ((latency - ttfts) / np.maximum(lens - 1, 1))[lens > 1]
    samples = {"ttft": ttfts, "tpot": tpots, "itl": np.concatenate(itls), "e2el": latency}
    for name, sample in samples.items():
        expected = (np.mean(sample), np.median(sample), np.std(sample), np.percentile(sample, 99))
        found = [result[f"{what}_{name}_ms"] for what in ("mean", "median", "std", "p99")]
        np.testing.assert_allclose(found, 1e3 * np.array(expected))
    duration = result["duration"]
    assert result["completed"] == result["num_prompts"] == 30 and result["failed"] == 0
    assert result["request_throughput"] == pytest.approx(30 / duration)
    assert result["output_throughput"] == pytest.approx(lens.sum() / duration)
    assert result["total_token_throughput"] == pytest.approx((lens.sum() + sum(result["input_lens"])) / duration)
    assert result["request_goodput"] == pytest.approx(((ttfts <= 0.6) & (latency <= 1.5)).sum() / duration)
    assert 0 < result["request_goodput"] < result["request_throughput"]
    # The peaks, second by second.
    start = np.array(result["start_times"]) - min(result["start_times"])
    tokens, present = np.zeros(999), np.zeros(999)
    for begin, first, gaps in zip(start, ttfts, itls, strict=True):
        for instant in begin + first + np.cumsum([0.0, *gaps]):
            tokens[int(instant)] += 1
        present[int(begin) : int(begin + first + sum(gaps)) + 1] += 1
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == (tokens.max(), present.max())


def test_vllm_speculation_counts_rounds_that_verified() -> None:
    trace = served()
    rounds = trace.drafts[trace.drafts["verify_len"] > 0]
    result = bench_serve(trace)
    assert 0 < len(rounds) < len(trace.drafts) and result["request_goodput"] is None
    assert result["spec_decode_num_drafts"] == len(rounds)
    accepted, drafted = rounds["num_accepted"].sum(), rounds["verify_len"].sum()
    assert result["spec_decode_acceptance_length"] == pytest.approx(1 + accepted / len(rounds))
    assert result["spec_decode_acceptance_rate"] == pytest.approx(100 * accepted / drafted)
    assert sum(result["spec_decode_per_position_acceptance_rates"]) == pytest.approx(accepted / len(rounds))
    # Summed over requests, their own fields give the run's, as vLLM's documentation says.
    fields = [row["metrics"]["speculative_decoding"] for row in per_request_metrics(trace)]
    for ours, total in (
        ("num_spec_steps", "spec_decode_num_drafts"),
        ("num_draft_tokens", "spec_decode_draft_tokens"),
        ("num_accepted_draft_tokens", "spec_decode_accepted_tokens"),
    ):
        assert sum(field[ours] for field in fields) == result[total]
    for field in fields:
        assert sum(field["acceptance_histogram"]) == field["num_spec_steps"] == len(field["per_step_accepted"])
        assert len(field["acceptance_histogram"]) == field["num_spec_tokens"] + 1 == 6
        assert sum(j * n for j, n in enumerate(field["acceptance_histogram"])) == field["num_accepted_draft_tokens"]
        by_len = field["acceptance_histogram_by_draft_length"]
        assert sum(map(sum, by_len.values())) == field["num_spec_steps"]
        assert all(len(counts) == int(length) + 1 for length, counts in by_len.items())


def test_vllm_without_speculation_has_no_such_fields() -> None:
    trace = simulate(toy_trace(3, 12, 0), Fixed(0), ClosedLoop(2), COST)
    result = bench_serve(trace, detailed=False)
    assert not any(name.startswith("spec_decode") or isinstance(value, list) for name, value in result.items())
    assert (result["request_rate"], result["max_concurrency"]) == ("inf", 2)
    assert all(row["metrics"]["speculative_decoding"] is None for row in per_request_metrics(trace))
    assert result["mean_itl_ms"] == pytest.approx(1e3 * summary(trace)["icl_mean"])


def test_per_request_times_by_hand() -> None:
    first, second = per_request_metrics(by_hand())
    assert scheduled_instants(by_hand()).tolist() == [0.0, 2.0]
    times = {key: value for key, value in second["metrics"].items() if key != "speculative_decoding"}
    # Arrived at 0.5, prefilled over [2, 4], finished at 6 with 3 tokens.
    assert times == pytest.approx(
        {
            **{"time_to_first_token_ms": 2000.0, "generation_time_ms": 2000.0, "queue_time_ms": 1500.0},
            **{"mean_itl_ms": 1000.0, "tokens_per_second": 3 / 4},
        }
    )
    assert second["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert first["metrics"]["speculative_decoding"]["per_step_accepted"] == [2, 0]


def test_scheduled_is_the_recorded_instant_where_there_is_one() -> None:
    trace = by_hand()
    trace.requests["scheduled"] = [0.25, 1.75]
    assert scheduled_instants(trace).tolist() == [0.25, 1.75]


# Timelines


def check_timeline(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The laws of the format; returns the spans of every track. Times are compared as whole nanoseconds."""
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    counters: dict[str, list[float]] = defaultdict(list)
    named = {(event["pid"], event["tid"]) for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in ("X", "C", "M") and event["name"]
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0
            tracks[event["pid"], event["tid"]].append(event)
        elif event["ph"] == "C":
            assert event["args"] and all(np.isfinite(value) for value in event["args"].values())
            counters[event["name"]].append(event["ts"])
    assert set(tracks) <= named
    for spans in tracks.values():
        stack: list[int] = []
        last = -1
        for span in spans:
            begin = round(span["ts"] * 1e3)
            end = begin + round(span["dur"] * 1e3)
            assert begin >= last
            last = begin
            while stack and stack[-1] <= begin:
                stack.pop()
            assert not stack or end <= stack[-1], "a span ends after the one around it"
            stack.append(end)
    for instants in counters.values():
        assert instants == sorted(instants)
    return tracks


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(("request", "slot")))
def test_timelines_nest_and_hold_everything(seed: int, tracks: Any) -> None:
    trace = served(seed, 12)
    spans = check_timeline(list(timeline(trace, tracks=tracks)))
    engine = spans.pop((1, 1))
    iterations = [span for span in engine if span["cat"] == "iteration"]
    assert [span["args"]["step"] for span in iterations] == trace.steps["step"].tolist()
    seconds = {name: sum(span["dur"] for span in engine if span["name"] == name) / 1e6 for name in SPANS}
    for name, total in seconds.items():
        assert total == pytest.approx(trace.steps[f"{name}_seconds"].sum(), abs=1e-8 * len(trace.steps)), name
    lives = [span for track in spans.values() for span in track]
    for category, count in (("request", 12), ("round", len(trace.drafts))):
        assert sum(span["cat"] == category for span in lives) == count
    phases = sum(span["dur"] for span in lives if span["cat"] == "phase") / 1e6
    assert phases == pytest.approx(per_request(trace)["e2e_latency"].sum(), abs=1e-6)


def test_slots_are_as_many_as_requests_at_once() -> None:
    trace = simulate(toy_trace(6, 24), Fixed(2), ClosedLoop(3), COST, num_requests=40)
    spans = check_timeline(list(timeline(trace, tracks="slot")))
    assert len(spans) == 1 + 3
    assert len(check_timeline(list(timeline(trace, tracks="request")))) == 1 + 40


def test_replicas_have_a_track_each() -> None:
    trace = served()
    steps = trace.steps.copy()
    # A second engine that does the same a little later, under other step numbers.
    twin = steps.assign(step=steps["step"] + len(steps), start=steps["start"] + 1e-3, replica=1)
    trace.steps = pd.concat([steps.assign(replica=0), twin], ignore_index=True)
    spans = check_timeline(list(timeline(trace)))
    assert {tid for pid, tid in spans if pid == 1} == {1, 2}
    assert len(spans[1, 1]) == len(spans[1, 2])


def test_a_part_of_a_timeline() -> None:
    trace = served()
    window = Window(0.3, 0.6)
    events = list(timeline(trace, window=window))
    check_timeline(events)
    steps = [event["args"]["step"] for event in events if event.get("cat") == "iteration"]
    assert steps == trace.steps.loc[trace.steps["start"].between(0.3, 0.6), "step"].tolist() and len(steps) > 2
    with pytest.raises(UserError, match="nothing happened"):
        list(timeline(trace, window=Window(1e6, 2e6)))


def test_a_timeline_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = served()
    path = write_timeline(trace, tmp_path / "deep" / "run.json")
    document = json.loads(path.read_text())
    assert document["displayTimeUnit"] == "ms" and document["otherData"]["policy"] == "prefix"
    assert document["traceEvents"] == list(timeline(trace))
    # A row that cannot be written: the old file stays, no part of a new one is left.
    trace.requests["domain"] = [object()] * len(trace.requests)
    with pytest.raises(TypeError):
        write_timeline(trace, path)
    assert json.loads(path.read_text()) == document and [entry.name for entry in path.parent.iterdir()] == ["run.json"]


# The command


@pytest.mark.parametrize("form", ["vllm", "vllm-requests", "perfetto"])
def test_export_trace(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served().write(tmp_path / "run")
    cli.main(["export-trace", str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / "file")])
    text = (tmp_path / "file").read_text()
    assert f"as {form} to" in capsys.readouterr().out
    if form == "vllm":
        assert json.loads(text)["completed"] == 30
    elif form == "vllm-requests":
        assert [json.loads(line)["id"] for line in text.splitlines()] == [f"request-{i}" for i in range(30)]
    else:
        check_timeline(json.loads(text)["traceEvents"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--format", "perfetto", "--goodput", "ttft:1"), "--goodput goes with format vllm"),
        (("--start", "1"), "--start and --end go with format perfetto"),
        (("--format", "perfetto", "--start", "3", "--end", "2"), "end must be after its start"),
        (("--goodput", "ttft"), "part 'ttft'"),
    ],
)
def test_export_refusals(
    flags: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand().write(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        cli.main(["export-trace", str(tmp_path / "run"), "--out", str(tmp_path / "file"), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "file").exists()
