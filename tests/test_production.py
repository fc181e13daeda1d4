"""The prediction of the production result: what it is made of, that it follows from it, and how it is judged."""

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")

from dspark_sim import reference
from dspark_sim.errors import UserError
from dspark_sim.production import CONCURRENCY, dspark_requests, policy_of, predict, sensitivity, under_way
from dspark_sim.production_inputs import (
    BLOCK_SIZE,
    NUM_LAYERS,
    RANGES,
    Priors,
    costs,
    laws,
    published_baseline,
    target_pass,
)
from dspark_sim.production_plots import draw_frontier, draw_load, draw_tornado
from dspark_sim.production_scores import (
    budget_at,
    curve_errors,
    gains,
    over_seeds,
    published_budget,
    published_throughput,
    result_row,
    throughput_at,
)

TARGETS = tuple(NUM_LAYERS)
FLASH, PRO = TARGETS


SHORT = Priors(output_len=120)


def simulated() -> pd.DataFrame:
    runs = [predict(target, SHORT, (1, 64, 210), num_requests=150, seed=3) for target in TARGETS]
    return pd.concat(runs, ignore_index=True)


@pytest.fixture(scope="module")
def curves() -> pd.DataFrame:
    return simulated()


# What goes in


def without_dspark_production(name: str, original=reference.load) -> pd.DataFrame:
    """The published files with every DSpark number of production replaced by nonsense."""
    frame = original(name)
    if name.startswith(("fig7", "fig8")):
        numbers = [column for column in frame.select_dtypes("number") if not column.startswith("mtp_")]
        touched = frame["drafter"].ne("mtp-1") if "drafter" in frame else pd.Series(True, index=frame.index)
        frame[numbers] = frame[numbers].astype(float).where(~touched, -12345.0)
    elif name == "reported_numbers":
        frame["value_printed"] = frame["value_printed"].where(~frame["source"].str.contains(r"5\.4|figure 7"), -12345.0)
    return frame


def test_no_number_of_a_dspark_curve_of_production_goes_in(monkeypatch, curves):
    monkeypatch.setattr(reference, "load", without_dspark_production)
    assert (reference.curve("fig8_throughput", drafter="dspark-5")["throughput_tok_s_gpu"] == -12345.0).all()
    pd.testing.assert_frame_equal(simulated(), curves, check_exact=True)


@pytest.mark.parametrize("figure", ["figure8", "figure7"])
def test_the_baseline_reads_mtp_rows_alone(monkeypatch, figure):
    read = []

    def spy(name, original=reference.load):
        read.append(name)
        frame = original(name)
        return frame[frame["drafter"] == "mtp-1"]

    monkeypatch.setattr(reference, "load", spy)
    baseline = published_baseline(FLASH, figure)
    assert read == ["fig8_throughput" if figure == "figure8" else "fig7_frontier"]
    assert all(high > low for low, high in zip(baseline.concurrency, baseline.concurrency[1:], strict=False))


# Step seconds


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "priors", [Priors(), Priors(draft_cost=2.0, request_share=0.5, mtp_acceptance=0.7), Priors(baseline="figure7")]
)
def test_with_mtp_1_a_round_takes_what_the_published_throughput_says(target, priors):
    """T = N·τ / X at B = 2N, whatever the priors make of it."""
    baseline = published_baseline(target, priors.baseline)
    cost = costs(baseline, priors)["mtp"]
    for users in (5, 30, 100, 200):
        seconds = cost.round_seconds(2 * users, 0, users, 1)
        published = np.interp(users, baseline.concurrency, baseline.round_seconds(priors))
        # Between the digitised points both sides are straight lines, but for the draft's half as many tokens.
        assert seconds == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_pass_rises_with_its_tokens_and_goes_on_in_a_straight_line(target):
    baseline = published_baseline(target)
    whole = target_pass(baseline, Priors())
    last = 2.0 * baseline.concurrency[-1]
    sizes = np.linspace(2, 4 * last, 500)
    assert (np.diff(whole.level(sizes)) > 0).all()
    beyond = whole.level(np.array([last, 2 * last, 3 * last]))
    slope = np.diff(beyond) / last
    assert slope[0] == pytest.approx(slope[1], rel=1e-9)
    steeper = target_pass(baseline, Priors(slope_beyond=2.0)).level(np.array([last, 2 * last]))
    assert steeper[0] == pytest.approx(beyond[0]) and np.diff(steeper)[0] == pytest.approx(2 * np.diff(beyond)[0])


