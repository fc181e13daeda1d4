"""The autoregressive drafter in the ragged batch: its own KV cache, one pass per drafted token.

Target features of committed tokens wait until the next draft. A position's keys also need the token behind it, so
those of all positions before the anchor's are made then; the chain writes its own behind them, where the next round's
context overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.attention import RaggedBatch, TreeRows, attend
from dspark_sim.engine.drafters import Drafted, IntArray, SequenceState
from dspark_sim.engine.drafters.candidates import CandidateRule
from dspark_sim.engine.drafters.chain_model import ChainDrafter
from dspark_sim.engine.drafters.choose import Confidence, DraftRule
from dspark_sim.engine.drafters.grow import grow_trees, in_order, shortened
from dspark_sim.engine.drafters.heads import run_head
from dspark_sim.engine.drafters.pending import PendingFeatures
from dspark_sim.engine.drafters.walk import Branch, Slots
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.timing import SpanTimer
from dspark_sim.tree_shapes import TreeShape


class RaggedChainDrafter:
    """A `ChainDrafter` with the state of a run.

    Parameters
    ----------
    name
        For the trace.
    network
        Attached to its target.
    num_slots, max_len
        As the target's KV cache.
    confidence
        Where confidence comes from; the network has no head for it, so ``None`` means none.
    """

    def __init__(
        self, name: str, network: ChainDrafter, num_slots: int, max_len: int, confidence: Confidence | None = None
    ) -> None:
        config = network.config
        self.name = name
        self.network = network
        self.block_size = config.block_size
        self.confidence = confidence or Confidence()
        self.has_confidence = self.confidence.kind != "head"
        self.feature_layers = config.target_layer_ids
        self.draft_token_ids = network.draft_token_ids if config.draft_vocab_size else None
        weight = network.q_proj.weight
        self._device = weight.device
        self._cache = SlotCache(
            1, num_slots, config.num_key_value_heads, max_len, config.head_dim, dtype=weight.dtype, device=weight.device
        )
        self._known = torch.zeros((num_slots, max_len, config.hidden_size), dtype=weight.dtype, device=weight.device)
        self._pending = PendingFeatures(max_len)
        # Positions of each slot whose keys are the context's.
        self._done = np.zeros(num_slots, dtype=np.int64)

    def observe(self, slots: IntArray, starts: IntArray, lens: IntArray, features: torch.Tensor) -> None:
        """Keep features for the next draft; when nothing drafts for long, project them now."""
        self._pending.add(slots, starts, lens, features)
        # A slot that changed hands starts at 0 again.
        self._done[slots] = np.minimum(self._done[slots], starts)
        if self._pending.is_full:
            self._project()

    @torch.inference_mode()
    def draft(
        self,
        states: Sequence[SequenceState],
        draft_len: int,
        limits: IntArray,
        rule: DraftRule,
        timer: SpanTimer,
    ) -> Drafted:
        """Draft chains of `draft_len` tokens, one pass each."""
        positions, anchors = self._start(states, timer)
        with timer.span("head"):
            choose = rule.choose(
                np.array([state.request_id for state in states]), positions, self.network.draft_token_ids
            )
            walk = _RaggedWalk(self, np.array([state.slot for state in states]), positions, timer)
            out = run_head(self.network, walk, anchors, draft_len, choose, self.confidence, with_prob=rule.with_prob)
            return out.drafted(limits)

    @torch.inference_mode()
    def draft_trees(
        self,
        states: Sequence[SequenceState],
        shape: TreeShape,
        draft_len: int,
        limits: IntArray,
        rule: DraftRule,
        timer: SpanTimer,
    ) -> Drafted:
        """A pass over each level of the trees; candidates and the building of trees are the span ``head``."""
        shape = shortened(shape, draft_len)
        positions, anchors = self._start(states, timer)
        with timer.span("head"):
            ids, slots = (np.array([getattr(state, name) for state in states]) for name in ("request_id", "slot"))
            candidates = CandidateRule(rule, ids, positions, self.network.draft_token_ids, shape.num_candidates)
            walk = _RaggedWalk(self, slots, positions, timer)
            grown = grow_trees(self.network, walk, anchors, shape, candidates, self.confidence)
            return in_order(grown, draft_len, limits)

    def _start(self, states: Sequence[SequenceState], timer: SpanTimer) -> tuple[IntArray, torch.Tensor]:
        """Anchors' positions and tokens [R], once the context has all keys it needs."""
        with timer.span("draft"):
            self._project()
            self._extend_context(states)
            anchors = torch.tensor([state.tokens[-1] for state in states], device=self._device)
        return np.array([state.position for state in states]), anchors

    def known_before(self, slots: IntArray, positions: IntArray) -> torch.Tensor:
        """What was known, g [R, d], at the positions before `positions`."""
        index = torch.from_numpy(np.stack((slots, positions - 1))).to(self._device)
        return self._known[index[0], index[1]]

    def layer(
        self,
        known: torch.Tensor,
        tokens: torch.Tensor,
        slots: IntArray,
        positions: IntArray,
        lens: IntArray | None = None,
        tree: TreeRows | None = None,
    ) -> torch.Tensor:
        """Output [B, d] of a pass over a token per request, or `lens` nodes of trees at places from `positions`."""
        lens = np.ones_like(positions) if lens is None else lens
        if tree is not None:
            # A tree may have more nodes than were reserved for those that are verified.
            self._cache.lengthen(int((positions + lens).max()))
        batch = RaggedBatch(self._cache, slots, positions, lens, self._device, tree=tree)
        residual, entered = self.network.enter(known, tokens)
        rotary = self.network.rotary(batch.positions, entered)
        queries, (keys, values) = self.network.queries(entered, rotary), self.network.keys(entered, rotary)
        return self.network.leave(residual, attend(batch, 0, queries, keys, values, queries.shape[-1] ** -0.5))

    def _project(self) -> None:
        """Turn pending target features into g."""
        pending = self._pending.take(self._device)
        if pending is not None:
            slots, positions, features = pending
            self._known[slots, positions] = self.network.fuse(features.to(self._known.dtype))

    def _extend_context(self, states: Sequence[SequenceState]) -> None:
        """Keys and values of committed positions before the anchors' predecessors."""
        slots: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        for state in states:
            low, high = int(self._done[state.slot]), state.position - 1
            slots += [state.slot] * (high - low)
            positions += range(low, high)
            tokens += state.tokens[low + 1 : high + 1]
            self._done[state.slot] = max(low, high)
        if not slots:
            return
        index = torch.tensor([slots, positions, tokens], device=self._device)
        known = self._known[index[0], index[1]]
        _, entered = self.network.enter(known, index[2])
        self._cache.write(0, index[0], index[1], *self.network.keys(entered, self.network.rotary(index[1], entered)))


