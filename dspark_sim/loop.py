"""The decoding loop: one iteration of a speculative server, for the live engine and the simulator alike.

An iteration is five lines: schedule, draft, choose, verify, commit. The `Executor` does the work (on torch, against
a clock) or looks it up (from recorded anchors, priced by a cost model); nothing else differs. `step()` returns
its seconds: a live driver has already spent them, a simulated server waits for them.

Spans are named seconds of one iteration: ``prefill, draft, head, policy, verify, accept, host``. What a span does
not cover is ``host``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.policy import LoadView, Signal, SpeculationPolicy
from dspark_sim.request import Request
from dspark_sim.runnable import Mode as Mode
from dspark_sim.runnable import require_runnable as require_runnable
from dspark_sim.scheduler import Scheduler
from dspark_sim.trace import DraftRows, StepRow, TraceRecorder
from dspark_sim.tree import never_rising
from dspark_sim.tree_shapes import TreeShape

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Spans = dict[str, float]


@dataclass(slots=True)
class Prefilled:
    """What a prefill returns: whether each request's first token ended it, [R], and the seconds spent."""

    stopped: BoolArray
    spans: Spans


@dataclass(slots=True)
class DraftBatch:
    """One round's drafts; where they are trees, their nodes in admission order.

    Parameters
    ----------
    draft_lens
        [R], tokens drafted per request.
    confidence
        [R, γ], estimated P(accept k | all before k accepted); entries past a request's draft are ignored.
    spans
        Seconds of the draft (backbone) and head.
    tokens
        [R, γ] drafted token ids for the trace, or ``None``.
    draft_prob
        [R, γ], the drafter's probability of the very tokens it proposed, or ``None``.
    accept_prob
        [R, γ], true P(accept k | all before k accepted), or ``None``; only a replay knows it.
    handle
        What the executor needs to verify them.
    survival
        [R, n], of the nodes of trees, whatever signal a policy asks for; ``None`` for chains, whose survival is the
        product of a signal.
    parents
        [R, n], of the nodes of trees, or ``None``.
    """

    draft_lens: IntArray
    confidence: FloatArray
    spans: Spans = field(default_factory=dict)
    tokens: npt.NDArray[np.int32] | None = None
    draft_prob: FloatArray | None = None
    accept_prob: FloatArray | None = None
    handle: Any = None
    survival: FloatArray | None = None
    parents: IntArray | None = None

    @staticmethod
    def empty(num_requests: int) -> DraftBatch:
        """A batch without drafts: plain decoding."""
        nothing = np.zeros((num_requests, 0))
        return DraftBatch(np.zeros(num_requests, dtype=np.int64), nothing, draft_prob=nothing, accept_prob=nothing)


@dataclass(slots=True)
class Verification:
    """One round's outcome.

    Parameters
    ----------
    num_accepted
        [R], drafts accepted, bonus not counted, nothing after an end-of-sequence token counted.
    num_emitted
        [R], tokens appended: accepted + 1, less what the end-of-sequence token or the length limit cuts.
    stopped
        [R], whether the last emitted token ends the sequence.
    spans
        Seconds of verify and accept.
    padded_tokens
        Tokens the target's linear layers processed.
    accepted_path
        [R, D], the accepted nodes of trees; ``None`` for chains.
    """

    num_accepted: IntArray
    num_emitted: IntArray
    stopped: BoolArray
    spans: Spans
    padded_tokens: int
    accepted_path: IntArray | None = None


class Executor(Protocol):
    """Does the work of an iteration, or looks its outcome up."""

    @property
    def block_size(self) -> int:
        """Most tokens drafted per round, the nodes of a tree; 0 without a drafter."""
        ...

    @property
    def tree(self) -> TreeShape | None:
        """Shape of the drafts; ``None`` for chains."""
        ...

    @property
    def has_confidence(self) -> bool:
        """Whether drafts carry confidence estimates."""
        ...

    @property
    def mode(self) -> Mode:
        """Acceptance mode; under ``rejection`` and ``block`` a policy that looks at sampled tokens is biased."""
        ...

    def clock(self) -> float:
        """Seconds on the clock that the work is spent on; a virtual clock stands still inside an iteration."""
        ...

    def overhead_seconds(self, num_requests: int) -> float:
        """Host seconds of an iteration that the clock does not show; 0 where the clock is real."""
        ...

    def prefill(self, requests: Sequence[Request]) -> Prefilled:
        """Process prompts and produce first tokens (none for a request that is resumed)."""
        ...

    def draft(self, requests: Sequence[Request], draft_len: int) -> DraftBatch:
        """Propose up to `draft_len` tokens per request, never more than its remaining length - 1."""
        ...

    def verify(self, requests: Sequence[Request], drafts: DraftBatch, verify_lens: IntArray) -> Verification:
        """Run the target on every anchor and its verified drafts, accept, and commit tokens."""
        ...

    def release(self, request: Request) -> None:
        """Forget a request's cache, because it finished or was preempted."""
        ...


