"""The running requests of the simulated server as columns of one array, in the order in which they were admitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dspark_sim.request import Request
from dspark_sim.simulate.kernels import (
    HEADROOM,
    ID,
    LEFT,
    NUM_COLUMNS,
    NUM_FALLING,
    NUM_MOVING,
    PAGES,
    POSITION,
    ROOM,
    ROW,
    Kernels,
)

IntArray = npt.NDArray[np.int64]


class Batch:
    """Columns of R running requests; `Request.num_generated` is brought up to date when one leaves.

    Parameters
    ----------
    page_size, reserve
        Places of a page, and of a request's anchor and drafts.
    kernels
        For what machine code can do; ``None`` does it by array operations.

    Attributes
    ----------
    requests
        In order of admission.
    state
        [7, capacity], the first R of each of the columns named above: places in a request's pages behind its context,
        its anchor and a whole block of drafts; output tokens until it ends; drafts that fit before its longest output;
        row of its anchor in the recorded tables; the anchor's absolute position; its pages; its number.
    context_tokens
        Sum of the contexts.
    """

    def __init__(self, page_size: int, reserve: int, kernels: Kernels | None = None) -> None:
        self._page_size, self._reserve, self._kernels = page_size, reserve, kernels
        self.state = np.zeros((NUM_COLUMNS, 16), dtype=np.int64)
        self.requests: list[Request] = []
        self.context_tokens = 0
        self._gone = np.zeros((3, 16), dtype=np.int64)

    @property
    def ids(self) -> tuple[int, ...]:
        """Numbers of the requests."""
        return tuple(self.state[ID, : len(self.requests)].tolist())

    def column(self, which: int) -> IntArray:
        """A column [R] of the state, as a view."""
        return self.state[which, : len(self.requests)]

    def add(self, new: Sequence[tuple[Request, int, tuple[int, int, int, int, int]]]) -> None:
        """Put requests with their pages and recorded facts (see `executor.look_up`) behind the others."""
        before = len(self.requests)
        if before + len(new) > self.state.shape[1]:
            self.state = np.pad(self.state, ((0, 0), (0, max(len(new), self.state.shape[1]))))
        state = self.state
        for place, (request, pages, facts) in enumerate(new, before):
            first_row, output_len, _, max_tokens, prompt_len = facts
            done = request.num_generated
            context = prompt_len + done - 1
            # Entry by entry: an array of seven numbers takes longer to make.
            state[HEADROOM, place] = pages * self._page_size - context - self._reserve
            state[LEFT, place] = min(output_len, max_tokens) - done
            state[ROOM, place] = max_tokens - done - 1
            state[ROW, place] = first_row + done - 1
            state[POSITION, place] = context
            state[PAGES, place] = pages
            state[ID, place] = request.request_id
            self.requests.append(request)
            self.context_tokens += context

    def grow(self, free_pages: int) -> int:
        """Give every request the pages that a round needs; how many, or -1 if there are too few: nobody grew then."""
        num = len(self.requests)
        if self._kernels is not None:
            return int(self._kernels.grow(self.state, num, self._page_size, free_pages))
        headroom = self.column(HEADROOM)
        if not num or headroom[headroom.argmin()] >= 0:
            return 0
        short = np.maximum(-(headroom // self._page_size), 0)
        needed = int(short.sum())
        if needed > free_pages:
            return -1
        self.column(PAGES)[:] += short
        headroom += short * self._page_size
        return needed

    def ended(self) -> tuple[list[Request], int]:
        """Take out the requests that have their last token; as `remove`."""
        num = len(self.requests)
        if self._kernels is None:
            return self.remove(np.flatnonzero(self.column(LEFT) == 0).tolist())
        if num > self._gone.shape[1]:
            self._gone = np.zeros((3, 2 * num), dtype=np.int64)
        count = self._kernels.sweep(self.state, num, self._gone)
        places, positions, held = self._gone[:, :count].tolist()
        removed = [self.requests[place] for place in places]
        for place in reversed(places):
            del self.requests[place]
        for request, position in zip(removed, positions, strict=True):
            request.num_generated = position - request.prompt_len + 1
        self.context_tokens -= sum(positions)
        return removed, sum(held)

    def remove(self, places: list[int]) -> tuple[list[Request], int]:
        """Take out the requests at some rising places; returns them in order, and how many pages they had."""
        state = self.state
        removed = []
        pages = 0
        for place in reversed(places):
            request = self.requests.pop(place)
            position, pages = int(state[POSITION, place]), pages + int(state[PAGES, place])
            request.num_generated = position - request.prompt_len + 1
            self.context_tokens -= position
            last = len(self.requests)
            state[:, place:last] = state[:, place + 1 : last + 1]
            removed.append(request)
        removed.reverse()
        return removed, pages

    def advance(self, emitted: IntArray) -> None:
        """Count the tokens [R] that a round emitted."""
        num = len(self.requests)
        self.state[:NUM_FALLING, :num] -= emitted
        self.state[NUM_FALLING:NUM_MOVING, :num] += emitted
        self.context_tokens += int(emitted.sum())
