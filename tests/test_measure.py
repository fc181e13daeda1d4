"""Metrics with intervals, objectives and windows: by hand, against theory, and whether the intervals cover."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import by_hand
from toy import constant_cost, toy_cost, toy_trace

from dspark_sim.analysis.measure import COLUMNS, PERCENTILES, measure
from dspark_sim.analysis.metrics import per_request, summary
from dspark_sim.analysis.samples import Observations
from dspark_sim.analysis.slo import SLO, Objectives, parse_goodput, parse_slo
from dspark_sim.analysis.stats import Bootstrap
from dspark_sim.analysis.timeline import timeline
from dspark_sim.analysis.vllm_export import bench_serve
from dspark_sim.analysis.window import Window, mser, steady, trimmed, whole
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler
from dspark_sim.scheduler import SchedulerConfig
from dspark_sim.simulate import simulate
from dspark_sim.trace import SCHEMAS, Trace
from dspark_sim.workload import ClosedLoop, Poisson

COST = toy_cost()
QUICK = Bootstrap(num_resamples=50)
INF = float("inf")


def means(frame: pd.DataFrame, domain: str = "all") -> dict[str, float]:
    return frame[frame["domain"] == domain].set_index("metric")["mean"].to_dict()


def test_by_hand() -> None:
    """The run of `test_metrics.by_hand`: 6 seconds, two prompts of 4 and 7 tokens, outputs of 5 and 3."""
    found = means(measure(by_hand(), objectives=Objectives(SLO(ttft=2.0)), bootstrap=QUICK))
    expected = {
        "ttft": (1.0 + 3.5) / 2,
        "tpot": (5 / 4 + 2 / 2) / 2,
        "itl": (1 + 0 + 0 + 4 + 2 + 0) / 6,
        "icl": (1 + 4 + 2) / 3,
        "e2e_latency": (6.0 + 5.5) / 2,
        "user_tokens_per_second": (4 / 5 + 2 / 2) / 2,
        "request_throughput": 2 / 6,
        "output_throughput": 8 / 6,
        "total_token_throughput": (8 + 11) / 6,
        "acceptance_length": (3 + 1 + 2) / 3,
        "verification_budget": (4 + 4 + 2) / 3,
        "wasted_verification": (1 + 3 + 0) / 3,
        "wasted_verification_share": 4 / 7,
        "draft_acceptance_rate": 3 / 9,
        "concurrency": (6.0 + 5.5) / 6,
        "num_preemptions": 0.0,
        "slo_attainment": 1 / 2,
        "slo_attainment_ttft": 1 / 2,
        "goodput": 1 / 6,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 6), st.booleans(), st.integers(20, 60))
def test_identities(seed: int, verify_len: int, users: int, open_loop: bool, num_pages: int) -> None:
    """Little's law, the summary's numbers, and sums over domains; memory may force preemptions."""
    limits = SchedulerConfig(max_num_seqs=4, num_pages=num_pages, page_size=4, max_model_len=num_pages * 4)
    recorded = toy_trace(5, 16, seed=seed)
    workload = Poisson(20.0) if open_loop else ClosedLoop(users)
    trace = simulate(recorded, Fixed(verify_len), workload, COST, num_requests=12, scheduler=limits)
    found, old = means(measure(trace, bootstrap=QUICK)), summary(trace)
    assert found["concurrency"] == pytest.approx(found["request_throughput"] * found["e2e_latency"])
    for ours, theirs in (
        *((name, f"{name}_mean") for name in ("ttft", "tpot", "itl", "icl", "e2e_latency")),
        *((name, name) for name in ("output_throughput", "user_tokens_per_second", "verification_budget")),
        ("acceptance_length", "mean_acceptance_length"),
        ("draft_acceptance_rate", "draft_acceptance_rate"),
    ):
        assert found[ours] == pytest.approx(old[theirs], nan_ok=True), ours
    assert found["num_preemptions"] * len(trace.requests) == pytest.approx(trace.requests["num_preemptions"].sum())
    assert found["wasted_verification"] == pytest.approx(found["verification_budget"] - found["acceptance_length"])
    assert 0 <= found["kv_usage"] <= 1 and 0 < found["num_running"] <= 4


def test_a_window_counts_what_lies_in_it() -> None:
    """Constant steps of half a second, one user, no drafts: in every window two tokens a second."""
    trace = simulate(toy_trace(1, 24), Fixed(0), ClosedLoop(1), constant_cost(0.5, 0.5), num_requests=20)
    for window in (trimmed(trace, 30.2, 41.2), Window(100.2, 150.2)):
        found = means(measure(trace, window=window, bootstrap=QUICK))
        assert found["output_throughput"] == pytest.approx(2.0, abs=2 / window.seconds)
        assert found["concurrency"] == pytest.approx(1.0)
        assert found["icl"] == pytest.approx(0.5)
        chosen = Observations.of(trace, window)
        inside = trace.requests["arrival"].between(window.start, window.end)
        assert len(chosen.requests) == inside.sum() < len(trace.requests)
        assert chosen.steps["end"].between(window.start, window.end).all()
        # A request that arrives in the window counts with its whole latency, wherever it finishes.
        np.testing.assert_allclose(chosen.requests["e2e_latency"], 12.0)


def test_steady_leaves_out_filling_up_and_running_empty() -> None:
    trace = simulate(toy_trace(6, 24), Fixed(2), Poisson(6.0), COST, num_requests=300)
    span = steady(trace)
    assert whole(trace).start <= span.start < span.end == trace.requests["arrival"].max() < whole(trace).end
    with pytest.raises(UserError, match="no request arrived after"):
        steady(simulate(toy_trace(6, 24), Fixed(2), ClosedLoop(6), COST))


def test_mser_finds_the_end_of_a_transient() -> None:
    rng = np.random.default_rng(0)
    ends = [mser(np.concatenate((np.linspace(-30, 0, 80), np.zeros(420))) + rng.normal(size=500)) for _ in range(20)]
    assert all(60 <= end <= 110 for end in ends), ends
    assert mser(np.full(10, 3.0)) == 0


def _gamma(seed: int, num_prompts: int, num_requests: int) -> Trace:
    """Requests with prompts' own mean latency: what is drawn is known."""
    rng = np.random.default_rng(seed)
    prompts = rng.gamma(4.0, 0.25, num_prompts)
    latency = rng.exponential(np.repeat(prompts, num_requests))
    rows = [
        {
            **{"request_id": i, "prompt_id": str(i // num_requests), "domain": "x", "arrival": float(i)},
            **{"prompt_len": 1, "max_tokens": 1, "output_len": 1, "num_preemptions": 0, "finish_reason": "length"},
            **{"first_token": i + float(seconds), "finish": i + float(seconds)},
        }
        for i, seconds in enumerate(latency)
    ]
    tables = {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    return Trace({**tables, "requests": pa.Table.from_pylist(rows, schema=SCHEMAS["requests"])}, "virtual")


def _coverage(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_bootstrap_over_prompts_covers_the_mean_and_the_median() -> None:
    median = np.median(np.random.default_rng(9).exponential(np.random.default_rng(8).gamma(4.0, 0.25, 10**6)))
    rows = []
    for seed in range(40):
        frame = measure(_gamma(seed, 40, 5), bootstrap=Bootstrap(num_resamples=100)).set_index("metric")
        rows.append(frame.loc["ttft", ["low", "high", "p50_low", "p50_high"]].astype(float).tolist())
    # 95 % of 40, less three standard errors and some shortness of percentile intervals.
    assert _coverage([(row[0], row[1]) for row in rows], 1.0) >= 0.85
    assert _coverage([(row[2], row[3]) for row in rows], float(median)) >= 0.85


def test_replications_cover_the_mean_of_a_queue() -> None:
    """Poisson arrivals, one at a time, each served for one second: an M/D/1 queue at load 1/2 waits 1/2 second."""
    recorded = toy_trace(1, 2, 0)
    limits = SchedulerConfig(max_num_seqs=1)

    def run(seed: int) -> Trace:
        policy, cost = Fixed(0), constant_cost(0.5, 0.5)
        return simulate(recorded, policy, Poisson(0.5), cost, num_requests=400, scheduler=limits, seed=seed)

    traces = [run(seed) for seed in range(1, 9)]
    frame = measure(traces, window=steady).set_index("metric")
    assert frame.loc["e2e_latency", "method"] == "t over 8 replications"
    row = frame.loc["e2e_latency"]
    assert row["low"] <= 1.5 <= row["high"] and row["high"] - row["low"] < 0.5
    single = measure(traces[0], window=steady).set_index("metric")
    assert single.loc["concurrency", "method"] == "batch means"
    assert single.loc["concurrency", "low"] < frame.loc["concurrency", "mean"] < single.loc["concurrency", "high"]
    per_run = [measure(trace, window=steady).set_index("metric").loc["ttft", "p99"] for trace in traces]
    assert frame.loc["ttft", "p99"] == pytest.approx(np.mean(per_run))
    assert frame.loc["ttft", "p99_low"] < np.mean(per_run) < frame.loc["ttft", "p99_high"]


def test_rows_are_tidy_and_repeat_exactly() -> None:
    trace = simulate(toy_trace(6, 24), PrefixScheduler(COST), ClosedLoop(3), COST)
    first, second = (measure(trace, by_domain=True, objectives=parse_slo("ttft:1 tpot:0.1")) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert tuple(first.columns) == COLUMNS and not first.duplicated(["metric", "domain"]).any()
    samples = first[first["p50"].notna()]
    values = samples[["p50", "p90", "p95", "p99"]].to_numpy()
    assert (np.diff(values, axis=1) >= 0).all()
    spans = first[first["low"].notna()]
    assert (spans["low"] <= spans["mean"] + 1e-12).all() and (spans["mean"] <= spans["high"] + 1e-12).all()
    for percent in PERCENTILES:
        known = first[first[f"p{percent}_low"].notna()]
        assert (known[f"p{percent}_low"] <= known[f"p{percent}_high"]).all() and len(known)
    # One domain here: its rows are those of all.
    assert means(first, "toy") == pytest.approx({name: means(first)[name] for name in means(first, "toy")}, nan_ok=True)


def test_without_drafts_shares_are_undefined_and_a_round_is_a_token() -> None:
    found = means(measure(simulate(toy_trace(3, 12), Fixed(0), ClosedLoop(2), COST), bootstrap=QUICK))
    assert np.isnan(found["draft_acceptance_rate"]) and np.isnan(found["wasted_verification_share"])
    assert found["acceptance_length"] == found["verification_budget"] == 1
    assert found["icl"] == pytest.approx(found["itl"])


def test_failed_requests_fail_their_objective_and_have_no_latency() -> None:
    """One of two requests gave up after 2 seconds, without a token."""
    trace = by_hand()
    rows = trace.tables["requests"].to_pylist()
    rows[1] |= {"finish_reason": "timeout", "first_token": None, "finish": 2.5, "output_len": 0}
    drafts = trace.tables["drafts"].slice(0, 2)
    requests = pa.Table.from_pylist(rows, schema=SCHEMAS["requests"])
    failed = Trace({**trace.tables, "requests": requests, "drafts": drafts}, "virtual")
    found = means(measure(failed, objectives=Objectives(SLO(ttft=9.0)), bootstrap=QUICK))
    expected = {"failed_share": 0.5, "slo_attainment": 0.5, "ttft": 1.0, "goodput": 1 / 6, "output_throughput": 5 / 6}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    result = bench_serve(failed)
    assert (result["completed"], result["failed"], result["num_prompts"]) == (1, 1, 2)
    waiting = [event["name"] for event in timeline(failed) if event.get("tid") == 2 and event.get("cat") == "phase"]
    assert waiting == ["queue"]


# Objectives


def requests_of(rows: list[tuple[str, float, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["domain", "ttft", "tpot", "e2e_latency"])


def test_objectives_by_hand() -> None:
    """A limit holds when it is met exactly; a request of one token has no tpot and passes, as in vLLM."""
    frame = requests_of([("a", 0.5, 0.05, 9.0), ("a", 0.6, 0.01, 1.0), ("b", 0.1, np.nan, 1.0), ("b", 0.1, 0.06, 1.0)])
    met = Objectives(SLO(ttft=0.5, tpot=0.05), {"b": SLO(tpot=0.055)}).met(frame)
    assert met["all"].tolist() == [True, False, True, False]
    assert met["ttft"].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft:0.5 tpot:0.05", Objectives(SLO(0.5, 0.05))),
        ("ttft:500ms,tpot:50ms e2e:2s", Objectives(SLO(0.5, 0.05, 2.0))),
        (("ttft:1", "code=tpot:2e-2"), Objectives(SLO(1.0), {"code": SLO(tpot=0.02)})),
        ("code=e2e_latency:3", Objectives(SLO(), {"code": SLO(e2e=3.0)})),
    ],
)
def test_objectives_are_read(text: str, expected: Objectives) -> None:
    assert parse_slo(text) == expected


def test_vllm_goodput_is_in_milliseconds() -> None:
    assert parse_goodput("ttft:500 tpot:50 e2el:5000") == Objectives(SLO(0.5, 0.05, 5.0))
    assert SLO().limits() == {} and SLO(tpot=1.0).limits() == {"tpot": 1.0} and SLO().e2e == INF


GOODPUT = simulate(toy_trace(5, 20), Fixed(2), Poisson(15.0), COST, num_requests=20)


@settings(deadline=None, max_examples=8)
@given(st.floats(0, 1), st.floats(0, 0.1), st.floats(0, 3))
def test_goodput_is_brute_force_and_falls_with_tighter_limits(ttft: float, tpot: float, e2e: float) -> None:
    trace = GOODPUT
    found = means(measure(trace, objectives=Objectives(SLO(ttft, tpot, e2e)), bootstrap=QUICK))
    good = sum(
        row.ttft <= ttft and (row.output_len == 1 or row.tpot <= tpot) and row.e2e_latency <= e2e
        for row in per_request(trace).itertuples()
    )
    assert found["slo_attainment"] == pytest.approx(good / 20)
    assert found["goodput"] == pytest.approx(good / whole(trace).seconds)
    looser = means(measure(trace, objectives=Objectives(SLO(2 * ttft, 2 * tpot, 2 * e2e)), bootstrap=QUICK))
    assert looser["goodput"] >= found["goodput"]


def refusals() -> list[tuple[object, str]]:
    trace = by_hand()
    empty = Trace({name: schema.empty_table() for name, schema in SCHEMAS.items()}, "virtual")
    return [
        (lambda: parse_slo("ttft=0.5"), "part '0.5'"),
        (lambda: parse_slo("ttft:fast"), "part 'ttft:fast'"),
        (lambda: parse_slo("ttft:1e"), "part 'ttft:1e'"),
        (lambda: parse_slo("latency:1"), "limit on 'latency'"),
        (lambda: parse_slo("ttft:1 ttft:2"), "limits ttft twice"),
        (lambda: parse_slo(("ttft:1", "tpot:2")), "second of its kind"),
        (lambda: parse_slo(" "), "objective is empty"),
        (lambda: parse_goodput("tpot:-1"), "tpot objective is -0.001 seconds"),
        (lambda: measure(trace, objectives=Objectives(SLO(), {"z": SLO()})), "the domains are x, y"),
        (lambda: measure([]), "zero traces"),
        (lambda: measure(empty), "no finished request"),
        (lambda: measure(trace, num_batches=1), "num_batches is 1"),
        (lambda: measure(trace, window=Window(5.0, 6.0)), "no request arrived between 5 and 6"),
        (lambda: Window(2.0, 2.0), "end must be after its start"),
        (lambda: trimmed(trace, 3.0, 3.0), "trim less"),
        (lambda: trimmed(trace, -1.0), "0 or more"),
    ]


@pytest.mark.parametrize(("call", "words"), refusals())
def test_refusals(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=words):
        call()