def test_what_goes_with_requests_is_not_paid_for_tokens():
    baseline = published_baseline(PRO)
    by_tokens, by_requests = (costs(baseline, Priors(request_share=share))["dspark"] for share in (0.0, 1.0))
    assert by_requests.step_seconds(600, 0, 100) == pytest.approx(by_requests.step_seconds(200, 0, 100))
    assert by_tokens.step_seconds(600, 0, 100) > 1.5 * by_tokens.step_seconds(200, 0, 100)
    assert by_requests.round_seconds(200, 0, 100, 5) == pytest.approx(by_tokens.round_seconds(200, 0, 100, 5))


def test_drafts_cost_their_layers_and_the_head():
    baseline = published_baseline(FLASH)
    free = costs(baseline, Priors(draft_cost=0.0, head_seconds=0.0))
    assert free["mtp"].draft_seconds(50, 1, 0) == free["dspark"].draft_seconds(50, 5, 0) == 0.0
    head = costs(baseline, Priors(draft_cost=0.0, head_seconds=1e-3))["dspark"].draft_seconds(50, 5, 0)
    assert head == pytest.approx(5e-3)
    priors = Priors(head_seconds=0.0)
    whole = target_pass(baseline, priors)
    block = costs(baseline, priors)["dspark"].draft_seconds(50, 5, 0)
    assert block == pytest.approx(3 / 43 * float(whole.level(250.0)))


# Acceptance


def test_laws_are_figure_2s_by_domain():
    found = laws(Priors(domain_shares=(1.0, 0.0, 1.0)))
    assert list(found) == ["math", "chat"]
    for domain, law in found.items():
        published = reference.curve(
            "fig2_conditional_acceptance", target_model="qwen3-4b", drafter="dspark", domain=domain
        )["conditional_acceptance"]
        np.testing.assert_allclose(law.conditional("rounds"), published, atol=1e-6)
    harder = laws(Priors(acceptance_shift=-0.3))["chat"]
    assert harder.mean_acceptance_length(BLOCK_SIZE) < found["chat"].mean_acceptance_length(BLOCK_SIZE)


def test_requests_have_the_shares_and_start_on_their_way():
    priors = Priors(domain_shares=(0.2, 0.2, 0.6), output_len=50)
    anchors = dspark_requests(priors, 300)
    domains = [anchors.prompts[name].domain for name in anchors.request_prompts]
    for stretch in (domains[:100], domains[100:]):
        assert stretch.count("chat") / len(stretch) == pytest.approx(0.6, abs=0.02)
    started = under_way(anchors, 100, 300, seed=0)
    lengths = np.array([started.prompts[name].output_len for name in started.request_prompts])
    assert lengths[:100].mean() == pytest.approx(26, abs=4) and lengths.min() >= 2
    assert (lengths[100:] == 50).all() and anchors.prompts[anchors.request_prompts[0]].output_len == 50


# The simulation follows from it


@pytest.mark.parametrize("target", TARGETS)
def test_the_baseline_predicts_itself(curves, target):
    rows = curves[(curves["target_model"] == target) & (curves["served"] == "mtp-1")]
    baseline = published_baseline(target)
    published = np.interp(rows["concurrency_requests"], baseline.concurrency, baseline.throughput)
    # Outputs end, so a few drafts are cut; and luck.
    np.testing.assert_allclose(rows["throughput_tok_s_gpu"], published, rtol=0.025)
    np.testing.assert_allclose(rows["verification_budget_tokens"], 2.0, atol=0.02)


