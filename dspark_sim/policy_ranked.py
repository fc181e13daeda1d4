"""Policies that rank draft positions by survival, and one that cuts each draft at a threshold.

All but the threshold share the ranked list of `policy.ranked` and differ in how many of its pairs they admit, and
in what the survival is made of. Whether that number may depend on the drafted tokens decides whether the output
stays the target's: see `policy` for the three kinds of information.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.policy import (
    Controller,
    FloatArray,
    Information,
    IntArray,
    LoadView,
    RankedController,
    Signal,
    capped,
    check_draft_len,
    leading_lens,
    ranked,
    round_seconds,
)


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Verify each draft up to the first position whose confidence is below a threshold (paper, Figure 5).

    The confidence is the conditional one, P(accept k | all before k accepted). The load plays no part. A position
    is judged by what was known before its token, so the rule is lossless.

    Parameters
    ----------
    threshold
        Between 0 (verify everything) and 1.
    """

    threshold: float
    information: Information = "pre_token"
    signal: Signal = "confidence"
    needs_confidence: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UserError(f"threshold is {self.threshold}; give a confidence between 0 and 1")

    def start(self) -> Controller:
        """A stateless controller."""
        return _ThresholdController(self.threshold)

    def label(self) -> str:
        """Name in tables."""
        return f"threshold-{self.threshold:g}"


@dataclass(frozen=True)
class _ThresholdController:
    threshold: float

    def draft_len(self, load: LoadView) -> int:
        return load.block_size

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        # c_k >= t is survival_k >= t · survival_{k-1}: nothing is divided, and a confidence equal to t passes, because
        # both sides then round alike.
        least = np.full_like(survival, self.threshold)
        least[:, 1:] *= survival[:, :-1]
        passes = (survival >= least) & (survival > 0.0)
        return np.asarray(np.logical_and.accumulate(passes, axis=1).sum(axis=1), dtype=np.int64)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass


@dataclass(frozen=True)
class LaggedPrefixScheduler:
    """DSpark's scheduler as it is served: how many from rounds ago, which from now (paper, section 5.2).

    An engine that prepares rounds ahead must fix the size K of the target's batch before the drafts are ready. So K
    is where Θ is largest over the ranked list of the survivals seen `lag` rounds ago, priced at the current load, and
    the K best positions by the *current* survivals are verified. A request that was not there then counts as 1
    everywhere: it is taken to accept all its drafts. The paper's lag is 2, as is SGLang's; vLLM (pull request 47808)
    also takes K from older confidences, and 1 for new requests.

    It is exact, although K is a global maximum. K is made of earlier rounds, whose tokens are decided, so it depends
    on no token of this round. Given K, position j of request r is verified if fewer than K pairs rank before it.
    Those are positions before j of the same request, and positions of other requests; ties go by position and
    request. The survivals of the former are computed before token j is looked at, and those of the latter never
    depend on it: what could outrank a token never depends on that token.

    Parameters
    ----------
    cost
        Step times by batch tokens; must come from the same device, model and thread count as the run.
    lag
        Rounds between the survivals that give K and the round it is used in, at least 1. Only rounds that drafted
        count.
    draft_len
        Tokens to draft per round, at least 1; ``None`` means the drafter's block size.
    """

    cost: CostModel
    lag: int = 2
    draft_len: int | None = None
    information: Information = "pre_token"
    signal: Signal = "confidence"
    needs_confidence: bool = True

    def __post_init__(self) -> None:
        if self.lag < 1:
            raise UserError(f"lag is {self.lag}; give 1 or more, or use policy prefix, which has none")
        check_draft_len(self.draft_len)

    def start(self) -> Controller:
        """A controller without history."""
        return _LaggedController(self.cost, self.draft_len, deque(maxlen=self.lag))

    def label(self) -> str:
        """Name in tables."""
        return f"lagged-{self.lag}" if self.draft_len is None else f"lagged-{self.lag}-draft-{self.draft_len}"


@dataclass
class _LaggedController:
    cost: CostModel
    max_draft_len: int | None
    history: deque[tuple[tuple[int, ...], FloatArray]] = field(repr=False)

    def draft_len(self, load: LoadView) -> int:
        return capped(self.max_draft_len, load)

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        num_requests, draft_len = survival.shape
        if len(load.request_ids) != num_requests:
            raise ValueError(f"a lagged policy needs one request id per row; got {load.request_ids} for {num_requests}")
        if survival.size == 0:
            return np.zeros(num_requests, dtype=np.int64)
        lagged = self._lagged(load.request_ids, draft_len)
        seconds = round_seconds(self.cost, load, num_requests, draft_len)
        num_admitted = best_count(lagged, ranked(lagged)[1], seconds)
        self.history.append((load.request_ids, survival.copy()))
        return leading_lens(ranked(survival)[0], num_admitted, survival)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass

    def _lagged(self, request_ids: tuple[int, ...], draft_len: int) -> FloatArray:
        """Survivals of `lag` rounds ago for today's requests; 1 where there is none."""
        full = self.history.maxlen
        then, survival = self.history[0] if len(self.history) == full else ((), np.empty((0, draft_len)))
        if survival.shape[1] != draft_len:
            then = ()
        if then == request_ids:
            return survival
        rows = {request_id: row for row, request_id in enumerate(then)}
        lagged = np.ones((len(request_ids), draft_len))
        for row, request_id in enumerate(request_ids):
            if request_id in rows:
                lagged[row] = survival[rows[request_id]]
        return lagged