class _RaggedWalk:
    """Walk of the running requests; see `Walk`."""

    def __init__(self, drafter: RaggedChainDrafter, slots: IntArray, positions: IntArray, timer: SpanTimer) -> None:
        self._drafter, self._slots, self._timer = drafter, slots, timer
        self._at = positions - 1
        self._known = drafter.known_before(slots, positions)
        self._ways = self._known
        self._tree = _GrowingTrees(self._at)

    def step(self, previous: torch.Tensor, rows: torch.Tensor | None = None) -> Slots:
        """Go to the next slot; see `Walk`."""
        network = self._drafter.network
        with self._timer.span("draft"):
            self._known = self._drafter.layer(self._known, previous, self._slots, self._at)
            self._at = self._at + 1
        hidden = network.norm(self._known if rows is None else self._known[rows])
        return Slots(network.base_logits(hidden), hidden, None)

    def along(self, previous: torch.Tensor) -> Slots:
        """Slots along known tokens; see `Walk`."""
        return Slots.stack([self.step(column) for column in previous.unbind(dim=1)], dim=1)

    def branch(self, rows: torch.Tensor, parents: torch.Tensor | None, previous: torch.Tensor) -> Branch:
        """Go to the next slot by many ways: one pass over a level of trees in the drafter's cache; see `Walk`.

        The ways of all levels stand behind each other, each seeing its ancestors; `rows` must not fall.
        """
        network = self._drafter.network
        known = self._known[rows] if parents is None else self._ways[parents]
        requests, starts, lens, tree = self._tree.grow(rows.cpu().numpy(), None if parents is None else parents.cpu())
        with self._timer.span("draft"):
            self._ways = self._drafter.layer(known, previous, self._slots[requests], starts, lens, tree)
        hidden = network.norm(self._ways)
        return Branch(hidden, None, lambda part: network.base_logits(hidden[part]))


class _GrowingTrees:
    """Trees in the cache that grow by a level at a time.

    Parameters
    ----------
    roots
        [R], place and position of each root.
    """

    def __init__(self, roots: IntArray) -> None:
        self._roots = roots
        self._used = np.zeros_like(roots)
        self._depths = np.zeros((len(roots), 0), dtype=np.int64)
        self._seen = np.zeros((0, 0), dtype=np.bool_)
        self._level = 0

    def grow(self, rows: IntArray, parents: npt.ArrayLike | None) -> tuple[IntArray, IntArray, IntArray, TreeRows]:
        """Add a level of nodes [M].

        Parameters
        ----------
        rows
            [M], the tree of each node, not falling.
        parents
            [M], each node's parent in the level before; ``None`` for roots.

        Returns
        -------
        requests, starts, lens, tree
            [A] trees that grow, the place and number of their new nodes, and what these see.
        """
        lens = np.bincount(rows, minlength=len(self._roots))
        column = np.arange(len(rows)) - (np.cumsum(lens) - lens)[rows]
        node = self._used[rows] + column
        width = int((self._used + lens).max())
        seen = np.zeros((len(rows), width), dtype=np.bool_)
        if parents is not None:
            seen[:, : self._seen.shape[1]] = self._seen[np.asarray(parents)]
        seen[np.arange(len(rows)), node] = True
        depths = np.zeros((len(self._roots), width), dtype=np.int64)
        depths[:, : self._depths.shape[1]] = self._depths
        depths[rows, node] = self._level
        requests = np.flatnonzero(lens)
        sees = np.zeros((len(requests), int(lens.max()), width), dtype=np.bool_)
        sees[np.searchsorted(requests, rows), column] = seen
        starts = (self._roots + self._used)[requests]
        self._used, self._depths, self._seen = self._used + lens, depths, seen
        self._level += 1
        return requests, starts, lens[requests], TreeRows(self._roots[requests], depths[requests], sees)
