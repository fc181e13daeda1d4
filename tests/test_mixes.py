import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dspark_sim.errors import UserError
from dspark_sim.mixes import DomainMix, assign_prompts, parse_mix

STEADY = DomainMix({"math": 1.0, "code": 2.0, "chat": 5.0}, seed=1)
DRIFT = DomainMix({"math": 1.0, "code": 0.0}, [(0.5, {"math": 1, "code": 1}), (1.0, {"code": 3, "chat": 1})], seed=2)


def chi_square(counts: np.ndarray[Any, Any], shares: np.ndarray[Any, Any]) -> float:
    """p-value of counts [bins, domains] under shares [bins, domains]; cells of share 0 must be empty."""
    expected = shares * counts.sum(axis=1, keepdims=True)
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    freedom = int(used.sum()) - counts.shape[0]
    return float(stats.chi2.sf(((counts - expected)[used] ** 2 / expected[used]).sum(), freedom))


def test_steady_shares() -> None:
    """Over many seeds the p-values are uniform; shares 2 points off pile them up near 0."""
    assert STEADY.domains == ("math", "code", "chat")
    draws = [np.bincount(replace(STEADY, seed=seed).draw(2000), minlength=3)[None] for seed in range(200)]
    right = [chi_square(counts, np.array([[0.125, 0.25, 0.625]])) for counts in draws]
    wrong = [chi_square(counts, np.array([[0.145, 0.25, 0.605]])) for counts in draws]
    assert stats.kstest(right, "uniform").pvalue > 0.01
    assert stats.kstest(wrong, "uniform").pvalue < 1e-6


def test_drifting_shares() -> None:
    num, bins = 12_000, 12
    counts = np.stack([np.bincount(part, minlength=3) for part in np.split(DRIFT.draw(num), bins)])
    shares = DRIFT.shares_at(np.arange(num) / (num - 1)).reshape(bins, -1, 3).mean(axis=1)
    assert chi_square(counts, shares) > 0.01
    # Power: the mean share all along is not it.
    assert chi_square(counts, np.tile(shares.mean(axis=0), (bins, 1))) < 1e-6
    np.testing.assert_allclose(
        DRIFT.shares_at([0.0, 0.25, 0.5, 0.75, 1.0]),
        [[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0], [0.25, 0.625, 0.125], [0, 0.75, 0.25]],
    )


def test_drift_in_seconds_goes_by_the_clock() -> None:
    mix = DomainMix({"a": 1}, [(100.0, {"a": 1}), (100.001, {"b": 1})], unit="seconds")
    arrivals = np.linspace(0, 200, 50)
    assert mix.draw(50, arrivals).tolist() == (arrivals > 100).astype(int).tolist()
    assert mix.draw(20, arrivals[:20]).tolist() == [0] * 20
    assert DomainMix({"a": 1}, unit="seconds").draw(3).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="needs arrival times"):
        mix.draw(50)
    with pytest.raises(UserError, match="there are 20 arrivals and 50 requests"):
        mix.draw(50, arrivals[:20])


def test_mixes_with_one_seed_meet_the_same_luck() -> None:
    """Moving a tenth of the requests from one domain to its neighbour moves about a tenth of them, and no others."""
    one, other = DomainMix({"a": 5, "b": 5}, seed=3).draw(5000), DomainMix({"a": 6, "b": 4}, seed=3).draw(5000)
    assert (other <= one).all()
    assert (one != other).mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 5000))
    assert one.tolist() != DomainMix({"a": 5, "b": 5}, seed=4).draw(5000).tolist()


PROMPTS = ["math", "chat", "code", "math", "code", "chat", "math"]


def test_prompts_in_order() -> None:
    chosen = assign_prompts(STEADY, 40, PROMPTS)
    drawn = [STEADY.domains[index] for index in STEADY.draw(40)]
    assert [PROMPTS[index] for index in chosen] == drawn
    of_math = [int(index) for index, domain in zip(chosen, drawn, strict=True) if domain == "math"]
    assert of_math == [[0, 3, 6][turn % 3] for turn in range(len(of_math))] and len(of_math) > 3