@dataclass(frozen=True)
class GlobalArgmax:
    """Admit the prefix of the ranked list where Θ is largest, without the stop of Algorithm 1.

    A negative control. It finds throughput that the stop misses where step seconds jump, but whether it goes on past
    a pair depends on survivals after it, which depend on the pair's own token: under rejection sampling the output
    is biased (paper, Appendix A, where a probability of 0.70 comes out as 0.85).

    Parameters
    ----------
    cost
        Step times by batch tokens; must come from the same device, model and thread count as the run.
    draft_len
        Tokens to draft per round, at least 1; ``None`` means the drafter's block size.
    """

    cost: CostModel
    draft_len: int | None = None
    information: Information = "sampled_token"
    signal: Signal = "confidence"
    needs_confidence: bool = True

    def __post_init__(self) -> None:
        check_draft_len(self.draft_len)

    def start(self) -> Controller:
        """A stateless controller."""
        return RankedController(self.cost, self.draft_len, admit_best)

    def label(self) -> str:
        """Name in tables."""
        return "argmax" if self.draft_len is None else f"argmax-{self.draft_len}"


@dataclass(frozen=True)
class Oracle:
    """`GlobalArgmax` on the true acceptance probabilities of the drafted tokens.

    An upper bound on what confidences can give, and only a replay can run it: the probabilities take the target's
    pass to know. It maximises each round's expected rate, not the run's.

    Parameters
    ----------
    cost
        Step times by batch tokens.
    draft_len
        Tokens to draft per round, at least 1; ``None`` means the drafter's block size.
    """

    cost: CostModel
    draft_len: int | None = None
    information: Information = "sampled_token"
    signal: Signal = "accept_prob"
    needs_confidence: bool = False

    def __post_init__(self) -> None:
        check_draft_len(self.draft_len)

    def start(self) -> Controller:
        """A stateless controller."""
        return RankedController(self.cost, self.draft_len, admit_best)

    def label(self) -> str:
        """Name in tables."""
        return "oracle" if self.draft_len is None else f"oracle-{self.draft_len}"


@dataclass(frozen=True)
class Tetris:
    """Spend a fixed number of verified drafts where the drafter is surest (TETRIS, Wu et al., arXiv 2502.15197).

    The positions with the largest cumulative draft probability of the tokens that were sampled, over the whole
    batch. It needs no confidence head and no cost table. Under rejection sampling it is biased as soon as two
    requests share the capacity: a likelier sample makes its own verification likelier.

    Parameters
    ----------
    capacity
        Drafted tokens verified per round, over all requests.
    """

    capacity: int
    information: Information = "sampled_token"
    signal: Signal = "draft_prob"
    needs_confidence: bool = False

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"capacity is {self.capacity}; give 1 or more drafted tokens, or use policy none")

    def start(self) -> Controller:
        """A stateless controller."""
        return _TetrisController(self.capacity)

    def label(self) -> str:
        """Name in tables."""
        return f"tetris-{self.capacity}"


@dataclass(frozen=True)
class _TetrisController:
    capacity: int

    def draft_len(self, load: LoadView) -> int:
        return load.block_size

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        return leading_lens(ranked(survival)[0], self.capacity, survival)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass


def seen_survival(controller: Controller, load: LoadView, survival: FloatArray) -> FloatArray:
    """The survivals that the next choice's size is made of, before `verify_lens` is called.

    Parameters
    ----------
    controller
        Any policy's, parked or not.
    load, survival
        What `verify_lens` will be given; survival is [R, γ].

    Returns
    -------
    array
        [R, γ]: those of `lag` rounds ago for `LaggedPrefixScheduler`, `survival` itself for all others.
    """
    controller = getattr(controller, "inner", controller)
    if isinstance(controller, _LaggedController) and survival.size:
        return controller._lagged(load.request_ids, survival.shape[1])
    return survival


def best_count(survival: FloatArray, expected: FloatArray, seconds: FloatArray) -> int:
    """How many ranked pairs give the largest expected throughput; the fewest of equals.

    Parameters
    ----------
    survival
        [R, γ]. Past its last positive entry nothing is emitted; a larger batch that happens to be faster, as small
        ones are on some kernels, would stay unfilled and does not count.
    expected, seconds
        [R·γ + 1], of `ranked` and `round_seconds`.
    """
    return int(np.argmax((expected / seconds)[: np.count_nonzero(survival) + 1]))


def admit_best(survival: FloatArray, seconds: FloatArray) -> IntArray:
    """The prefix of the ranked list with the largest expected throughput; arguments as for `admit_prefixes`."""
    order, expected = ranked(survival)
    return leading_lens(order, best_count(survival, expected, seconds), survival)
