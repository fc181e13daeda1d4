"""The exact joint law of what R requests emit, by walking every branch of every round.

A `World` gives, for every request and every prefix of tokens, the target's law, the drafter's law and a confidence
that depends on the tokens before the one it judges. Policies are the real ones; acceptance probabilities come from
the engine's own rule functions. Probabilities are multiplied, never sampled, so the result is exact to rounding.

In ``coupled`` mode target and drafter share their noise, so nothing can be multiplied along a round; there the noise
of every position is cut into the cells in which no choice changes, and each combination of cells is decoded.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dspark_sim.engine.verify import acceptance, block_acceptance, block_weights
from dspark_sim.loop import Mode
from dspark_sim.policy import Controller, LoadView, Signal, SpeculationPolicy

Array = npt.NDArray[np.float64]
Path = tuple[int, ...]
Law = dict[tuple[Path, ...], float]
Outcome = tuple[int, Path, float]


@dataclass(eq=False)
class World:
    """Random conditional laws over a small vocabulary.

    Parameters
    ----------
    num_requests, vocab_size, block_size
        R, V and γ.
    seed
        Of the laws.
    """

    num_requests: int
    vocab_size: int
    block_size: int
    seed: int = 0
    _tables: dict[tuple[str, int, Path], Array] = field(default_factory=dict)

    def target(self, request: int, path: Path) -> Array:
        """Law of the token behind `path`, [V]."""
        return self._law("target", request, path)

    def drafter(self, request: int, path: Path) -> Array:
        """The drafter's law of the token behind `path`, [V]."""
        return self._law("drafter", request, path)

    def confidence(self, request: int, path: Path) -> float:
        """Estimate for the token behind `path`: a function of the tokens before it, right or wrong."""
        return float(self._law("confidence", request, path)[0])

    def _law(self, kind: str, request: int, path: Path) -> Array:
        key = kind, request, path
        if key not in self._tables:
            rng = np.random.default_rng([self.seed, len(kind), request, len(path), *path])
            self._tables[key] = (
                rng.uniform(0.05, 0.98, 1) if kind == "confidence" else rng.dirichlet(np.ones(self.vocab_size))
            )
        return self._tables[key]

    def accept_prob(self, request: int, path: Path) -> float:
        """True probability that the drafted token behind `path` is accepted."""
        return float(np.minimum(self.target(request, path), self.drafter(request, path)).sum())

    def law(self, num_tokens: int) -> Law:
        """The target's own joint law of the first `num_tokens` tokens of all requests."""
        single: list[dict[Path, float]] = []
        for request in range(self.num_requests):
            paths: dict[Path, float] = {}
            for path in product(range(self.vocab_size), repeat=num_tokens):
                paths[path] = float(np.prod([self.target(request, path[:k])[path[k]] for k in range(num_tokens)]))
            single.append(paths)
        return {joint: float(np.prod([single[r][path] for r, path in enumerate(joint)])) for joint in product(*single)}

    def greedy(self, num_tokens: int) -> tuple[Path, ...]:
        """The most probable token again and again."""
        paths = []
        for request in range(self.num_requests):
            path: Path = ()
            while len(path) < num_tokens:
                path = (*path, int(self.target(request, path).argmax()))
            paths.append(path)
        return tuple(paths)


def total_variation(left: Law, right: Law) -> float:
    """Half the sum of absolute differences."""
    return 0.5 * sum(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in {*left, *right})


class Rounds(Protocol):
    """What may happen in a round of one request: chains (`Chains`) or trees (`tree_laws.Trees`)."""

    @property
    def size(self) -> int:
        """Most drafts."""
        ...

    def drafts(self, request: int, output: Path, draft_len: int, room: int) -> list[tuple[Any, float]]:
        """Every draft that may be made behind `output`, `room` tokens deep, and its probability."""
        ...

    def survival(self, request: int, output: Path, draft: Any) -> Array:
        """What the policy is told of a draft, [its length]."""
        ...

    def outcomes(self, request: int, output: Path, draft: Any, verify_len: int) -> list[Outcome]:
        """Every (accepted, emitted tokens, probability) if `verify_len` drafts are verified."""
        ...


@dataclass(frozen=True)
class Chains:
    """Rounds of chains in a world, for an acceptance mode and a policy's signal."""

    world: World
    mode: Mode
    signal: Signal

    @property
    def size(self) -> int:
        """γ."""
        return self.world.block_size

    def drafts(self, request: int, output: Path, draft_len: int, room: int) -> list[tuple[Path, float]]:
        """See `Rounds`."""
        return _drafts(self.world, request, output, min(draft_len, room), self.mode)

    def survival(self, request: int, output: Path, draft: Path) -> Array:
        """See `Rounds`."""
        return _survival(self.world, self.signal, request, output, draft)

    def outcomes(self, request: int, output: Path, draft: Path, verify_len: int) -> list[Outcome]:
        """See `Rounds`."""
        return _outcomes(self.world, request, output, draft[:verify_len], self.mode)


