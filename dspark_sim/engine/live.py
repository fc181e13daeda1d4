"""The live driver: sends requests to a loop at their times and runs it until all are answered."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Sequence

from tqdm import tqdm

from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop
from dspark_sim.request import Request
from dspark_sim.workload import ClosedLoop, Workload


def serve(loop: DecodeLoop, requests: Sequence[Request], workload: Workload, *, progress: bool = False) -> None:
    """Run all requests; times in them are seconds since the call.

    A closed loop's user sends its next request the moment (plus think time) its last one is answered, in the order
    of finishing; an open loop's requests arrive at their drawn times.

    Raises
    ------
    UserError
        If users have a timeout: a live request cannot be abandoned.
    """
    if workload.timeout_seconds is not None:
        raise UserError(
            f"timeout_seconds is {workload.timeout_seconds} and a live run answers every request; leave it out, or "
            "simulate"
        )
    order = itertools.count()
    if isinstance(workload, ClosedLoop):
        times = [0.0] * min(workload.num_users, len(requests))
        think_times = workload.think_times(len(requests)).tolist()
    else:
        times = workload.arrivals(len(requests)).tolist()
    arrivals = [(when, next(order)) for when in times]
    heapq.heapify(arrivals)
    pending = deque(requests)
    start = time.perf_counter()
    with tqdm(total=len(requests), unit="request", disable=not progress, leave=False) as bar:
        while pending or loop.has_work:
            now = time.perf_counter() - start
            while pending and arrivals and arrivals[0][0] <= now:
                request = pending.popleft()
                request.arrival = heapq.heappop(arrivals)[0]
                loop.submit(request)
            if not loop.has_work:
                time.sleep(max(0.0, arrivals[0][0] - now))
                continue
            loop.step(now)
            for request in loop.finished:
                bar.update()
                if isinstance(workload, ClosedLoop):
                    heapq.heappush(arrivals, (request.finish + think_times[request.request_id], next(order)))
            loop.finished.clear()
