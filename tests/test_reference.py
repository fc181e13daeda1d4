"""The digitised files give back what the paper prints, and hang together."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dspark_sim import reference
from dspark_sim.errors import UserError
from dspark_sim.reference import curve, load

FOLDER = Path(reference.__file__).parent


def pick(frame: pd.DataFrame, **labels) -> pd.DataFrame:
    for column, label in labels.items():
        frame = frame[frame[column] == label]
    assert len(frame), labels
    return frame


def only(frame: pd.DataFrame, column: str, **labels) -> float:
    rows = pick(frame, **labels)
    assert len(rows) == 1, labels
    return float(rows[column].iloc[0])


def percent(over: float, under: float) -> float:
    return 100.0 * (over / under - 1.0)


def macro_gain(row):
    table = pick(load("table1_accepted_length"), target_model=row.target_model)
    ours, theirs = row.condition.split(" vs ")
    means = table.groupby("drafter")["accepted_length_tokens"].mean()
    return percent(means[ours], means[theirs])


def domain_mean(row):
    table = pick(load("table1_accepted_length"), target_model=row.target_model, domain=row.domain, drafter="dspark")
    assert len(table) == 3
    return table["accepted_length_tokens"].mean()


def conditional(row):
    drafter, place = row.condition.split(", ")
    values = curve("fig2_conditional_acceptance", target_model=row.target_model, domain=row.domain, drafter=drafter)
    values = values.set_index("draft_position")["conditional_acceptance"]
    return values.min() if place == "lowest position" else values[int(place.removeprefix("position "))]


def length_gain(row):
    drafter, length = re.match(r"(.+), draft length (\d+)", row.condition).groups()
    at = {"domain": row.domain, "draft_length_tokens": int(length)}
    frame = load("fig4_proposal_length")
    over, under = (only(frame, "accepted_length_tokens", drafter=name, **at) for name in (drafter, "dflash"))
    return percent(over, under)


def latency_overhead(row):
    drafter, length = re.match(r"(.+), draft length (\d+)", row.condition).groups()
    frame = load("fig4_round_latency")
    over, under = (
        only(frame, "round_latency_ms", drafter=name, draft_length_tokens=int(length)) for name in (drafter, "dflash")
    )
    return percent(over, under)


def acceptance_rate(row):
    at = pick(
        load("fig5_threshold_sweep"),
        domain=row.domain,
        confidence_threshold=float(row.condition.removeprefix("threshold ")),
    ).iloc[0]
    return 100.0 * at["accepted_tokens_per_step"] / (at["accepted_tokens_per_step"] + at["rejected_tokens_per_step"])


def calibration_error(row):
    position, calibration = re.match(r"position (\d), (\w+) calibration", row.condition).groups()
    if calibration == "after":
        return None
    bins = pick(load("fig6_reliability_curve"), draft_position=int(position), calibration="before")
    counts = bins["bin_sample_count"]
    observed = bins["bin_accepted_count"] / counts
    return 100.0 * np.average((bins["predicted_acceptance_bin_mean"] - observed).abs(), weights=counts)


def mean_calibration_error(row):
    return pick(load("fig6_calibration_summary"), calibration="after")["ece_pct_printed"].mean()


def figure7_gain(row):
    anchor = float(re.search(r"anchor (\d+)", row.condition).group(1))
    point = pick(
        load("fig7_annotations"),
        target_model=row.target_model,
        gain_kind=row.quantity,
        sla_anchor_tps_tok_s_user=anchor,
    ).iloc[0]
    which = "throughput_tok_s_gpu" if row.quantity.startswith("throughput") else "tps_tok_s_user"
    return percent(point[f"dspark_{which}"], point[f"mtp_{which}"])


def budget(row):
    drafter = "mtp-1" if row.condition == "mtp-1" else "dspark-5"
    line = curve("fig8_verification_budget", target_model=row.target_model, drafter=drafter)
    x, y = line["concurrency_requests"], line["verification_budget_tokens"]
    if drafter == "mtp-1":
        return y.mean()
    at = re.search(r"at (\d+) requests", row.condition)
    return float(np.interp(float(at.group(1)), x, y)) if at else y.iloc[0]


RECOMPUTED = {
    "macro_average_accepted_length_gain": macro_gain,
    "mean_accepted_length": domain_mean,
    "conditional_acceptance": conditional,
    "accepted_length_gain_over_dflash": length_gain,
    "round_latency_overhead_over_dflash": latency_overhead,
    "acceptance_rate": acceptance_rate,
    "expected_calibration_error": calibration_error,
    "mean_expected_calibration_error": mean_calibration_error,
    "throughput_at_matched_tps": figure7_gain,
    "tps_at_matched_throughput": figure7_gain,
    "verification_budget": budget,
    "verification_budget_upper": budget,
    "verification_budget_lower": budget,
}
PRINTED = load("reported_numbers")


@pytest.mark.parametrize("quantity", RECOMPUTED)
def test_the_figures_give_the_numbers_that_are_printed(quantity):
    """Recomputed from the data files, not from the column beside the printed number."""
    compared = 0
    for row in pick(PRINTED, quantity=quantity).itertuples():
        value = RECOMPUTED[quantity](row)
        if value is None:
            assert np.isnan(row.value_from_digitised_data)
            continue
        compared += 1
        assert value == pytest.approx(row.value_from_digitised_data, rel=1e-3, abs=0.006), row
        if row.agrees == "yes":
            assert abs(value - row.value_printed) <= row.tolerance, row
        elif row.agrees == "no":
            assert abs(value - row.value_printed) > row.tolerance, row
    assert compared


def test_every_number_that_can_be_recomputed_is():
    comparable = PRINTED[PRINTED["value_from_digitised_data"].notna()]
    assert set(comparable["quantity"]) == set(RECOMPUTED)
    assert len(PRINTED) == 84 and len(comparable) == 56


def test_three_numbers_of_the_text_are_not_in_the_figures():
    refused = PRINTED[PRINTED["agrees"] == "no"]
    assert len(refused) == 3 and set(refused["quantity"]) == {"conditional_acceptance"}


def test_accepted_lengths_follow_from_conditional_acceptance():
    """1 + Σ of cumulative products is Table 1's domain mean, within 0.8 %."""
    means = (
        load("table1_accepted_length").groupby(["target_model", "drafter", "domain"])["accepted_length_tokens"].mean()
    )
    lines = load("fig2_conditional_acceptance").groupby(["target_model", "drafter", "domain"])
    assert len(lines) == 9
    for key, line in lines:
        steps = line.sort_values("draft_position")["conditional_acceptance"].to_numpy()
        assert 1.0 + np.cumprod(steps).sum() == pytest.approx(means[key], rel=0.008)


