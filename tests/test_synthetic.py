import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import nquad
from scipy.special import expit, logit
from toy import constant_cost, toy_cost, toy_trace

from dspark_sim.analysis.metrics import summary
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler
from dspark_sim.policy_ranked import Oracle
from dspark_sim.reference import load, table1
from dspark_sim.simulate import RecordedAnchors, SyntheticFit, fit_by_domain, fit_synthetic, preset, simulate
from dspark_sim.simulate.presets import FIGURE6, Figure6, figure6_misfit, figure6_residuals, fit_figure6
from dspark_sim.simulate.synthetic import Averaged, ConfidenceLaw, SyntheticAcceptance
from dspark_sim.simulate.synthetic_anchors import synthetic_anchors
from dspark_sim.workload import ClosedLoop, Poisson

LAW = SyntheticAcceptance((0.88, 0.84, 0.8, 0.82), difficulty_sd=0.7, anchor_sd=0.8, position_sd=0.6)


def clustered(values: np.ndarray, num_clusters: int) -> tuple[float, float]:
    """Mean and standard error of rows that belong to equally large clusters, in order."""
    means = values.reshape(num_clusters, -1).mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(num_clusters))


def conditional(anchors: RecordedAnchors, k: int) -> tuple[float, float]:
    """P(draft k accepted | those before) over all anchors, with the standard error over outputs."""
    there, on = anchors.num_accepted >= k - 1, anchors.num_accepted >= k
    estimate = on.sum() / there.sum()
    num_outputs = sum(anchors.acceptance_source["num_outputs"].values())
    _, error = clustered(on - estimate * there, num_outputs)
    return float(estimate), error / float(there.mean())


# ---- the law --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0.05, 0.98), min_size=1, max_size=7),
    *[st.sampled_from([0.0, 0.4, 1.5])] * 3,
    st.sampled_from(["anchors", "rounds"]),
)
def test_the_logits_give_the_population_its_conditional_acceptance(
    given_acceptance: list[float], difficulty: float, anchor: float, position: float, over: Averaged
) -> None:
    law = SyntheticAcceptance(tuple(given_acceptance), difficulty, anchor, position, averaged_over=over)
    assert law.conditional(over) == pytest.approx(np.array(given_acceptance), abs=1e-9)
    assert law.mean_survival(over) == pytest.approx(np.cumprod(given_acceptance), abs=1e-9)
    assert law.mean_acceptance_length(over=over) == pytest.approx(1 + np.cumprod(given_acceptance).sum())


def test_survival_is_the_integral_over_all_effects() -> None:
    law = SyntheticAcceptance((0.8, 0.7), difficulty_sd=0.9, anchor_sd=1.1, position_sd=0.8)
    t1, t2 = law.logits

    def density(z: float) -> float:
        return float(np.exp(-z * z / 2) / np.sqrt(2 * np.pi))

    def integrand(shared: float, first: float, second: float) -> float:
        chance = expit(t1 + shared * np.hypot(0.9, 1.1) + 0.8 * first) * expit(
            t2 + shared * np.hypot(0.9, 1.1) + 0.8 * second
        )
        return float(chance) * density(shared) * density(first) * density(second)

    value, _ = nquad(integrand, [(-6, 6)] * 3, opts={"epsabs": 1e-5, "limit": 30})
    assert law.mean_survival()[1] == pytest.approx(value, abs=1e-5)
    assert value == pytest.approx(0.8 * 0.7, abs=1e-5)


def test_survivors_are_the_easy_ones() -> None:
    """Given one figure for all positions, later positions are harder for every single request."""
    law = SyntheticAcceptance((0.8, 0.8, 0.8), difficulty_sd=1.0)
    assert (np.diff(law.logits) < -0.1).all()
    flat = SyntheticAcceptance((0.8, 0.8, 0.8))
    assert flat.logits == pytest.approx(np.full(3, logit(0.8)))
    # Hard requests make more rounds, so the same law shows less acceptance over rounds than over anchors.
    assert (law.conditional("rounds") < law.conditional("anchors")).all()
    assert law.mean_acceptance_length(over="rounds") < law.mean_acceptance_length(over="anchors")
    assert flat.mean_acceptance_length(over="rounds") == pytest.approx(flat.mean_acceptance_length(over="anchors"))


