import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dspark_sim.errors import UserError
from dspark_sim.lengths import ConstantLengths, EmpiricalLengths, Lengths, LognormalLengths
from dspark_sim.request_traces import RequestTrace

TRACE = RequestTrace("t.csv", "azure", None, np.array([10, 20, 30, 40, 40]), np.array([1, 2, 3, 4, 5]))


def test_constant_lengths() -> None:
    prompt_len, output_len = ConstantLengths(1000, 250).lengths(3)
    assert prompt_len.tolist() == [1000] * 3 and output_len.tolist() == [250] * 3


def test_lognormal_lengths_follow_their_law() -> None:
    num = 20_000
    law = LognormalLengths(1000.0, 250.0, 0.8, 1.5, seed=1)
    prompt_len, output_len = law.lengths(num)
    for lengths, mean, cv in ((prompt_len, 1000.0, 0.8), (output_len, 250.0, 1.5)):
        assert lengths.mean() == pytest.approx(mean, rel=5 * cv / math.sqrt(num))
        sigma = math.sqrt(math.log1p(cv * cv))
        wanted = stats.lognorm(sigma, scale=mean * math.exp(-(sigma**2) / 2))
        # Rounding to whole tokens is undone by a uniform part of one.
        smooth = lengths + np.random.default_rng(0).uniform(-0.5, 0.5, num)
        assert stats.kstest(smooth, wanted.cdf).pvalue > 0.01
        assert stats.kstest(smooth * 1.05, wanted.cdf).pvalue < 1e-4
    # Standard error of the cv of a lognormal is large; on the log scale it is not.
    assert np.log(prompt_len).std() == pytest.approx(math.sqrt(math.log1p(0.64)), rel=4 / math.sqrt(2 * num))
    assert abs(stats.spearmanr(prompt_len, output_len).statistic) < 4 / math.sqrt(num)


def test_lognormal_limits() -> None:
    prompt_len, output_len = LognormalLengths(50.0, 2.0, 2.0, 2.0, 3, max_prompt_len=80, max_output_len=7).lengths(4000)
    assert prompt_len.max() == 80 and output_len.max() == 7 and output_len.min() == 1
    assert LognormalLengths(50.0, 7.0, 0.0, 0.0).lengths(2)[0].tolist() == [50, 50]


def test_empirical_lengths_are_rows_of_the_trace() -> None:
    pairs = list(zip(TRACE.prompt_len.tolist(), TRACE.output_len.tolist(), strict=True))
    drawn = list(zip(*(part.tolist() for part in EmpiricalLengths(TRACE, seed=2).lengths(5000)), strict=True))
    counts = [drawn.count(pair) for pair in pairs]
    assert sum(counts) == 5000
    assert stats.chisquare(counts).pvalue > 0.01
    in_order = EmpiricalLengths(TRACE, bootstrap=False).lengths(7)
    assert in_order[0].tolist() == [10, 20, 30, 40, 40, 10, 20]


LAWS: list[Lengths] = [ConstantLengths(3, 4), LognormalLengths(30.0, 40.0, 3.0), EmpiricalLengths(TRACE)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAWS), st.integers(0, 50), st.integers(0, 50))
def test_any_law(law: Lengths, num: int, more: int) -> None:
    """Whole numbers, at least 1; the same again; more requests leave the first ones."""
    for lengths, again, longer in zip(law.lengths(num), law.lengths(num), law.lengths(num + more), strict=True):
        assert lengths.shape == (num,) and lengths.dtype == np.int64 and (lengths >= 1).all()
        assert lengths.tolist() == again.tolist() == longer[:num].tolist()
    assert json.loads(json.dumps(law.describe()))["kind"] == type(law).__name__


def test_seeds_matter() -> None:
    assert (
        LognormalLengths(30.0, 40.0).lengths(9)[0].tolist()
        != LognormalLengths(30.0, 40.0, seed=1).lengths(9)[0].tolist()
    )
    assert EmpiricalLengths(TRACE).lengths(30)[1].tolist() != EmpiricalLengths(TRACE, seed=1).lengths(30)[1].tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ConstantLengths(0, 3), "prompt_len is 0"),
        (lambda: ConstantLengths(3, -1), "output_len is -1"),
        (lambda: LognormalLengths(0.5, 3.0), "prompt_mean is 0.5"),
        (lambda: LognormalLengths(5.0, math.nan), "output_mean is nan"),
        (lambda: LognormalLengths(5.0, 3.0, -1.0), "prompt_cv is -1.0"),
        (lambda: LognormalLengths(5.0, 3.0, 1.0, 101.0), "output_cv is 101.0"),
        (lambda: LognormalLengths(5.0, 3.0, max_output_len=0), "max_output_len is 0"),
        (lambda: LognormalLengths(5.0, 3.0, seed=-1), "seed is -1"),
        (lambda: EmpiricalLengths(TRACE, seed=-1), "seed is -1"),
        (lambda: ConstantLengths(3, 3).lengths(-1), "num_requests is -1"),
    ],
)
def test_impossible_lengths(make: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value)
