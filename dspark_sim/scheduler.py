"""Continuous batching: who is in the batch, and whether the KV cache has room for them.

Admission is first come, first served, and prefill first: an iteration either prefills newly admitted requests or
runs one decode round for all running ones. The KV cache is counted in pages of `page_size` tokens. A running
request always holds room for its context, its anchor and a whole block of drafts (1 + γ places); when it cannot
grow, the request admitted last gives its pages back and is prefilled again later (preemption by recompute).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dspark_sim.errors import UserError
from dspark_sim.request import Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the server, in vLLM's names.

    Parameters
    ----------
    max_num_seqs
        Most requests running at once.
    max_num_batched_tokens
        Most prompt tokens prefilled in one iteration; a longer prompt is prefilled alone.
    num_pages, page_size
        Size of the KV cache: `num_pages` pages of `page_size` tokens.
    max_model_len
        Longest sequence (prompt, output and a block of drafts) the engine can hold, in tokens.
    enable_chunked_prefill
        Read prompts beside decode rounds, as many tokens of them as `max_num_batched_tokens` leaves; only the simulator
        can.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    num_pages: int = 2048
    page_size: int = 16
    max_model_len: int = 2048
    enable_chunked_prefill: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size", "max_model_len"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")

    @property
    def longest(self) -> int:
        """Positions of the longest sequence that can ever run."""
        return min(self.max_model_len, self.num_pages * self.page_size)


def longest_sequence(request: Request, reserve: int) -> int:
    """Positions that a request may come to need, `reserve` of them for its anchor and drafts."""
    return request.prompt_len + request.max_tokens + reserve - 1


@dataclass(slots=True)
class ScheduledStep:
    """The work of one iteration: either list may be empty, both are empty when nothing can run."""

    prefill: list[Request] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Queue, batch and page accounts of one server.

    Parameters
    ----------
    config
        The server's limits.
    block_size
        Most drafted tokens per round (γ); 1 + γ places per running request are reserved.
    """

    def __init__(self, config: SchedulerConfig, block_size: int) -> None:
        if config.enable_chunked_prefill:
            raise UserError(
                "enable_chunked_prefill is set and the live engine reads whole prompts; simulate it instead"
            )
        self.config = config
        self.reserve = 1 + block_size
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._pages: dict[int, int] = {}
        self.free_pages = config.num_pages

    def add(self, request: Request) -> None:
        """Queue a request; refuses what `check` refuses."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises
        ------
        UserError
            If it is longer than the model's context or than the whole cache.
        """
        longest, limit = longest_sequence(request, self.reserve), self.config.longest
        if longest > limit:
            raise UserError(
                f"prompt {request.prompt_id} needs {longest} positions ({request.prompt_len} prompt, "
                f"{request.max_tokens} output, {self.reserve - 1} draft tokens) but the context holds {limit}; "
                "shorten the prompt, lower max_tokens, or raise max_model_len"
            )

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache over all running requests."""
        return sum(request.context_len for request in self.running)

    @property
    def kv_usage(self) -> float:
        """Fraction of the pages in use."""
        return 1.0 - self.free_pages / self.config.num_pages

    def schedule(self) -> ScheduledStep:
        """Choose the next iteration's work and account for its pages."""
        prefill = self._admit()
        if prefill:
            return ScheduledStep(prefill=prefill)
        preempted = self._grow()
        return ScheduledStep(decode=list(self.running), preempted=preempted)

    def finish(self, request: Request) -> None:
        """Take a finished request out of the batch and free its pages."""
        self.running.remove(request)
        self.free_pages += self._pages.pop(request.request_id)

    def _pages_for(self, request: Request) -> int:
        return -(-(request.context_len + self.reserve) // self.config.page_size)

    def _admit(self) -> list[Request]:
        admitted: list[Request] = []
        num_tokens = 0
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            pages = self._pages_for(request)
            num_tokens += request.prefill_len
            if pages > self.free_pages or (admitted and num_tokens > self.config.max_num_batched_tokens):
                break
            self.waiting.popleft()
            self.free_pages -= pages
            self._pages[request.request_id] = pages
            self.running.append(request)
            admitted.append(request)
        return admitted

    def _grow(self) -> list[Request]:
        preempted: list[Request] = []
        for request in list(self.running):
            if request in preempted:
                continue
            missing = self._pages_for(request) - self._pages[request.request_id]
            while missing > self.free_pages and self.running[-1] is not request:
                preempted.append(self._preempt(self.running[-1]))
            if missing > self.free_pages:
                preempted.append(self._preempt(request))
                continue
            self.free_pages -= missing
            self._pages[request.request_id] += missing
        return preempted

    def _preempt(self, request: Request) -> Request:
        self.running.remove(request)
        self.free_pages += self._pages.pop(request.request_id)
        request.num_preemptions += 1
        self.waiting.appendleft(request)
        return request