@pytest.mark.parametrize("verify_len", [0, 1, 2])
def test_expected_rounds_are_those_of_all_paths(verify_len: int) -> None:
    law = SyntheticAcceptance((0.7, 0.6))
    survival = np.array([1.0, 0.7, 0.42])

    def rounds(remaining: int) -> float:
        if remaining == 0:
            return 0.0
        cap = min(verify_len, remaining - 1)
        chances = [survival[n] - (survival[n + 1] if n < cap else 0.0) for n in range(cap + 1)]
        return 1.0 + sum(chance * rounds(remaining - n - 1) for n, chance in enumerate(chances))

    for output_len in range(1, 9):
        assert law.expected_rounds(output_len, verify_len) == pytest.approx(rounds(output_len - 1))
    # Far from the end a request emits its mean acceptance length a round.
    assert 4000 / law.expected_rounds(4001, verify_len) == pytest.approx(
        law.mean_acceptance_length(verify_len), rel=1e-3
    )


def test_a_law_survives_json() -> None:
    for law in (LAW, replace(LAW, confidence=None), preset(drafter="dspark", domain="chat")):
        assert SyntheticAcceptance.from_json(json.loads(json.dumps(law.to_json()))) == law
    with pytest.raises(UserError, match="this is no synthetic law"):
        SyntheticAcceptance.from_json({"difficulty": 1})


# ---- what is generated ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_requests", [600, 6000])
def test_generated_anchors_follow_the_law(num_requests: int) -> None:
    """Every request with an output of its own, and drawn from a bank."""
    anchors = synthetic_anchors(LAW, num_requests, output_len=101, seed=1, max_rows=100_000)
    own = num_requests == 600
    num_outputs = anchors.acceptance_source["num_outputs"]["synthetic"]
    assert num_outputs == (600 if own else 1000) and anchors.num_accepted.shape == (100 * num_outputs,)
    for k, expected in enumerate(LAW.conditional_acceptance, 1):
        estimate, error = conditional(anchors, k)
        assert estimate == pytest.approx(expected, abs=4 * error) and error < 0.01
    mean, error = clustered(1.0 + anchors.num_accepted, num_outputs)
    assert mean == pytest.approx(LAW.mean_acceptance_length(over="anchors"), abs=4 * error)
    # Outputs differ by the law's variance of request means.
    effects, weights = LAW.difficulty_nodes
    lengths = 1 + LAW.survival(effects).sum(axis=1)
    spread = np.sqrt(weights @ lengths**2 - (weights @ lengths) ** 2)
    means = (1.0 + anchors.num_accepted).reshape(num_outputs, -1).mean(axis=1)
    within = (1.0 + anchors.num_accepted).reshape(num_outputs, -1).var(axis=1, ddof=1).mean() / 100
    assert np.sqrt(means.var(ddof=1) - within) == pytest.approx(spread, rel=0.12)


def test_a_smaller_block_is_the_law_of_its_first_positions() -> None:
    anchors = synthetic_anchors(LAW, 500, output_len=101, seed=2)
    for size in (1, 2, 3):
        cut = anchors.restricted(size)
        assert (cut.num_accepted == np.minimum(anchors.num_accepted, size)).all()
        shorter = replace(LAW, conditional_acceptance=LAW.conditional_acceptance[:size])
        mean, error = clustered(1.0 + cut.num_accepted, 500)
        assert mean == pytest.approx(shorter.mean_acceptance_length(over="anchors"), abs=4 * error)
        assert shorter.mean_acceptance_length() == pytest.approx(LAW.mean_acceptance_length(size))


def test_luck_belongs_to_the_request_and_its_position() -> None:
    lens = np.array([30, 80, 12, 55])
    few = synthetic_anchors(LAW, 4, output_len=lens, seed=3)
    many = synthetic_anchors(LAW, 300, output_len=90, seed=3)
    other = synthetic_anchors(LAW, 4, output_len=lens, seed=4)
    blind = synthetic_anchors(replace(LAW, confidence=ConfidenceLaw(noise_sd=(1.0,))), 4, output_len=lens, seed=3)
    for i, name in enumerate(few.request_prompts):
        mine, theirs = few.prompts[name], many.prompts[name]
        assert mine.output_len == lens[i] and theirs.output_len == 90
        rows = slice(theirs.first_row, theirs.first_row + lens[i] - 1)
        for field in ("num_accepted", "confidence", "accept_prob"):
            assert (getattr(few, field)[mine.rows] == getattr(many, field)[rows]).all()
        assert (other.num_accepted[mine.rows] != few.num_accepted[mine.rows]).any()
    # Another confidence of the same law: the same outcomes.
    assert (blind.num_accepted == few.num_accepted).all() and (blind.confidence != few.confidence).any()


