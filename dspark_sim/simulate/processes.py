"""The world around the decode loop as SimPy processes: a server, users, and a source of arrivals.

The server runs one iteration after another while there is work, and sleeps when there is none. SimPy's clock counts
float seconds. The server is one event per iteration; nothing here happens per token.

Order at one instant: a finished iteration is answered first, in the order of finishing; users who ask again at once
are queued in that order, before the next iteration starts. A live driver does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import simpy
from simpy.events import ProcessGenerator

from dspark_sim.loop import DecodeLoop
from dspark_sim.request import Request


class Server:
    """A decode loop that lives in simulated time.

    Parameters
    ----------
    env
        The simulation.
    loop
        The server's iterations.
    on_finish
        Called with every finished request.
    """

    def __init__(
        self, env: simpy.Environment, loop: DecodeLoop, on_finish: Callable[[Request], object] | None = None
    ) -> None:
        self.env = env
        self.loop = loop
        self._on_finish = on_finish
        self._answers: dict[int, simpy.Event] = {}
        self._work_came = env.event()
        env.process(self._serve())

    def submit(self, request: Request) -> simpy.Event:
        """Queue a request that arrives now; the returned event happens when it is answered."""
        request.arrival = self.env.now
        self.loop.submit(request)
        answer = self._answers[request.request_id] = self.env.event()
        if not self._work_came.triggered:
            self._work_came.succeed()
        return answer

    def _serve(self) -> ProcessGenerator:
        while True:
            if not self.loop.has_work:
                self._work_came = self.env.event()
                yield self._work_came
            num_finished = len(self.loop.finished)
            yield self.env.timeout(self.loop.step(self.env.now))
            finished = self.loop.finished[num_finished:]
            for request in finished:
                self._answers.pop(request.request_id).succeed(request)
                if self._on_finish is not None:
                    self._on_finish(request)
            if finished:
                # Let the users who were just answered speak before the next iteration.
                yield self.env.timeout(0.0)


def user(
    env: simpy.Environment, server: Server, requests: Iterator[Request], think_times: Sequence[float]
) -> ProcessGenerator:
    """One user of a closed loop: take the next request off the shared list, wait for the answer, think, ask again.

    The pause after a request is the entry of `think_times` at its request_id, in seconds.
    """
    for request in requests:
        yield server.submit(request)
        if think_times[request.request_id] > 0:
            yield env.timeout(think_times[request.request_id])


def source(
    env: simpy.Environment, server: Server, requests: Iterable[Request], arrivals: Iterable[float]
) -> ProcessGenerator:
    """An open loop: send each request at its time, whatever the server does."""
    for request, arrival in zip(requests, arrivals, strict=True):
        yield env.timeout(max(arrival - env.now, 0.0))
        server.submit(request)
