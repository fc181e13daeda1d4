"""Laws of the real model: streams that no schedule changes, and replays that equal live runs.

*Stream invariance*: what is emitted in ``greedy``, ``coupled`` and ``target_match`` mode is a function of the seed and
the prompt alone. *Identity*: a live run's own replay has its rounds. *Counterfactual*: the replay of one recording
under another policy has the rounds of a second live run; in ``rejection`` mode, where a second run draws other
tokens, its acceptance lies within the interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dspark_sim.analysis.fidelity import rounds_equal
from dspark_sim.analysis.stats import paired_difference
from dspark_sim.api import simulate
from dspark_sim.cost import CostModel, Curve
from dspark_sim.engine.explore import Explore
from dspark_sim.engine.serve import Engine
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler, Tetris
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop, Prompt, bundled_prompts

# Flat to 8 tokens, then rising: speculation pays for few requests. Only decisions depend on it here.
COST = CostModel(verify=Curve((1.0, 8.0, 32.0), (0.06, 0.07, 0.14)), draft=Curve(levels=(0.01,)))


@dataclass(frozen=True)
class Scale:
    """Size of the runs on the real model."""

    per_domain: int = 1
    max_tokens: int = 12
    concurrency: int = 2
    block_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    short: bool = False

    def prompts(self) -> list[Prompt]:
        """The prompts, of every domain."""
        return bundled_prompts(per_domain=self.per_domain)


QUICK = Scale(max_tokens=8, block_sizes=(3, 7), short=True)


def policies(scale: Scale, mode: Mode) -> list[SpeculationPolicy]:
    """Policies whose replay is checked in a mode."""
    chosen: list[SpeculationPolicy] = [Fixed(size) for size in scale.block_sizes]
    chosen.append(PrefixScheduler(COST))
    if scale.short or mode == "target_match":
        return chosen if scale.short else [Fixed(2), Fixed(5), PrefixScheduler(COST), LaggedPrefixScheduler(COST, 1)]
    chosen += [PrefixScheduler(COST, size) for size in (2, 5)]
    chosen += [ConfidenceThreshold(0.5), BatchSizeTable(((2, 5), (4, 2))), AcceptanceEMA((1, 3, 7)), Goodput(COST)]
    chosen += [Parked(Fixed(7), COST), LaggedPrefixScheduler(COST, 2)]
    if mode != "rejection":
        chosen += [GlobalArgmax(COST), Tetris(6)]
    return chosen


class RealModel:
    """Live runs of the embedded target, their anchors and their replays."""

    def __init__(self, engine: Engine, scale: Scale) -> None:
        self.engine, self.scale = engine, scale

    def live(self, policy: SpeculationPolicy, mode: Mode, *, seed: int = 3, concurrency: int | None = None) -> Trace:
        """A live run without anchors."""
        return self.engine.record(
            self.scale.prompts(),
            policy,
            ClosedLoop(concurrency or self.scale.concurrency),
            max_tokens=self.scale.max_tokens,
            mode=mode,
            temperature=0.0 if mode == "greedy" else 0.8,
            top_p=1.0 if mode in ("greedy", "coupled") else 0.95,
            seed=seed,
            progress=False,
        )

    def anchored(self, trace: Trace) -> Trace:
        """With dense anchors."""
        return self.engine.anchors(trace, progress=False)

    def replay(self, trace: Trace, policy: SpeculationPolicy) -> Trace:
        """A simulated run of the same requests."""
        return simulate(trace, policy=policy, cost=COST, concurrency=self.scale.concurrency)

    def invariance(self, mode: Mode) -> tuple[int, int]:
        """Streams that equal plain decoding's under other policies and batches; (equal, compared)."""
        plain = self.live(Fixed(0), mode, concurrency=1).requests["output_tokens"]
        equal = compared = 0
        runs: list[tuple[SpeculationPolicy, int]] = [(Explore(7, 1), self.scale.concurrency)]
        if not self.scale.short:
            runs += [(PrefixScheduler(COST), 2), (Fixed(7), 1)]
        for policy, users in runs:
            tokens = self.live(policy, mode, concurrency=users).requests["output_tokens"]
            equal += sum(list(a) == list(b) for a, b in zip(plain, tokens, strict=True))
            compared += len(plain)
        return equal, compared

    def counterfactuals(self, mode: Mode) -> Iterator[tuple[str, bool, str]]:
        """(case, whether it holds, in words) for every policy, from one recording."""
        first = self.anchored(self.live(Fixed(7), mode))
        yield "identity fixed-7", *_verdict(first, self.replay(first, Fixed(7)))
        for policy in policies(self.scale, mode):
            live = self.live(policy, mode)
            if mode == "rejection":
                # A lagged budget sees confidences behind the verified prefix, which the dense pass draws anew.
                if not isinstance(policy, LaggedPrefixScheduler):
                    yield f"identity {policy.label()}", *_verdict(live, self.replay(self.anchored(live), policy))
            else:
                yield f"counterfactual {policy.label()}", *_verdict(live, self.replay(first, policy))

    def acceptance_interval(self, policy: SpeculationPolicy) -> tuple[float, float, float]:
        """Live less replayed mean acceptance length in ``rejection`` mode, with an interval over prompts."""
        recording = self.anchored(self.live(Fixed(7), "rejection", seed=4))
        runs = self.live(policy, "rejection", seed=5), self.replay(recording, policy)
        live, replayed = (_rounds_by_request(trace) for trace in runs)
        found = paired_difference(replayed, live, "emitted", "rounds")
        return found.estimate, found.low, found.high


def _rounds_by_request(trace: Trace) -> pd.DataFrame:
    drafts = trace.drafts.groupby("request_id")["num_accepted"]
    counts = pd.DataFrame({"emitted": drafts.sum() + drafts.size(), "rounds": drafts.size()})
    return counts.join(trace.requests.set_index("request_id")["prompt_id"])


def _verdict(live: Trace, replayed: Trace) -> tuple[bool, str]:
    verdict = rounds_equal(live, replayed)
    return bool(verdict), str(verdict)


def depth_slope(trace: Trace, num_draws: int = 2000) -> tuple[float, float, float]:
    """Acceptance of the first draft: late half of the outputs less early half, with a 95 % interval over requests.

    A block at the wrong positions loses acceptance as the context grows.
    """
    anchors = trace.anchors
    first = (anchors["num_accepted"] > 0).astype(float)
    place = anchors.groupby("request_id").cumcount()
    late = place >= anchors.groupby("request_id")["position"].transform("size") / 2
    means = first.groupby([anchors["request_id"], late]).mean().unstack()
    difference = (means[True] - means[False]).dropna().to_numpy()
    rng = np.random.default_rng(0)
    draws = rng.choice(difference, (num_draws, len(difference))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