def test_a_bank_bounds_the_rows_and_serves_every_length() -> None:
    rng = np.random.default_rng(0)
    output_lens, prompt_lens = rng.integers(1, 200, 5000), rng.integers(1, 900, 5000)
    anchors = synthetic_anchors(LAW, 5000, output_len=output_lens, prompt_len=prompt_lens, max_rows=60_000, seed=1)
    assert anchors.num_accepted.size <= 60_000
    prompts = [anchors.prompts[name] for name in anchors.request_prompts]
    assert [prompt.output_len for prompt in prompts] == output_lens.tolist()
    assert [prompt.prompt_len for prompt in prompts] == prompt_lens.tolist()
    width = output_lens.max() - 1
    for prompt in prompts:
        # Within one output: a request has one difficulty.
        assert prompt.first_row // width == max(prompt.rows.stop - 1, prompt.first_row) // width
    starts = np.array([prompt.first_row // width for prompt in prompts])
    assert np.bincount(starts).max() < 45 and np.unique(starts).size == anchors.num_accepted.size // width


@pytest.mark.parametrize(
    ("scale", "shift", "noise_sd"), [(1.0, 0.0, 0.0), (1.5, 0.4, 0.0), (0.7, -0.3, 0.0), (1.0, 0.0, 1.0)]
)
def test_confidences_are_as_calibrated_as_stated(scale: float, shift: float, noise_sd: float) -> None:
    law = replace(LAW, confidence=ConfidenceLaw((scale,), (shift,), (noise_sd,)))
    anchors = synthetic_anchors(law, 1000, output_len=101, seed=5)
    for k in range(law.block_size):
        there = anchors.num_accepted >= k
        confidence, happened = anchors.confidence[there, k], anchors.num_accepted[there] > k
        index = (confidence * 20).astype(int)
        count = np.bincount(index, minlength=20)
        gap = np.bincount(index, weights=confidence - happened, minlength=20)
        ece = np.abs(gap).sum() / happened.size
        if noise_sd:
            assert ece > 0.015
            continue
        # Without noise the law says how often a confidence comes true.
        true = expit((logit(confidence) - shift) / scale)
        off = np.bincount(index, weights=true - happened, minlength=20)
        error = np.sqrt(np.bincount(index, weights=true * (1 - true), minlength=20))
        assert (np.abs(off)[count > 30] < 4.5 * error[count > 30]).all()
        if (scale, shift) == (1.0, 0.0):
            assert ece < 0.006 and (confidence == pytest.approx(anchors.accept_prob[there, k]))
        else:
            assert ece > 0.015 and ece == pytest.approx(np.abs(confidence - true).mean(), abs=0.01)


# ---- the simulator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verify_len", "num_users"), [(0, 1), (2, 1), (4, 1), (4, 6)])
def test_throughput_at_constant_seconds_is_the_closed_form(verify_len: int, num_users: int) -> None:
    """Every round takes 10 ms and prefills none: a user's requests take their rounds."""
    output_len, num_requests = 40, 150
    expected = LAW.expected_rounds(output_len, verify_len)
    rounds = []
    for seed in range(2):
        anchors = synthetic_anchors(LAW, num_requests, prompt_len=20, output_len=output_len, seed=seed)
        cost = constant_cost(0.010, 0.0)
        run = simulate(anchors, Fixed(verify_len), ClosedLoop(num_users), cost)
        rounds += run.drafts.groupby("request_id").size().tolist()
        assert (run.requests["output_len"] == output_len).all()
        if num_users == 1:
            measured = summary(run)["output_throughput"]
            assert measured == pytest.approx(output_len / (np.mean(rounds[-num_requests:]) * 0.010))
            assert measured == pytest.approx(output_len / (expected * 0.010), rel=0.08)
        # Seconds of a request are its rounds', whoever shares them.
        seconds = (run.requests["finish"] - run.requests["first_token"]).sum()
        assert seconds == pytest.approx(0.010 * sum(rounds[-num_requests:]))
    error = np.std(rounds, ddof=1) / np.sqrt(len(rounds))
    assert np.mean(rounds) == pytest.approx(expected, abs=4 * error + 1e-9)


def test_policies_meet_the_same_luck_and_the_trace_says_whose() -> None:
    law = preset(drafter="dspark", domain="math")
    cost = toy_cost()
    runs = [simulate(law, policy, ClosedLoop(4), cost, num_requests=8, seed=7) for policy in (Fixed(7), Fixed(3))]
    anchors = synthetic_anchors(law, 8, seed=7)
    for run in runs:
        source = run.config["acceptance_source"]
        assert source["kind"] == "synthetic" and source["seed"] == 7
        assert SyntheticAcceptance.from_json(source["laws"]["math"]) == law
        assert (run.config["mode"], run.config["has_confidence"]) == ("rejection", True)
        for row in run.drafts.itertuples():
            prompt = anchors.prompts[f"synthetic-{row.request_id}"]
            full = anchors.num_accepted[prompt.first_row + row.position - prompt.prompt_len]
            assert row.num_accepted == min(full, row.verify_len)
    assert set(runs[0].requests["prompt_len"]) == {1000} and set(runs[0].requests["output_len"]) == {250}
    again = simulate(law, Fixed(7), ClosedLoop(4), cost, num_requests=8, seed=7)
    assert again.drafts.astype(str).equals(runs[0].drafts.astype(str))
    other = simulate(law, Fixed(7), ClosedLoop(4), cost, num_requests=8, seed=8)
    assert not other.drafts.astype(str).equals(again.drafts.astype(str))


def test_knowing_more_pays_more() -> None:
    """True acceptance beats a confidence with noise, over several runs of luck; a blind confidence still runs."""
    cost = toy_cost()
    law = replace(LAW, confidence=ConfidenceLaw(noise_sd=(1.5,)))
    gains = []
    for seed in range(5):
        anchors = synthetic_anchors(law, 60, prompt_len=20, output_len=60, seed=seed)
        knows, estimates = (
            summary(simulate(anchors, policy, ClosedLoop(8), cost))["output_throughput"]
            for policy in (Oracle(cost), PrefixScheduler(cost))
        )
        gains.append(np.log(knows / estimates))
    assert np.mean(gains) > 3 * np.std(gains, ddof=1) / np.sqrt(5) > 0


def test_domains_have_laws_of_their_own() -> None:
    laws = {domain: preset(drafter="dspark", domain=domain) for domain in ("math", "chat")}
    domains = ["math", "chat", "chat"] * 60
    anchors = synthetic_anchors(laws, 180, domains=domains, prompt_len=10, output_len=60)
    run = simulate(anchors, Fixed(7), Poisson(20.0, 1), toy_cost())
    assert run.requests["domain"].tolist() == domains
    rounds = run.drafts.groupby("request_id").size().to_numpy()
    for domain, law in laws.items():
        mine = rounds[np.array(domains) == domain]
        error = mine.std(ddof=1) / np.sqrt(mine.size)
        assert mine.mean() == pytest.approx(law.expected_rounds(60), abs=4 * error) and error < 1


@pytest.mark.parametrize("mode", ["greedy", "rejection"])
def test_bootstrap_draws_whole_outputs_with_replacement(mode: str) -> None:
    recorded = RecordedAnchors.from_trace(toy_trace(6, mode=mode))
    drawn = recorded.bootstrap(4000, seed=1)
    counts = {name: drawn.request_prompts.count(name) for name in recorded.request_prompts}
    assert sum(counts.values()) == 4000
    # 4000 draws of six: five standard deviations are 118.
    assert all(abs(count - 4000 / 6) < 118 for count in counts.values())
    assert drawn.request_prompts[:50] == recorded.bootstrap(50, seed=1).request_prompts
    assert drawn.request_prompts[:50] != recorded.bootstrap(50, seed=2).request_prompts
    assert drawn.confidence is recorded.confidence and drawn.num_accepted is recorded.num_accepted
    run = simulate(recorded.bootstrap(12, seed=1), Fixed(3), ClosedLoop(3), toy_cost())
    assert run.config["acceptance_source"]["bootstrap"] == {"num_requests": 12, "seed": 1}
    names = run.requests["prompt_id"].tolist()
    assert names == [recorded.prompts[name].prompt_id for name in drawn.request_prompts[:12]]
    with pytest.raises(UserError, match="num_requests is 0; draw at least 1"):
        recorded.bootstrap(0)


# ---- fits -----------------------------------------------------------------------------------------------------------


def test_a_fit_recovers_the_law() -> None:
    law = replace(LAW, confidence=ConfidenceLaw((1.3,), (0.4,)))
    scores = []
    for seed in range(3):
        fit = fit_synthetic(synthetic_anchors(law, 200, output_len=150, seed=seed))
        frame = fit.positions
        off = frame["conditional_acceptance"] - np.array(law.conditional_acceptance)
        assert (abs(off) < 4 * frame["conditional_acceptance_se"]).all()
        # logit p = (logit c - shift) / scale.
        assert (abs(frame["slope"] - 1 / 1.3) < 4 * frame["slope_se"]).all()
        assert (abs(frame["intercept"] + 0.4 / 1.3) < 4 * frame["intercept_se"]).all()
        assert fit.law.confidence is not None and set(fit.law.confidence.noise_sd) == {0.0}
        assert (fit.law.anchor_sd, fit.law.position_sd) == (pytest.approx(0.8, abs=0.06), pytest.approx(0.6, abs=0.06))
        scores.append((fit.law.difficulty_sd - 0.7) / fit.difficulty_sd_se)
        assert fit.difficulty_sd_se < 0.07 and (fit.num_requests, fit.num_anchors) == (200, 200 * 149)
        assert fit.recorded_acceptance_length == pytest.approx(law.mean_acceptance_length(), rel=0.03)
        assert fit.law.mean_acceptance_length() == pytest.approx(fit.recorded_acceptance_length, rel=0.02)
    assert np.abs(scores).max() < 4 and abs(np.mean(scores)) < 2.5


def test_no_spread_is_found_where_there_is_none() -> None:
    fit = fit_synthetic(synthetic_anchors(SyntheticAcceptance((0.8, 0.7), confidence=None), 150, output_len=120))
    assert fit.law.difficulty_sd < 0.2 and (fit.law.anchor_sd, fit.law.position_sd) == (0.0, 0.0)
    assert fit.law.confidence is None


def test_a_noisy_drafter_is_fitted_by_one_with_the_same_reliability() -> None:
    law = replace(LAW, difficulty_sd=0.3, confidence=ConfidenceLaw((1.2,), (0.3,), (0.8,)))
    anchors = synthetic_anchors(law, 300, output_len=120, seed=1)
    twin = synthetic_anchors(fit_synthetic(anchors).law, 300, output_len=120, seed=2)
    for k in range(law.block_size):
        shown = []
        for one in (anchors, twin):
            there = one.num_accepted >= k
            confidence, happened = one.confidence[there, k], one.num_accepted[there] > k
            index = np.minimum((confidence * 5).astype(int), 4)
            count = np.bincount(index, minlength=5)
            came_true = np.bincount(index, weights=happened, minlength=5) / count
            shown.append((confidence.mean(), confidence.std(), came_true, count / count.sum()))
        (mean, spread, came_true, share), (twin_mean, twin_spread, twin_came_true, twin_share) = shown
        assert (mean, spread) == (pytest.approx(twin_mean, abs=0.01), pytest.approx(twin_spread, abs=0.01))
        assert share @ np.abs(came_true - twin_came_true) < 0.015 and np.abs(share - twin_share).max() < 0.015


def test_a_useless_confidence_is_noise() -> None:
    rng = np.random.default_rng(3)
    anchors = synthetic_anchors(LAW, 60, output_len=80)
    confidence = rng.uniform(0.2, 0.9, anchors.confidence.shape)
    law = fit_synthetic(replace(anchors, confidence=confidence)).law
    assert law.confidence is not None
    scale, shift, noise = law.confidence.per_position(4)
    useless = scale == 0
    # Two standard errors: one in twenty of these looks useful by chance, with a confidence that hardly moves.
    assert useless.sum() >= 3
    assert noise[useless] == pytest.approx(logit(confidence).std(), rel=0.05)
    assert shift[useless] == pytest.approx(logit(confidence).mean(), abs=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"ragged": True}, {"confidence": False}, {"mode": "rejection"}, {"acceptance": 1}, {"seed": 5}]
)
def test_toy_recordings_can_be_fitted_and_simulated(options: dict) -> None:
    recorded = toy_trace(8, **options)
    fit = fit_synthetic(recorded)
    anchors = RecordedAnchors.from_trace(recorded)
    assert (fit.law.block_size, fit.law.mode) == (5, options.get("mode", "greedy"))
    assert (fit.law.confidence is None) == (options.get("confidence") is False)
    first = fit.positions.iloc[0]
    trials = anchors.draft_len >= 1
    assert first["num_trials"] == trials.sum()
    if not options.get("acceptance"):
        assert first["conditional_acceptance"] == pytest.approx((anchors.num_accepted[trials] >= 1).mean())
    run = simulate(fit.law, Fixed(3), ClosedLoop(2), toy_cost(), num_requests=4)
    assert len(run.requests) == 4


