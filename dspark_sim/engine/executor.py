"""The live executor: runs target and drafter on torch and reads a clock.

Tokens of running requests live here; the loop, the scheduler and the policies see counts. In a decode round the
target's linear layers see exactly Σ(1 + verify_len) tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.attention import RaggedBatch, TreeRows
from dspark_sim.engine.drafters import Drafted, Drafter, SequenceState, TreeDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.kv_cache import SlotCache, SlotPool
from dspark_sim.engine.models import Target
from dspark_sim.engine.sampling import SamplingParams, draw, keyed_exponential, keyed_uniform, probabilities, race
from dspark_sim.engine.timing import SpanTimer
from dspark_sim.engine.tree_round import accept_matching_paths, accept_sampled_paths, require_drawn_in_order, tree_rows
from dspark_sim.engine.verify import (
    MATCHING_MODES,
    SampledRound,
    accept_block,
    accept_matching,
    accept_rejection,
    cut,
)
from dspark_sim.errors import UserError
from dspark_sim.loop import DraftBatch, Mode, Prefilled, Verification
from dspark_sim.request import Request
from dspark_sim.tree_accept import AcceptedPaths
from dspark_sim.tree_shapes import TreeShape

IntArray = npt.NDArray[np.int64]


class TorchExecutor:
    """Does the work of an iteration.

    Parameters
    ----------
    target
        The model that decides.
    drafter
        The model that proposes; ``None`` decodes plainly.
    prompts
        Token ids of every prompt by prompt_id.
    cache
        KV cache of the target; its number of slots bounds the batch.
    mode
        Acceptance rule: ``greedy`` needs temperature 0, every other mode a positive one.
    params
        Sampling of target and drafter.
    with_draft_prob
        Whether the drafter's probability of its tokens is handed to the policy.
    tree
        Shape of the drafts, fitted to the drafter; a shape that does not branch is the chain of its depth, and
        ``None`` that of the whole block.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        prompts: dict[str, list[int]],
        cache: SlotCache,
        mode: Mode = "greedy",
        params: SamplingParams | None = None,
        *,
        with_draft_prob: bool = False,
        tree: TreeShape | None = None,
    ) -> None:
        self.params = params or SamplingParams()
        if (mode == "greedy") != (self.params.temperature == 0):
            raise UserError(
                f"mode {mode} does not go with temperature {self.params.temperature}; "
                "use greedy with 0 and rejection, coupled, target_match or block with a positive temperature"
            )
        self.target, self.drafter, self.prompts, self.mode = target, drafter, prompts, mode
        self.rule = DraftRule(mode, self.params, with_draft_prob)
        self.outputs: dict[int, list[int]] = {}
        self._cache = cache
        self._slots = SlotPool(cache.keys.shape[1])
        self._states: dict[int, SequenceState] = {}
        self._timer = SpanTimer(target.device)
        self._eos = target.eos_token_ids
        self._layers = drafter.feature_layers if drafter is not None else ()
        self._shape = tree
        if tree is not None and mode == "rejection":
            require_drawn_in_order(tree)

    @property
    def block_size(self) -> int:
        """The drafter's γ, or the most nodes of a tree; 0 without a drafter."""
        if self._shape is not None:
            return self._shape.num_nodes
        return self.drafter.block_size if self.drafter is not None else 0

    @property
    def tree(self) -> TreeShape | None:
        """Shape of the drafts; ``None`` for chains."""
        return None if self._shape is None or self._shape.num_candidates == 1 else self._shape

    @property
    def has_confidence(self) -> bool:
        """Whether the drafter estimates acceptance; of a tree's nodes it always does."""
        return self.drafter is not None and (self.tree is not None or self.drafter.has_confidence)

    def clock(self) -> float:
        """Wall seconds."""
        return perf_counter()

    def overhead_seconds(self, num_requests: int) -> float:
        """The wall clock shows everything."""
        return 0.0

    def prefill(self, requests: Sequence[Request]) -> Prefilled:
        """One ragged pass over the prompts; a resumed request gets its cache back and no new token."""
        states = [self._start(request) for request in requests]
        lens = np.array([request.prefill_len for request in requests])
        with self._timer.span("prefill"):
            tokens = [token for state, length in zip(states, lens, strict=True) for token in state.tokens[:length]]
            logits, _ = self._forward(tokens, states, np.zeros_like(lens), lens, np.cumsum(lens) - 1)
            ids = np.array([request.request_id for request in requests])
            first = self._choose(logits, ids, np.array([request.prompt_len for request in requests]))
        stopped = np.zeros(len(requests), dtype=np.bool_)
        for row, (request, state) in enumerate(zip(requests, states, strict=True)):
            if request.num_generated == 0:
                state.tokens.append(int(first[row]))
                self.outputs[request.request_id] = [int(first[row])]
                stopped[row] = int(first[row]) in self._eos
        return Prefilled(stopped, self._timer.collect())

    def draft(self, requests: Sequence[Request], draft_len: int) -> DraftBatch:
        """Ask the drafter; never for tokens deeper than the remaining length - 1."""
        if self.drafter is None:
            return DraftBatch.empty(len(requests))
        states = [self._states[request.request_id] for request in requests]
        limits = np.array([request.remaining - 1 for request in requests])
        if self.tree is not None:
            return self._draft_trees(states, draft_len, limits, self.tree)
        drafted = self.drafter.draft(states, draft_len, limits, self.rule, self._timer)
        confidence = np.ones(drafted.tokens.shape) if drafted.confidence is None else drafted.confidence
        return DraftBatch(
            drafted.lens,
            confidence,
            self._timer.collect(),
            drafted.tokens.astype(np.int32),
            draft_prob=drafted.draft_prob,
            handle=drafted,
        )

    def _draft_trees(
        self, states: list[SequenceState], draft_len: int, limits: IntArray, shape: TreeShape
    ) -> DraftBatch:
        assert isinstance(self.drafter, TreeDrafter)
        drafted = self.drafter.draft_trees(states, shape, draft_len, limits, self.rule, self._timer)
        trees = drafted.trees
        assert trees is not None
        return DraftBatch(
            drafted.lens,
            trees.survival,
            self._timer.collect(),
            drafted.tokens.astype(np.int32),
            handle=drafted,
            survival=trees.survival,
            parents=trees.parents,
        )

    def verify(self, requests: Sequence[Request], drafts: DraftBatch, verify_lens: IntArray) -> Verification:
        """One pass over all anchors and verified drafts, acceptance, commit."""
        states = [self._states[request.request_id] for request in requests]
        drafted: Drafted = drafts.handle or Drafted(np.zeros((len(requests), 0), dtype=np.int64), verify_lens)
        positions = np.array([state.position for state in states])
        lens = 1 + verify_lens
        row_starts = np.cumsum(lens) - lens
        with self._timer.span("verify"):
            tokens: list[int] = []
            for state, row, length in zip(states, drafted.tokens.tolist(), verify_lens.tolist(), strict=True):
                tokens += [state.tokens[-1], *row[:length]]
            tree = None if drafted.trees is None else tree_rows(drafted.trees, positions, verify_lens)
            logits, features = self._forward(tokens, states, positions, lens, tree=tree)
        with self._timer.span("accept"):
            proposed, path = drafted.tokens, None
            if drafted.trees is None:
                accepted, next_token = self._accept(requests, drafted, verify_lens, logits, row_starts, positions)
            else:
                paths = self._accept_paths(requests, drafted, verify_lens, logits, row_starts, positions)
                accepted, next_token = paths.num_accepted, paths.next_token
                proposed, path = paths.tokens(drafted.trees), paths.nodes
            remaining = np.array([request.remaining for request in requests])
            accepted, emitted, stopped, new = cut(proposed, accepted, next_token, remaining, self._eos)
            for state, added in zip(states, new, strict=True):
                state.tokens += added
                self.outputs[state.request_id] += added
            if path is not None:
                self._cache.compact(np.array([state.slot for state in states]), positions, path, accepted)
            if features is not None:
                rows = np.arange(int(accepted.max()) + 1) + np.zeros_like(row_starts)[:, None]
                if path is not None:
                    rows[:, 1:] = 1 + path[:, : rows.shape[1] - 1]
                kept = (row_starts[:, None] + rows)[np.arange(rows.shape[1]) <= accepted[:, None]]
                kept_features = features[torch.from_numpy(kept).to(features.device)]
                self._observe(states, positions, 1 + accepted, kept_features)
        return Verification(accepted, emitted, stopped, self._timer.collect(), len(tokens), accepted_path=path)

    def release(self, request: Request) -> None:
        """Free the request's slot; its output stays in `outputs`."""
        del self._states[request.request_id]
        self._slots.release(request.request_id)

    def _start(self, request: Request) -> SequenceState:
        prompt = self.prompts[request.prompt_id]
        tokens = prompt + self.outputs.get(request.request_id, [])
        state = SequenceState(request.request_id, len(prompt), tokens, self._slots.acquire(request.request_id))
        self._states[request.request_id] = state
        return state

    def _forward(
        self,
        tokens: list[int],
        states: list[SequenceState],
        starts: IntArray,
        lens: IntArray,
        logit_rows: IntArray | None = None,
        tree: TreeRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One target pass; a prefill's features go to the drafter at once, a round's after acceptance."""
        device = self.target.device
        batch = RaggedBatch(self._cache, np.array([state.slot for state in states]), starts, lens, device, tree=tree)
        rows = np.arange(len(tokens)) if logit_rows is None else logit_rows
        logits, features = self.target.forward(
            torch.tensor(tokens, device=device), batch, torch.from_numpy(rows).to(device), self._layers
        )
        if logit_rows is not None and features is not None:
            self._observe(states, starts, lens, features)
        return logits, features

    def _observe(self, states: list[SequenceState], starts: IntArray, lens: IntArray, features: torch.Tensor) -> None:
        assert self.drafter is not None
        self.drafter.observe(np.array([state.slot for state in states]), starts, lens, features)

    def _choose(self, logits: torch.Tensor, ids: IntArray, positions: IntArray) -> IntArray:
        """The target's own tokens for absolute `positions` of requests `ids`, one per row of `logits`."""
        if self.mode == "greedy":
            chosen = logits.argmax(dim=-1)
        elif self.mode == "coupled":
            every = torch.arange(logits.shape[-1], device=logits.device)
            chosen = race(
                probabilities(logits, self.params), keyed_exponential(self.params.seed, ids, positions, every)
            )
        else:
            uniforms = keyed_uniform(self.params.seed, ids, positions, "bonus")
            chosen = draw(probabilities(logits, self.params), uniforms)
        return chosen.cpu().numpy()

    def _accept(
        self,
        requests: Sequence[Request],
        drafted: Drafted,
        verify_lens: IntArray,
        logits: torch.Tensor,
        row_starts: IntArray,
        positions: IntArray,
    ) -> tuple[IntArray, IntArray]:
        ids = np.array([request.request_id for request in requests])
        if self.mode in MATCHING_MODES:
            lens = 1 + verify_lens
            depth = np.arange(len(logits)) - np.repeat(row_starts, lens)
            flat = self._choose(logits, np.repeat(ids, lens), np.repeat(positions, lens) + 1 + depth)
            rows = np.minimum(row_starts[:, None] + np.arange(drafted.tokens.shape[1] + 1), len(flat) - 1)
            return accept_matching(drafted.tokens, verify_lens, flat[rows])
        judged = SampledRound(
            drafted.tokens,
            verify_lens,
            probabilities(logits, self.params),
            row_starts,
            drafted.probs,
            self.drafter.draft_token_ids if self.drafter is not None else None,
            ids,
            positions,
            self.params,
        )
        return accept_rejection(judged) if self.mode == "rejection" else accept_block(judged)

    def _accept_paths(
        self,
        requests: Sequence[Request],
        drafted: Drafted,
        verify_lens: IntArray,
        logits: torch.Tensor,
        row_starts: IntArray,
        positions: IntArray,
    ) -> AcceptedPaths:
        assert drafted.trees is not None and self.drafter is not None
        ids = np.array([request.request_id for request in requests])
        if self.mode == "rejection":
            known = self.drafter.draft_token_ids
            return accept_sampled_paths(drafted, verify_lens, logits, row_starts, known, ids, positions, self.params)

        def own(walking: IntArray, nodes: IntArray, depth: int) -> IntArray:
            rows = torch.from_numpy(row_starts[walking] + 1 + nodes).to(logits.device)
            return self._choose(logits[rows], ids[walking], positions[walking] + 1 + depth)

        return accept_matching_paths(drafted.trees, verify_lens, own)