def test_prompts_by_bootstrap() -> None:
    chosen = assign_prompts(STEADY, 9000, PROMPTS, choice="bootstrap")
    assert [PROMPTS[index] for index in chosen] == [STEADY.domains[index] for index in STEADY.draw(9000)]
    for domain in STEADY.domains:
        counts = Counter(int(index) for index in chosen if PROMPTS[index] == domain)
        assert len(counts) == PROMPTS.count(domain)
        assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert chosen.tolist() == assign_prompts(STEADY, 9000, PROMPTS, choice="bootstrap").tolist()
    assert chosen[:3000].tolist() == assign_prompts(STEADY, 3000, PROMPTS, choice="bootstrap").tolist()


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.0, 10.0), min_size=1).filter(lambda s: sum(s.values()) > 1e-3),
    st.dictionaries(st.sampled_from("cdef"), st.floats(0.1, 10.0), min_size=1),
    st.integers(0, 50),
    st.integers(0, 2**32),
)
def test_any_mix(first: dict[str, float], last: dict[str, float], num: int, seed: int) -> None:
    mix = DomainMix(first, [(1.0, last)], seed=seed)
    drawn = mix.draw(num)
    shares = mix.shares_at(np.arange(num) / max(num - 1, 1))
    assert drawn.shape == (num,) and drawn.dtype == np.int64
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    assert (shares[np.arange(num), drawn] > 0).all()
    assert json.loads(json.dumps(mix.describe()))["seed"] == seed
    owners = [*mix.domains, *mix.domains]
    for choice in ("in_order", "bootstrap"):
        chosen = assign_prompts(mix, num, owners, choice=choice)  # type: ignore[arg-type]
        assert [owners[index] for index in chosen] == [mix.domains[index] for index in drawn]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DomainMix({}), "give at least one above 0"),
        (lambda: DomainMix({"a": 0.0}), "give at least one above 0"),
        (lambda: DomainMix({"a": -1.0, "b": 2.0}), "the share of a at 0.0 is -1.0"),
        (lambda: DomainMix({"a": math.nan}), "the share of a at 0.0 is nan"),
        (lambda: DomainMix({"a": 1}, [(0.5, {"a": 0})]), "the shares at 0.5 are"),
        (lambda: DomainMix({"a": 1}, [(0.0, {"a": 1})]), "shares are given at 0.0 after 0.0"),
        (lambda: DomainMix({"a": 1}, [(0.7, {"a": 1}), (0.6, {"a": 1})]), "shares are given at 0.6 after 0.7"),
        (lambda: DomainMix({"a": 1}, [(2.0, {"a": 1})]), "at the fraction 2.0; give at most 1, or unit seconds"),
        (lambda: DomainMix({"a": 1}, unit="hours"), "unit is 'hours'"),  # type: ignore[arg-type]
        (lambda: DomainMix({"a": 1}, seed=-1), "seed is -1"),
        (lambda: STEADY.draw(-1), "num_requests is -1"),
        (lambda: assign_prompts(STEADY, 3, ["math", "code"]), "has domain chat and no recorded prompt is of it"),
        (lambda: assign_prompts(STEADY, 3, []), "recorded are none"),
        (lambda: assign_prompts(STEADY, 3, PROMPTS, choice="best"), "choice is 'best'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_mixes(make: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value)


def test_mixes_are_read_from_text() -> None:
    assert parse_mix("math:2,code:1", 3) == DomainMix({"math": 2.0, "code": 1.0}, [], seed=3)
    drifting = parse_mix("math:1 0.5=math:1,chat:1 1=chat:1")
    assert drifting.drift == [(0.5, {"math": 1.0, "chat": 1.0}), (1.0, {"chat": 1.0})]
    for text in ("math", "math:x", "", "math:1 code:1", "math:1 half=code:1"):
        with pytest.raises(UserError, match="is no mix"):
            parse_mix(text)
    with pytest.raises(UserError, match=r"the share of math at 0\.0 is -1\.0"):
        parse_mix("math:-1")