def test_scheduling_beats_static_drafts_at_high_load_and_verifies_less(curves):
    for target in TARGETS:
        at = curves[(curves["target_model"] == target) & (curves["concurrency_requests"] == 210)].set_index("served")
        rate, budget = at["throughput_tok_s_gpu"], at["verification_budget_tokens"]
        assert rate["prefix"] > rate["fixed-5"] and rate["lagged-2"] > rate["fixed-5"]
        assert budget["lagged-2"] < budget["fixed-5"] - 0.5
        few = curves[(curves["target_model"] == target) & (curves["served"] == "prefix")]
        assert few["verification_budget_tokens"].is_monotonic_decreasing


def mean_field(target: str, num_users: int, priors: Priors) -> tuple[float, float]:
    """Throughput and budget of Algorithm 1 with infinitely many requests a GPU would draw from, without a clock.

    With calibrated confidences, admitting while Θ rises means admitting every draft of survival above
    Θ · (seconds of one more token). A request is met in a round as often as it has rounds.
    """
    anchors = dspark_requests(priors, 1500, seed=11)
    survival = np.cumprod(anchors.accept_prob, axis=1).reshape(1500, -1, BLOCK_SIZE)
    cost = costs(published_baseline(target), priors)["dspark"]

    def at(threshold: float) -> tuple[float, float, float]:
        admitted = survival >= threshold
        emitted = 1.0 + (survival * admitted).sum(axis=2).mean(axis=1)
        rounds = (1.0 / emitted) / (1.0 / emitted).sum()
        tokens, budget = float(rounds @ emitted), 1.0 + float(rounds @ admitted.sum(axis=2).mean(axis=1))
        size = num_users * budget
        spare = cost.draft_seconds(num_users, BLOCK_SIZE, 0) + cost.host_seconds(num_users)
        seconds, more = (float(cost.verify.level(value)) for value in (size, size + 1.0))
        return num_users * tokens / (seconds + spare), budget, more - seconds

    low, high = 0.0, 1.0
    for _ in range(40):
        threshold = (low + high) / 2
        rate, budget, slope = at(threshold)
        low, high = (threshold, high) if threshold < rate * slope else (low, threshold)
    return rate, budget


@pytest.mark.parametrize("target", TARGETS)
def test_the_simulation_is_the_mean_field_of_its_inputs(target):
    priors = Priors(output_len=150)
    run = predict(target, priors, (128,), ("prefix",), num_requests=1372, seed=11).iloc[0]
    rate, budget = mean_field(target, 128, priors)
    # Outputs of 150 tokens lose about 1 % of their drafts at the end.
    assert run["throughput_tok_s_gpu"] == pytest.approx(rate, rel=0.02)
    assert run["verification_budget_tokens"] == pytest.approx(budget, abs=0.08)


def test_the_same_seed_gives_the_same_numbers(curves):
    again = predict(PRO, SHORT, (1, 64, 210), ("lagged-2",), num_requests=150, seed=3)
    rows = curves[(curves["target_model"] == PRO) & (curves["served"] == "lagged-2")].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, rows, check_exact=True)


def test_a_run_too_short_to_measure_is_refused():
    with pytest.raises(UserError, match="raise num_requests or output_len"):
        predict(PRO, Priors(output_len=10), (50,), ("prefix",), num_requests=1)


def test_a_scheduler_that_prices_the_target_alone_verifies_less():
    runs = [
        predict(FLASH, replace(SHORT, priced=what), (96,), ("prefix",), num_requests=100).iloc[0]
        for what in ("round", "target")
    ]
    assert runs[1]["verification_budget_tokens"] < runs[0]["verification_budget_tokens"]


# How it is judged


def published_as_a_curve(target: str) -> pd.DataFrame:
    line = published_throughput(target)
    line = line[line["concurrency_requests"] <= published_budget(target)["concurrency_requests"].max()]
    budget = published_budget(target)
    tokens = np.interp(
        line["concurrency_requests"], budget["concurrency_requests"], budget["verification_budget_tokens"]
    )
    return line.assign(verification_budget_tokens=tokens)


@pytest.mark.parametrize("target", TARGETS)
def test_the_published_curve_has_no_error_and_another_has_its_own(target):
    line = published_throughput(target)
    budget = published_budget(target)
    tokens = np.interp(
        line["concurrency_requests"], budget["concurrency_requests"], budget["verification_budget_tokens"]
    )
    exact = line.assign(verification_budget_tokens=tokens)
    assert max(map(abs, curve_errors(exact, target).values())) < 1e-4
    off = exact.assign(
        throughput_tok_s_gpu=1.1 * exact["throughput_tok_s_gpu"],
        verification_budget_tokens=exact["verification_budget_tokens"] - 0.3,
    )
    errors = curve_errors(off, target)
    assert errors["throughput_mean_abs_error"] == pytest.approx(0.1, abs=1e-4)
    assert errors["throughput_mean_error"] == pytest.approx(0.1, abs=1e-4)
    assert errors["budget_mean_abs_error"] == pytest.approx(0.3, abs=1e-3)
    assert errors["budget_mean_error"] == pytest.approx(-0.3, abs=1e-3)


@pytest.mark.parametrize("target", TARGETS)
def test_figure_7s_own_lines_give_the_printed_gains(target):
    """The reckoning of gains, on the published frontier, gives the published labels."""
    line = reference.curve("fig7_frontier", target_model=target, drafter="dspark-5")
    line["concurrency_requests"] = line["throughput_tok_s_gpu"] / line["tps_tok_s_user"]
    found = gains(line.sort_values("concurrency_requests"), target, "figure7")
    per_user = found[found["gain_kind"] == "tps_at_matched_throughput"]
    np.testing.assert_allclose(per_user["error_points"], 0.0, atol=2.0)


def test_a_doubled_baseline_gains_a_hundred_percent():
    baseline = published_baseline(FLASH)
    # At matched throughput half the requests: twice the speed.
    twice = pd.DataFrame(
        {
            "concurrency_requests": np.asarray(baseline.concurrency),
            "throughput_tok_s_gpu": np.interp(
                2 * np.asarray(baseline.concurrency), baseline.concurrency, baseline.throughput
            ),
        }
    )
    twice = twice[twice["concurrency_requests"] <= 170]
    found = gains(twice, FLASH).set_index(["gain_kind", "sla_anchor_tps_tok_s_user"])["predicted_pct"]
    assert found["tps_at_matched_throughput", 80.0] == pytest.approx(100.0, abs=0.5)


def test_a_result_row_holds_the_gains_per_user(curves):
    for target in TARGETS:
        row = result_row(curves[(curves["target_model"] == target) & (curves["served"] == "lagged-2")], target)
        assert row["target_model"] == target and len(row["gain_errors_points"]) == 2
        assert row["gains_published_pct"] == ([60.0, 85.0] if target == FLASH else [57.0, 78.0])
        difference = np.subtract(row["gains_predicted_pct"], row["gains_published_pct"])
        np.testing.assert_allclose(difference, row["gain_errors_points"])


def test_between_simulated_points_seconds_and_budget_are_straight():
    curve = pd.DataFrame(
        {
            "concurrency_requests": [10, 20],
            "throughput_tok_s_gpu": [1000.0, 1000.0],
            "verification_budget_tokens": [5.0, 4.0],
        }
    )
    assert throughput_at(curve, 15) == pytest.approx(15 / 0.015)
    assert budget_at(curve, 15) == pytest.approx(4.5)


