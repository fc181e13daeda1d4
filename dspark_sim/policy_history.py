"""Policies that look at the load and at earlier rounds only, and the wrapper that stops drafting where it cannot pay.

None of them reads a confidence, so any drafter will do, and none looks at a token of the round it decides on: all
are lossless. Averages are exponential: ``new = decay · old + (1 - decay) · observed``, so about 1 / (1 - decay)
rounds count. A round that did not draft teaches nothing; policies that may choose not to draft therefore probe.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.policy import Controller, FloatArray, Information, IntArray, LoadView, Signal, SpeculationPolicy


@dataclass(frozen=True)
class BatchSizeTable:
    """As many drafts as a table has for the batch size (vLLM's dynamic speculative decoding).

    vLLM has it as ``num_speculative_tokens_per_batch_size`` (pull request 32374) and, with two rows, as
    ``disable_by_batch_size``. As there, no more is drafted than the drafter can.

    Parameters
    ----------
    table
        Pairs (largest number of running requests, drafted tokens verified per request), rising in the former. 0
        does not draft. Beyond the last pair its tokens hold.
    """

    table: tuple[tuple[int, int], ...]
    information: Information = "history"
    signal: Signal = "confidence"
    needs_confidence: bool = False

    def __post_init__(self) -> None:
        if not self.table:
            raise UserError("the batch size table is empty; give pairs (largest num_running, verify_len)")
        sizes = [size for size, _ in self.table]
        if sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
            raise UserError(f"the batch size table has num_running {sizes}; give numbers that rise from 1 or more")
        if min(verify_len for _, verify_len in self.table) < 0:
            raise UserError(f"the batch size table {self.table} has a negative verify_len; give 0 or more")

    def start(self) -> Controller:
        """A stateless controller."""
        sizes, lens = zip(*self.table, strict=True)
        return _TableController(sizes, lens)

    def label(self) -> str:
        """Name in tables."""
        return "table"


@dataclass(frozen=True)
class _TableController:
    sizes: tuple[int, ...]
    lens: tuple[int, ...]

    def draft_len(self, load: LoadView) -> int:
        row = min(bisect_left(self.sizes, load.num_running), len(self.sizes) - 1)
        return min(self.lens[row], load.block_size)

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        return _whole_drafts(survival)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass


@dataclass(frozen=True)
class AcceptanceEMA:
    """Candidate lengths, chosen by the mean number of drafts accepted (SGLang's adaptive speculative steps).

    After every round the mean of accepted drafts over the batch enters an average. Every `interval` rounds the
    length moves by at most one candidate: down when the average is at most ``lower - 1/2 - hysteresis`` for the next
    lower candidate, up when it is above ``current - 1/2``, that is when nearly all drafts are accepted and a longer
    one is worth a try. The load plays no part. A candidate of 0 does not draft; its threshold is that of 1, and the
    next candidate is tried again after `interval` rounds.

    SGLang (pull request 21599, ``adaptive_spec_params.py``) has the same thresholds, with its ``down_hysteresis`` of
    -0.25 and ``up_hysteresis`` of 0, and a decay of 0.8. It goes on past a candidate while thresholds allow, which
    makes a difference only right after the warm-up; later versions keep one such state per range of batch sizes.

    Parameters
    ----------
    candidates
        Draft lengths, rising. The start is the middle one, and the average starts at one less.
    decay
        Of the average, at least 0 and below 1.
    hysteresis
        Drafts by which the threshold down is lowered, at least 0.
    interval
        Rounds from one decision to the next.
    warmup
        Rounds before the first interval.
    """

    candidates: tuple[int, ...] = (1, 3, 7)
    decay: float = 0.9
    hysteresis: float = 0.25
    interval: int = 5
    warmup: int = 10
    information: Information = "history"
    signal: Signal = "confidence"
    needs_confidence: bool = False

    def __post_init__(self) -> None:
        if not self.candidates or self.candidates[0] < 0 or any(a >= b for a, b in pairwise(self.candidates)):
            raise UserError(f"candidates are {self.candidates}; give draft lengths of 0 or more that rise")
        _check_decay(self.decay)
        if not self.hysteresis >= 0.0:
            raise UserError(f"hysteresis is {self.hysteresis}; give 0 or more drafts")
        _check_rounds("interval", self.interval)
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; give 0 or more rounds")

    def start(self) -> Controller:
        """A controller at the middle candidate."""
        middle = len(self.candidates) // 2
        return _EMAController(self, middle, max(self.candidates[middle] - 1.0, 0.0))

    def label(self) -> str:
        """Name in tables."""
        return "ema"


@dataclass
class _EMAController:
    policy: AcceptanceEMA
    choice: int
    mean_accepted: float
    num_rounds: int = 0

    def draft_len(self, load: LoadView) -> int:
        return min(self.policy.candidates[self.choice], load.block_size)

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        return _whole_drafts(survival)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        policy = self.policy
        if policy.candidates[self.choice] > 0:
            mean = float(num_accepted.sum()) / max(len(num_accepted), 1)
            self.mean_accepted = policy.decay * self.mean_accepted + (1.0 - policy.decay) * mean
        self.num_rounds += 1
        since = self.num_rounds - policy.warmup
        if since > 0 and since % policy.interval == 0:
            self.choice += self._move()

    def _move(self) -> int:
        candidates, current = self.policy.candidates, self.policy.candidates[self.choice]
        if self.choice > 0:
            lower = max(candidates[self.choice - 1], 1)
            if self.mean_accepted <= lower - 0.5 - self.policy.hysteresis:
                return -1
        longest = self.choice == len(candidates) - 1
        return int(not longest and (current == 0 or self.mean_accepted > current - 0.5))


@dataclass(frozen=True)
class Goodput:
    """The length with the largest expected goodput, if all drafts are alike (SmartSpec, now TurboSpec).

    With N requests and every draft accepted with probability α given those before it, drafting and verifying k
    tokens emits N(1 - α^{k+1}) / (1 - α) tokens in T(k) seconds: a draft of k tokens, a target pass over N(1 + k)
    tokens, and the host. k = 0 drafts nothing and costs no draft. The largest ratio is taken, the smaller k of equals
    (Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", 2024,
    arXiv 2406.14066).

    α is an average of accepted over examined drafts: of ℓ drafts of which n are accepted, min(n + 1, ℓ) were
    examined, the last of them rejected if n < ℓ.

    Parameters
    ----------
    cost
        Step times by batch tokens; must come from the same device, model and thread count as the run.
    decay
        Of the average, at least 0 and below 1.
    prior
        α before the first round.
    probe_every
        After so many rounds without drafts one draft per request is tried, to learn whether α has changed.
    """

    cost: CostModel
    decay: float = 0.9
    prior: float = 0.7
    probe_every: int = 64
    information: Information = "history"
    signal: Signal = "confidence"
    needs_confidence: bool = False

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if not 0.0 <= self.prior <= 1.0:
            raise UserError(f"prior is {self.prior}; give an acceptance probability between 0 and 1")
        _check_rounds("probe_every", self.probe_every)

    def start(self) -> Controller:
        """A controller at the prior."""
        return _GoodputController(self, self.prior)

    def label(self) -> str:
        """Name in tables."""
        return "goodput"


@dataclass
class _GoodputController:
    policy: Goodput
    acceptance: float
    drafts: bool = False
    num_idle: int = 0

    def draft_len(self, load: LoadView) -> int:
        best = int(np.argmax(goodputs(self.policy.cost, load, self.acceptance)))
        if best == 0 and self.num_idle >= self.policy.probe_every:
            best = min(1, load.block_size)
        self.drafts = best > 0
        return best

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        return _whole_drafts(survival)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        self.num_idle = 0 if self.drafts else self.num_idle + 1
        num_examined = int(np.minimum(num_accepted + 1, verify_lens).sum())
        if num_examined:
            observed = float(num_accepted.sum()) / num_examined
            self.acceptance = self.policy.decay * self.acceptance + (1.0 - self.policy.decay) * observed


def goodputs(cost: CostModel, load: LoadView, acceptance: float) -> FloatArray:
    """Expected tokens per second of drafting and verifying k tokens per request, for k = 0..γ: [γ + 1].

    Parameters
    ----------
    cost, load
        Price and size of the round.
    acceptance
        Probability that a draft is accepted given those before it.
    """
    lens = np.arange(load.block_size + 1)
    num_requests, context_tokens = load.num_running, load.context_tokens
    seconds = cost.step_seconds(num_requests * (1 + lens), context_tokens, num_requests)
    seconds = seconds + cost.host_seconds(num_requests)
    seconds = seconds + cost.draft_seconds(num_requests, lens, context_tokens)
    return num_requests * np.cumsum(np.power(acceptance, lens)) / seconds


@dataclass(frozen=True)
class Parked:
    """Another policy, but no draft at all while drafts do not pay.

    Algorithm 1 cannot skip the draft: when it admits positions the draft has been paid. While it drafts, this wrapper
    keeps averages of the tokens emitted and verified per request and round. From these and the inner policy's draft
    length it prices the current load twice: R·emitted tokens per round with the draft, and R tokens per plain round.
    It parks, asking for no draft, while the former rate is not above the latter. It does not park before it has seen
    1 / (1 - decay) rounds with drafts, and while parked it drafts once every `probe_every` rounds to learn whether
    that still is so. Whether it drafts is made of earlier rounds and the load: the inner policy's losslessness stays.

    Parameters
    ----------
    inner
        Decides whenever drafts pay.
    cost
        Step times by batch tokens, the inner policy's if it has one.
    decay
        Of the averages, at least 0 and below 1.
    probe_every
        Rounds from parking, or from a probe, to the next probe.
    """

    inner: SpeculationPolicy
    cost: CostModel
    decay: float = 0.9
    probe_every: int = 32

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        _check_rounds("probe_every", self.probe_every)
        if getattr(self.inner, "cost", self.cost) != self.cost:
            raise UserError(f"policy {self.label()} has two different cost tables; give the inner policy's to both")

    @property
    def information(self) -> Information:
        """The inner policy's."""
        return self.inner.information

    @property
    def signal(self) -> Signal:
        """The inner policy's."""
        return self.inner.signal

    @property
    def needs_confidence(self) -> bool:
        """The inner policy's."""
        return self.inner.needs_confidence

    def start(self) -> Controller:
        """A controller that has seen no round."""
        return _ParkedController(self, self.inner.start())

    def label(self) -> str:
        """The inner policy's name and ``parked``."""
        return f"{self.inner.label()} parked"


@dataclass
class _ParkedController:
    policy: Parked
    inner: Controller
    state: Literal["drafting", "inner", "parked"] = "inner"
    num_drafted: int = 0
    num_parked: int = 0
    # Weighted sums over rounds that drafted; divided by their weight they are means from the first round on.
    emitted: float = 0.0
    verified: float = 0.0
    weight: float = 0.0

    def draft_len(self, load: LoadView) -> int:
        wanted = self.inner.draft_len(load)
        if wanted == 0:
            self.state = "inner"
        elif self.num_parked >= self.policy.probe_every or self._pays(load, wanted):
            self.state = "drafting"
        else:
            self.state = "parked"
        return 0 if self.state == "parked" else wanted

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        if self.state == "parked":
            return np.zeros(survival.shape[0], dtype=np.int64)
        return self.inner.verify_lens(load, survival)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        if self.state == "parked":
            self.num_parked += 1
            return
        self.inner.observe(load, verify_lens, num_accepted)
        if self.state == "drafting" and len(verify_lens):
            self.num_parked = 0
            self.num_drafted += 1
            old, new = self.policy.decay, (1.0 - self.policy.decay) / len(verify_lens)
            self.emitted = old * self.emitted + new * (len(num_accepted) + int(num_accepted.sum()))
            self.verified = old * self.verified + new * int(verify_lens.sum())
            self.weight = old * self.weight + 1.0 - old

    def _pays(self, load: LoadView, draft_len: int) -> bool:
        if self.num_drafted < round(1.0 / (1.0 - self.policy.decay)):
            return True
        cost, num_requests, context_tokens = self.policy.cost, load.num_running, load.context_tokens
        batch_tokens = num_requests * np.array((1.0, 1.0 + self.verified / self.weight))
        plain, speculative = cost.step_seconds(batch_tokens, context_tokens, num_requests)
        host = cost.host_seconds(num_requests)
        draft = cost.draft_seconds(num_requests, draft_len, context_tokens)
        return bool(self.emitted / self.weight * (plain + host) > speculative + draft + host)


def _whole_drafts(survival: FloatArray) -> IntArray:
    """Everything that was drafted: these policies draft no more than they verify."""
    num_requests, draft_len = survival.shape
    return np.full(num_requests, draft_len, dtype=np.int64)


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise UserError(f"decay is {decay}; give at least 0 and less than 1")


def _check_rounds(name: str, num_rounds: int) -> None:
    if num_rounds < 1:
        raise UserError(f"{name} is {num_rounds}; give 1 or more rounds")
