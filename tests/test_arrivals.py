import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from toy import toy_cost, toy_trace

from dspark_sim.arrivals import Deterministic, Gamma, ImportedArrivals, OpenLoop, Poisson, Spike, Stepped, Weibull
from dspark_sim.engine.live import serve
from dspark_sim.errors import UserError
from dspark_sim.gaps import ConstantGaps, ExponentialGaps, GammaGaps, WeibullGaps
from dspark_sim.loop import DecodeLoop
from dspark_sim.policy import Fixed
from dspark_sim.request import Request
from dspark_sim.request_traces import RequestTrace, read_request_trace
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate import RecordedAnchors, ReplayExecutor
from dspark_sim.simulate.run import simulate
from dspark_sim.workload import ClosedLoop, Workload

Array = npt.NDArray[np.float64]
NUM = 20_000


def gaps_of(workload: OpenLoop, num: int = NUM) -> Array:
    return np.diff(workload.arrivals(num), prepend=0.0)


def weibull(shape: float) -> Any:
    return stats.weibull_min(shape, scale=1 / math.gamma(1 + 1 / shape))


def imported(num: int = 50) -> RequestTrace:
    arrival = np.arange(num) * 0.5
    return RequestTrace("made.csv", "azure", arrival, np.arange(num) % 7 + 1, np.arange(num) % 11 + 1)


# ---- the laws -------------------------------------------------------------------------------------------------------

LAWS: list[tuple[OpenLoop, Any]] = [
    (Poisson(3.0, 1), stats.expon),
    (Gamma(0.02, 0.4, 2), stats.gamma(1 / 0.16, scale=0.16)),
    (Gamma(800.0, 2.5, 3), stats.gamma(1 / 6.25, scale=6.25)),
    (Weibull(5.0, shape=0.6, seed=4), weibull(0.6)),
    (Weibull(5.0, shape=3.0, seed=5), weibull(3.0)),
    (Stepped([(0.0, 3.0)], seed=6), stats.expon),
    (Stepped([(0.0, 0.5)], GammaGaps(2.0), seed=7), stats.gamma(0.25, scale=4.0)),
]


@pytest.mark.parametrize(("workload", "law"), LAWS)
def test_gaps_follow_their_law(workload: OpenLoop, law: Any) -> None:
    rate = workload.steps[0][1] if isinstance(workload, Stepped) else workload.rate  # type: ignore[union-attr]
    units = gaps_of(workload) * rate
    assert stats.kstest(units, law.cdf).pvalue > 0.01
    # No memory of the gap before (standard error 1/sqrt n), judged on ranks: gaps of high cv have wild products.
    assert abs(stats.spearmanr(units[1:], units[:-1]).statistic) < 4 / math.sqrt(NUM)
    assert units.mean() == pytest.approx(1.0, abs=4 * law.std() / math.sqrt(NUM))


@pytest.mark.parametrize(("workload", "law"), LAWS)
def test_the_same_test_refuses_a_wrong_law(workload: OpenLoop, law: Any) -> None:
    """Gaps clipped at three times their mean, rounded to a tenth of it, or of a cv 10 % off, are found out."""
    rate = workload.steps[0][1] if isinstance(workload, Stepped) else workload.rate  # type: ignore[union-attr]
    units = gaps_of(workload) * rate
    if law.sf(3.0) > 0.005:
        assert stats.kstest(np.minimum(units, 3.0), law.cdf).pvalue < 1e-6
    assert stats.kstest(np.round(units, 1), law.cdf).pvalue < 1e-6
    assert stats.kstest(units**1.1 / np.mean(units**1.1), law.cdf).pvalue < 1e-3


@pytest.mark.parametrize("cv", [0.01, 0.2, 1.0, 1.7, 4.0])
def test_weibull_gaps_have_the_cv_asked_for(cv: float) -> None:
    gaps = WeibullGaps(cv=cv).draw(np.random.default_rng(3), NUM)
    for wrong, least, most in ((1.0, 0.01, 1.0), (1.1, 0.0, 1e-3)):
        law = weibull(optimize.brentq(lambda shape, spread: weibull(shape).std() - spread, 0.2, 900.0, wrong * cv))
        assert least <= stats.kstest(gaps, law.cdf).pvalue <= most


def test_the_laws_meet_where_they_are_the_same() -> None:
    poisson = gaps_of(Poisson(2.0, 1))
    for same in (Gamma(2.0, 1.0, 9), Weibull(2.0, shape=1.0, seed=9), Weibull(2.0, cv=1.0, seed=9)):
        assert stats.ks_2samp(poisson, gaps_of(same)).pvalue > 0.01
    np.testing.assert_allclose(
        Weibull(2.0, cv=1.0, seed=9).arrivals(99), Weibull(2.0, shape=1.0, seed=9).arrivals(99), rtol=1e-9
    )
    assert Stepped([(0.0, 2.0)], ConstantGaps()).arrivals(4) == pytest.approx(Deterministic(2.0).arrivals(4))
    assert Deterministic(2.0).arrivals(4).tolist() == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("kind", [Gamma, Weibull])
def test_burstiness_shows_in_the_counts(kind: type[Any]) -> None:
    """Over long windows the variance of counts over their mean tends to cv² (renewal theorem)."""
    for cv in (0.5, 2.0):
        arrivals = kind(10.0, cv=cv, seed=8).arrivals(100_000)
        counts = np.histogram(arrivals, np.arange(0.0, arrivals[-1], 40.0))[0]
        assert counts.var() / counts.mean() == pytest.approx(cv * cv, rel=6 * math.sqrt(2 / counts.size))


# ---- profiles -------------------------------------------------------------------------------------------------------

STEPS = ((0.0, 4.0), (50.0, 0.0), (60.0, 40.0), (80.0, 1.0), (200.0, 10.0))


def counts_and_means(arrivals: Array, profile: Stepped, width: float) -> tuple[Array, Array]:
    edges = np.arange(0.0, arrivals[-1] - width, width)
    fine = profile.rate_at(np.arange(0.0, edges[-1], width / 100) + width / 200)
    return np.histogram(arrivals, edges)[0].astype(float), fine.reshape(-1, 100).mean(axis=1) * width


def test_counts_by_interval_are_poisson() -> None:
    profile = Stepped(STEPS, seed=11)
    counts, means = counts_and_means(profile.arrivals(8000), profile, 5.0)
    assert (counts[means == 0] == 0).all() and (means == 0).sum() == 2
    counts, means = counts[means > 0], means[means > 0]
    statistic = ((counts - means) ** 2 / means).sum()
    assert 0.005 < stats.chi2.cdf(statistic, counts.size) < 0.995
    # Power: a profile 15 % off, and equal gaps, are found out.
    assert stats.chi2.sf(((counts - 1.15 * means) ** 2 / (1.15 * means)).sum(), counts.size) < 1e-6
    even, expected = counts_and_means(Stepped(STEPS, ConstantGaps()).arrivals(8000), profile, 5.0)
    positive = expected > 0
    assert stats.chi2.cdf(((even - expected)[positive] ** 2 / expected[positive]).sum(), positive.sum()) < 1e-6


def test_time_rescaling_gives_the_unit_process_back() -> None:
    """Integrated rate at the arrivals: Exp(1) gaps, whatever the profile (time-rescaling theorem)."""
    arrivals = Stepped(STEPS, seed=12).arrivals(3000)
    starts, rates = np.array(STEPS).T
    ends = np.append(0.0, np.cumsum(np.diff(starts) * rates[:-1]))
    place = np.searchsorted(starts, arrivals, side="right") - 1
    units = np.diff(ends[place] + (arrivals - starts[place]) * rates[place], prepend=0.0)
    assert stats.kstest(units, "expon").pvalue > 0.01
    assert stats.kstest(np.diff(arrivals, prepend=0.0) * 10.0, "expon").pvalue < 1e-6


def test_equal_gaps_through_steps_by_hand() -> None:
    profile = Stepped([(0.0, 1.0), (2.0, 0.0), (5.0, 2.0)], ConstantGaps())
    # The second arrival falls on the end of the first step, before the pause.
    assert profile.arrivals(5).tolist() == [1.0, 2.0, 5.5, 6.0, 6.5]
    assert profile.rate_at([0.0, 1.9, 2.0, 4.9, 5.0, 100.0]).tolist() == [1.0, 1.0, 0.0, 0.0, 2.0, 2.0]


