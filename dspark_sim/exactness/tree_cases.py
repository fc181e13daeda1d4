"""The enumerated cases of trees: shapes, policies and modes that must be exact, and controls that must not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dspark_sim.exactness.enumeration import Array, World, output_law, total_variation
from dspark_sim.exactness.laws import LOOK_AHEAD, Enumerated, Tempting, tables
from dspark_sim.exactness.tree_laws import Drawn, Told, Trees, acceptance_of_children, coupled_tree_law
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed, LoadView, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_history import BatchSizeTable
from dspark_sim.policy_ranked import GlobalArgmax, LaggedPrefixScheduler, Tetris
from dspark_sim.tree import never_rising
from dspark_sim.tree_shapes import BestFirst, Chain, DynamicTopK, FixedWidth, Sequoia, TreeShape

# Two children of the anchor and one below the first: the smallest tree in which depth and width compete.
_FORK = Sequoia(3, ((0.5, 0.3),))


def static_shapes(num_requests: int) -> list[TreeShape]:
    """Small enough to follow every way to draw their tokens."""
    shapes: list[TreeShape] = [_FORK, Chain()] if num_requests == 2 else [_FORK, FixedWidth(2, 2), FixedWidth(3, 1)]
    return [shape.fitted(2) for shape in shapes]


def dynamic_shapes() -> list[TreeShape]:
    """Of which each round has one."""
    shapes: list[TreeShape] = [BestFirst(4, candidates=3), DynamicTopK(2, 2, 5)]
    return [shape.fitted(2) for shape in shapes]


def tree_policies() -> list[SpeculationPolicy]:
    """Policies that are exact on trees under every mode; lengths count nodes."""
    step, *_ = tables()
    policies: list[SpeculationPolicy] = [Fixed(0), Fixed(2), Fixed(6), BatchSizeTable(((1, 3), (2, 1)))]
    return [*policies, PrefixScheduler(step), LaggedPrefixScheduler(step, 1)]


def exact_tree_cases(num_worlds: int) -> Iterator[Enumerated]:
    """Every case that docs/exactness.md calls exact."""
    for num_requests in (1, 2):
        for mode in ("greedy", "target_match", "rejection"):
            shapes = static_shapes(num_requests)
            policies = tree_policies()
            if mode != "rejection":
                shapes = [*shapes, *dynamic_shapes()]
                policies.append(GlobalArgmax(LOOK_AHEAD))
            for shape in shapes:
                for policy in policies:
                    yield _enumerated(policy, mode, shape, num_requests, num_worlds)
    for shape in (_FORK.fitted(2), *dynamic_shapes()):
        for policy in (Fixed(3), PrefixScheduler(tables()[0]), GlobalArgmax(LOOK_AHEAD)):
            worst = 0.0
            for seed in range(num_worlds):
                world = World(1, 3, 2, seed)
                worst = max(
                    worst, total_variation(coupled_tree_law(Trees(world, "coupled", shape), policy, 2), world.law(2))
                )
                world = World(1, 2, 2, seed)
                worst = max(
                    worst, total_variation(coupled_tree_law(Trees(world, "coupled", shape), policy, 3), world.law(3))
                )
            yield Enumerated(f"{shape.label()}, {policy.label()}", "coupled", 1, worst, 2 * num_worlds)


def biased_tree_cases(num_worlds: int) -> Iterator[Enumerated]:
    """Controls under rejection; the bias of each must show."""
    ratio = FixedWidth(2, 2)
    yield _enumerated(
        Fixed(6), "rejection", ratio, 1, num_worlds, drawn="likeliest", name="ratio rule on likeliest tokens"
    )
    for policy in (Tetris(2), PrefixScheduler(tables()[0])):
        name = f"{policy.label()} by the drawn token's own probability"
        yield _enumerated(policy, "rejection", _FORK.fitted(2), 2, num_worlds, told="own_token", name=name)
    yield _enumerated(GlobalArgmax(LOOK_AHEAD), "rejection", Chain(2), 1, num_worlds, tempting=True)


def _enumerated(
    policy: SpeculationPolicy,
    mode: Mode,
    shape: TreeShape,
    num_requests: int,
    num_worlds: int,
    *,
    told: Told = "pre_token",
    drawn: Drawn = "without_replacement",
    tempting: bool = False,
    name: str | None = None,
) -> Enumerated:
    worst = 0.0
    for seed in range(num_worlds):
        # Every second world tempts, and in every second the drafter says the same behind all nodes of a depth.
        kind = Tempting if tempting or seed % 2 else World
        # What a policy remembers tells ways apart that are alike otherwise: there are too many of them with 3 tokens.
        vocab_size = 2 if num_requests == 2 and isinstance(policy, LaggedPrefixScheduler) else 3
        world = kind(num_requests, vocab_size, 2, seed)
        expected = {world.greedy(3): 1.0} if mode == "greedy" else world.law(3)
        rounds = Trees(world, mode, shape, factorised=seed % 2 == 0, told=told, drawn=drawn)
        worst = max(worst, total_variation(output_law(world, policy, mode, 3, rounds), expected))
    return Enumerated(f"{shape.label()}, {name or policy.label()}", mode, num_requests, worst, num_worlds)


def node_interventions(policy: SpeculationPolicy, num_trials: int, seed: int = 0) -> int:
    """Times that redrawing what stands behind node k of a request's list changed whether k is admitted.

    The survival of node k is known before its token is; those behind it may depend on that token.
    """
    rng = np.random.default_rng(seed)
    failures = 0
    for _ in range(num_trials):
        num_requests, width = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        ids = tuple(range(num_requests))
        history = [rng.uniform(0.0, 1.0, (num_requests, width)) for _ in range(int(rng.integers(0, 4)))]
        survival = rng.uniform(0.0, 1.0, (num_requests, width))
        request, node = int(rng.integers(num_requests)), int(rng.integers(width))
        changed = survival.copy()
        changed[request, node + 1 :] = rng.uniform(0.0, 1.0, width - node - 1)
        admitted = []
        for current in (survival, changed):
            controller = policy.start()
            for step, values in enumerate([*history, current]):
                load = LoadView(step, num_requests, 0, 10 * num_requests, width, ids)
                controller.draft_len(load)
                lens = controller.verify_lens(load, never_rising(values))
                if step < len(history):
                    controller.observe(load, lens, lens // 2)
            admitted.append(bool(lens[request] > node))
        failures += admitted[0] != admitted[1]
    return failures


def children_accepted(targets: Sequence[Array] | Array, drafters: Sequence[Array] | Array) -> list[tuple[float, float]]:
    """Mean probability that one of 1, 2, 3 children is accepted: without replacement, and drawn independently."""
    pairs = list(zip(targets, drafters, strict=True))
    return [
        (
            float(np.mean([acceptance_of_children(p, q, count) for p, q in pairs])),
            float(np.mean([acceptance_of_children(p, q, count, replaced=True) for p, q in pairs])),
        )
        for count in (1, 2, 3)
    ]
