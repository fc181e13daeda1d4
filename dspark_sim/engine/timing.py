"""Spans of an iteration: wall seconds on a CPU, CUDA events on a GPU. A span inside another is not counted there.

Events cost no synchronisation when they are recorded; they are read once, at the end of a part that has
synchronised anyway (tokens have come back to the host).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch


class SpanTimer:
    """Collects named seconds on one device.

    Parameters
    ----------
    device
        Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, str | None, Any, Any]] = []
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the block's seconds to `name`, and take them from the span around it."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        try:
            if self._cuda:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                yield
                end.record()
                self._events.append((name, outer, begin, end))
            else:
                start = perf_counter()
                yield
                self._add(name, outer, perf_counter() - start)
        finally:
            self._open.pop()

    def collect(self) -> dict[str, float]:
        """Seconds since the last call; on CUDA waits for the last event."""
        for name, outer, begin, end in self._events:
            end.synchronize()
            self._add(name, outer, begin.elapsed_time(end) / 1e3)
        self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds
