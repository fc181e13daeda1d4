"""The executor that looks outcomes up and prices them: the simulator's half of the decode loop.

A round of R requests is a few fancy-index operations on the anchors' arrays: row = first row of the request's
recorded output + output tokens so far - 1. Its seconds come from a cost model; its clock stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_sim.cost import IterationSeconds
from dspark_sim.errors import UserError
from dspark_sim.loop import DraftBatch, IntArray, Mode, Prefilled, Verification
from dspark_sim.request import Request
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.tree_replay import RecordedTree
from dspark_sim.tree_shapes import TreeShape


def look_up(anchors: RecordedAnchors, request: Request) -> tuple[int, int, int, int, int]:
    """First row, output length, whether it stops (0 or 1), most tokens, and prompt length of a request.

    Raises
    ------
    UserError
        If its prompt was not recorded, or its output is recorded shorter than the request may become.
    """
    key = request.prompt_id
    if anchors.mode != "greedy":
        key = anchors.request_prompts[request.request_id % len(anchors.request_prompts)]
    prompt = anchors.prompts.get(key)
    if prompt is None:
        raise UserError(
            f"prompt {request.prompt_id} was not recorded; choose one of the {len(anchors.prompts)} recorded prompts"
        )
    if prompt.finish_reason == "length" and request.max_tokens > prompt.output_len:
        raise UserError(
            f"request {request.request_id} may give {request.max_tokens} tokens but the output of prompt "
            f"{request.prompt_id} was recorded only up to {prompt.output_len}; lower max_tokens or record longer"
        )
    stops = int(prompt.finish_reason == "stop")
    return prompt.first_row, prompt.output_len, stops, request.max_tokens, request.prompt_len


@dataclass(slots=True)
class _Round:
    """A batch of R requests at the start of a round; arrays are [R]."""

    rows: IntArray
    num_generated: IntArray
    output_len: IntArray
    max_tokens: IntArray
    stops: IntArray
    context_tokens: int


class ReplayExecutor:
    """Replays recorded anchors under a cost model.

    Parameters
    ----------
    anchors
        Recorded blocks and outputs.
    cost
        Seconds of prefill, draft, verify and host.
    block_size
        Cut every block to this many tokens; ``None`` keeps the recorded size.

    Raises
    ------
    UserError
        If `block_size` is above the recorded one.
    """

    def __init__(self, anchors: RecordedAnchors, cost: IterationSeconds, block_size: int | None = None) -> None:
        self.anchors = anchors if block_size is None else anchors.restricted(block_size)
        self.cost = cost
        self._facts: dict[int, tuple[int, int, int, int, int]] = {}
        self._batch: tuple[list[int], IntArray] = ([], np.zeros((5, 0), dtype=np.int64))
        self._last_was_prefill = False

    @property
    def block_size(self) -> int:
        """Most tokens drafted per round."""
        return self.anchors.round_size

    @property
    def tree(self) -> TreeShape | None:
        """Shape of the drafts; ``None`` for chains."""
        return None if self.anchors.tree is None else self.anchors.tree.shape

    @property
    def has_confidence(self) -> bool:
        """Whether confidences, or survivals of a tree's nodes, were recorded."""
        return self.anchors.estimates

    @property
    def mode(self) -> Mode:
        """Acceptance mode of the recording."""
        return self.anchors.mode

    def clock(self) -> float:
        """Zero, always: the time of an iteration is computed, not spent."""
        return 0.0

    def overhead_seconds(self, num_requests: int) -> float:
        """Host seconds of the iteration that was just replayed."""
        if self._last_was_prefill:
            return self.cost.prefill_host_seconds(num_requests)
        return self.cost.host_seconds(num_requests)

    def prefill(self, requests: Sequence[Request]) -> Prefilled:
        """Look up whether the first token ends the output, and price the prompt tokens.

        Raises
        ------
        UserError
            If a prompt was not recorded, or its recorded output is shorter than the request may become.
        """
        self._last_was_prefill = True
        stopped = np.zeros(len(requests), dtype=np.bool_)
        for index, request in enumerate(requests):
            _, output_len, stops, _, _ = self._facts[request.request_id] = look_up(self.anchors, request)
            stopped[index] = request.num_generated == 0 and output_len == 1 and stops
        num_tokens = sum(request.prefill_len for request in requests)
        return Prefilled(stopped, {"prefill": self.cost.prefill_seconds(num_tokens)})

    def draft(self, requests: Sequence[Request], draft_len: int) -> DraftBatch:
        """The recorded blocks of every request's anchor, cut to `draft_len` and to the remaining length - 1."""
        batch = self._round(requests)
        if self.anchors.tree is not None:
            return self._trees(self.anchors.tree, batch, draft_len)
        draft_lens = np.minimum(self.anchors.draft_len[batch.rows], draft_len)
        draft_lens = np.minimum(draft_lens, batch.max_tokens - batch.num_generated - 1)
        return DraftBatch(
            draft_lens=draft_lens,
            confidence=self.anchors.confidence[batch.rows, :draft_len],
            spans={"draft": self.cost.draft_seconds(len(requests), draft_len, batch.context_tokens)},
            tokens=self.anchors.draft_tokens[batch.rows, :draft_len],
            draft_prob=None if self.anchors.draft_prob is None else self.anchors.draft_prob[batch.rows, :draft_len],
            accept_prob=None if self.anchors.accept_prob is None else self.anchors.accept_prob[batch.rows, :draft_len],
            handle=batch,
        )

    def _trees(self, tree: RecordedTree, batch: _Round, draft_len: int) -> DraftBatch:
        num_requests = len(batch.rows)
        parents = tree.parents
        survival = np.full((num_requests, draft_len), np.nan)
        if tree.survival is not None:
            survival = tree.survival[batch.rows, :draft_len]
        return DraftBatch(
            draft_lens=tree.drafted(batch.rows, draft_len, batch.max_tokens - batch.num_generated - 1),
            confidence=survival,
            spans={"draft": self.cost.draft_seconds(num_requests, draft_len, batch.context_tokens)},
            handle=batch,
            survival=survival,
            parents=None if parents is None else np.broadcast_to(parents[:draft_len], (num_requests, draft_len)),
        )

    def verify(self, requests: Sequence[Request], drafts: DraftBatch, verify_lens: IntArray) -> Verification:
        """Accept what was accepted in the recording, as far as it is verified.

        The recorded count includes an accepted end-of-sequence token and nothing after it; no bonus token follows it.
        """
        self._last_was_prefill = False
        batch = drafts.handle if isinstance(drafts.handle, _Round) else self._round(requests)
        num_accepted = self.anchors.accepted(batch.rows, verify_lens)
        longest = np.minimum(batch.output_len, batch.max_tokens)
        num_emitted = np.minimum(num_accepted + 1, longest - batch.num_generated)
        stopped = (batch.num_generated + num_emitted == batch.output_len) & (batch.stops == 1)
        batch_tokens = len(requests) + int(verify_lens.sum())
        seconds = self.cost.step_seconds(batch_tokens, batch.context_tokens, len(requests))
        path = None if self.anchors.tree is None else self.anchors.tree.node_rank[batch.rows]
        return Verification(num_accepted, num_emitted, stopped, {"verify": seconds}, batch_tokens, path)

    def release(self, request: Request) -> None:
        """Forget a request that finished or was preempted."""
        self._facts.pop(request.request_id, None)

    def _round(self, requests: Sequence[Request]) -> _Round:
        request_ids = [request.request_id for request in requests]
        if request_ids != self._batch[0]:
            facts = np.array([self._facts[request_id] for request_id in request_ids], dtype=np.int64)
            self._batch = request_ids, facts.T
        first_row, output_len, stops, max_tokens, prompt_len = self._batch[1]
        num_generated = np.array([request.num_generated for request in requests], dtype=np.int64)
        # The context is everything before the anchor.
        context_tokens = int(prompt_len.sum() + num_generated.sum()) - len(requests)
        return _Round(first_row + num_generated - 1, num_generated, output_len, max_tokens, stops, context_tokens)
