"""Sampled outputs of the real loop against the toy target's exact law, and planted errors that must be found.

G-test (likelihood ratio) of the joint law of the first tokens of many requests, cells of small expectation merged.
Requests have lengths of their own, so the batch's composition changes all the time. The level is 1e-4 a test;
`power` says what a test would find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from dspark_sim.cost import CostModel, Curve
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.block_model import BlockDrafter
from dspark_sim.engine.drafters.choose import Choose, Confidence, DraftRule
from dspark_sim.engine.sampling import SamplingParams, draw, keyed_uniform, probabilities
from dspark_sim.exactness.laws import LOOK_AHEAD
from dspark_sim.exactness.toy import BLOCK_SIZE, Toy
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import GlobalArgmax

LEVEL = 1e-4
NUM_TOKENS = 3
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GTest:
    """Outcome of a G-test: p-value, number of cells, requests, and observed total variation."""

    p_value: float
    num_cells: int
    num_requests: int
    total_variation: float

    @property
    def power(self) -> float:
        """Probability of finding, at `LEVEL`, a law that is off by a total variation of 0.05.

        The noncentrality is at least N (2 TV)², by Cauchy-Schwarz.
        """
        degrees = self.num_cells - 1
        critical = stats.chi2.isf(LEVEL, degrees)
        return float(stats.ncx2.sf(critical, degrees, self.num_requests * (2 * 0.05) ** 2))


def g_test(outputs: IntArray, law: FloatArray) -> GTest:
    """Test outputs [N, n] against the flat joint law [V ** n]."""
    num_requests, num_tokens = outputs.shape
    size = round(len(law) ** (1 / num_tokens))
    counts = np.bincount(np.ravel_multi_index(tuple(outputs.T), (size,) * num_tokens), minlength=len(law))
    expected = num_requests * law
    distance = 0.5 * float(np.abs(counts / num_requests - law).sum())
    if counts[expected == 0].any():
        return GTest(0.0, len(counts), num_requests, distance)  # what cannot happen did
    counts, expected = counts[expected > 0], expected[expected > 0]
    small = expected < 8
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    result = stats.power_divergence(counts, expected * counts.sum() / expected.sum(), lambda_="log-likelihood")
    return GTest(float(result.pvalue), len(counts), num_requests, distance)


def sampled_law(
    toy: Toy,
    policy: SpeculationPolicy,
    mode: Mode,
    params: SamplingParams,
    num_requests: int,
    *,
    allow_biased: bool = False,
    rule: DraftRule | None = None,
    num_tokens: int = NUM_TOKENS,
    spread: int = 4,
) -> GTest:
    """Decode through the real loop and test the outputs."""
    rng = np.random.default_rng(params.seed)
    executor = toy.executor(mode, params, with_draft_prob=policy.signal == "draft_prob")
    if rule is not None:
        executor.rule = rule
    outputs = toy.decode(
        policy,
        mode,
        params,
        num_requests=num_requests,
        num_tokens=num_tokens,
        lens=rng.integers(num_tokens + 2, num_tokens + 2 + spread, num_requests).tolist(),
        allow_biased=allow_biased,
        executor=executor,
    )
    return g_test(outputs, toy.law(params, num_tokens))


@dataclass(frozen=True)
class _ArgmaxJudgedAsSampled(DraftRule):
    """Planted error: the most probable token, judged by the ratio rule as if it had been drawn."""

    def choose(self, request_ids: IntArray, anchors: IntArray, token_ids: torch.Tensor) -> Choose:
        def wrong(_slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return logits.argmax(dim=-1), probabilities(logits, self.params)

        return wrong


@dataclass(frozen=True)
class _DrawnInBfloat16(DraftRule):
    """Planted error: drafts drawn from a bfloat16 softmax and judged by float32 probabilities."""

    def choose(self, request_ids: IntArray, anchors: IntArray, token_ids: torch.Tensor) -> Choose:
        def wrong(slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # Logits of language models lie far from zero, where bfloat16 is coarse; a shift changes no softmax.
            rough = ((logits + 20.0).bfloat16() / self.params.temperature).softmax(dim=-1).float()
            uniforms = keyed_uniform(self.params.seed, request_ids, anchors, "draft", slot)
            return draw(rough, uniforms), probabilities(logits, self.params)

        return wrong


class _Tempting(Confidence):
    """The paper's example: the second draft looks good behind some tokens and bad behind the others."""

    def __init__(self) -> None:
        super().__init__("top1")
        object.__setattr__(self, "slots", cycle(range(BLOCK_SIZE)))

    def estimate(
        self, network: BlockDrafter, hidden: torch.Tensor, embedding: torch.Tensor | None, logits: torch.Tensor
    ) -> torch.Tensor:
        assert embedding is not None and network.markov_head is not None
        slot = next(self.slots)  # type: ignore[attr-defined]
        if slot != 1:
            return torch.full_like(embedding[:, 0], 0.8 if slot == 0 else 0.05)
        middle = network.markov_head.markov_w1.weight[:, 0].median()
        return torch.where(embedding[:, 0] > middle, 0.9, 0.1)


@dataclass(frozen=True)
class _DrawnWithTheResidualsNumber(DraftRule):
    """Planted error: a draft is drawn with the number that later draws its replacement."""

    def choose(self, request_ids: IntArray, anchors: IntArray, token_ids: torch.Tensor) -> Choose:
        def wrong(slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            law = probabilities(logits, self.params)
            return draw(law, keyed_uniform(self.params.seed, request_ids, anchors + 1 + slot, "residual")), law

        return wrong


def controls(num_requests: int) -> dict[str, Callable[[], GTest]]:
    """Planted errors by name; each must be found."""

    def argmax_judged() -> GTest:
        params = SamplingParams(1.0, seed=11)
        rule = _ArgmaxJudgedAsSampled("rejection", params)
        return sampled_law(Toy.make(), _everything(), "rejection", params, num_requests, rule=rule)

    def bfloat16() -> GTest:
        params = SamplingParams(0.3, seed=12)
        rule = _DrawnInBfloat16("rejection", params)
        return sampled_law(Toy.make(sharpness=0.7), _everything(), "rejection", params, num_requests, rule=rule)

    def shared_noise() -> GTest:
        params = SamplingParams(1.0, seed=13)
        rule = _DrawnWithTheResidualsNumber("rejection", params)
        return sampled_law(Toy.make(), _everything(), "rejection", params, num_requests, rule=rule)

    def global_argmax() -> GTest:
        toy = Toy.make(max_num_seqs=1)
        assert isinstance(toy.drafter, RaggedBlockDrafter)
        toy.drafter.confidence = _Tempting()
        policy = GlobalArgmax(LOOK_AHEAD)
        params = SamplingParams(1.0, seed=14)
        # One request at a time is where its own token sways the choice most.
        options: dict[str, Any] = {"allow_biased": True, "num_tokens": 2, "spread": 1}
        return sampled_law(toy, policy, "rejection", params, min(num_requests, 1500), **options)

    return {
        "greedy drafts judged by the ratio": argmax_judged,
        "bfloat16 drafts judged in float32": bfloat16,
        "one number for draft and residual": shared_noise,
        "global argmax under rejection": global_argmax,
    }


def _everything() -> SpeculationPolicy:
    return Fixed(3)


def scheduled() -> PrefixScheduler:
    """Algorithm 1 on a table that makes it admit some drafts and not others."""
    return PrefixScheduler(CostModel(verify=Curve((1.0, 64.0, 256.0), (1.0, 2.0, 6.0))))