def test_intervals_are_students_over_seeds():
    rows = pd.DataFrame({"target_model": [FLASH], "served": ["prefix"], "concurrency_requests": [8]})
    frames = [rows.assign(throughput_tok_s_gpu=value) for value in (1.0, 2.0, 3.0)]
    found = over_seeds(frames).iloc[0]
    assert found["throughput_tok_s_gpu"] == 2.0
    assert found["throughput_tok_s_gpu_high"] - 2.0 == pytest.approx(4.30265 / np.sqrt(3), rel=1e-4)
    assert np.isnan(over_seeds(frames[:1]).iloc[0]["throughput_tok_s_gpu_low"])


# Priors


def test_every_range_moves_one_prior_away_from_the_centre():
    central = Priors()
    for one in RANGES:
        ends = [replace(central, **end) for end in (one.low, one.high)]
        assert ends[0] != ends[1] and len({*one.low, *one.high}) == 1 and one.source
        (name,) = {*one.low, *one.high}
        values = [getattr(end, name) for end in ends]
        if isinstance(getattr(central, name), float):
            assert min(values) <= getattr(central, name) <= max(values)


def test_sensitivity_moves_one_prior_at_a_time():
    chosen = [one for one in RANGES if not {"domain_shares", "acceptance_shift", "spread", "calibration"} & {*one.low}]
    chosen = [one for one in chosen if one.name != "baseline's figure"]
    assert len(chosen) == len(RANGES) - 5
    found = sensitivity(PRO, Priors(output_len=80), (1, 210), chosen, num_requests=40)
    assert len(found) == 1 + 2 * len(chosen) and found["prior"].iloc[0] == "central"
    error = found.set_index(["prior", "end"])["throughput_mean_error"]
    # Each of these makes DSpark slower at one end, against the same baseline.
    for name in (
        "MTP-1 acceptance",
        "cost of drafter layers",
        "sequential head",
        "slope beyond the baseline's batches",
    ):
        slower, faster = ("high", "low") if name == "MTP-1 acceptance" else ("low", "high")
        assert error[name, slower] < error["central", ""] < error[name, faster]
    assert error["growth with requests, not tokens", "low"] == error["central", ""]


def test_impossible_wishes_are_refused_in_a_sentence():
    for wrong, message in (
        ({"mtp_acceptance": 1.2}, "mtp_acceptance is 1.2; give 0.01 to 0.99"),
        ({"domain_shares": (0.0, 0.0, 0.0)}, "domain_shares are"),
        ({"output_len": 1}, "output_len is 1"),
    ):
        with pytest.raises(UserError, match=message):
            Priors(**wrong)
    with pytest.raises(UserError, match="no target 'qwen3-4b'; choose one of deepseek-v4-flash"):
        published_baseline("qwen3-4b")
    with pytest.raises(UserError, match="no policy 'tetris' is predicted"):
        policy_of("tetris", costs(published_baseline(FLASH), Priors())["dspark"], Priors())


# Figures


def test_figures_show_every_policy_and_name_their_axes(curves):
    table = over_seeds([curves])
    for draw in (draw_load, draw_frontier):
        figure = draw(table, "note")
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names[-2:] == ["predicted", "published"] and len(names) == 6
        assert all(axis.get_ylabel() for axis in figure.axes)
    swept = pd.DataFrame(
        [
            {
                "target_model": target,
                "prior": prior,
                "end": end,
                "value": end,
                "throughput_mean_error": shift,
                "budget_mean_error": shift,
            }
            for target in TARGETS
            for prior, end, shift in (
                ("central", "", 0.01),
                ("a", "low", -0.1),
                ("a", "high", 0.2),
                ("b", "high", 0.05),
            )
        ]
    )
    assert [label.get_text() for label in draw_tornado(swept, "note").axes[0].get_yticklabels()] == ["b", "a"]


def test_the_grid_reaches_beyond_the_paper_so_that_the_frontier_is_covered():
    assert CONCURRENCY[0] == 1 and CONCURRENCY[-1] > 210
