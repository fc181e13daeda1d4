"""Speculation policies: how many drafted tokens of each request the target verifies.

A policy is a frozen dataclass of parameters; `start()` returns its controller, which holds whatever state it
learns. Controllers see counts and numpy arrays, never tensors, and the same objects run in the live engine and in
the simulator.

**Survival** of draft position j (0-based) of request r is the estimated probability that positions 0..j are all
accepted: the cumulative product of the confidences. It never rises with j, so the j best positions of a request
are always a prefix.

**Why a scheduler can bias the output.** Under rejection sampling the decision to verify drafted token k must not
depend on token k itself (nor on later ones): given the tokens before it, its admission has to be fixed before it
is looked at. A policy states what its admission depends on in `information`:

* ``"history"``: earlier rounds and the load only;
* ``"pre_token"``: also confidences, each computed from what was known before the token it judges;
* ``"sampled_token"``: the drafted tokens themselves; biased under rejection sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Information = Literal["history", "pre_token", "sampled_token"]


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
    """

    step: int
    num_running: int
    num_waiting: int
    context_tokens: int
    block_size: int


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
        return np.full(survival.shape[0], self.verify_len, dtype=np.int64)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass


@dataclass(frozen=True)
class PrefixScheduler:
    """DSpark's hardware-aware prefix scheduler (paper, Algorithm 1).

    Sort all (request, position) pairs by survival, highest first. Start from B = R tokens, one per request, and
    an expectation of R emitted tokens. Admit pair after pair while the expected throughput
    Θ = (R + Σ survival) / seconds(B) strictly rises; stop at the first pair that does not raise it.

    It is lossless because of the stop. Pairs are met in falling order of survival, so whether the pair (r, j) is
    met and admitted depends only on survivals at least as large as its own: positions before j of the same
    request, and positions of other requests. The confidence of position j is computed before token j is looked at
    (it depends on the tokens before it), hence admission of token j never depends on token j. A global maximum of
    Θ over all prefixes of the sorted list does look past j, at confidences that depend on token j, and biases the
    output (paper, Appendix A).

    `seconds(B)` is the time of a whole round: target pass, draft, and host. The draft has been paid when the
    choice is made, but it is part of what a round costs and so of the rate the choice maximises.

    Parameters
    ----------
    cost
        Step times by batch tokens; must come from the same device, model and thread count as the run.
    draft_len
        Tokens to draft per round; ``None`` means the drafter's block size.
    """

    cost: CostModel
    draft_len: int | None = None
    information: Information = "pre_token"
    needs_confidence: bool = True

    def start(self) -> Controller:
        """A stateless controller."""
        return _PrefixController(self.cost, self.draft_len)

    def label(self) -> str:
        """Name in tables."""
        return "prefix" if self.draft_len is None else f"prefix-{self.draft_len}"


@dataclass(frozen=True)
class _PrefixController:
    cost: CostModel
    max_draft_len: int | None

    def draft_len(self, load: LoadView) -> int:
        return load.block_size if self.max_draft_len is None else min(self.max_draft_len, load.block_size)

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        num_requests, draft_len = survival.shape
        fixed = self.cost.draft_seconds(num_requests, draft_len, load.context_tokens) + self.cost.host_seconds(
            num_requests
        )
        batch_tokens = np.arange(num_requests, num_requests * (1 + draft_len) + 1)
        seconds = self.cost.step_seconds(batch_tokens, load.context_tokens, num_requests) + fixed
        return admit_prefixes(survival, seconds)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass


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
    num_requests, draft_len = survival.shape
    if num_requests == 0 or draft_len == 0:
        return np.zeros(num_requests, dtype=np.int64)
    # Ties: by position, then by request, never by token. Flattening position-major and sorting stably does that.
    flat = survival.T.ravel()
    order = np.argsort(-flat, kind="stable")
    expected = num_requests + np.concatenate(([0.0], np.cumsum(flat[order])))
    throughput = expected / seconds
    rises = throughput[1:] > throughput[:-1]
    num_admitted = int(np.argmin(rises)) if not rises.all() else rises.size
    return np.bincount(order[:num_admitted] % num_requests, minlength=num_requests).astype(np.int64)


Policy = Fixed | PrefixScheduler


def parameters(policy: SpeculationPolicy) -> dict[str, Any]:
    """A policy's kind and parameters as JSON types, without its cost table (which is recorded on its own)."""
    values = {name: value for name, value in vars(policy).items() if not isinstance(value, CostModel)}
    return {"kind": type(policy).__name__, **values}
