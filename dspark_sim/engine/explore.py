"""A policy for profile runs: batches of every size that other policies make."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_sim.policy import Controller, FloatArray, Information, IntArray, LoadView, Signal


@dataclass(frozen=True)
class Explore:
    """A policy for profiling: draft and verify lengths drawn at random each round.

    Parameters
    ----------
    block_size
        Most tokens to draft.
    seed
        Of the draws.
    """

    block_size: int
    seed: int = 0
    information: Information = "history"
    signal: Signal = "confidence"
    needs_confidence: bool = False

    def start(self) -> Controller:
        """A fresh generator."""
        return _ExploreController(self.block_size, np.random.default_rng(self.seed))

    def label(self) -> str:
        """Name in tables."""
        return "explore"


@dataclass
class _ExploreController:
    block_size: int
    rng: np.random.Generator

    def draft_len(self, load: LoadView) -> int:
        if self.block_size == 0 or self.rng.random() < 0.2:
            return 0
        return self.block_size if self.rng.random() < 0.6 else int(self.rng.integers(1, self.block_size + 1))

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        num_requests, width = survival.shape
        # Half of the rounds verify all or nothing: most rounds of other policies do.
        kind = self.rng.random()
        if kind < 0.5:
            return np.full(num_requests, width if kind < 0.35 else 0, dtype=np.int64)
        level = int(self.rng.integers(0, width + 1))
        jitter = self.rng.integers(-1, 2, num_requests)
        return np.asarray(np.clip(level + jitter, 0, width), dtype=np.int64)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass
