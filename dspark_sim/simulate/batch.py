"""The running requests of the simulated server as columns of one array, in the order in which they were admitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dspark_sim.request import Request

IntArray = npt.NDArray[np.int64]

# All columns move by the tokens emitted, the first three down and the others up.
_NUM_COLUMNS, _NUM_FALLING, _POSITION = 5, 3, 4


class Batch:
    """Columns of R running requests; `Request.num_generated` is brought up to date when one leaves.

    Parameters
    ----------
    page_size, reserve
        Places of a page, and of a request's anchor and drafts.

    Attributes
    ----------
    requests, ids
        The requests and their numbers.
    pages
        [capacity] pages of each; only the first R count.
    headroom
        [R] places in a request's pages behind its context, its anchor and a whole block of drafts.
    left, room
        [R] output tokens until it ends, and drafts that fit before its longest output.
    rows, positions
        [R] row of its anchor in the recorded tables, and the anchor's absolute position.
    ones
        [R] ones.
    context_tokens
        Sum of the contexts.
    """

    headroom: IntArray
    left: IntArray
    room: IntArray
    rows: IntArray
    positions: IntArray

    def __init__(self, page_size: int, reserve: int) -> None:
        self._page_size, self._reserve = page_size, reserve
        self._state = np.zeros((_NUM_COLUMNS, 16), dtype=np.int64)
        self._id_list: list[int] = []
        self.pages = np.zeros(16, dtype=np.int64)
        self.requests: list[Request] = []
        self.context_tokens = 0
        self._view()

    def add(self, new: Sequence[tuple[Request, int, tuple[int, int, int, int, int]]]) -> None:
        """Put requests with their pages and recorded facts (see `executor.look_up`) behind the others."""
        before = len(self.requests)
        if before + len(new) > self.pages.size:
            more = max(len(new), self.pages.size)
            self._state = np.pad(self._state, ((0, 0), (0, more)))
            self.pages = np.pad(self.pages, (0, more))
        for place, (request, pages, facts) in enumerate(new, before):
            first_row, output_len, _, max_tokens, prompt_len = facts
            done = request.num_generated
            self._state[:, place] = (
                pages * self._page_size - request.context_len - self._reserve,
                min(output_len, max_tokens) - done,
                max_tokens - done - 1,
                first_row + done - 1,
                prompt_len + done - 1,
            )
            self.pages[place] = pages
            self.requests.append(request)
            self._id_list.append(request.request_id)
            self.context_tokens += prompt_len + done - 1
        self._view()

    def remove(self, places: list[int]) -> tuple[list[Request], int]:
        """Take out the requests at some rising places; returns them in order, and how many pages they had."""
        removed = [self.requests[place] for place in places]
        pages = int(self.pages[places].sum())
        for request, place in zip(removed, places, strict=True):
            request.num_generated = int(self._state[_POSITION, place]) - request.prompt_len + 1
        for place in reversed(places):
            last = len(self.requests) - 1
            self.context_tokens -= int(self._state[_POSITION, place])
            self._state[:, place:last] = self._state[:, place + 1 : last + 1]
            self.pages[place:last] = self.pages[place + 1 : last + 1]
            del self.requests[place], self._id_list[place]
        self._view()
        return removed, pages

    def advance(self, emitted: IntArray) -> None:
        """Count the tokens [R] that a round emitted."""
        np.subtract(self._falling, emitted, out=self._falling)
        np.add(self._rising, emitted, out=self._rising)
        self.context_tokens += int(emitted.dot(self.ones))

    def _view(self) -> None:
        state = self._state[:, : len(self.requests)]
        self.ids = tuple(self._id_list)
        self._falling, self._rising = state[:_NUM_FALLING], state[_NUM_FALLING:]
        self.headroom, self.left, self.room, self.rows, self.positions = state
        self.ones = np.ones(len(self.requests), dtype=np.int64)
