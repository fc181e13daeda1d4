"""Seconds of a decode round at a fixed batch and context: draft, verify all of it, choose the target's tokens.

Step times depend on shapes and not on what weights or caches hold, so caches are filled with random numbers instead of
prompts, and networks may have random weights. Every round starts from the same state: requests stand at the same
context length, and the drafter first takes in the target's features of as many tokens as a round commits on average.
Seconds are wall seconds with the device awaited at both ends, so time that the host takes is in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from tqdm import tqdm

from dspark_sim.engine.attention import RaggedBatch
from dspark_sim.engine.drafters import SequenceState
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.models import Target
from dspark_sim.engine.timing import SpanTimer
from dspark_sim.engine.verify import accept_matching
from dspark_sim.errors import UserError

COMMITTED = 4
"""Tokens per request whose features the drafter takes in before each draft."""


@dataclass(frozen=True)
class RoundSeconds:
    """Medians over the repeats, in seconds.

    Parameters
    ----------
    draft
        Backbone and sequential head, the features of committed tokens included.
    verify
        The target's pass over anchors and drafts, and its choice of tokens.
    whole
        The round.
    """

    draft: float
    verify: float
    whole: float


@torch.inference_mode()
def round_seconds(
    target: Target,
    networks: dict[str, BlockDrafter],
    num_requests: int,
    context_len: int,
    *,
    repeats: int = 9,
    warm_up: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, RoundSeconds]:
    """Time rounds of several drafters in turn, so that drift of the machine meets all alike.

    Parameters
    ----------
    target, networks
        The target, and drafters attached to it by name.
    num_requests, context_len
        Requests of the batch, and tokens before each one's anchor.
    repeats, warm_up
        Rounds of each drafter that count, and those before them that do not.
    seed
        Of tokens and caches.
    progress
        Show a bar.

    Raises
    ------
    UserError
        If a number is not positive.
    """
    numbers = {"num_requests": num_requests, "context_len": context_len, "repeats": repeats}
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}; give at least 1")
    if context_len < COMMITTED:
        raise UserError(f"context_len is {context_len}; give at least {COMMITTED}")
    longest = context_len + 1 + max(network.config.num_drafts for network in networks.values())
    torch.manual_seed(seed)
    cache = target.new_cache(num_requests, longest)
    for part in (cache.keys, cache.values):
        part.normal_()
    rounds = {
        name: _Round(target, RaggedBlockDrafter(name, network, num_requests, longest), cache, context_len, seed)
        for name, network in networks.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    numbered = tqdm(range(warm_up + repeats), desc="rounds", unit="round", disable=not progress, leave=False)
    for number in numbered:
        for name, one in rounds.items():
            found = one.run()
            if number >= warm_up:
                seconds[name].append(found)
    medians = {name: np.median(np.array(values), axis=0) for name, values in seconds.items()}
    wholes = {name: float(np.median(np.array(values).sum(axis=1))) for name, values in seconds.items()}
    return {name: RoundSeconds(float(m[0]), float(m[1]), wholes[name]) for name, m in medians.items()}


class _Round:
    """One drafter's round, always from the same state."""

    def __init__(
        self, target: Target, drafter: RaggedBlockDrafter, cache: SlotCache, context_len: int, seed: int
    ) -> None:
        self.target, self.drafter, self.cache = target, drafter, cache
        rng = np.random.default_rng(seed)
        num_requests = cache.keys.shape[1]
        tokens = rng.integers(0, target.config.vocab_size, (num_requests, context_len + 1))
        self.states = [SequenceState(row, 1, tokens[row].tolist(), row) for row in range(num_requests)]
        self.slots = np.arange(num_requests)
        self.positions = np.full(num_requests, context_len)
        self.timer = SpanTimer(target.device)
        for row in range(num_requests):
            drafter.observe(
                self.slots[row : row + 1], np.zeros(1, dtype=np.int64), self.positions[:1], self._random(context_len)
            )
        self.features = self._random(num_requests * COMMITTED)

    def run(self) -> tuple[float, float]:
        """Seconds of draft and verification."""
        gamma, ones = self.drafter.block_size, np.ones(len(self.slots), dtype=np.int64)
        start = self._now()
        self.drafter.observe(self.slots, self.positions - COMMITTED, COMMITTED * ones, self.features)
        drafted = self.drafter.draft(self.states, gamma, gamma * ones, DraftRule(), self.timer)
        middle = self._now()
        anchors = [state.tokens[-1] for state in self.states]
        rows = np.concatenate((np.array(anchors)[:, None], drafted.tokens), axis=1)
        batch = RaggedBatch(self.cache, self.slots, self.positions, (1 + gamma) * ones, self.target.device)
        flat = torch.from_numpy(rows.ravel()).to(self.target.device)
        every = torch.arange(len(flat), device=self.target.device)
        logits, _ = self.target.forward(flat, batch, every, self.drafter.feature_layers)
        accept_matching(drafted.tokens, gamma * ones, logits.argmax(dim=-1).cpu().numpy().reshape(rows.shape))
        end = self._now()
        self.timer.collect()
        return middle - start, end - middle

    def _random(self, num_rows: int) -> torch.Tensor:
        size = self.target.config.hidden_size * len(self.drafter.feature_layers)
        return torch.randn((num_rows, size), device=self.target.device, dtype=self.target.dtype)

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return perf_counter()