def test_a_spike_is_steps() -> None:
    spike = Spike(2.0, 30.0, 10.0, 5.0, GammaGaps(2.0), 3, timeout_seconds=9.0)
    same = Stepped([(0.0, 2.0), (10.0, 30.0), (15.0, 2.0)], GammaGaps(2.0), 3, timeout_seconds=9.0)
    assert spike.profile == same
    assert spike.arrivals(200).tolist() == same.arrivals(200).tolist()
    assert spike.rate_at([9.9, 10.0, 15.0]).tolist() == [2.0, 30.0, 2.0]
    at_once = Spike(2.0, 30.0, 0.0, 5.0)
    assert at_once.profile.steps == ((0.0, 30.0), (5.0, 2.0))
    counts = np.histogram(Spike(2.0, 30.0, 100.0, 50.0, seed=4).arrivals(3000), [0, 100, 150, 500])[0]
    assert (abs(counts - [200, 1500, 700]) < 4 * np.sqrt([200, 1500, 700])).all()


# ---- imported arrivals ----------------------------------------------------------------------------------------------


def test_imported_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    lines = [f"2024-01-01 00:00:{10 + 3 * i}.0000000,{i + 1},5\n" for i in range(4)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines))
    workload = ImportedArrivals(read_request_trace(path, speedup=2.0), timeout_seconds=4.0)
    assert workload.arrivals(3).tolist() == [0.0, 1.5, 3.0]
    with pytest.raises(UserError, match=r"azure\.csv has 4 requests and 5 were asked for"):
        workload.arrivals(5)
    assert workload.reseeded(3) is workload
    described = workload.describe()
    assert described["trace"] == "azure.csv" and described["num_requests"] == 4 and len(described["digest"]) == 16
    no_times = RequestTrace("talk.json", "sharegpt", None, np.ones(2, np.int64), np.ones(2, np.int64))
    with pytest.raises(UserError, match=r"talk\.json \(sharegpt\) has no arrival times"):
        ImportedArrivals(no_times)
    # What is returned is the caller's own.
    workload.arrivals(2)[:] = 7.0
    assert workload.arrivals(2).tolist() == [0.0, 1.5]


# ---- all of them ----------------------------------------------------------------------------------------------------

RATES = st.floats(1e-3, 1e4)
CVS = st.floats(0.01, 3.0)
SEEDS = st.integers(0, 2**40)
GAPS = st.one_of(
    st.just(ConstantGaps()), st.just(ExponentialGaps()), CVS.map(GammaGaps), CVS.map(lambda cv: WeibullGaps(cv=cv))
)


@st.composite
def profiles(draw: st.DrawFn) -> Stepped:
    lengths = draw(st.lists(st.floats(0.01, 100.0), max_size=4))
    rates = [draw(st.one_of(st.just(0.0), RATES)) for _ in lengths]
    steps = list(zip(np.cumsum([0.0, *lengths]).tolist(), [*rates, draw(RATES)], strict=True))
    return Stepped(steps, draw(GAPS), draw(SEEDS))


OPEN_LOOPS = st.one_of(
    st.builds(Poisson, RATES, SEEDS),
    st.builds(Gamma, RATES, CVS, SEEDS),
    st.builds(Weibull, RATES, cv=CVS, seed=SEEDS),
    st.builds(Deterministic, RATES),
    profiles(),
    st.builds(Spike, RATES, RATES, st.floats(0.0, 50.0), st.floats(0.1, 50.0), GAPS, SEEDS),
)