def test_positions_past_the_end_of_an_output_are_no_trials() -> None:
    """Everything is accepted as far as there is output: no position may look worse near the end."""
    fit = fit_synthetic(toy_trace(8, acceptance=1))
    assert (fit.positions["conditional_acceptance"] > 0.98).all()
    assert (np.diff(fit.positions["num_trials"]) < 0).all()


def test_domains_are_fitted_apart() -> None:
    laws = {name: replace(LAW, conditional_acceptance=(p, p), domain=name) for name, p in (("a", 0.9), ("b", 0.6))}
    anchors = synthetic_anchors(laws, 80, domains=["a", "b"] * 40, output_len=80)
    fits = fit_by_domain(anchors)
    assert list(fits) == ["a", "b"] and all(isinstance(fit, SyntheticFit) for fit in fits.values())
    for name, fit in fits.items():
        assert fit.law.domain == name and fit.num_requests == 40
        assert fit.law.conditional_acceptance == pytest.approx(laws[name].conditional_acceptance, abs=0.08)
    with pytest.raises(UserError, match="no recorded request is of domain c; choose one of a, b"):
        fit_synthetic(anchors, domain="c")


# ---- the paper's ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["eagle3", "dflash", "dspark"])
def test_presets_have_the_papers_acceptance(drafter: str) -> None:
    figure = load("fig2_conditional_acceptance")
    printed = table1().set_index(["target", "drafter"]).loc[("qwen3-4b", drafter)]
    for domain in ("math", "code", "chat"):
        law = preset("qwen3-4b", drafter=drafter, domain=domain)
        rows = figure[(figure["drafter"] == drafter) & (figure["domain"] == domain)]
        assert law.conditional("rounds") == pytest.approx(rows["conditional_acceptance"].to_numpy(), abs=1e-9)
        # Figure 2 implies Table 1's domain means within 0.8 %.
        assert law.mean_acceptance_length() == pytest.approx(printed[domain], rel=0.008)
        assert (law.confidence is None) == (drafter != "dspark") and law.domain == domain
    if drafter != "dspark":
        with pytest.raises(UserError, match="needs confidence estimates and this drafter gives none"):
            simulate(law, PrefixScheduler(toy_cost()), ClosedLoop(1), toy_cost(), num_requests=1)


