"""The world around the decode loop as SimPy processes: a server, users, and a source of arrivals.

The server runs one iteration after another while there is work, and sleeps when there is none. SimPy's clock counts
float seconds. The server is one event per iteration; nothing here happens per token.

Order at one instant: a finished iteration is answered first, in the order of finishing; users who ask again at once
are queued in that order, before the next iteration starts. A live driver does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Protocol

import simpy
from simpy.events import ProcessGenerator

from dspark_sim.request import Request
from dspark_sim.simulate.array_loop import ArrayLoop


class Loop(Protocol):
    """What a server runs: `ArrayLoop`, or the plain `loop.DecodeLoop`."""

    finished: list[Request]

    @property
    def has_work(self) -> bool:
        """Whether an iteration would do anything."""
        ...

    def submit(self, request: Request) -> bool | None:
        """Queue a request; False if it is refused."""
        ...

    def step(self, now: float) -> float:
        """Run one iteration and return its seconds."""
        ...


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

    Attributes
    ----------
    outstanding_tokens
        Prompts and longest outputs of the requests that it has not answered.
    """

    def __init__(
        self, env: simpy.Environment, loop: Loop, on_finish: Callable[[Request], object] | None = None
    ) -> None:
        self.env = env
        self.loop = loop
        self._on_finish = on_finish
        self._answers: dict[int, simpy.Event] = {}
        self.outstanding_tokens = 0
        self._work_came = env.event()
        env.process(self._serve())

    def submit(self, request: Request) -> simpy.Event:
        """Queue a request that arrives now; the returned event happens when it is answered or refused."""
        request.arrival = self.env.now
        answer = self.env.event()
        if self.loop.submit(request) is False:
            self._close(request, answer)
            return answer
        self._answers[request.request_id] = answer
        self.outstanding_tokens += request.prompt_len + request.max_tokens
        self._wake()
        return answer

    def give_up(self, request: Request) -> None:
        """The user of a request goes away."""
        assert isinstance(self.loop, ArrayLoop)
        self.loop.give_up(request, self.env.now)
        self._wake()

    def _wake(self) -> None:
        if not self._work_came.triggered:
            self._work_came.succeed()

    def _close(self, request: Request, answer: simpy.Event) -> None:
        answer.succeed(request)
        if self._on_finish is not None:
            self._on_finish(request)

    def _serve(self) -> ProcessGenerator:
        loop, timeout = self.loop, self.env.timeout
        answered = 0
        while True:
            if not loop.has_work:
                self._work_came = self.env.event()
                yield self._work_came
            yield timeout(loop.step(self.env.now))
            if len(loop.finished) == answered:
                continue
            for request in loop.finished[answered:]:
                # A refused request was answered at once.
                if request.request_id in self._answers:
                    self.outstanding_tokens -= request.prompt_len + request.max_tokens
                    self._close(request, self._answers.pop(request.request_id))
            answered = len(loop.finished)
            # Let the users who were just answered speak before the next iteration.
            yield timeout(0.0)


class Router(Protocol):
    """Chooses the server of each request."""

    def submit(self, request: Request) -> tuple[Server, simpy.Event]:
        """Send a request that arrives now; returns its server and the event of its answer."""
        ...


class RoundRobin:
    """Every server in turn."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = cycle(servers)

    def submit(self, request: Request) -> tuple[Server, simpy.Event]:
        """See `Router`."""
        server = next(self._servers)
        return server, server.submit(request)


class LeastOutstandingTokens:
    """The server that owes the fewest tokens: prompts and longest outputs of the requests it has not answered.

    Of equal ones the first.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    def submit(self, request: Request) -> tuple[Server, simpy.Event]:
        """See `Router`."""
        server = min(self._servers, key=lambda server: server.outstanding_tokens)
        return server, server.submit(request)


def user(
    env: simpy.Environment,
    router: Router,
    requests: Iterator[Request],
    think_times: Sequence[float],
    timeout_seconds: float | None = None,
) -> ProcessGenerator:
    """One user of a closed loop: take the next request off the shared list, wait for the answer, think, ask again.

    The pause after a request is the entry of `think_times` at its request_id, in seconds. A user who has waited
    `timeout_seconds` gives the request up.
    """
    for request in requests:
        server, answer = router.submit(request)
        if timeout_seconds is None:
            yield answer
        else:
            yield answer | env.timeout(timeout_seconds)
            if not answer.triggered:
                server.give_up(request)
        if think_times[request.request_id] > 0:
            yield env.timeout(think_times[request.request_id])


def source(
    env: simpy.Environment,
    router: Router,
    requests: Iterable[Request],
    arrivals: Iterable[float],
    timeout_seconds: float | None = None,
) -> ProcessGenerator:
    """An open loop: send each request at its time, whatever the server does."""
    for request, arrival in zip(requests, arrivals, strict=True):
        yield env.timeout(max(arrival - env.now, 0.0))
        server, answer = router.submit(request)
        if timeout_seconds is not None:
            env.process(_patience(env, server, request, answer, timeout_seconds))


def _patience(
    env: simpy.Environment, server: Server, request: Request, answer: simpy.Event, seconds: float
) -> ProcessGenerator:
    yield answer | env.timeout(seconds)
    if not answer.triggered:
        server.give_up(request)