def output_law(
    world: World, policy: SpeculationPolicy, mode: Mode, num_tokens: int, rounds: Rounds | None = None
) -> Law:
    """The joint law of the first `num_tokens` tokens of all requests under a policy and an acceptance mode.

    `rounds` says what is drafted and how it is judged; by default chains, by the mode.
    """
    if mode == "coupled" and rounds is None:
        return _coupled_law(world, policy, num_tokens)
    rounds = rounds or Chains(world, mode, policy.signal)
    law: Law = defaultdict(float)
    start = tuple(() for _ in range(world.num_requests))
    # Ways that emitted the same go on alike if the controller remembers nothing, and are joined.
    joined = getattr(type(policy.start()), "__dataclass_params__", None)
    forgets = joined is not None and joined.frozen
    states: dict[Any, tuple[tuple[Path, ...], Controller, int, float]] = {start: (start, policy.start(), 0, 1.0)}
    while states:
        # Those of the earliest step first, so that all ways into a state have been seen when it is left.
        outputs, controller, step, probability = states.pop(next(iter(states)))
        running = [r for r in range(world.num_requests) if len(outputs[r]) < num_tokens]
        if not running:
            law[outputs] += probability
            continue
        controller = _copied(controller)
        load = LoadView(step, len(running), 0, 10 * len(running), rounds.size, tuple(running))
        draft_len = min(controller.draft_len(load), rounds.size)
        every = [rounds.drafts(r, outputs[r], draft_len, num_tokens - len(outputs[r]) - 1) for r in running]
        for combination in product(*every):
            chance = probability * float(np.prod([weight for _, weight in combination]))
            if chance == 0.0:
                continue
            drafts = [draft for draft, _ in combination]
            chooser = _copied(controller)
            told = [rounds.survival(r, outputs[r], draft) for r, draft in zip(running, drafts, strict=True)]
            verify_lens = chosen_lens(chooser, load, told, drafts, draft_len)
            outcomes = [
                rounds.outcomes(r, outputs[r], draft, length)
                for r, draft, length in zip(running, drafts, verify_lens.tolist(), strict=True)
            ]
            for result in product(*outcomes):
                weight = chance * float(np.prod([one[2] for one in result]))
                if weight == 0.0:
                    continue
                after = list(outputs)
                for r, (_, emitted, _) in zip(running, result, strict=True):
                    after[r] = (*outputs[r], *emitted)
                observer = _copied(chooser)
                observer.observe(load, verify_lens, np.array([one[0] for one in result]))
                state = tuple(after)
                key = (step + 1, state) if forgets else (step + 1, state, len(states), object())
                before = states[key][-1] if key in states else 0.0
                states[key] = state, observer, step + 1, before + weight
    return dict(law)


def _copied(controller: Controller) -> Controller:
    """A controller with state of its own; tables it only reads are shared."""
    copied = copy.copy(controller)
    for name, value in getattr(copied, "__dict__", {}).items():
        if isinstance(value, (list, dict, set)) or hasattr(value, "maxlen") or hasattr(value, "observe"):
            object.__setattr__(copied, name, _copied(value) if hasattr(value, "observe") else copy.copy(value))
    return copied


def _drafts(world: World, request: int, output: Path, length: int, mode: Mode) -> list[tuple[Path, float]]:
    """Every block that may be drafted and its probability."""
    if mode in ("greedy", "target_match"):
        path: Path = ()
        for _ in range(length):
            path = (*path, int(world.drafter(request, (*output, *path)).argmax()))
        return [(path, 1.0)]
    blocks = []
    for path in product(range(world.vocab_size), repeat=length):
        laws = [world.drafter(request, (*output, *path[:k]))[path[k]] for k in range(length)]
        blocks.append((path, float(np.prod(laws))))
    return blocks


def _choose(
    world: World,
    policy: SpeculationPolicy,
    controller: Controller,
    load: LoadView,
    running: Sequence[int],
    outputs: Sequence[Path],
    drafts: Sequence[Path],
    draft_len: int,
) -> npt.NDArray[np.int64]:
    told = [_survival(world, policy.signal, r, outputs[r], draft) for r, draft in zip(running, drafts, strict=True)]
    return chosen_lens(controller, load, told, drafts, draft_len)


def _survival(world: World, signal: Signal, request: int, output: Path, draft: Path) -> Array:
    values = []
    for k, token in enumerate(draft):
        path = (*output, *draft[:k])
        if signal == "draft_prob":
            values.append(float(world.drafter(request, path)[token]))
        elif signal == "accept_prob":
            values.append(world.accept_prob(request, path))
        else:
            values.append(world.confidence(request, path))
    survival: Array = np.cumprod(np.array(values), dtype=np.float64)
    return survival


def chosen_lens(
    controller: Controller, load: LoadView, told: Sequence[Array], drafts: Sequence[Sized], draft_len: int
) -> npt.NDArray[np.int64]:
    """Drafts that a controller has verified, [R], from what it is told of each request's."""
    survival = np.zeros((len(told), draft_len))
    for row, values in enumerate(told):
        survival[row, : len(values)] = values
    return np.minimum(controller.verify_lens(load, survival), [len(draft) for draft in drafts])


