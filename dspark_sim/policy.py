"""Speculation policies: how many drafted tokens of each request the target verifies.

A policy is a frozen dataclass of parameters; `start()` returns its controller, which holds whatever state it
learns. Controllers see counts and numpy arrays, never tensors, and the same objects run in the live engine and in
the simulator.

**Survival** of draft position j (0-based) of request r is the estimated probability that positions 0..j are all
accepted: the cumulative product of the policy's signal, usually the confidences. It never rises with j, so the j
best positions of a request are always a prefix. It is 0 where nothing was drafted.

**Why a scheduler can bias the output.** Under rejection sampling the decision to verify drafted token k must not
depend on token k itself (nor on later ones): given the tokens before it, its admission has to be fixed before it
is looked at. A policy states what its admission depends on in `information`:

* ``"history"``: earlier rounds and the load only;
* ``"pre_token"``: also confidences, each computed from what was known before the token it judges;
* ``"sampled_token"``: the drafted tokens themselves; biased under rejection sampling.

The policies that only count are in `policy_history`, those that rank draft positions in `policy_ranked`;
`policy_zoo` makes any of them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Information = Literal["history", "pre_token", "sampled_token"]
Signal = Literal["confidence", "draft_prob", "accept_prob"]


@dataclass(frozen=True, slots=True)
class LoadView:
    """What a policy may know about the server at the start of a round.

    Parameters
    ----------
    step
        Number of the engine iteration.
    num_running, num_waiting
        Requests in the batch and in the queue.
    context_tokens
        Sum over running requests of tokens in the KV cache.
    block_size
        Most tokens the drafter can propose per round.
    request_ids
        Ids of the running requests, in batch order; empty before a batch exists.
    """

    step: int
    num_running: int
    num_waiting: int
    context_tokens: int
    block_size: int
    request_ids: tuple[int, ...] = ()


class Controller(Protocol):
    """The running state of a policy in one run."""

    def draft_len(self, load: LoadView) -> int:
        """Tokens to draft per request this round; 0 means do not draft."""
        ...

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        """Drafted tokens to verify: survival [R, draft_len] to lengths [R]."""
        ...

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        """Learn from a finished round; both arrays are [R]."""
        ...


class SpeculationPolicy(Protocol):
    """Parameters of a policy and the information its admission uses."""

    @property
    def information(self) -> Information:
        """What admission of a token may depend on."""
        ...

    @property
    def signal(self) -> Signal:
        """What survival is the cumulative product of.

        Confidence estimates; the drafter's probability of the very tokens it sampled; or true acceptance
        probabilities, which only a replay knows.
        """
        ...

    @property
    def needs_confidence(self) -> bool:
        """Whether the policy is meaningless without confidence estimates."""
        ...

    def start(self) -> Controller:
        """A fresh controller for one run."""
        ...

    def label(self) -> str:
        """Short name for tables and legends."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Verify the same number of drafted tokens for every request, whatever the load.

    Parameters
    ----------
    verify_len
        Drafted tokens verified per request; 0 is plain decoding.
    """

    verify_len: int
    information: Information = "history"
    signal: Signal = "confidence"
    needs_confidence: bool = False

    def __post_init__(self) -> None:
        if self.verify_len < 0:
            raise UserError(f"verify_len is {self.verify_len}; give 0 (no speculation) or more")

    def start(self) -> Controller:
        """A stateless controller."""
        return _FixedController(self.verify_len)

    def label(self) -> str:
        """``none`` for zero, else ``fixed-k``."""
        return f"fixed-{self.verify_len}" if self.verify_len else "none"


@dataclass(frozen=True)
class _FixedController:
    verify_len: int

    def draft_len(self, load: LoadView) -> int:
        return self.verify_len

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        return full(survival.shape[0], self.verify_len)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass


@dataclass(frozen=True)
class PrefixScheduler:
    """DSpark's hardware-aware prefix scheduler (paper, Algorithm 1).

    Sort all (request, position) pairs by survival, highest first. Start from B = R tokens, one per request, and
    an expectation of R emitted tokens. Admit pair after pair while the expected throughput
    Θ = (R + Σ survival) / seconds(B) strictly rises; stop at the first pair that does not raise it.

    It is lossless because of the stop. The largest survival left is always that of some request's next position,
    and the confidence of that position is computed from the tokens before it. So the choice can be made step by
    step: look at the next confidences, admit one draft, look at that draft, go on or stop. Each step adds a draft
    that nothing looked at so far depends on, and one more verified draft changes no law on average; hence the
    output of all requests together is the target's (docs/exactness.md). A global maximum of Θ over all prefixes of
    the sorted list looks past a draft, at confidences that depend on it, before it admits it, and biases the output
    (paper, Appendix A).

    `seconds(B)` is the time of a whole round: target pass, draft, and host. The draft has been paid when the
    choice is made, but it is part of what a round costs and so of the rate the choice maximises. Where a matrix
    kernel makes an odd size slower than a larger one, the nearest curve that does not fall is taken: Algorithm 1
    would stop at the odd size although the next one pays.

    Parameters
    ----------
    cost
        Step times by batch tokens; must come from the same device, model and thread count as the run.
    draft_len
        Tokens to draft per round, at least 1; ``None`` means the drafter's block size.
    """

    cost: CostModel
    draft_len: int | None = None
    information: Information = "pre_token"
    signal: Signal = "confidence"
    needs_confidence: bool = True

    def __post_init__(self) -> None:
        check_draft_len(self.draft_len)

    def start(self) -> Controller:
        """A stateless controller."""
        return RankedController(self.cost, self.draft_len, _admit_smoothly)

    def label(self) -> str:
        """Name in tables."""
        return "prefix" if self.draft_len is None else f"prefix-{self.draft_len}"


def never_falling(seconds: FloatArray) -> FloatArray:
    """The nearest curve that does not fall (least squares): the seconds that `PrefixScheduler` goes by."""
    if (seconds[1:] < seconds[:-1]).any():
        return np.asarray(isotonic_regression(seconds).x)
    return seconds


def _admit_smoothly(survival: FloatArray, seconds: FloatArray) -> IntArray:
    return admit_prefixes(survival, never_falling(seconds))


@dataclass(frozen=True)
class RankedController:
    """Stateless: admits from the ranked list by a rule on survival and round seconds.

    Parameters
    ----------
    cost
        Prices a round.
    max_draft_len
        Tokens to draft per round; ``None`` means the drafter's block size.
    admit
        From survival [R, γ] and seconds [R·γ + 1] to verify lengths [R], such as `admit_prefixes`.
    """

    cost: CostModel
    max_draft_len: int | None
    admit: Callable[[FloatArray, FloatArray], IntArray]

    def draft_len(self, load: LoadView) -> int:
        """The chosen length, at most the block size."""
        return capped(self.max_draft_len, load)

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        """What the rule admits."""
        return self.admit(survival, round_seconds(self.cost, load, *survival.shape))

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        """Nothing is learnt."""


def fixed_length(controller: Controller) -> int | None:
    """The one length that a controller of `Fixed` verifies; ``None`` for any other controller."""
    return controller.verify_len if isinstance(controller, _FixedController) else None


def admits_by_algorithm_1(controller: Controller) -> TypeGuard[RankedController]:
    """Whether a controller is that of `PrefixScheduler`."""
    return isinstance(controller, RankedController) and controller.admit is _admit_smoothly


@lru_cache(maxsize=4096)
def full(num_requests: int, value: int) -> IntArray:
    """The same length for every request, [R]; shared, and not to be written to."""
    lens = np.full(num_requests, value, dtype=np.int64)
    lens.setflags(write=False)
    return lens


def check_draft_len(draft_len: int | None) -> None:
    """Refuse a draft length below 1.

    Raises
    ------
    UserError
        If `draft_len` is neither ``None`` nor at least 1.
    """
    if draft_len is not None and draft_len < 1:
        raise UserError(f"draft_len is {draft_len}; give 1 or more, or None for the drafter's whole block")


def capped(draft_len: int | None, load: LoadView) -> int:
    """`draft_len`, at most the block size; ``None`` is the block size."""
    return load.block_size if draft_len is None else min(draft_len, load.block_size)


def round_seconds(cost: CostModel, load: LoadView, num_requests: int, draft_len: int) -> FloatArray:
    """Seconds of a whole round by drafted tokens verified.

    Returns
    -------
    array
        [R·γ + 1]; entry i is the time of drafting γ tokens for each of R requests, of a target pass over R + i
        tokens, and of the host.
    """
    return cost.round_table(num_requests, draft_len, load.context_tokens)


def ranked(survival: FloatArray) -> tuple[IntArray, FloatArray]:
    """All (request, position) pairs by survival, highest first, and what admitting them in turn is worth.

    Parameters
    ----------
    survival
        [R, γ], in [0, 1], not rising along a row.

    Returns
    -------
    order
        [R·γ], pair (r, j) written as j·R + r. Ties go by position, then by request, never by token: so the first
        pairs of a request always are a prefix, and nothing after a pair decides where it stands.
    expected
        [R·γ + 1], expected emitted tokens of the round when the first i pairs are verified: R + Σ survival.
    """
    # Flattening position-major and sorting stably breaks the ties.
    flat = survival.T.ravel()
    order = np.argsort(-flat, kind="stable")
    expected = np.empty(flat.size + 1)
    expected[0] = survival.shape[0]
    expected[1:] = flat[order]
    return order, np.cumsum(expected)


def leading_lens(order: IntArray, num_admitted: int, survival: FloatArray) -> IntArray:
    """Verify lengths [R] that admit the first pairs of a ranking, positions of zero survival never."""
    num_requests = survival.shape[0]
    num_admitted = min(num_admitted, int(np.count_nonzero(survival)))
    return np.bincount(order[:num_admitted] % max(num_requests, 1), minlength=num_requests).astype(np.int64)


def admit_prefixes(survival: FloatArray, seconds: FloatArray) -> IntArray:
    """Algorithm 1 on arrays.

    Parameters
    ----------
    survival
        [R, γ], in [0, 1], not rising along a row. Zero marks a position that was not drafted.
    seconds
        [R·γ + 1]; entry i is the time of a round that verifies i drafted tokens besides one token per request.

    Returns
    -------
    array
        [R], number of leading positions admitted per request.
    """
    # How many are admitted hangs on the sorted values alone, and which ones on their order only if the last is tied.
    values = np.sort(survival, axis=None)[::-1]
    expected = np.empty(values.size + 1)
    expected[0] = survival.shape[0]
    expected[1:] = values
    throughput = np.cumsum(expected) / seconds
    rises = throughput[1:] > throughput[:-1]
    num_admitted = rises.size if rises.all() else int(rises.argmin())
    if (
        not num_admitted
        or values[num_admitted - 1] <= 0.0
        or (num_admitted < values.size and values[num_admitted] == values[num_admitted - 1])
    ):
        return leading_lens(ranked(survival)[0], num_admitted, survival)
    lens: IntArray = np.add.reduce(survival >= values[num_admitted - 1], axis=1, dtype=np.int64)
    return lens


def parameters(policy: SpeculationPolicy) -> dict[str, Any]:
    """A policy's kind and parameters as JSON types, without cost tables (which are recorded on their own).

    A policy inside a policy, such as the one that `Parked` wraps, becomes a dictionary of the same form.
    """
    values = {name: value for name, value in vars(policy).items() if not isinstance(value, CostModel)}
    nested = {name: parameters(value) for name, value in values.items() if hasattr(value, "start")}
    return {"kind": type(policy).__name__, **values, **nested}
