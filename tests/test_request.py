from math import isnan

import pytest

from dspark_sim.request import Request


def make(max_tokens: int = 10) -> Request:
    return Request(0, "p", "toy", prompt_len=7, max_tokens=max_tokens, arrival=1.0)


def test_positions_follow_the_definition() -> None:
    request = make()
    assert (request.prefill_len, request.context_len, request.remaining) == (7, 7, 10)
    request.append(1, False, now=2.0)
    # Output token 0 is the anchor and stands right after the prompt; everything before it is in the cache.
    assert (request.position, request.context_len, request.remaining) == (7, 7, 9)
    request.append(4, False, now=3.0)
    assert (request.position, request.context_len, request.prefill_len) == (11, 11, 11)


def test_first_token_and_finish_are_set_once() -> None:
    request = make(max_tokens=3)
    assert isnan(request.first_token)
    request.append(0, False, now=1.5)
    assert isnan(request.first_token)
    request.append(1, False, now=2.0)
    request.append(2, False, now=5.0)
    assert (request.first_token, request.finish, request.finish_reason) == (2.0, 5.0, "length")


@pytest.mark.parametrize(
    ("num_tokens", "stopped", "reason"), [(3, True, "stop"), (3, False, "length"), (2, False, None)]
)
def test_end_of_sequence_wins_over_the_length_limit(num_tokens: int, stopped: bool, reason: str | None) -> None:
    request = make(max_tokens=3)
    request.append(num_tokens, stopped, now=1.0)
    assert request.finish_reason == reason
    assert request.is_finished == (reason is not None)


def test_requests_are_told_apart_by_identity() -> None:
    assert make() != make()
