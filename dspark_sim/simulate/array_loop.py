"""The decode loop of the simulator: `loop.DecodeLoop` on recorded anchors, with the batch kept as arrays.

The plain loop asks every running request for its counts in every iteration; here the counts are columns of one array
that an iteration moves on at once. Decisions are the same ones: a policy's controller is the live engine's own, and
`tests/test_array_loop.py` runs both loops on random servers and compares whole traces. What only a simulator offers
is here alone: chunked prefill, requests that are given up or refused, a load that policies see late.

An iteration is schedule, draft, choose, verify, commit, as in the plain loop. Lengths and counts are in tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark_sim.cost import IterationSeconds
from dspark_sim.errors import UserError
from dspark_sim.loop import require_runnable
from dspark_sim.policy import LoadView, SpeculationPolicy
from dspark_sim.request import Request
from dspark_sim.scheduler import SchedulerConfig, longest_sequence
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.array_recorder import ArrayRecorder
from dspark_sim.simulate.batch import Batch
from dspark_sim.simulate.block_tables import BlockTables
from dspark_sim.simulate.compiled import CompiledRounds
from dspark_sim.simulate.executor import look_up
from dspark_sim.simulate.kernels import HEADROOM, PAGES, Kernels
from dspark_sim.simulate.rounds import ArrayRounds, Rounds


@dataclass(slots=True, eq=False)
class _Prefill:
    """A running request whose prompt is not yet whole in the cache."""

    request: Request
    pages: int
    done: int = 0


class ArrayLoop:
    """One simulated server.

    Parameters
    ----------
    anchors
        Recorded blocks and outputs, cut to the block size of the run.
    cost
        Seconds of prefill, draft, verify and host.
    config
        The server's limits.
    policy
        Chooses how many drafts are verified; started here.
    recorder
        Collects the trace.
    allow_biased
        Run a policy that would bias the live output, as a negative control.
    load_lag
        Iterations by which the load that the policy sees is old: running and waiting requests, context tokens.
    tables
        Of `anchors`, to share them between servers.
    kernels
        Play decode rounds with these, see `compiled`; ``None`` plays them by array operations.

    Raises
    ------
    UserError
        If the policy needs confidences or a signal that were not recorded, or would bias the output.
    """

    def __init__(
        self,
        anchors: RecordedAnchors,
        cost: IterationSeconds,
        config: SchedulerConfig,
        policy: SpeculationPolicy,
        recorder: ArrayRecorder,
        *,
        allow_biased: bool = False,
        load_lag: int = 0,
        tables: BlockTables | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.biased = require_runnable(
            policy, anchors.mode, anchors.estimates, allow_biased, None if anchors.tree is None else anchors.tree.shape
        )
        if load_lag < 0:
            raise UserError(f"load_lag is {load_lag}; give 0 (the load of now) or more iterations")
        self.anchors, self.cost, self.config, self.recorder = anchors, cost, config, recorder
        self.controller = policy.start()
        tables = tables or BlockTables.of(anchors, policy)
        # By the contract of policies their choice does not depend on what is passed for survival then.
        looks = policy.information != "history"
        self._rounds: Rounds = ArrayRounds(self.controller, tables, recorder, looks)
        if kernels is not None and anchors.tree is None:
            self._rounds = CompiledRounds(self.controller, tables, recorder, looks, kernels)
        self.block_size = anchors.round_size
        self.reserve = 1 + self.block_size
        self.waiting: deque[Request] = deque()
        self.finished: list[Request] = []
        self.free_pages = config.num_pages
        self.num_steps = 0
        self._prefilling: deque[_Prefill] = deque()
        self._given_up: list[tuple[Request, float]] = []
        self._views: deque[LoadView] = deque(maxlen=load_lag + 1)
        self._batch = Batch(config.page_size, self.reserve, kernels)
        self._facts: dict[int, tuple[int, int, int, int, int]] = {}

    @property
    def has_work(self) -> bool:
        """Whether an iteration would do anything."""
        return bool(self._batch.requests or self.waiting or self._prefilling or self._given_up)

    @property
    def num_running(self) -> int:
        """Requests in the batch, those whose prompts are being read among them."""
        return len(self._batch.requests) + len(self._prefilling)

    def submit(self, request: Request) -> bool:
        """Queue a request; its `arrival` must be set.

        Returns
        -------
        bool
            False if it can never run, because it is longer than the context or than the whole cache: it is then
            finished at once with reason ``refused``.
        """
        facts = look_up(self.anchors, request)
        if longest_sequence(request, self.reserve) > self.config.longest:
            request.finish_reason, request.finish = "refused", request.arrival
            self.finished.append(request)
            self.recorder.finish(request)
            return False
        self._facts[request.request_id] = facts
        self.waiting.append(request)
        return True

    def give_up(self, request: Request, now: float) -> None:
        """Its user does not wait any longer: it leaves before the next iteration.

        If the present iteration is its last, its user is gone when the answer comes.
        """
        if request.is_finished:
            request.finish_reason, request.finish = "abort", now
        else:
            self._given_up.append((request, now))

    def step(self, now: float) -> float:
        """Run one iteration that starts at time `now`; returns the seconds it takes.

        Requests it finished are appended to `finished`.

        Raises
        ------
        UserError
            If the KV cache cannot hold one waiting request.
        """
        if self._given_up:
            self._abort()
            if not self.has_work:
                return 0.0
        if self.config.enable_chunked_prefill:
            return self._mixed(now)
        admitted = self._admit()
        return self._prefill(admitted, now) if admitted else self._mixed(now)

    def _mixed(self, now: float) -> float:
        """A decode round of all requests that can, beside which prompts are read as far as the budget goes."""
        self._grow()
        batch = self._batch
        num = len(batch.requests)
        draft_len = ended = 0
        load: LoadView | None = None
        if num:
            known = self._rounds.draft_len
            if known is None or self._views.maxlen != 1:
                load = self._load()
                known = self.controller.draft_len(load)
            draft_len = min(known, self.block_size)
        chunks = self._chunks(num * (1 + draft_len)) if self.config.enable_chunked_prefill else []
        if not num and not chunks:
            raise UserError("the KV cache is too small to hold one waiting request; raise num_pages")
        num_prefill_tokens = sum(size for _, size in chunks) if chunks else 0
        num_running, num_waiting = self.num_running, len(self.waiting)
        if num:
            context = batch.context_tokens
            num_verified, ended = self._rounds.play(batch, load, draft_len)
            batch_tokens = num + num_verified + num_prefill_tokens
            draft_seconds = self.cost.draft_seconds(num, draft_len, context) if draft_len else 0.0
            read = sum(chunk.done for chunk, _ in chunks) if chunks else 0
            spent = self.cost.step_seconds(batch_tokens, context + read, num + len(chunks))
            measured = draft_seconds + spent
            seconds = measured + self.cost.host_seconds(num + len(chunks))
            spans = (0.0, draft_seconds, spent)
        else:
            batch_tokens, context = num_prefill_tokens, 0
            measured = self.cost.prefill_seconds(
                num_prefill_tokens, sum(chunk.done for chunk, _ in chunks), len(chunks)
            )
            seconds = measured + self.cost.prefill_host_seconds(len(chunks))
            spans = (measured, 0.0, 0.0)
        self.recorder.step(
            (now, num_running, num_waiting, num_prefill_tokens, draft_len, batch_tokens, context, self.free_pages),
            (*spans, seconds - measured, seconds),
            num,
        )
        self.num_steps += 1
        if ended:
            self._leave(now + seconds)
        if chunks:
            self._read(chunks, now + seconds)
        return seconds

    def _load(self) -> LoadView:
        view = LoadView(
            self.num_steps,
            len(self._batch.requests),
            len(self.waiting),
            self._batch.context_tokens,
            self.block_size,
            self._batch.ids,
        )
        if self._views.maxlen == 1:
            return view
        self._views.append(view)
        then = self._views[0]
        return replace(
            view, num_running=then.num_running, num_waiting=then.num_waiting, context_tokens=then.context_tokens
        )

    def _leave(self, now: float) -> None:
        """Take requests that have their last token out of the batch and free their pages."""
        requests, pages = self._batch.ended()
        self.free_pages += pages
        for request in requests:
            _, output_len, stops, _, _ = self._facts[request.request_id]
            request.finish_reason = "stop" if stops and request.num_generated == output_len else "length"
            request.finish = now
            self._close(request)

    def _take_out(self, place: int) -> Request:
        """The request at a place of the batch, which leaves it; its pages are free."""
        (request,), pages = self._batch.remove([place])
        self.free_pages += pages
        return request

    def _close(self, request: Request) -> None:
        del self._facts[request.request_id]
        self.finished.append(request)
        self.recorder.finish(request)

    def _pages_for(self, request: Request) -> int:
        return -(-(request.context_len + self.reserve) // self.config.page_size)

    def _admit(self) -> list[tuple[Request, int]]:
        """Requests that enter the batch now, first come, first served, with their pages."""
        admitted: list[tuple[Request, int]] = []
        num_tokens = 0
        while self.waiting and self.num_running + len(admitted) < self.config.max_num_seqs:
            request = self.waiting[0]
            pages = self._pages_for(request)
            num_tokens += request.prefill_len
            if pages > self.free_pages or (admitted and num_tokens > self.config.max_num_batched_tokens):
                break
            self.waiting.popleft()
            self.free_pages -= pages
            admitted.append((request, pages))
        return admitted

    def _prefill(self, admitted: list[tuple[Request, int]], now: float) -> float:
        """An iteration that reads whole prompts and nothing else."""
        num_tokens = sum(request.prefill_len for request, _ in admitted)
        measured = self.cost.prefill_seconds(num_tokens)
        seconds = measured + self.cost.prefill_host_seconds(len(admitted))
        self.recorder.step(
            (now, self.num_running + len(admitted), len(self.waiting), num_tokens, 0, num_tokens, 0, self.free_pages),
            (measured, 0.0, 0.0, seconds - measured, seconds),
            0,
        )
        self.num_steps += 1
        self._begin(admitted, now + seconds)
        return seconds

    def _begin(self, read: Sequence[tuple[Request, int]], now: float) -> None:
        """First tokens of requests whose prompts have been read; they join the batch unless that was all."""
        staying = []
        for request, pages in read:
            if request.num_generated == 0:
                _, output_len, stops, _, _ = self._facts[request.request_id]
                request.append(1, bool(stops) and output_len == 1, now)
            if request.is_finished:
                self.free_pages += pages
                self._close(request)
            else:
                staying.append((request, pages))
        if staying:
            self._batch.add([(request, pages, self._facts[request.request_id]) for request, pages in staying])

    def _chunks(self, decode_tokens: int) -> list[tuple[_Prefill, int]]:
        """Prompts to read in this iteration, and how many tokens of each: those begun first, then new ones."""
        budget = self.config.max_num_batched_tokens - decode_tokens
        chunks = []
        for chunk in self._prefilling:
            size = min(budget, chunk.request.prefill_len - chunk.done)
            if size <= 0:
                break
            chunks.append((chunk, size))
            budget -= size
        while budget > 0 and self.waiting and self.num_running < self.config.max_num_seqs:
            request = self.waiting[0]
            pages = self._pages_for(request)
            if pages > self.free_pages:
                break
            self.waiting.popleft()
            self.free_pages -= pages
            chunk = _Prefill(request, pages)
            self._prefilling.append(chunk)
            size = min(budget, request.prefill_len)
            chunks.append((chunk, size))
            budget -= size
        return chunks

    def _read(self, chunks: list[tuple[_Prefill, int]], now: float) -> None:
        for chunk, size in chunks:
            chunk.done += size
        whole = []
        # Prompts are read in the order of admission, so that those read to the end come first.
        while self._prefilling and self._prefilling[0].done == self._prefilling[0].request.prefill_len:
            chunk = self._prefilling.popleft()
            whole.append((chunk.request, chunk.pages))
        self._begin(whole, now)

    def _grow(self) -> None:
        """Give every request room for a round; where there is none, the ones admitted last go back to the queue."""
        batch = self._batch
        grown = batch.grow(self.free_pages)
        if grown >= 0:
            self.free_pages -= grown
            return
        page_size = self.config.page_size
        short = np.maximum(-(batch.column(HEADROOM) // page_size), 0).tolist()
        for place, pages in enumerate(short):
            if place >= len(batch.requests):
                break
            while pages > self.free_pages and (self._prefilling or len(batch.requests) > place + 1):
                self._preempt()
            if pages > self.free_pages:
                self._preempt()
                break
            self.free_pages -= pages
            batch.state[PAGES, place] += pages
            batch.state[HEADROOM, place] += pages * page_size

    def _preempt(self) -> None:
        """Send back whoever was admitted last."""
        if self._prefilling:
            chunk = self._prefilling.pop()
            self.free_pages += chunk.pages
            request = chunk.request
        else:
            request = self._take_out(len(self._batch.requests) - 1)
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _abort(self) -> None:
        """Take out requests whose users have gone."""
        for request, when in self._given_up:
            if request in self._batch.requests:
                self._take_out(self._batch.requests.index(request))
            else:
                chunk = next((chunk for chunk in self._prefilling if chunk.request is request), None)
                if chunk is None:
                    self.waiting.remove(request)
                else:
                    self._prefilling.remove(chunk)
                    self.free_pages += chunk.pages
            request.finish_reason, request.finish = "abort", when
            self._close(request)
        self._given_up.clear()