def _outcomes(world: World, request: int, output: Path, draft: Path, mode: Mode) -> list[Outcome]:
    """Every (accepted, emitted tokens, probability) of one request's verification."""
    targets = [world.target(request, (*output, *draft[:k])) for k in range(len(draft) + 1)]
    if mode == "greedy":
        return list(_matched([np.eye(world.vocab_size)[law.argmax()] for law in targets], draft))
    if mode == "target_match":
        return list(_matched(targets, draft))
    laws = [world.drafter(request, (*output, *draft[:k])) for k in range(len(draft))]
    p = np.array([[targets[k][token] for k, token in enumerate(draft)]]).reshape(1, -1)
    q = np.array([[laws[k][token] for k, token in enumerate(draft)]]).reshape(1, -1)
    if mode == "rejection":
        keep = np.cumprod(np.concatenate(([1.0], acceptance(p, q)[0])))
        last = np.append(1.0 - acceptance(p, q)[0], 1.0)
        ends = keep * last
        weights = np.ones(len(draft) + 1)
    else:
        weights = block_weights(p, q)[0]
        mass = np.array([np.maximum(weights[k] * targets[k] - law, 0).sum() for k, law in enumerate(laws)] + [0.0])
        kept = block_acceptance(weights[None], mass[None], np.array([len(draft)]))[0]
        kept[0] = 1.0
        ends = np.array([kept[k] * np.prod(1.0 - kept[k + 1 :]) for k in range(len(draft) + 1)])
    results = []
    for k, chance in enumerate(ends):
        following = targets[k] if k == len(draft) else np.maximum(weights[k] * targets[k] - laws[k], 0.0)
        if chance > 0:
            following = following / following.sum()
            results += [(k, (*draft[:k], token), float(chance * w)) for token, w in enumerate(following)]
    return results


def _matched(targets: Sequence[Array], draft: Path) -> Iterator[Outcome]:
    """The target chooses a token at every row; drafts are accepted while they are its choice."""
    chance = 1.0
    for k, law in enumerate(targets):
        for token, weight in enumerate(law):
            if k == len(draft) or token != draft[k]:
                yield k, (*draft[:k], token), chance * float(weight)
        if k < len(draft):
            chance *= float(law[draft[k]])


def _coupled_law(world: World, policy: SpeculationPolicy, num_tokens: int) -> Law:
    """Vocabulary 2: token 0 wins the race iff the position's uniform is below its probability, for both models."""
    if world.vocab_size != 2:
        raise ValueError(f"coupled enumeration needs vocab_size 2, not {world.vocab_size}")
    cells: list[list[tuple[float, float]]] = []
    for r in range(world.num_requests):
        for position in range(num_tokens):
            paths = list(product(range(2), repeat=position))
            cuts = {float(law(r, path)[0]) for path in paths for law in (world.target, world.drafter)}
            cells.append(list(pairwise(sorted({0.0, 1.0, *cuts}))))
    law: Law = defaultdict(float)
    for combination in product(*cells):
        noise = [
            [(low + high) / 2 for low, high in combination[r * num_tokens : (r + 1) * num_tokens]]
            for r in range(world.num_requests)
        ]
        weight = float(np.prod([high - low for low, high in combination]))
        law[decode(world, policy, num_tokens, partial(_below, noise))] += weight
    return dict(law)


def _below(noise: list[list[float]], law: Array, request: int, position: int) -> int:
    return int(noise[request][position] >= law[0])


def decode(
    world: World, policy: SpeculationPolicy, num_tokens: int, choose: Callable[[Array, int, int], int]
) -> tuple[Path, ...]:
    """Decode with target and drafter that choose by the same ``choose(law, request, position)``."""
    outputs: list[Path] = [() for _ in range(world.num_requests)]
    controller, step = policy.start(), 0
    while running := [r for r in range(world.num_requests) if len(outputs[r]) < num_tokens]:
        load = LoadView(step, len(running), 0, 10 * len(running), world.block_size, tuple(running))
        draft_len = min(controller.draft_len(load), world.block_size)
        drafts: list[Path] = []
        for r in running:
            draft: Path = ()
            while len(draft) < min(draft_len, num_tokens - len(outputs[r]) - 1):
                path = (*outputs[r], *draft)
                draft = (*draft, choose(world.drafter(r, path), r, len(path)))
            drafts.append(draft)
        verify_lens = _choose(world, policy, controller, load, running, outputs, drafts, draft_len)
        accepted = []
        for r, draft, length in zip(running, drafts, verify_lens.tolist(), strict=True):
            emitted: list[Any] = []
            while True:
                path = (*outputs[r], *emitted)
                token = choose(world.target(r, path), r, len(path))
                emitted.append(token)
                if len(emitted) > length or draft[len(emitted) - 1] != token:
                    break
            accepted.append(len(emitted) - 1)
            outputs[r] = (*outputs[r], *emitted)
        controller.observe(load, verify_lens, np.array(accepted))
        step += 1
    return tuple(outputs)
