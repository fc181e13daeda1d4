"""Groups of command-line options that several commands share, and the objects they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.gaps import ConstantGaps, ExponentialGaps, GammaGaps, Gaps, WeibullGaps
from dspark_sim.policy_zoo import DEFAULT_TABLE, Policy, PolicyName, make_policy
from dspark_sim.request_traces import read_request_trace
from dspark_sim.scheduler import SchedulerConfig
from dspark_sim.workload import (
    ClosedLoop,
    Deterministic,
    Gamma,
    ImportedArrivals,
    Poisson,
    Prompt,
    Stepped,
    Weibull,
    Workload,
    bundled_prompts,
    read_prompts,
)

if TYPE_CHECKING:
    from dspark_sim.engine.drafters.choose import Confidence
    from dspark_sim.engine.serve import Engine


_MANY = 1 << 30


@dataclass(frozen=True)
class NetworkOptions:
    """Which models, and where they run."""

    target: str = "smollm2-135m-instruct"
    """Target: the embedded smollm2-135m-instruct, a model folder, or a hub name."""
    drafter: str = "dspark"
    """none, ngram, dspark, dspark-rnn, dflash, eagle3, mtp1, or a drafter's folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; float32 keeps greedy output identical under every batch shape."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    num_threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""

    def engine(self, max_num_seqs: int, confidence: Confidence | None = None) -> Engine:
        """The engine, with a source of confidence (``None``: the drafter's head)."""
        from dspark_sim.engine.serve import Engine

        return Engine.load(
            self.target,
            self.drafter,
            dtype=self.dtype,
            device=self.device,
            num_threads=self.num_threads,
            max_num_seqs=max_num_seqs,
            confidence=confidence,
        )


