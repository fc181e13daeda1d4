from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sim.errors import UserError
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig


def make(request_id: int, prompt_len: int = 4, max_tokens: int = 8) -> Request:
    return Request(request_id, f"p{request_id}", "toy", prompt_len, max_tokens)


def check_limits(scheduler: Scheduler) -> None:
    config = scheduler.config
    pages = scheduler._pages
    assert scheduler.free_pages >= 0
    assert scheduler.free_pages + sum(pages.values()) == config.num_pages
    assert len(scheduler.running) <= config.max_num_seqs
    assert {request.request_id for request in scheduler.running} == set(pages)
    waiting = {request.request_id for request in scheduler.waiting}
    assert not waiting & set(pages)


@st.composite
def servers(draw: st.DrawFn) -> tuple[SchedulerConfig, int, list[Request]]:
    block_size = draw(st.integers(0, 5))
    shapes = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12))
    requests = [make(i, prompt_len, max_tokens) for i, (prompt_len, max_tokens) in enumerate(shapes)]
    page_size = draw(st.integers(1, 8))
    longest = max(prompt_len + max_tokens for prompt_len, max_tokens in shapes) + block_size
    config = SchedulerConfig(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        num_pages=-(-longest // page_size) + draw(st.integers(0, 12)),
        page_size=page_size,
    )
    return config, block_size, requests


@settings(deadline=None)
@given(servers(), st.integers(0, 2**32 - 1))
def test_laws_over_random_workloads(server: tuple[SchedulerConfig, int, list[Request]], seed: int) -> None:
    """Pages are conserved, limits hold, service is first come first served, and everyone finishes."""
    config, block_size, requests = server
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(config, block_size)
    upcoming = list(requests)
    first_prefills: list[int] = []
    for step in count():
        assert step < 2000, "no progress"
        while upcoming and (not scheduler.has_work or rng.random() < 0.5):
            scheduler.add(upcoming.pop(0))
        if not scheduler.has_work:
            break
        plan = scheduler.schedule()
        check_limits(scheduler)
        assert plan.prefill or plan.decode
        assert not (plan.prefill and plan.decode)
        prefill_tokens = sum(request.prefill_len for request in plan.prefill)
        assert len(plan.prefill) <= 1 or prefill_tokens <= config.max_num_batched_tokens
        for request in plan.decode:
            assert scheduler._pages[request.request_id] * config.page_size >= request.context_len + 1 + block_size
        assert not set(plan.preempted) & set(plan.decode)
        first_prefills += [request.request_id for request in plan.prefill if request.num_generated == 0]
        for request in plan.prefill + plan.decode:
            emitted = int(request.num_generated == 0) if plan.prefill else int(rng.integers(1, block_size + 2))
            request.append(min(emitted, request.remaining), bool(plan.decode) and rng.random() < 0.1, float(step))
            if request.is_finished:
                scheduler.finish(request)
        check_limits(scheduler)
    assert all(request.is_finished for request in requests)
    assert scheduler.free_pages == config.num_pages
    # A request preempted before its first token could come twice; the first times must be in order.
    assert list(dict.fromkeys(first_prefills)) == [request.request_id for request in requests]


def test_prefill_goes_first_and_obeys_the_token_limit() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=10), block_size=2)
    requests = [make(0, 6), make(1, 4), make(2, 1), make(3, 15)]
    for request in requests:
        scheduler.add(request)
    batches = [[request.request_id for request in scheduler.schedule().prefill] for _ in range(3)]
    assert batches == [[0, 1], [2], [3]]
    assert scheduler.schedule().decode == requests


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    # 4 pages of 4 places; each request holds prompt 4 + anchor 1 + draft 2 = 7 places, 2 pages.
    scheduler = Scheduler(SchedulerConfig(num_pages=4, page_size=4), block_size=2)
    old, young, late = (make(i, 4, 8) for i in range(3))
    for request in (old, young, late):
        scheduler.add(request)
    assert scheduler.schedule().prefill == [old, young]
    for request in (old, young):
        request.append(1, False, 0.0)
    old.append(3, False, 1.0)
    plan = scheduler.schedule()
    assert (plan.decode, plan.preempted) == ([old], [young])
    assert (young.num_preemptions, list(scheduler.waiting)) == (1, [young, late])
    old.append(4, False, 2.0)
    assert old.finish_reason == "length"
    scheduler.finish(old)
    assert scheduler.schedule().prefill == [young, late]
    assert young.num_generated == 1
    assert scheduler.running == [young, late]


@pytest.mark.parametrize("limit", [{"max_model_len": 20}, {"num_pages": 5, "page_size": 4}])
def test_too_long_a_request_is_refused(limit: dict[str, int]) -> None:
    scheduler = Scheduler(SchedulerConfig(**limit), block_size=3)
    scheduler.add(make(0, 9, 8))
    with pytest.raises(UserError, match=r"prompt p1 needs 21 positions \(10 prompt, 8 output, 3 draft tokens\)"):
        scheduler.add(make(1, 10, 8))
    assert scheduler.schedule().prefill


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size", "max_model_len"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        SchedulerConfig(**{name: 0})