def test_the_confidence_law_is_the_fit_of_figure_6() -> None:
    fitted = fit_figure6(Figure6(0.8, 0.8, 1.0, 0.0))
    for name, tolerance in (("shared_sd", 0.05), ("position_sd", 0.07), ("scale", 0.03), ("shift", 0.03)):
        assert getattr(FIGURE6, name) == pytest.approx(getattr(fitted, name), abs=tolerance)
    best, kept = ((figure6_residuals(one) ** 2).sum() for one in (fitted, FIGURE6))
    assert kept == pytest.approx(best, rel=0.01)


def test_figure_6_is_matched_as_well_as_said() -> None:
    frame = figure6_misfit()
    summary_6 = load("fig6_calibration_summary").query("calibration == 'before'")
    # What is compared is the paper's.
    assert frame["ece"].to_numpy() == pytest.approx(summary_6["ece_pct_recomputed"] / 100, abs=2e-4)
    assert frame["mean"].to_numpy() == pytest.approx(summary_6["mean_predicted_acceptance"], abs=1e-3)
    for column, tolerance in (("mean", 0.025), ("sd", 0.035), ("ece", 0.02), ("auc", 0.02)):
        assert frame[f"{column}_law"].to_numpy() == pytest.approx(frame[column].to_numpy(), abs=tolerance), column
    assert frame["histogram_distance"].max() < 0.04 and frame["reliability_error"].max() < 0.03


