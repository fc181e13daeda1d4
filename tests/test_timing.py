"""Spans on a clock that the test moves."""

import pytest

torch = pytest.importorskip("torch")

from dspark_sim.engine import timing  # noqa: E402
from dspark_sim.engine.timing import SpanTimer  # noqa: E402


@pytest.fixture
def clock(monkeypatch):
    """A list with the present time; spans read it."""
    now = [100.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    return now


def test_a_span_inside_another_is_not_counted_there(clock):
    timer = SpanTimer(torch.device("cpu"))
    with timer.span("head"):
        clock[0] += 1.0
        for _ in range(3):
            with timer.span("draft"):
                clock[0] += 4.0
                with timer.span("accept"):
                    clock[0] += 16.0
            clock[0] += 0.5
    with timer.span("draft"):
        clock[0] += 2.0
    assert timer.collect() == {"head": 2.5, "draft": 14.0, "accept": 48.0}
    assert timer.collect() == {}


def test_a_span_that_raises_does_not_enclose_what_follows(clock):
    timer = SpanTimer(torch.device("cpu"))
    with pytest.raises(ValueError, match="inside"), timer.span("draft"):
        raise ValueError("inside")
    with timer.span("head"):
        clock[0] += 1.0
    assert timer.collect() == {"head": 1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_so_with_cuda_events():
    timer = SpanTimer(torch.device("cuda"))
    x = torch.randn(2048, 2048, device="cuda")
    with timer.span("outer"):
        with timer.span("inner"):
            for _ in range(50):
                x = x @ x / 2048
        x = x + 1
    seconds = timer.collect()
    assert 0 < seconds["outer"] < seconds["inner"]