@settings(max_examples=150, deadline=None)
@given(OPEN_LOOPS, st.integers(0, 60), st.integers(0, 60))
def test_any_open_loop(workload: OpenLoop, num: int, more: int) -> None:
    """Times do not fall; the same again; more requests leave the first ones; seeds change what is drawn."""
    arrivals = workload.arrivals(num)
    assert arrivals.shape == (num,) and arrivals.dtype == np.float64 and np.isfinite(arrivals).all()
    assert (arrivals >= 0).all() and (np.diff(arrivals) >= 0).all()
    assert workload.arrivals(num).tolist() == arrivals.tolist()
    assert workload.arrivals(num + more)[:num].tolist() == arrivals.tolist()
    other = workload.reseeded(1)
    drawn = not isinstance(workload, Deterministic) and getattr(workload, "gaps", None) != ConstantGaps()
    assert workload.reseeded(0) == workload
    if num and drawn:
        assert other.arrivals(num).tolist() != arrivals.tolist()
    else:
        assert other.arrivals(num).tolist() == arrivals.tolist()
    assert json.loads(json.dumps(workload.describe())) == workload.describe()
    assert workload.describe()["kind"] == type(workload).__name__


@settings(max_examples=60, deadline=None)
@given(GAPS, SEEDS)
def test_gaps_are_positive_and_average_one(law: Any, seed: int) -> None:
    gaps = law.draw(np.random.default_rng(seed), 500)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1.0, abs=8 * 3.0 / math.sqrt(500))


@settings(max_examples=30, deadline=None)
@given(profiles(), st.floats(0.25, 4.0))
def test_a_profile_has_no_arrival_in_a_pause(profile: Stepped, factor: float) -> None:
    arrivals = profile.arrivals(200)
    ends = [*(start for start, _ in profile.steps[1:]), math.inf]
    for (start, rate), end in zip(profile.steps, ends, strict=True):
        if rate == 0:
            assert not ((arrivals > start) & (arrivals < end)).any()
    # Slower by a factor, with all starts later by it: the same, stretched.
    slow = Stepped([(s * factor, r / factor) for s, r in profile.steps], profile.gaps, profile.seed)
    np.testing.assert_allclose(slow.arrivals(200), arrivals * factor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "workload",
    [
        *(workload for workload, _ in LAWS),
        Weibull(3.0, cv=2.0),
        Deterministic(3.0),
        Stepped(STEPS, WeibullGaps(cv=2.0)),
        Spike(3.0, 30.0, 10.0, 5.0),
    ],
)
def test_a_hundred_thousand_arrivals_take_milliseconds(workload: OpenLoop) -> None:
    workload.arrivals(10)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        workload.arrivals(100_000)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gamma(-1.0, 2.0), "rate is -1.0 requests per second"),
        (lambda: Gamma(1.0, 0.0), "cv is 0.0; give a number between 0.01 and 100, or the deterministic law"),
        (lambda: Gamma(1.0, math.nan), "cv is nan"),
        (lambda: Weibull(0.0, 1.0), "rate is 0.0"),
        (lambda: Weibull(1.0), "shape None and cv None; give one of the two"),
        (lambda: Weibull(1.0, 1.0, 1.0), "shape 1.0 and cv 1.0; give one of the two"),
        (lambda: Weibull(1.0, 0.01), "shape is 0.01"),
        (lambda: WeibullGaps(cv=1000.0), "cv is 1000.0"),
        (lambda: Deterministic(math.inf), "rate is inf"),
        (lambda: Poisson(1.0, -1), "seed is -1"),
        (lambda: Poisson(1.0, timeout_seconds=0.0), "timeout_seconds is 0.0; give a positive number, or none"),
        (lambda: ClosedLoop(1, timeout_seconds=-2.0), "timeout_seconds is -2.0"),
        (lambda: ClosedLoop(1, timeout_seconds=math.nan), "timeout_seconds is nan"),
        (lambda: ClosedLoop(1, seed=-1), "seed is -1"),
        (lambda: ClosedLoop(1, math.inf), "think_seconds is inf"),
        (lambda: Stepped([]), "the first with start 0"),
        (lambda: Stepped([(1.0, 2.0)]), "the first with start 0"),
        (lambda: Stepped([(0.0, 2.0), (3.0, 1.0), (3.0, 2.0)]), "a step starts at 3.0 after one at 3.0"),
        (lambda: Stepped([(0.0, 2.0), (math.inf, 1.0)]), "a step starts at inf"),
        (lambda: Stepped([(0.0, -2.0), (1.0, 1.0)]), "the rate from 0.0 s on is -2.0"),
        (lambda: Stepped([(0.0, 2.0), (1.0, 0.0)]), "the last step has rate 0"),
        (lambda: Spike(0.0, 2.0, 1.0, 1.0), "base_rate is 0.0"),
        (lambda: Spike(1.0, -2.0, 1.0, 1.0), "peak_rate is -2.0"),
        (lambda: Spike(1.0, 2.0, -1.0, 1.0), "start_seconds is -1.0"),
        (lambda: Spike(1.0, 2.0, 1.0, 0.0), "duration_seconds is 0.0"),
        (lambda: Poisson(1.0).arrivals(-1), "num_requests is -1"),
        (lambda: Deterministic(1.0).arrivals(-1), "num_requests is -1"),
    ],
)
def test_impossible_workloads(make: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value)