def test_five_layers_of_figure3_are_table1_and_its_means_figure4():
    depth = pick(load("fig3_drafter_depth"), drafter_layers=5)
    table = load("table1_accepted_length").set_index(["target_model", "drafter", "benchmark"])["accepted_length_tokens"]
    for row in depth.itertuples():
        assert row.accepted_length_tokens == pytest.approx(
            table[row.target_model, row.drafter, row.benchmark], abs=0.0051
        )
    lengths = pick(load("fig4_proposal_length"), draft_length_tokens=8).replace(
        {"drafter": {"dspark-markov": "dspark"}}
    )
    both = depth.groupby(["drafter", "domain"])["accepted_length_tokens"].mean()
    for (drafter, domain), value in both.items():
        assert only(lengths, "accepted_length_tokens", drafter=drafter, domain=domain) == pytest.approx(value, abs=1e-5)


def test_figure6_counts_are_the_histogram():
    curves = pick(load("fig6_reliability_curve"), calibration="before").set_index(["draft_position", "bin_index"])
    histogram = load("fig6_confidence_histogram").set_index(["draft_position", "bin_index"])
    assert (curves["bin_sample_count"] == histogram["sample_count"]).all()
    totals = histogram.groupby("draft_position")["sample_count"].sum()
    assert totals.tolist() == [51573, 51384, 51213, 51132]


@pytest.mark.parametrize("target_model", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_figure8_lines_are_their_closed_forms(target_model):
    fits = pick(load("fig7_fig8_fit_parameters"), figure="fig8", target_model=target_model)
    for drafter in ("mtp-1", "dspark-5"):
        rate = pick(fits, drafter=drafter, quantity="throughput_tok_s_gpu").set_index("parameter")["value"]
        line = curve("fig8_throughput", target_model=target_model, drafter=drafter)
        n = line["concurrency_requests"]
        closed = rate["a"] * (1.0 - np.exp(-rate["b"] * n ** rate["c"])) + rate["d"] * n
        np.testing.assert_allclose(line["throughput_tok_s_gpu"], closed, atol=0.02)
        tokens = pick(fits, drafter=drafter, quantity="verification_budget_tokens").set_index("parameter")["value"]
        line = curve("fig8_verification_budget", target_model=target_model, drafter=drafter)
        n = line["concurrency_requests"]
        closed = tokens["q2"] * n**2 + tokens["q1"] * n + tokens["q0"]
        np.testing.assert_allclose(line["verification_budget_tokens"], closed, atol=2e-4)


def test_annotated_points_lie_on_figure7():
    frontier = load("fig7_frontier")
    for row in load("fig7_annotations").itertuples():
        for name in ("mtp", "dspark"):
            drafter = {"mtp": "mtp-1", "dspark": "dspark-5"}[name]
            line = pick(frontier, target_model=row.target_model, drafter=drafter).sort_values("tps_tok_s_user")
            drawn = np.interp(
                getattr(row, f"{name}_tps_tok_s_user"), line["tps_tok_s_user"], line["throughput_tok_s_gpu"]
            )
            assert drawn == pytest.approx(getattr(row, f"{name}_throughput_tok_s_gpu"), rel=0.01), row


def test_curve_leaves_out_its_labels_and_names_what_there_is():
    line = curve("fig8_throughput", target_model="deepseek-v4-pro", drafter="mtp-1")
    assert line.columns.tolist() == ["concurrency_requests", "throughput_tok_s_gpu", "within_plotted_axis"]
    assert line.index.tolist() == list(range(len(line)))
    with pytest.raises(UserError, match="no drafter 'mtp-2'; choose one of dspark-5, mtp-1"):
        curve("fig8_throughput", drafter="mtp-2")
    with pytest.raises(UserError, match="no column 'target'"):
        curve("fig8_throughput", target="x")
    with pytest.raises(UserError, match="no published numbers 'fig9'"):
        load("fig9")


def test_files_are_small_and_listed():
    files = sorted(FOLDER.glob("*.csv"))
    assert sum(file.stat().st_size for file in files) < 300_000
    listed = set(re.findall(r"`(\w+)`", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert {file.stem for file in files} <= listed
    for file in files:
        assert len(load(file.stem))
