"""Prompt lookup: propose what followed the most recent earlier occurrence of the last few tokens. Needs no training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dspark_sim.engine.drafters import Drafted, IntArray, SequenceState
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.timing import SpanTimer


class NgramDrafter:
    """N-gram drafter (Saxena 2023; vLLM's `ngram`).

    Parameters
    ----------
    block_size
        Most tokens proposed.
    max_ngram, min_ngram
        Lengths of the suffix that is looked up, longest first.
    """

    name = "ngram"
    has_confidence = False
    feature_layers: tuple[int, ...] = ()
    draft_token_ids: torch.Tensor | None = None

    def __init__(self, block_size: int = 7, max_ngram: int = 3, min_ngram: int = 2) -> None:
        self.block_size = block_size
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def observe(self, slots: IntArray, starts: IntArray, lens: IntArray, features: torch.Tensor) -> None:
        """Nothing to learn from features."""

    def draft(
        self,
        states: Sequence[SequenceState],
        draft_len: int,
        limits: IntArray,
        rule: DraftRule,
        timer: SpanTimer,
    ) -> Drafted:
        """Look every request's suffix up."""
        with timer.span("draft"):
            tokens = np.zeros((len(states), draft_len), dtype=np.int64)
            lens = np.zeros(len(states), dtype=np.int64)
            for row, (state, limit) in enumerate(zip(states, limits.tolist(), strict=True)):
                found = self.propose(np.asarray(state.tokens), min(draft_len, limit))
                tokens[row, : len(found)] = found
                lens[row] = len(found)
        # A point mass: whatever was looked up was certain.
        return Drafted(tokens, lens, draft_prob=np.ones(tokens.shape) if rule.with_prob else None)

    def propose(self, tokens: IntArray, num_tokens: int) -> IntArray:
        """Up to `num_tokens` tokens that may follow `tokens` [n]."""
        for size in range(self.max_ngram, self.min_ngram - 1, -1):
            if len(tokens) <= size or num_tokens <= 0:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
            starts = np.flatnonzero((windows == tokens[-size:]).all(axis=1))
            if starts.size:
                after = int(starts[-1]) + size
                return tokens[after : after + num_tokens]
        return tokens[:0]
