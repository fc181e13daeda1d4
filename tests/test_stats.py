import numpy as np
import pandas as pd
import pytest
from toy import toy_cost, toy_trace

from dspark_sim.analysis.metrics import per_request, summary
from dspark_sim.analysis.stats import Bootstrap, paired_difference, ratio_interval, run_intervals
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed
from dspark_sim.simulate import simulate
from dspark_sim.workload import ClosedLoop


def prompts_and_rounds(
    rng: np.random.Generator, num_prompts: int, rounds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds of prompts of unequal difficulty; the true ratio is 2.

    A prompt's level is drawn once and shared by its rounds, which is what makes rounds alike.
    """
    level = rng.gamma(4.0, 0.5, num_prompts)
    prompts = np.repeat(np.arange(num_prompts), rounds)
    return rng.poisson(level[prompts]).astype(float), np.ones(prompts.size), prompts


def coverage(by_prompt: bool, repeats: int = 300) -> float:
    rng = np.random.default_rng(11)
    covered = 0
    for number in range(repeats):
        numerator, denominator, prompts = prompts_and_rounds(rng, 40, 10)
        groups = prompts if by_prompt else np.arange(prompts.size)
        interval = ratio_interval(numerator, denominator, groups, Bootstrap(400, 0.9, number))
        covered += interval.low <= 2.0 <= interval.high
    return covered / repeats


def test_interval_covers_the_true_ratio_at_its_level() -> None:
    # Standard error of the rate 0.017; a percentile interval of 40 prompts is a little short.
    assert coverage(by_prompt=True) == pytest.approx(0.9, abs=0.055)


def test_resampling_rounds_instead_of_prompts_covers_too_rarely() -> None:
    """The known wrong way, which the check above would catch."""
    assert coverage(by_prompt=False) < 0.7


def test_interval_shrinks_with_the_root_of_prompts_and_widens_with_the_level() -> None:
    rng = np.random.default_rng(5)
    few, many = (ratio_interval(*prompts_and_rounds(rng, n, 10), Bootstrap(2000)) for n in (50, 800))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4.0, rel=0.35)
    data = prompts_and_rounds(rng, 50, 10)
    narrow, wide = (ratio_interval(*data, Bootstrap(2000, level)) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_estimate_is_the_ratio_of_sums() -> None:
    interval = ratio_interval([1, 2, 6], [1, 1, 2], ["a", "b", "a"])
    assert interval.estimate == 9 / 4
    # The two prompts' own ratios, 7/3 and 2, are the ends any resample can reach.
    assert 2.0 <= interval.low <= interval.estimate <= interval.high <= 7 / 3


def test_same_seed_same_interval_and_order_plays_no_part() -> None:
    numerator, denominator, prompts = prompts_and_rounds(np.random.default_rng(2), 12, 4)
    order = np.random.default_rng(3).permutation(prompts.size)
    first = ratio_interval(numerator, denominator, prompts)
    again = ratio_interval(numerator[order], denominator[order], prompts[order])
    assert (again.low, again.high) == pytest.approx((first.low, first.high))
    other = ratio_interval(numerator, denominator, prompts, Bootstrap(seed=1))
    assert (other.low, other.high) != (first.low, first.high)


def test_one_prompt_has_no_interval() -> None:
    interval = ratio_interval([1, 2], [1, 1], ["a", "a"])
    assert interval.estimate == 1.5 and np.isnan(interval.low) and np.isnan(interval.high)


def frame(numerator: np.ndarray) -> pd.DataFrame:
    names = [f"p{number}" for number in range(numerator.size)]
    return pd.DataFrame({"prompt_id": names, "tokens": numerator, "rounds": 1.0})


def test_pairing_removes_what_the_prompts_share() -> None:
    rng = np.random.default_rng(0)
    level = rng.gamma(2.0, 2.0, 60)
    first, second = frame(level), frame(level + 0.1 + rng.normal(0, 0.02, level.size))
    paired = paired_difference(first, second, "tokens", "rounds")
    assert 0.0 < paired.low < 0.1 < paired.high < 0.2
    single = ratio_interval(level, np.ones(level.size), np.arange(level.size))
    assert (paired.high - paired.low) < 0.05 * (single.high - single.low)
    swapped = paired_difference(second, first, "tokens", "rounds")
    assert (swapped.low, swapped.high) == pytest.approx((-paired.high, -paired.low))


def test_a_relative_difference_of_scaled_data_is_the_scale() -> None:
    level = np.random.default_rng(0).gamma(2.0, 2.0, 30)
    interval = paired_difference(frame(level), frame(1.25 * level), "tokens", "rounds", relative=True)
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_run_intervals_agree_with_the_summary() -> None:
    trace = simulate(toy_trace(8, 30, seed=4), Fixed(4), ClosedLoop(3), toy_cost(), num_requests=24)
    intervals, values = run_intervals(per_request(trace)), summary(trace)
    assert intervals["estimate"].to_dict() == pytest.approx(values[intervals.index].to_dict())
    assert (intervals["low"] < intervals["estimate"]).all() and (intervals["estimate"] < intervals["high"]).all()


def test_refusals() -> None:
    with pytest.raises(UserError, match="zero requests"):
        ratio_interval([], [], [])
    with pytest.raises(UserError, match="num_resamples is 0"):
        Bootstrap(0)
    with pytest.raises(UserError, match="level is 95"):
        Bootstrap(level=95)
    with pytest.raises(UserError, match="only one of the two runs has prompt p2"):
        paired_difference(frame(np.ones(2)), frame(np.ones(3)), "tokens", "rounds")