class DecodeLoop:
    """One server: a scheduler, an executor and a policy.

    Parameters
    ----------
    executor, scheduler, policy
        The three parts. The policy is started here.
    recorder
        Collects the trace; ``None`` records nothing.
    cost
        If given, each step's predicted seconds and throughput are recorded beside the actual ones.
    allow_biased
        Run a policy under a mode whose output it biases, as a negative control; `biased` then says so.

    Raises
    ------
    UserError
        If the policy needs confidences that the executor's drafter does not give, or would bias the output.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        policy: SpeculationPolicy,
        recorder: TraceRecorder | None = None,
        cost: CostModel | None = None,
        *,
        allow_biased: bool = False,
    ) -> None:
        self.biased = require_runnable(policy, executor.mode, executor.has_confidence, allow_biased, executor.tree)
        self.executor = executor
        self.scheduler = scheduler
        self.controller = policy.start()
        self.signal = policy.signal
        self.recorder = recorder
        self.cost = cost
        self.num_steps = 0
        self.finished: list[Request] = []

    def submit(self, request: Request) -> None:
        """Queue a request; its `arrival` must be set."""
        self.scheduler.add(request)

    @property
    def has_work(self) -> bool:
        """Whether an iteration would do anything."""
        return self.scheduler.has_work

    def step(self, now: float) -> float:
        """Run one iteration that starts at time `now`.

        Returns
        -------
        float
            Seconds the iteration took. Requests it finished are appended to `finished`.
        """
        clock = self.executor.clock
        start = clock()
        plan = self.scheduler.schedule()
        for request in plan.preempted:
            self.executor.release(request)
        if not (plan.prefill or plan.decode):
            raise UserError("the KV cache is too small to hold one waiting request; raise num_pages")
        load = self._load(plan.decode)
        drafts: DraftBatch | None = None
        accepted_path: IntArray | None = None
        num_prefill_tokens = 0
        if plan.prefill:
            num_prefill_tokens = sum(request.prefill_len for request in plan.prefill)
            fresh = np.array([request.num_generated == 0 for request in plan.prefill], dtype=np.int64)
            prefilled = self.executor.prefill(plan.prefill)
            requests, emitted, stopped, spans = plan.prefill, fresh, prefilled.stopped, dict(prefilled.spans)
            batch_tokens = padded_tokens = num_prefill_tokens
            draft_len = 0
            survival = np.zeros((len(requests), 0))
            verify_lens = num_accepted = np.zeros(len(requests), dtype=np.int64)
        else:
            requests = plan.decode
            positions = np.array([request.position for request in requests], dtype=np.int64)
            draft_len = min(self.controller.draft_len(load), load.block_size)
            drafts = self.executor.draft(requests, draft_len) if draft_len else DraftBatch.empty(len(requests))
            before = clock()
            survival = survival_of(drafts, self.signal)
            verify_lens = np.minimum(self.controller.verify_lens(load, survival), drafts.draft_lens)
            policy_seconds = clock() - before
            outcome = self.executor.verify(requests, drafts, verify_lens)
            num_accepted, emitted, stopped = outcome.num_accepted, outcome.num_emitted, outcome.stopped
            accepted_path = outcome.accepted_path
            self.controller.observe(load, verify_lens, num_accepted)
            spans = {**drafts.spans, "policy": policy_seconds, **outcome.spans}
            batch_tokens = len(requests) + int(verify_lens.sum())
            padded_tokens = outcome.padded_tokens
        measured = sum(spans.values())
        seconds = max(clock() - start, measured) + self.executor.overhead_seconds(len(requests))
        spans["host"] = seconds - measured
        if self.recorder is not None:
            predicted_seconds, predicted_throughput = self._predict(
                load, draft_len, batch_tokens, verify_lens, None if drafts is None else survival
            )
            self.recorder.step(
                StepRow(
                    step=self.num_steps,
                    start=now,
                    num_running=len(self.scheduler.running),
                    num_waiting=len(self.scheduler.waiting),
                    num_prefill_tokens=num_prefill_tokens,
                    draft_len=draft_len,
                    batch_tokens=batch_tokens,
                    padded_tokens=padded_tokens,
                    context_tokens=load.context_tokens,
                    kv_usage=self.scheduler.kv_usage,
                    spans=spans,
                    step_seconds=seconds,
                    predicted_step_seconds=predicted_seconds,
                    predicted_throughput=predicted_throughput,
                )
            )
            if drafts is not None:
                self.recorder.drafts(
                    DraftRows(
                        step=self.num_steps,
                        request_id=np.array([request.request_id for request in requests], dtype=np.int64),
                        position=positions,
                        draft_len=drafts.draft_lens,
                        verify_len=verify_lens,
                        num_accepted=num_accepted,
                        num_emitted=emitted,
                        draft_tokens=drafts.tokens,
                        confidence=drafts.confidence if drafts.survival is None else drafts.survival,
                        parents=drafts.parents,
                        accepted_path=accepted_path,
                    )
                )
        self._commit(requests, emitted, stopped, now + seconds)
        self.num_steps += 1
        return seconds

    def _load(self, decode: Sequence[Request]) -> LoadView:
        return LoadView(
            step=self.num_steps,
            num_running=len(decode),
            num_waiting=len(self.scheduler.waiting),
            context_tokens=sum(request.context_len for request in decode),
            block_size=self.executor.block_size,
            request_ids=tuple(request.request_id for request in decode),
        )

    def _commit(self, requests: Sequence[Request], emitted: IntArray, stopped: BoolArray, now: float) -> None:
        for request, num_tokens, stop in zip(requests, emitted.tolist(), stopped.tolist(), strict=True):
            request.append(num_tokens, stop, now)
            if request.is_finished:
                self.scheduler.finish(request)
                self.executor.release(request)
                self.finished.append(request)
                if self.recorder is not None:
                    self.recorder.finish(request)

    def _predict(
        self,
        load: LoadView,
        draft_len: int,
        batch_tokens: int,
        verify_lens: IntArray,
        survival: FloatArray | None,
    ) -> tuple[float, float]:
        if self.cost is None or survival is None:
            return np.nan, np.nan
        num = load.num_running
        draft = self.cost.draft_seconds(num, draft_len, load.context_tokens)
        seconds = draft + self.cost.step_seconds(batch_tokens, load.context_tokens, num) + self.cost.host_seconds(num)
        # As the simulator sums many rounds at once, to the bit.
        admitted = np.add.reduceat(admitted_survival(survival)[np.arange(len(survival)), verify_lens], [0])[0]
        return seconds, (load.num_running + admitted) / seconds


def admitted_survival(survival: FloatArray) -> FloatArray:
    """Expected accepted drafts [R, γ + 1] of a round that verifies the first 0, 1, .. γ of survivals [R, γ]."""
    return np.concatenate((np.zeros((len(survival), 1)), np.cumsum(survival, axis=1)), axis=1)


def signal_of(source: Any, signal: Signal) -> FloatArray:
    """The array [R, γ] of a signal, from a `DraftBatch` or whatever else has one under its name.

    Raises
    ------
    UserError
        If it is missing.
    """
    values: FloatArray | None = getattr(source, signal)
    if values is None:
        raise UserError(
            f"the policy needs {signal}, which this run does not have; "
            + ("only a simulation of a recording knows it" if signal == "accept_prob" else "choose another policy")
        )
    return values


def survival_of(drafts: DraftBatch, signal: Signal = "confidence") -> FloatArray:
    """Survival [R, γ] of drafted positions: cumulative product of a signal, 0 where nothing was drafted.

    The nodes of trees have theirs already; a policy gets them so that they never rise.

    Raises
    ------
    UserError
        If the executor does not give the signal.
    """
    values = signal_of(drafts, signal) if drafts.survival is None else drafts.survival
    width = values.shape[1]
    drafted = np.arange(width) < drafts.draft_lens[:, None]
    if drafts.survival is not None:
        return never_rising(np.where(drafted, values, 0.0))
    return np.cumprod(np.where(drafted, values, 0.0), axis=1, dtype=np.float64)