def test_calibrated_presets_are_calibrated_and_raw_ones_overconfident() -> None:
    for calibration in ("before", "after"):
        law = preset(drafter="dspark", domain="chat", calibration=calibration)
        anchors = synthetic_anchors(law, 400, output_len=101, seed=1)
        forecast, survived = np.cumprod(anchors.confidence, axis=1)[:, 2], anchors.num_accepted >= 3
        gap, error = clustered(forecast - survived, 400)
        assert gap > 0.04 if calibration == "before" else abs(gap) < 4 * error


def test_bad_input_is_one_sentence() -> None:
    for values, message in (
        ({"conditional_acceptance": ()}, "conditional_acceptance is empty"),
        ({"conditional_acceptance": (0.9, 1.0)}, "at position 2 is 1.0; give a number strictly between 0 and 1"),
        ({"difficulty_sd": -1.0}, "difficulty_sd is -1.0; give 0 to 10"),
        ({"position_sd": float("nan")}, "position_sd is nan"),
        ({"averaged_over": "steps"}, "averaged_over is 'steps'; give one of anchors, rounds"),
        ({"confidence": ConfidenceLaw((1.0, 2.0))}, "scale has 2 numbers and the block 4 positions"),
    ):
        with pytest.raises(UserError, match=message):
            replace(LAW, **values)
    with pytest.raises(UserError, match=r"noise_sd is -1\.0"):
        ConfidenceLaw(noise_sd=(-1.0,))
    with pytest.raises(UserError, match=r"scale is \(inf,\)"):
        ConfidenceLaw(scale=(float("inf"),))
    with pytest.raises(UserError, match="verify_len is 5 and the law has 4 positions"):
        LAW.mean_acceptance_length(5)
    with pytest.raises(UserError, match="output_len is 0"):
        LAW.expected_rounds(0)
    with pytest.raises(UserError, match="a synthetic law has no recorded requests to serve once; give num_requests"):
        simulate(LAW, Fixed(1), ClosedLoop(1), toy_cost())
    for options, message in (
        ({"output_len": 0}, "output_len has 0; every length is a whole number of at least 1"),
        ({"prompt_len": [3.5, 2.0]}, "prompt_len has 2.0; every length"),
        ({"prompt_len": [1, 2, 3]}, r"prompt_len has shape \(3,\); give one number, or one for each of 2 requests"),
        ({"domains": ["math", "poem"]}, "there is no law for domain math"),
        ({"domains": ["math"]}, "there are 1 domains for 2 requests"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(UserError, match=message):
            synthetic_anchors(LAW, 2, **options)
    with pytest.raises(UserError, match="num_requests is 0"):
        synthetic_anchors(LAW, 0)
    pair = {"a": LAW, "b": replace(LAW, confidence=None)}
    with pytest.raises(UserError, match=r"there are 2 laws \(a, b\); give the domain of every request"):
        synthetic_anchors(pair, 2)
    with pytest.raises(UserError, match="must agree in block size, mode and whether there are confidences"):
        synthetic_anchors(pair, 2, domains=["a", "b"])
    with pytest.raises(UserError, match=r"Figure 2 has no drafter 'mtp'; choose one of dflash, dspark, eagle3"):
        preset(drafter="mtp", domain="math")
    with pytest.raises(UserError, match="Figure 2 has no target_model 'qwen3-8b'; choose one of qwen3-4b"):
        preset("qwen3-8b", drafter="dspark", domain="math")
    with pytest.raises(UserError, match=r"difficulty_sd is 3\.0"):
        preset(drafter="dspark", domain="math", difficulty_sd=3.0)
    with pytest.raises(UserError, match="there are no published numbers 'fig9'; choose one of fig2_"):
        load("fig9")
    with pytest.raises(UserError, match="no drafted block to fit a law to"):
        fit_synthetic(toy_trace(1, output_len=1))