# ---- think times ----------------------------------------------------------------------------------------------------


def test_think_times_follow_their_law() -> None:
    assert ClosedLoop(3, 2.5).think_times(4).tolist() == [2.5] * 4
    times = ClosedLoop(3, 2.5, ExponentialGaps(), seed=4).think_times(NUM)
    assert stats.kstest(times, "expon", args=(0, 2.5)).pvalue > 0.01
    assert stats.kstest(np.minimum(times, 7.5), "expon", args=(0, 2.5)).pvalue < 1e-6
    assert times[:9].tolist() == ClosedLoop(8, 2.5, ExponentialGaps(), seed=4).think_times(9).tolist()
    # Not the numbers that arrivals of the same seed are made of.
    assert abs(stats.spearmanr(times, gaps_of(Poisson(1.0, 4))).statistic) < 4 / math.sqrt(NUM)


def toy_loop() -> DecodeLoop:
    executor = ReplayExecutor(RecordedAnchors.from_trace(toy_trace(1, seed=2)), toy_cost())
    return DecodeLoop(executor, Scheduler(SchedulerConfig(), executor.block_size), Fixed(0), None, toy_cost())


def toy_requests(num: int) -> list[Request]:
    prompt = next(iter(RecordedAnchors.from_trace(toy_trace(1, seed=2)).prompts.values()))
    return [Request(number, prompt.prompt_id, prompt.domain, prompt.prompt_len, 2) for number in range(num)]


def test_the_live_driver_waits_the_think_times() -> None:
    requests, workload = toy_requests(4), ClosedLoop(1, 0.01, ExponentialGaps(), seed=1)
    serve(toy_loop(), requests, workload)
    answered = np.array([request.finish for request in requests[:-1]])
    assert [request.arrival for request in requests[1:]] == (answered + workload.think_times(4)[:-1]).tolist()


@pytest.mark.parametrize("workload", [ClosedLoop(1, timeout_seconds=2.0), Poisson(3.0, timeout_seconds=2.0)])
def test_the_live_driver_refuses_timeouts(workload: Workload) -> None:
    with pytest.raises(UserError, match=r"timeout_seconds is 2\.0 and a live run answers every request"):
        serve(toy_loop(), toy_requests(2), workload)


WORKLOADS: list[Workload] = [
    ClosedLoop(2),
    ClosedLoop(2, 0.5, ExponentialGaps()),
    Poisson(20.0),
    Gamma(20.0, 3.0),
    Weibull(20.0, cv=2.0),
    Deterministic(20.0),
    Stepped([(0.0, 5.0), (1.0, 0.0), (2.0, 50.0)]),
    Spike(5.0, 50.0, 0.2, 0.5),
    ImportedArrivals(imported()),
]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_simulator_serves_every_workload(workload: Workload) -> None:
    num = 12
    trace = simulate(toy_trace(4, seed=2), Fixed(2), workload, toy_cost(), num_requests=num, seed=3)
    requests = trace.requests.sort_values("request_id")
    used = workload.reseeded(3)
    assert trace.config["workload"] == json.loads(json.dumps(used.describe()))
    if isinstance(used, ClosedLoop):
        # Each arrival after the first two follows an answer, later by the pause keyed by the answered request.
        asked = requests.finish.to_numpy() + used.think_times(num)
        late = requests.arrival.to_numpy()[2:]
        assert all(np.isclose(asked, arrival, rtol=0, atol=1e-9).any() for arrival in late)
    else:
        np.testing.assert_allclose(requests.arrival, used.arrivals(num), rtol=0, atol=1e-9)
