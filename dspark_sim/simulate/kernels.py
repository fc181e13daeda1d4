"""Inner loops of the simulator as plain functions of arrays, which numba can turn into machine code.

They can be read, and tested, without numba. `compiled` says what they are for.
"""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Columns of a batch's state. The first three fall by the tokens emitted, the next two rise, the last two stay.
HEADROOM, LEFT, ROOM, ROW, POSITION, PAGES, ID = range(7)
NUM_COLUMNS, NUM_FALLING, NUM_MOVING = 7, 3, 5


class Kernels(NamedTuple):
    """The functions below, compiled or plain."""

    play: Callable[..., tuple[int, int, int]]
    admit: Callable[..., bool]
    grow: Callable[..., int]
    sweep: Callable[..., int]


def has_numba() -> bool:
    """Whether numba is installed; it is not imported to find out."""
    return importlib.util.find_spec("numba") is not None


@lru_cache(maxsize=1)
def compiled_kernels() -> Kernels:
    """The kernels as machine code. numba keeps it on disk; the first call ever takes some seconds.

    Ctrl-C waits until all are there: the compiler does not survive it.
    """
    from numba import njit, types

    def array(item: Any, dimensions: int, *, written: bool = False) -> Any:
        return types.Array(item, dimensions, "C", readonly=not written)

    whole, real = types.int64, types.float64
    state, ints, work = array(whole, 2, written=True), array(whole, 1), array(whole, 1, written=True)
    record = array(types.int32, 2, written=True)
    play = (state, whole, whole, ints, ints, ints, whole, record, whole)
    admit = (state, whole, whole, array(real, 2), ints, array(real, 1), work, work, array(real, 1, written=True))
    grow, sweep = (state, whole, whole, whole), (state, whole, state)
    with _interrupts_later():
        return Kernels(
            njit(play, cache=True)(_play),
            njit(admit, cache=True)(_admit),
            njit(grow, cache=True)(_grow),
            njit(sweep, cache=True)(_sweep),
        )


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def plain_kernels() -> Kernels:
    """The kernels as they stand here."""
    return Kernels(_play, _admit, _grow, _sweep)


def _play(
    state: IntArray,
    num: int,
    draft_len: int,
    num_accepted: IntArray,
    whole: IntArray,
    lens: IntArray,
    constant: int,
    record: npt.NDArray[np.int32],
    place: int,
) -> tuple[int, int, int]:
    """A decode round of the first `num` columns of the batch's state.

    Parameters
    ----------
    state
        [7, capacity], see `Batch`.
    num_accepted, whole
        [T], see `BlockTables`; `whole` is empty where every block is whole.
    lens, constant
        [>= num] drafts to verify, or empty: then `constant` for every request.
    record, place
        [6, N] and its first free column, or an array of no columns: then nothing is noted.

    Returns
    -------
    num_verified, num_emitted, num_ended
    """
    verified, total, ended = 0, 0, 0
    for request in range(num):
        row = state[ROW, request]
        drafted = min(state[ROOM, request], draft_len)
        if whole.size:
            drafted = min(drafted, whole[row])
        verify = min(lens[request] if lens.size else constant, drafted)
        accepted = min(verify, num_accepted[row])
        emitted = min(accepted + 1, state[LEFT, request])
        if record.size:
            record[0, place + request] = state[ID, request]
            record[1, place + request] = row
            record[2, place + request] = state[POSITION, request]
            record[3, place + request] = drafted
            record[4, place + request] = verify
            record[5, place + request] = emitted
        for column in range(NUM_FALLING):
            state[column, request] -= emitted
        for column in range(NUM_FALLING, NUM_MOVING):
            state[column, request] += emitted
        verified += verify
        total += emitted
        ended += state[LEFT, request] == 0
    return verified, total, ended


def _admit(
    state: IntArray,
    num: int,
    draft_len: int,
    survival: FloatArray,
    whole: IntArray,
    seconds: FloatArray,
    lens: IntArray,
    heap: IntArray,
    heads: FloatArray,
) -> bool:
    """Algorithm 1 (`policy.admit_prefixes`) without sorting: the best next drafts of all requests lie in a heap.

    Parameters
    ----------
    state, num, draft_len, whole
        As for `_play`.
    survival
        [T, γ] of the recorded blocks.
    seconds
        [num·draft_len + 1].
    lens, heap, heads
        [>= num] each: the answer, and room to work in.

    Returns
    -------
    bool
        False if the seconds fall somewhere; nothing is chosen then.
    """
    for entry in range(1, seconds.size):
        if seconds[entry] < seconds[entry - 1]:
            return False
    for request in range(num):
        lens[request] = 0
        heap[request] = request
        drafted = min(state[ROOM, request], draft_len)
        if whole.size:
            drafted = min(drafted, whole[state[ROW, request]])
        heads[request] = survival[state[ROW, request], 0] if drafted > 0 else 0.0
    expected, admitted = float(num), 0
    best = expected / seconds[0]
    unordered = num // 2
    while True:
        if unordered:
            # Heap order first, from the last parent to the top.
            unordered -= 1
            node = unordered
        else:
            request = heap[0]
            expected += heads[request]
            if admitted == num * draft_len or heads[request] <= 0.0:
                return True
            admitted += 1
            throughput = expected / seconds[admitted]
            if not throughput > best:
                return True
            best = throughput
            lens[request] += 1
            row, depth = state[ROW, request], lens[request]
            drafted = min(state[ROOM, request], draft_len)
            if whole.size:
                drafted = min(drafted, whole[row])
            heads[request] = survival[row, depth] if depth < drafted else 0.0
            node = 0
        # The request at the node sinks below those that come before it: by survival, then position, then place.
        sinking = heap[node]
        while 2 * node + 1 < num:
            child = 2 * node + 1
            if child + 1 < num:
                left, right = heap[child], heap[child + 1]
                if heads[right] > heads[left] or (
                    heads[right] == heads[left]
                    and (lens[right] < lens[left] or (lens[right] == lens[left] and right < left))
                ):
                    child += 1
            other = heap[child]
            if heads[other] < heads[sinking] or (
                heads[other] == heads[sinking]
                and (lens[other] > lens[sinking] or (lens[other] == lens[sinking] and other > sinking))
            ):
                break
            heap[node] = other
            node = child
        heap[node] = sinking


def _grow(state: IntArray, num: int, page_size: int, free_pages: int) -> int:
    """Pages for every request whose headroom is used up; how many, or -1 if there are too few: nobody grew then."""
    needed = 0
    for request in range(num):
        if state[HEADROOM, request] < 0:
            needed += -(state[HEADROOM, request] // page_size)
    if needed > free_pages:
        return -1
    if needed:
        for request in range(num):
            if state[HEADROOM, request] < 0:
                pages = -(state[HEADROOM, request] // page_size)
                state[PAGES, request] += pages
                state[HEADROOM, request] += pages * page_size
    return needed


def _sweep(state: IntArray, num: int, gone: IntArray) -> int:
    """Close the gaps of requests with no token left; their places, positions and pages go to [3, >= num]; how many."""
    count = 0
    for request in range(num):
        if state[LEFT, request] == 0:
            gone[0, count] = request
            gone[1, count] = state[POSITION, request]
            gone[2, count] = state[PAGES, request]
            count += 1
        elif count:
            for column in range(NUM_COLUMNS):
                state[column, request - count] = state[column, request]
    return count
