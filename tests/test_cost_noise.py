"""Noise: the fit keeps the residuals it is given, and draws from them keep mean, tail and seed."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from test_cost import profile
from toy import toy_cost, toy_trace

from dspark_sim import api
from dspark_sim.analysis.metrics import summary
from dspark_sim.cost import CostModel, fit
from dspark_sim.cost_noise import Noisy, ResidualNoise
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed
from dspark_sim.workload import Poisson

RNG = np.random.default_rng(7)
# A heavy tail: one round in twenty takes three times as long.
SCATTER = np.where(RNG.random(500) < 0.05, 3.0, 1.0) * np.exp(0.05 * RNG.normal(size=500))
RESIDUALS = tuple(np.sort(SCATTER / SCATTER.mean()).tolist())


def test_the_fit_keeps_what_is_left_over() -> None:
    exact = fit(profile(toy_cost()))
    np.testing.assert_allclose(exact.residuals, 1.0, atol=1e-6)
    rough = fit(profile(toy_cost(), 4000, noise=0.2))
    ratios = np.array(rough.residuals)
    assert len(ratios) == 512 and (np.diff(ratios) >= 0).all() and ratios.mean() == pytest.approx(1.0, abs=1e-12)
    # Of lognormal luck on verify and draft, the host's seconds beside it fixed.
    assert 0.15 < np.log(ratios).std() < 0.22
    assert rough.prefill_residuals and np.mean(rough.prefill_residuals) == pytest.approx(1.0)
    assert CostModel.from_json(rough.to_json()) == rough


def test_draws_keep_mean_and_tail() -> None:
    noise = ResidualNoise(RESIDUALS, seed=3)
    drawn = np.array([noise.factor(step) for step in range(200_000)])
    standard_error = np.std(RESIDUALS) / np.sqrt(len(drawn))
    assert drawn.mean() == pytest.approx(1.0, abs=4 * standard_error)
    for quantile in (50, 90, 99):
        assert np.percentile(drawn, quantile) == pytest.approx(np.percentile(RESIDUALS, quantile), rel=0.02)
    assert set(np.unique(drawn)) <= set(RESIDUALS)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    forward = [ResidualNoise(RESIDUALS, 3).factor(step) for step in (0, 4095, 4096, 9000)]
    noise = ResidualNoise(RESIDUALS, 3)
    assert [noise.factor(step) for step in (9000, 4096, 4095, 0)] == forward[::-1]
    assert [ResidualNoise(RESIDUALS, 4).factor(step) for step in (0, 4095, 4096, 9000)] != forward
    assert [ResidualNoise(RESIDUALS, 3, 1).factor(step) for step in (0, 4095, 4096, 9000)] != forward
    series = np.array([noise.factor(step) for step in range(20_000)])
    assert abs(np.corrcoef(series[:-1], series[1:])[0, 1]) < 0.03
    assert ResidualNoise((), 0).factor(5) == 1.0


def test_drawing_is_cheap() -> None:
    """Below a microsecond an iteration, blocks included; the least of several passes, as the machine may be busy."""
    spent = []
    for seed in range(5):
        noise = ResidualNoise(RESIDUALS, seed)
        start = perf_counter()
        for step in range(40_000):
            noise.factor(step)
        spent.append((perf_counter() - start) / 40_000)
    assert min(spent) < 1e-6


def test_the_parts_of_an_iteration_share_a_factor() -> None:
    cost = replace(toy_cost(), residuals=RESIDUALS, prefill_residuals=(0.5, 1.5))
    noisy, noise, first = Noisy(cost, 11), ResidualNoise(RESIDUALS, 11), ResidualNoise((0.5, 1.5), 11, 1)
    assert noisy.prefill_seconds(40) == cost.prefill_seconds(40) * first.factor(0)
    assert noisy.prefill_host_seconds(2) == cost.prefill_host_seconds(2) * first.factor(0)
    for step in range(1, 50):
        factor = noise.factor(step)
        assert noisy.draft_seconds(2, 3, 50) == cost.draft_seconds(2, 3, 50) * factor
        assert noisy.step_seconds(8, 50, 2) == cost.step_seconds(8, 50, 2) * factor
        assert noisy.host_seconds(2) == cost.host_seconds(2) * factor
    assert noisy.step == 50


def test_tails_survive_in_a_simulation_and_means_stay() -> None:
    cost = replace(toy_cost(), residuals=RESIDUALS)
    recorded = toy_trace(6, 24)
    smooth = api.simulate(recorded, policy=Fixed(3), cost=cost, concurrency=1, num_requests=600)
    rough = api.simulate(recorded, policy=Fixed(3), cost=cost, concurrency=1, num_requests=600, noise_seed=5)
    again = api.simulate(recorded, policy=Fixed(3), cost=cost, concurrency=1, num_requests=600, noise_seed=5)
    other = api.simulate(recorded, policy=Fixed(3), cost=cost, concurrency=1, num_requests=600, noise_seed=6)
    assert rough.steps.equals(again.steps) and not rough.steps.equals(other.steps)
    assert smooth.tables["drafts"].equals(rough.tables["drafts"])
    # One user at a time: the n-th iteration of both does the same work, and the ratio is the factor of step n.
    noise = ResidualNoise(RESIDUALS, 5)
    steps = smooth.steps
    ratio = (rough.steps["step_seconds"] / steps["step_seconds"]).to_numpy()
    is_prefill = (steps["num_prefill_tokens"] > 0).to_numpy()
    expected = np.where(is_prefill, 1.0, [noise.factor(step) for step in range(len(steps))])
    np.testing.assert_allclose(ratio, expected, rtol=1e-12)
    decode = ratio[~is_prefill]
    assert np.mean(decode) == pytest.approx(1.0, abs=4 * np.std(RESIDUALS) / np.sqrt(len(decode)))
    assert np.percentile(decode, 99) == pytest.approx(np.percentile(RESIDUALS, 99), rel=0.05)
    assert summary(rough)["icl_p99"] > 1.5 * summary(smooth)["icl_p99"]
    # Predictions, and so policies, see the mean.
    assert (rough.steps["predicted_step_seconds"] == steps["predicted_step_seconds"])[~is_prefill].all()
    assert rough.config["noise_seed"] == 5 and smooth.config["noise_seed"] is None


def test_arrivals_do_not_move_with_the_noise() -> None:
    cost = replace(toy_cost(), residuals=RESIDUALS)
    runs = [
        api.simulate(toy_trace(6), policy=Fixed(3), cost=cost, workload=Poisson(20.0), num_requests=30, noise_seed=seed)
        for seed in (None, 1, 2)
    ]
    assert all(run.requests["arrival"].equals(runs[0].requests["arrival"]) for run in runs)


def test_what_is_no_residual_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no residuals to draw noise from"):
        Noisy(toy_cost(), 0)
    for wrong in ((1.0, 3.0), (-1.0, 3.0), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="give ratios of measured to fitted seconds"):
            ResidualNoise(wrong, 0)
