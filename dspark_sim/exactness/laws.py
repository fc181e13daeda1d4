"""The enumerated cases: every policy under every acceptance mode, and the known-bad ones.

Laws are random and unlike each other (p, q and confidence of every prefix are drawn on their own), so nothing is
exact by luck. Tables differ in shape, because a scheduler that stops early is tempted by a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark_sim.cost import CostModel, Curve
from dspark_sim.exactness.enumeration import World, output_law, total_variation
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed, LoadView, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler, Oracle, Tetris

MODES: tuple[Mode, ...] = ("greedy", "rejection", "coupled", "target_match", "block")
TOLERANCE = 1e-12
FloatArray = npt.NDArray[np.float64]


def tables() -> list[CostModel]:
    """A step that tempts to look ahead, and a gentle rise."""
    return [
        CostModel(verify=Curve((1.0, 2.0, 3.0, 4.0, 6.0), (1.0, 1.75, 1.8, 1.85, 3.4))),
        CostModel(verify=Curve((1.0, 6.0), (1.0, 2.6))),
        CostModel(verify=Curve((2.0, 3.0, 6.0), (1.0, 1.2, 1.9))),
    ]


def honest_policies() -> list[SpeculationPolicy]:
    """Policies that are exact under every mode."""
    chosen: list[SpeculationPolicy] = [Fixed(0), Fixed(1), Fixed(2), ConfidenceThreshold(0.5)]
    chosen += [BatchSizeTable(((1, 2), (2, 1))), AcceptanceEMA((1, 2))]
    for cost in tables():
        chosen += [PrefixScheduler(cost), LaggedPrefixScheduler(cost, 1), LaggedPrefixScheduler(cost, 2)]
        chosen += [Goodput(cost, probe_every=2), Parked(PrefixScheduler(cost), cost, probe_every=2)]
    return chosen


def peeking_policies() -> list[SpeculationPolicy]:
    """Policies that look at sampled tokens: exact under greedy, coupled and target_match only."""
    step, rise, *_ = tables()
    return [GlobalArgmax(step), GlobalArgmax(rise), Tetris(1), Tetris(2), Oracle(step), Oracle(rise)]


@dataclass(frozen=True, slots=True)
class Enumerated:
    """Largest total variation of a policy's output law over several worlds, and how many."""

    policy: str
    mode: Mode
    num_requests: int
    total_variation: float
    num_worlds: int


def enumerate_law(policy: SpeculationPolicy, mode: Mode, worlds: Sequence[World]) -> Enumerated:
    """Compare with the target's law; `greedy` with its most probable path."""
    num_requests, worst = worlds[0].num_requests, 0.0
    # One request has room for three rounds with drafts, so that two-round-old confidences matter.
    num_tokens = 5 if num_requests == 1 else 3
    if mode == "coupled":
        num_tokens = 3 if num_requests == 1 else 2
    for world in worlds:
        expected = {world.greedy(num_tokens): 1.0} if mode == "greedy" else world.law(num_tokens)
        worst = max(worst, total_variation(output_law(world, policy, mode, num_tokens), expected))
    return Enumerated(policy.label(), mode, num_requests, worst, len(worlds))


def exact_cases(num_worlds: int) -> Iterator[Enumerated]:
    """Every case that the design calls exact."""
    for num_requests in (1, 2):
        # Every second world tempts: its confidences say much about the token before.
        worlds = [(World, Tempting)[seed % 2](num_requests, 2, 2, seed) for seed in range(num_worlds)]
        for mode in MODES:
            peeking = [] if mode in ("rejection", "block") else peeking_policies()
            for policy in (*honest_policies(), *peeking):
                yield enumerate_law(policy, mode, worlds)


class Tempting(World):
    """A second draft looks good behind token 0 and bad behind any other."""

    def _law(self, kind: str, request: int, path: tuple[int, ...]) -> FloatArray:
        if kind == "confidence":
            return np.array([0.8 if not path else (0.9 if path[-1] == 0 else 0.1)])
        return super()._law(kind, request, path)


class AppendixA(Tempting):
    """The paper's example: two tokens A and B, p(A) = .7, q(A) = .5."""

    def __init__(self) -> None:
        super().__init__(1, 2, 2)

    def _law(self, kind: str, request: int, path: tuple[int, ...]) -> FloatArray:
        if kind == "confidence":
            return super()._law(kind, request, path)
        return np.array([0.7, 0.3]) if kind == "target" else np.array([0.5, 0.5])


# Verifying one draft does not pay by itself (1.8 / 1.9 < 1), two do if the second is likely (2.52 / 2 > 1).
LOOK_AHEAD = CostModel(verify=Curve((1.0, 2.0, 3.0, 4.0), (1.0, 1.9, 2.0, 3.0)))
# The same for two requests: 2, 1.93, 1.95, then 2.22 with one token 0 among them and 2.52 with two.
LOOK_AHEAD_TWO = CostModel(verify=Curve((2.0, 3.0, 4.0, 5.0, 6.0), (1.0, 1.45, 1.85, 1.95, 2.0)))


def biased_cases(num_worlds: int) -> Iterator[Enumerated]:
    """Peeking policies under rejection and block: their bias must show."""
    cases: list[tuple[SpeculationPolicy, int]] = [(GlobalArgmax(LOOK_AHEAD), 1), (GlobalArgmax(LOOK_AHEAD_TWO), 2)]
    cases += [(Tetris(1), 2), (Tetris(2), 2)]
    modes: tuple[Mode, ...] = ("rejection", "block")
    for mode in modes:
        for policy, num_requests in cases:
            kind = Tempting if isinstance(policy, GlobalArgmax) else World
            yield enumerate_law(policy, mode, [kind(num_requests, 2, 2, seed) for seed in range(num_worlds)])


def appendix_a() -> tuple[float, float]:
    """P(first token is A) under the global argmax and under Algorithm 1."""
    chances = []
    for policy in (GlobalArgmax(LOOK_AHEAD), PrefixScheduler(LOOK_AHEAD)):
        law = output_law(AppendixA(), policy, "rejection", 3)
        chances.append(sum(weight for (path,), weight in law.items() if path[0] == 0))
    return chances[0], chances[1]


def intervention_failures(policy: SpeculationPolicy, num_trials: int, seed: int = 0) -> int:
    """Times that redrawing confidences behind position k of a request changed whether k is admitted.

    The confidence of position k is known before token k is; those behind it depend on token k.
    """
    rng = np.random.default_rng(seed)
    failures = 0
    for _ in range(num_trials):
        num_requests, width = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        ids = tuple(range(num_requests))
        history = [rng.uniform(0.05, 1.0, (num_requests, width)) for _ in range(int(rng.integers(0, 4)))]
        confidence = rng.uniform(0.05, 1.0, (num_requests, width))
        request, position = int(rng.integers(num_requests)), int(rng.integers(width))
        changed = confidence.copy()
        changed[request, position + 1 :] = rng.uniform(0.0, 1.0, width - position - 1)
        admitted = []
        for current in (confidence, changed):
            controller = policy.start()
            for step, values in enumerate([*history, current]):
                load = LoadView(step, num_requests, 0, 10 * num_requests, width, ids)
                controller.draft_len(load)
                lens = controller.verify_lens(load, np.cumprod(values, axis=1))
                if step < len(history):
                    controller.observe(load, lens, lens // 2)
            admitted.append(bool(lens[request] > position))
        failures += admitted[0] != admitted[1]
    return failures
