"""The block drafter in the ragged batch: its own KV cache of projected target features, one pass, one head.

Features of committed tokens wait until the next draft, which turns them into context keys and values: that work is
part of what a draft costs. The block's own keys are written behind the context, where the next round's context
overwrites them; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dspark_sim.engine.attention import RaggedBatch, attend
from dspark_sim.engine.drafters import Drafted, IntArray, SequenceState
from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.candidates import CandidateRule
from dspark_sim.engine.drafters.choose import Confidence, DraftRule
from dspark_sim.engine.drafters.grow import grow_trees, in_order, shortened, tree_depth
from dspark_sim.engine.drafters.heads import run_head
from dspark_sim.engine.drafters.pending import PendingFeatures
from dspark_sim.engine.drafters.walk import BlockWalk
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.timing import SpanTimer
from dspark_sim.tree_shapes import TreeShape


class RaggedBlockDrafter:
    """A `BlockDrafter` with the state of a run.

    Parameters
    ----------
    name
        For the trace.
    network
        Attached to its target.
    num_slots, max_len
        As the target's KV cache.
    confidence
        Where confidence comes from; ``None`` means the network's head, if it has one.
    """

    def __init__(
        self, name: str, network: BlockDrafter, num_slots: int, max_len: int, confidence: Confidence | None = None
    ) -> None:
        config = network.config
        self.name = name
        self.network = network
        self.block_size = config.num_drafts
        self._num_slots = config.block_size
        self.confidence = confidence or Confidence()
        self.has_confidence = config.enable_confidence_head or self.confidence.kind != "head"
        self.feature_layers = config.target_layer_ids
        self.draft_token_ids = network.draft_token_ids if config.draft_vocab_size else None
        weight = network.fc.weight
        self._device = weight.device
        self._scale = config.head_dim**-0.5
        self._cache = SlotCache(
            config.num_hidden_layers,
            num_slots,
            config.num_key_value_heads,
            max_len,
            config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._pending = PendingFeatures(max_len)

    def observe(self, slots: IntArray, starts: IntArray, lens: IntArray, features: torch.Tensor) -> None:
        """Keep features for the next draft; when nothing drafts for long, turn them into context now."""
        self._pending.add(slots, starts, lens, features)
        if self._pending.is_full:
            self._extend_context()

    @torch.inference_mode()
    def draft(
        self,
        states: Sequence[SequenceState],
        draft_len: int,
        limits: IntArray,
        rule: DraftRule,
        timer: SpanTimer,
    ) -> Drafted:
        """Backbone over whole blocks, head over the first `draft_len` slots.

        The backbone always runs the whole block, whatever `draft_len`: its slots attend to each other, and a
        shorter block would draft other tokens.
        """
        with timer.span("draft"):
            positions, anchors, hidden = self._hidden(states, draft_len)
        with timer.span("head"):
            ids = np.array([state.request_id for state in states])
            choose = rule.choose(ids, positions, self.network.draft_token_ids)
            walk = BlockWalk(self.network, hidden)
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
        """Backbone as for a chain; candidates, heads and the building of trees are the span ``head``."""
        shape = shortened(shape, draft_len)
        with timer.span("draft"):
            positions, anchors, hidden = self._hidden(states, tree_depth(shape))
        with timer.span("head"):
            ids = np.array([state.request_id for state in states])
            candidates = CandidateRule(rule, ids, positions, self.network.draft_token_ids, shape.num_candidates)
            walk = BlockWalk(self.network, hidden)
            grown = grow_trees(self.network, walk, anchors, shape, candidates, self.confidence)
            return in_order(grown, draft_len, limits)

    def _hidden(self, states: Sequence[SequenceState], num_slots: int) -> tuple[IntArray, torch.Tensor, torch.Tensor]:
        """Anchors' positions [R] and tokens [R], and the first slots' hidden states [R, num_slots, d]."""
        self._extend_context()
        positions = np.array([state.position for state in states])
        batch = RaggedBatch(
            self._cache,
            np.array([state.slot for state in states]),
            positions,
            np.full(len(states), self._num_slots),
            self._device,
            causal=False,
        )
        anchors = torch.tensor([state.tokens[-1] for state in states], device=self._device)
        hidden = self.network.backbone(
            self.network.block_tokens(anchors).flatten(),
            batch.positions,
            lambda layer, q, k, v: attend(batch, layer, q, k, v, self._scale),
        )
        return positions, anchors, hidden.view(len(states), self._num_slots, -1)[:, :num_slots]

    def _extend_context(self) -> None:
        pending = self._pending.take(self._device)
        if pending is None:
            return
        slots, positions, features = pending
        context = self.network.project_context(features)
        rotary = self.network.rotary(positions, context)
        for index, layer in enumerate(self.network.layers):
            self._cache.write(index, slots, positions, *layer.context_keys(context, rotary))
