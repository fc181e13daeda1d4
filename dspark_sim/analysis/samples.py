"""What one run gives to measure: every observation with its unit, and the prompt and the time it belongs to.

Three kinds. A `Sample` is a set of observations with a distribution: a latency per request, a gap per token, a count
per round. A `Share` is a ratio of sums over requests or rounds, such as the part of verified drafts that was rejected.
A `Series` is something over time: a state of the server, weighted by the seconds of the iterations that had it, or a
rate, counts over the seconds of the window.

Definitions beyond those in `metrics`:

* ``acceptance_length``: num_accepted + 1 per round, the bonus token included (τ in the paper and in vLLM);
* ``verification_budget``: 1 + verify_len per request and round, the anchor included, as the paper counts (Figure 8);
* ``wasted_verification``: verify_len - num_accepted per request and round: drafts that took a place in the target's
  batch and were not kept; ``wasted_verification_share`` is their part of all verified drafts;
* ``failed_share``: requests that gave up, were refused or cut off, of all that arrived; latencies are of the others;
* ``num_running, num_waiting, batch_tokens, kv_usage``: over the time the engine was at work, as at the start of each
  iteration; idle time does not count. ``concurrency`` is requests in the server over all the window's time;
* ``output_throughput``: output tokens that became visible, over the window; ``total_token_throughput`` counts each
  prompt's tokens, too, when its first output token appears (vLLM's ``total_token_throughput``).

vLLM's ``itl`` is the time from one streamed chunk to the next (``vllm/benchmarks/lib/endpoint_request_func.py``; its
docs/benchmarking/cli.md says that under speculation a chunk holds several tokens): that is ``icl`` here. Here ``itl``
is per token, so a round's further tokens count as 0 seconds and its mean is close to ``tpot``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.analysis.metrics import inter_chunk, inter_token_seconds, per_request
from dspark_sim.analysis.slo import LIMITS, Objectives
from dspark_sim.analysis.window import Window
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace

FloatArray = npt.NDArray[np.float64]
Observed = Literal["request", "token", "chunk", "round"]


@dataclass(frozen=True)
class Sample:
    """Observations: `values` [n], and their prompts [n]."""

    metric: str
    unit: str
    per: Observed
    values: FloatArray
    prompts: npt.NDArray[Any]


@dataclass(frozen=True)
class Share:
    """Σ numerator / Σ denominator; both [n], with prompts [n]."""

    metric: str
    unit: str
    per: Observed
    numerator: FloatArray
    denominator: FloatArray
    prompts: npt.NDArray[Any]


@dataclass(frozen=True)
class State:
    """What the server was like: `values` [n] at `instants` [n], each for `seconds` [n]."""

    metric: str
    unit: str
    per: Literal["iteration", "time"]
    values: FloatArray
    instants: FloatArray
    seconds: FloatArray


@dataclass(frozen=True)
class Rate:
    """What happened per second: `counts` [n] at `instants` [n] within a window."""

    metric: str
    unit: str
    counts: FloatArray
    instants: FloatArray


Measurable = Sample | Share | State | Rate


@dataclass(frozen=True)
class Observations:
    """What of a trace lies in a window.

    Parameters
    ----------
    requests
        Of `metrics.per_request`, those that arrived in it, with ``num_preemptions``.
    finished
        ``finish, domain`` and ``good`` (whether the SLO is met) of all that finished in it.
    chunks
        Of `metrics.inter_chunk`, those that ended in it, with ``end, prompt_id, domain``.
    rounds
        Of the table `drafts`, those that ended in it, likewise.
    first
        ``first_token, prompt_len, domain`` of requests whose first token appeared in it.
    steps
        Of the table `steps`, those that ended in it.
    presence
        `requests` without a window.
    failed
        ``prompt_id, domain`` of requests that arrived in it and did not get their whole answer.
    """

    window: Window
    objectives: Objectives | None
    requests: pd.DataFrame
    finished: pd.DataFrame
    chunks: pd.DataFrame
    rounds: pd.DataFrame
    first: pd.DataFrame
    steps: pd.DataFrame
    presence: pd.DataFrame
    failed: pd.DataFrame

    @staticmethod
    def of(trace: Trace, window: Window, objectives: Objectives | None = None) -> Observations:
        """Take what lies in the window.

        Raises
        ------
        UserError
            If no request arrived in it.
        """
        every = per_request(trace)
        table = trace.requests.set_index("request_id")
        every["num_preemptions"] = every["request_id"].map(table["num_preemptions"]).fillna(0).astype("int64")
        for name in ("first_token", "finish"):
            every[name] = every["request_id"].map(table[name])
        requests = every[window.holds(every["arrival"])]
        if requests.empty:
            raise UserError(
                f"no request arrived between {window.start:.6g} and {window.end:.6g} seconds; widen the window"
            )
        every["good"] = True if objectives is None else objectives.met(every)["all"]
        steps = trace.steps.assign(end=trace.steps["start"] + trace.steps["step_seconds"])
        ends = steps.set_index("step")["end"]
        arrived = trace.requests[window.holds(trace.requests["arrival"])]
        owners = table[["prompt_id", "domain"]]

        def within(rows: pd.DataFrame) -> pd.DataFrame:
            rows = rows.assign(end=rows["step"].map(ends))
            return rows[window.holds(rows["end"])].join(owners, on="request_id", how="inner")

        return Observations(
            window=window,
            objectives=objectives,
            requests=requests,
            finished=every[window.holds(every["finish"])],
            chunks=within(inter_chunk(trace)),
            rounds=within(trace.drafts[["step", "request_id", "draft_len", "verify_len", "num_accepted"]]),
            first=every[window.holds(every["first_token"])],
            steps=steps[window.holds(steps["end"])],
            presence=every,
            failed=arrived[~arrived["request_id"].isin(every["request_id"])],
        )

    def domains(self) -> list[str]:
        """The domains of the requests, sorted."""
        return sorted(self.requests["domain"].unique())

    def only(self, domain: str) -> Observations:
        """Those of one domain; iterations are of all domains and are left out."""
        frames = {
            name: getattr(self, name)[getattr(self, name)["domain"] == domain]
            for name in ("requests", "finished", "chunks", "rounds", "first", "presence", "failed")
        }
        return Observations(self.window, self.objectives, steps=self.steps.iloc[:0], **frames)

    def __iter__(self) -> Iterator[Measurable]:
        """All metrics, in the order of a report."""
        yield from self._latencies()
        yield from self._rates()
        yield from self._speculation()
        yield from self._objectives()
        yield from self._states()

    def _latencies(self) -> Iterator[Measurable]:
        requests, chunks = self.requests, self.chunks
        for metric, unit in (
            *(("ttft", "s"), ("tpot", "s"), ("e2e_latency", "s")),
            *(("user_tokens_per_second", "tokens/s/user"), ("num_preemptions", "preemptions")),
        ):
            known = requests[requests[metric].notna()]
            yield Sample(metric, unit, "request", _floats(known[metric]), known["prompt_id"].to_numpy())
        prompts = chunks["prompt_id"].to_numpy()
        everyone = np.concatenate((requests["prompt_id"].to_numpy(), self.failed["prompt_id"].to_numpy()))
        failed = np.arange(everyone.size) >= len(requests)
        yield Share("failed_share", "fraction", "request", _floats(failed), np.ones(everyone.size), everyone)
        yield Sample("icl", "s", "chunk", _floats(chunks["icl"]), prompts)
        emitted = chunks["num_emitted"].to_numpy(dtype=np.int64)
        yield Sample("itl", "s", "token", inter_token_seconds(chunks), np.repeat(prompts, emitted))

    def _rates(self) -> Iterator[Measurable]:
        chunks, first = self.chunks, self.first
        output = np.concatenate((_floats(chunks["num_emitted"]), np.ones(len(first))))
        instants = np.concatenate((_floats(chunks["end"]), _floats(first["first_token"])))
        yield Rate("request_throughput", "requests/s", np.ones(len(self.finished)), _floats(self.finished["finish"]))
        yield Rate("output_throughput", "tokens/s", output, instants)
        yield Rate(
            "total_token_throughput",
            "tokens/s",
            np.concatenate((output, _floats(first["prompt_len"]))),
            np.concatenate((instants, _floats(first["first_token"]))),
        )

    def _speculation(self) -> Iterator[Measurable]:
        rounds = self.rounds
        prompts = rounds["prompt_id"].to_numpy()
        drafted, verified, accepted = (_floats(rounds[name]) for name in ("draft_len", "verify_len", "num_accepted"))
        yield Sample("acceptance_length", "tokens", "round", accepted + 1.0, prompts)
        yield Sample("verification_budget", "tokens", "round", verified + 1.0, prompts)
        yield Sample("wasted_verification", "tokens", "round", verified - accepted, prompts)
        yield Share("draft_acceptance_rate", "fraction", "round", accepted, drafted, prompts)
        yield Share("wasted_verification_share", "fraction", "round", verified - accepted, verified, prompts)

    def _objectives(self) -> Iterator[Measurable]:
        if self.objectives is None:
            return
        # Only the domains that are here: an objective of another one says nothing about these requests.
        here = set(self.requests["domain"])
        own = {domain: slo for domain, slo in self.objectives.domains.items() if domain in here}
        objectives = Objectives(self.objectives.general, own)
        met = objectives.met(self.requests)
        # A request that failed did not meet its objective.
        prompts = np.concatenate((self.requests["prompt_id"].to_numpy(), self.failed["prompt_id"].to_numpy()))
        ones, unmet = np.ones(len(prompts)), np.zeros(len(self.failed))
        set_limits = {name for slo in (objectives.general, *own.values()) for name in slo.limits()}
        yield Rate("goodput", "requests/s", _floats(self.finished["good"]), _floats(self.finished["finish"]))
        yield Share("slo_attainment", "fraction", "request", np.append(met["all"], unmet), ones, prompts)
        for name in LIMITS:
            if name in set_limits:
                yield Share(f"slo_attainment_{name}", "fraction", "request", np.append(met[name], unmet), ones, prompts)

    def _concurrency(self) -> State:
        """How many requests are in the server, constant from one arrival or finish to the next."""
        span = self.window
        comes, goes = (np.sort(_floats(self.presence[name])) for name in ("arrival", "finish"))
        edges = np.unique(np.clip(np.concatenate((comes, goes, (span.start, span.end))), span.start, span.end))
        present = np.searchsorted(comes, edges[:-1], side="right") - np.searchsorted(goes, edges[:-1], side="right")
        return State("concurrency", "requests", "time", _floats(present), edges[1:], np.diff(edges))

    def _states(self) -> Iterator[Measurable]:
        yield self._concurrency()
        steps = self.steps
        if steps.empty:
            return
        columns = {"num_running": "requests", "num_waiting": "requests", "batch_tokens": "tokens"}
        for metric, unit in {**columns, "kv_usage": "fraction"}.items():
            known = steps[steps[metric].notna()]
            yield State(metric, unit, "iteration", *(_floats(known[name]) for name in (metric, "end", "step_seconds")))


def _floats(values: Any) -> FloatArray:
    return np.asarray(values, dtype=np.float64)