@dataclass(frozen=True)
class ModelOptions(NetworkOptions):
    """Which models, where they run, and how sure a drafter is of its drafts."""

    confidence: Literal["head", "top1", "margin"] = "head"
    """Where a draft's estimated acceptance is read from, always before the draft is chosen.
    head: the drafter's confidence head, if it has one.
    top1: the probability of the drafter's likeliest token.
    margin: a logistic function of the gap between its two largest logits; needs --margin."""
    margin: Path | None = None
    """For confidence margin: the function's two numbers, made by `dspark-sim fit-margin`."""
    temperatures: Path | None = None
    """Temperatures of the confidences, made by `dspark-sim calibrate`, or SGLang's file; default: those in the
    drafter's folder, if any, with confidence head. none: leave them out."""

    def load(self, max_num_seqs: int) -> Engine:
        """The engine.

        Raises
        ------
        UserError
            If `confidence`, `margin` and `temperatures` do not go together, or as `Engine.load`.
        """
        if self.margin is not None and self.confidence != "margin":
            raise UserError(
                f"--margin goes with confidence margin and confidence is {self.confidence}; add --confidence margin, "
                "or leave --margin out"
            )
        return self.engine(max_num_seqs, self._source())

    def _source(self) -> Confidence | None:
        if self.confidence == "head" and self.temperatures is None:
            return None
        from dspark_sim.engine.drafters.choose import Confidence

        if self.confidence == "margin":
            if self.margin is None:
                raise UserError("confidence margin needs a file; give --margin, made by `dspark-sim fit-margin`")
            from dspark_sim.engine.margin import read_margin

            source = read_margin(self.margin, drafter=self.drafter)
        else:
            source = Confidence(self.confidence)
        if self.temperatures in (None, Path("none")):
            return source
        from dspark_sim.engine.temperatures import calibrated_confidence

        return calibrated_confidence(self.temperatures, source, self.drafter)


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts."""

    prompts: Path | None = None
    """JSON Lines file with `turns`; default: the bundled prompts."""
    per_domain: int | None = 8
    """Bundled prompts of each domain (math, code, chat)."""

    def load(self) -> list[Prompt]:
        """The prompts."""
        return bundled_prompts(per_domain=self.per_domain) if self.prompts is None else read_prompts(self.prompts)


@dataclass(frozen=True)
class PolicyChoice:
    """How many drafted tokens are verified."""

    policy: PolicyName = "fixed"
    """How many drafted tokens of each request are verified:
    none: nothing is drafted; plain decoding.
    fixed: always --verify-len.
    threshold: each draft up to its first confidence below --threshold.
    table: what --table has for the number of running requests (as in vLLM).
    ema: a short, middle or long draft, by an average of accepted drafts (as in SGLang).
    goodput: the length that an average acceptance rate makes fastest (TurboSpec); needs --cost.
    prefix: drafts in order of confidence while throughput rises (DSpark's Algorithm 1); needs --cost.
    lagged: as prefix, but how many is set --lag rounds before (DSpark as served); needs --cost.
    argmax: as prefix, without the stop that keeps the output unbiased: a negative control; needs --cost.
    tetris: the --capacity likeliest drafts of the whole batch; looks at sampled tokens.
    oracle: knows what will be accepted: an upper bound, for simulate only; needs --cost."""
    verify_len: int | None = None
    """For fixed: drafted tokens verified per request; default: the whole block."""
    threshold: float = 0.5
    """For threshold: least confidence of a verified draft, between 0 and 1."""
    lag: int = 2
    """For lagged: rounds between confidences and the batch size made of them, at least 1."""
    capacity: int = 32
    """For tetris: drafted tokens verified per round, over all requests."""
    table: str = ",".join(f"{size}:{verify_len}" for size, verify_len in DEFAULT_TABLE)
    """For table: pairs REQUESTS:DRAFTS; 4:7,17:0 is 7 drafts for up to 4 running requests, and none from 17 on."""
    park: bool = False
    """With any policy that drafts: draft nothing while drafts do not pay; needs --cost."""

    def make(self, block_size: int, cost: CostModel | None) -> Policy:
        """The policy.

        Raises
        ------
        UserError
            If a value is out of range or the table cannot be read, or a cost table is missing.
        """
        return make_policy(
            self.policy,
            block_size=block_size,
            cost=cost,
            verify_len=self.verify_len,
            threshold=self.threshold,
            lag=self.lag,
            capacity=self.capacity,
            table=parse_table(self.table),
            park=self.park,
        )


@dataclass(frozen=True)
class PolicyOptions(PolicyChoice):
    """How many drafted tokens are verified, and the cost table that some policies need."""

    cost: Path | None = None
    """Cost table made by `dspark-sim profile` on this machine."""
    force_cost: bool = False
    """Use the table although it is of another device, model, dtype or thread count; the trace says so."""

    def load(self, block_size: int) -> Policy:
        """The policy.

        Raises
        ------
        UserError
            As `PolicyChoice.make`, and if there is no cost table at `cost`.
        """
        return self.make(block_size, None if self.cost is None else CostModel.read(self.cost))


def parse_table(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of a batch size table from a text such as ``4:7,16:3``.

    Raises
    ------
    UserError
        If a part of the text is not two whole numbers with a colon between.
    """
    pairs = []
    for part in text.split(","):
        size, colon, verify_len = part.partition(":")
        try:
            if not colon:
                raise ValueError
            pairs.append((int(size), int(verify_len)))
        except ValueError:
            raise UserError(
                f"table {text!r} has the part {part.strip()!r}; give pairs REQUESTS:DRAFTS with commas between, "
                "such as 4:7,16:3,17:0"
            ) from None
    return tuple(pairs)


@dataclass(frozen=True)
class LoadOptions:
    """How many users, or when requests come."""

    concurrency: int = 4
    """Users of a closed loop: each asks again when answered."""
    think_seconds: float = 0.0
    """Mean pause of a user between an answer and the next request."""
    think: Literal["constant", "exponential"] = "constant"
    """Law of that pause."""
    rate: float | None = None
    """Open loop instead: requests per second."""
    arrivals: Literal["poisson", "gamma", "weibull", "deterministic"] = "poisson"
    """Law of the gaps of the open loop; gamma and weibull need --cv."""
    cv: float | None = None
    """Standard deviation over mean of a gap: above 1 bursty, below 1 more even than poisson."""
    steps: str | None = None
    """Later rates of the open loop, pairs SECONDS:RATE; --rate 2 --steps 60:20,90:2 is a spike of half a minute."""
    request_trace: Path | None = None
    """Open loop at the times of a recorded trace: Azure, BurstGPT, Mooncake, or a result of vLLM's bench serve."""
    speedup: float = 1.0
    """For --request-trace: its times are divided by this."""
    timeout_seconds: float | None = None
    """Users abandon a request that is not answered in so many seconds; for simulate only."""
    seed: int = 0
    """Of arrivals, think times and sampling."""

    def load(self) -> Workload:
        """The workload; a line about the trace of requests is printed, if there is one.

        Raises
        ------
        UserError
            If flags do not go together, a value is out of range or the trace of requests cannot be read.
        """
        is_open = self.rate is not None or self.request_trace is not None
        if self.rate is not None and self.request_trace is not None:
            raise UserError(f"--rate {self.rate} and --request-trace both say when requests come; give one of them")
        if is_open and (self.think_seconds, self.think) != (0.0, "constant"):
            raise UserError("--think-seconds and --think go with users of a closed loop; leave --rate or them out")
        if self.rate is None and (self.arrivals, self.cv, self.steps) != ("poisson", None, None):
            raise UserError("--arrivals, --cv and --steps go with an open loop; give --rate")
        if self.request_trace is None and self.speedup != 1.0:
            raise UserError(f"speedup is {self.speedup} and there is no trace to hasten; give --request-trace")
        if self.request_trace is not None:
            trace = read_request_trace(self.request_trace, speedup=self.speedup)
            print(trace.summary())
            return ImportedArrivals(trace, timeout_seconds=self.timeout_seconds)
        if self.rate is None:
            law = ExponentialGaps() if self.think == "exponential" else ConstantGaps()
            return ClosedLoop(
                self.concurrency, self.think_seconds, law, self.seed, timeout_seconds=self.timeout_seconds
            )
        return self._open(self.rate)

    def _open(self, rate: float) -> Workload:
        spread = {} if self.cv is None else {"cv": self.cv}
        if (self.arrivals in ("gamma", "weibull")) != bool(spread):
            raise UserError(f"cv is {self.cv} and arrivals are {self.arrivals}; --cv goes with gamma and weibull only")
        if self.steps is not None:
            laws = {"poisson": ExponentialGaps, "gamma": GammaGaps, "weibull": WeibullGaps}
            gaps: Gaps = laws.get(self.arrivals, ConstantGaps)(**spread)
            steps = [(0.0, rate), *parse_steps(self.steps)]
            return Stepped(steps, gaps, self.seed, timeout_seconds=self.timeout_seconds)
        match self.arrivals:
            case "poisson":
                return Poisson(rate, self.seed, timeout_seconds=self.timeout_seconds)
            case "gamma":
                return Gamma(rate, **spread, seed=self.seed, timeout_seconds=self.timeout_seconds)
            case "weibull":
                return Weibull(rate, **spread, seed=self.seed, timeout_seconds=self.timeout_seconds)
            case _:
                return Deterministic(rate, timeout_seconds=self.timeout_seconds)


@dataclass(frozen=True)
class ServerOptions:
    """The simulated server, and how many there are; limits that are not given never bind."""

    max_num_seqs: int | None = None
    """Most requests running at once; default: as many as there are users, in an open loop 16."""
    max_num_batched_tokens: int = 2048
    """Most prompt tokens of an iteration; with --enable-chunked-prefill less what its decode rounds take."""
    enable_chunked_prefill: bool = False
    """Read prompts beside decode rounds, in pieces."""
    num_pages: int | None = None
    """Pages of the KV cache; default: enough."""
    page_size: int = 16
    """Tokens of a page."""
    num_replicas: int = 1
    """Servers behind a router."""
    router: Literal["round_robin", "least_outstanding_tokens"] = "round_robin"
    """Which server a request goes to: each in turn, or the one that owes the fewest tokens."""
    load_lag: int = 0
    """Iterations by which the load that the policy sees is old."""

    def config(self, workload: Workload) -> SchedulerConfig | None:
        """The server's limits; ``None`` where nothing is asked for, which never binds."""
        if self == ServerOptions(num_replicas=self.num_replicas, router=self.router, load_lag=self.load_lag):
            return None
        users = workload.num_users if isinstance(workload, ClosedLoop) else SchedulerConfig().max_num_seqs
        return SchedulerConfig(
            max_num_seqs=users if self.max_num_seqs is None else self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_pages=_MANY if self.num_pages is None else self.num_pages,
            page_size=self.page_size,
            max_model_len=_MANY,
            enable_chunked_prefill=self.enable_chunked_prefill,
        )


def parse_steps(text: str) -> list[tuple[float, float]]:
    """Pairs (start_seconds, rate) from a text such as ``60:20,90:2``.

    Raises
    ------
    UserError
        If a part of the text is not two numbers with a colon between.
    """
    pairs = []
    for part in text.split(","):
        start, colon, rate = part.partition(":")
        try:
            if not colon:
                raise ValueError
            pairs.append((float(start), float(rate)))
        except ValueError:
            raise UserError(
                f"steps {text!r} have the part {part.strip()!r}; give pairs SECONDS:RATE with commas between, such as "
                "60:20,90:2"
            ) from None
    return pairs
