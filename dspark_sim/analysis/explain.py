"""Why a policy chose what it chose in one round: the load, the ranked drafts, the Θ curve, and what came of it.

Θ, the expected throughput of a round that verifies i drafts, is (R + Σ survival of the i best) / seconds(R + i), as in
the paper's Algorithm 1; the seconds are those of the whole round. All of it is computed again from the trace
(`decisions`), and the choice too: `Explanation.check` says whether it, and all before it, came out as recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dspark_sim.analysis.decisions import (
    Decision,
    DecisionsVerdict,
    cost_of,
    decisions,
    policy_of,
    signal_values,
    verdict,
)
from dspark_sim.analysis.tables import aligned, plain
from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.loop import DraftBatch, survival_of
from dspark_sim.policy import FloatArray, IntArray, PrefixScheduler, never_falling, ranked, round_seconds
from dspark_sim.policy_ranked import LaggedPrefixScheduler, admit_best
from dspark_sim.trace import Trace
from dspark_sim.tree_shapes import recorded_shape


@dataclass(frozen=True)
class Explanation:
    """One round of R requests, explained.

    Parameters
    ----------
    facts
        ``step, start, policy, signal`` and the load: ``num_running, num_waiting, context_tokens, block_size``; then
        ``draft_len`` asked for, ``num_verified, num_accepted, num_emitted``, ``batch_tokens, step_seconds,
        predicted_step_seconds, predicted_throughput, realised_throughput`` and ``oracle_throughput``. Seconds, tokens
        per second; absent ones are NaN.
    state
        What the controller had learnt before.
    requests
        A row per request: ``request_id, position, draft_len, verify_len, num_accepted, num_emitted``, ``chosen`` (the
        choice made again) and ``oracle`` (what true acceptance probabilities would have verified; missing where they
        are not recorded).
    candidates
        A row per drafted token, by rank: ``rank, request_id, depth`` (1 is the first draft), ``confidence, survival``,
        ``verified, outcome`` (accepted, rejected, after a rejection, not verified), ``accept_prob``; with a cost model
        ``expected_tokens, seconds, throughput`` of a round that verifies all down to here.
    curve
        The Θ curve, a row per number of verified drafts: ``num_admitted, batch_tokens, expected_tokens, seconds,
        throughput``; ``seen_throughput``, what the policy went by, where that differs: older survivals, or seconds
        smoothed to never fall. Empty without a cost model or a signal.
    check
        Whether the choices up to this one came out as recorded.
    notes
        What could not be computed and why.
    """

    facts: dict[str, Any]
    state: dict[str, Any]
    requests: pd.DataFrame
    candidates: pd.DataFrame
    curve: pd.DataFrame
    check: DecisionsVerdict
    notes: tuple[str, ...]

    def text(self, most: int = 20) -> str:
        """As text for a terminal; of long tables the first `most` candidates and as many points of the curve."""
        facts = self.facts
        parts = [
            f"Step {facts['step']} of policy {facts['policy']}, at {facts['start']:.6g} s",
            f"load: {facts['num_running']} running, {facts['num_waiting']} waiting, "
            f"{facts['context_tokens']} tokens of context, block size {facts['block_size']}",
        ]
        if self.state:
            learnt = ", ".join(f"{name} {_short(value)}" for name, value in self.state.items())
            parts.append(f"learnt before: {learnt}")
        parts.append(
            f"choice: {facts['draft_len']} drafts per request asked for, {facts['num_verified']} verified "
            f"in a batch of {facts['batch_tokens']} tokens; {facts['num_accepted']} accepted, "
            f"{facts['num_emitted']} tokens emitted"
        )
        parts.append(
            f"throughput (tokens/s): expected {_short(facts['predicted_throughput'])}, "
            f"realised {_short(facts['realised_throughput'])}"
            + ("" if np.isnan(facts["oracle_throughput"]) else f", oracle's {_short(facts['oracle_throughput'])}")
        )
        parts += ["", aligned(self.requests)]
        if len(self.candidates):
            shown = self.candidates.head(most).dropna(axis=1, how="all")
            parts += [
                "",
                f"candidates by {facts['signal']}, best {len(shown)} of {len(self.candidates)}:",
                aligned(shown),
            ]
        if len(self.curve):
            rows = np.unique(np.linspace(0, len(self.curve) - 1, min(most, len(self.curve))).round().astype(int))
            chosen, best = facts["num_verified"], int(self.curve["throughput"].argmax())
            points = self.curve.iloc[np.union1d(rows, [min(chosen, len(self.curve) - 1), best])].dropna(
                axis=1, how="all"
            )
            marks = [
                " ".join(word for word, place in (("chosen", chosen), ("largest", best)) if place == number)
                for number in points["num_admitted"]
            ]
            parts += ["", "expected throughput by verified drafts:", aligned(points.assign(mark=marks))]
        return "\n".join([*parts, "", *(f"note: {note}" for note in self.notes), f"check: {self.check.message}"])

    def to_json(self) -> dict[str, Any]:
        """JSON types only; undefined numbers are None."""
        tables = {
            name: [{key: plain(value) for key, value in row.items()} for row in getattr(self, name).to_dict("records")]
            for name in ("requests", "candidates", "curve")
        }
        check = {"equal": self.check.equal, "num_rounds": self.check.num_rounds, "message": self.check.message}
        return {
            "facts": {name: plain(value) for name, value in self.facts.items()},
            "state": {name: plain(value) for name, value in self.state.items()},
            **tables,
            "check": check,
            "notes": list(self.notes),
        }


def explain(trace: Trace, step: int, *, cost: CostModel | None = None, recording: Trace | None = None) -> Explanation:
    """Explain the choice of one decode round.

    Parameters
    ----------
    trace
        A live or simulated run.
    step
        Number of the iteration.
    cost
        The policy's cost table; ``None`` takes the one in the trace.
    recording
        The recording that was replayed, for its acceptance and draft probabilities; ``None`` looks in the trace itself.

    Raises
    ------
    UserError
        If the trace has no such iteration, it is a prefill, its drafts are trees, or as `decisions.decisions`.
    """
    if (shape := recorded_shape(trace.config)) is not None:
        raise UserError(
            f"the run drafted trees of shape {shape.label()} and explain shows drafts of chains; decisions and "
            "check_decisions go through both"
        )
    steps = trace.steps
    known_steps = steps["step"].to_numpy()
    if step not in known_steps:
        raise UserError(f"the trace has no step {step}; its steps are {_range(known_steps)}")
    made = list(decisions(trace, cost=cost, recording=recording, last=step))
    if not made or made[-1].load.step != step:
        known = trace.drafts["step"].to_numpy()
        later = known[known > step]
        nearest = f"the next decode round is step {later.min()}" if later.size else "no decode round follows"
        raise UserError(f"step {step} is a prefill, where a policy has nothing to choose; {nearest}")
    decision, policy = made[-1], policy_of(trace, cost)
    row: Any = steps.iloc[int(np.flatnonzero(known_steps == step)[0])]
    cost = cost if cost is not None else cost_of(trace)
    notes: list[str] = []
    accept_prob = _accept_prob(trace, recording, decision, notes)
    seconds = None if cost is None else round_seconds(cost, decision.load, *decision.survival.shape)
    oracle = None
    if accept_prob is not None and seconds is not None:
        true = survival_of(DraftBatch(decision.draft_lens, accept_prob))
        oracle = admit_best(true, seconds)
    curve = _curve(decision, seconds, policy, notes)
    candidates = _candidates(trace, decision, seconds, accept_prob)
    facts = {
        "step": step,
        "start": float(row["start"]),
        "policy": policy.label(),
        "signal": policy.signal,
        **{
            name: getattr(decision.load, name)
            for name in ("num_running", "num_waiting", "context_tokens", "block_size")
        },
        "draft_len": decision.draft_len,
        **{name: int(getattr(decision, name).sum()) for name in ("num_accepted", "num_emitted")},
        "num_verified": int(decision.verify_lens.sum()),
        "batch_tokens": int(row["batch_tokens"]),
        **{name: float(row[name]) for name in ("step_seconds", "predicted_step_seconds")},
        "predicted_throughput": _predicted(row, decision, seconds),
        "realised_throughput": float(decision.num_emitted.sum() / row["step_seconds"])
        if row["step_seconds"]
        else np.nan,
        "oracle_throughput": np.nan,
    }
    requests = pd.DataFrame(
        {
            "request_id": decision.load.request_ids,
            "position": trace.tables["drafts"]["position"].to_numpy()[decision.rows],
            "draft_len": decision.draft_lens,
            "verify_len": decision.verify_lens,
            "num_accepted": decision.num_accepted,
            "num_emitted": decision.num_emitted,
            "chosen": decision.chosen,
        }
    )
    if oracle is not None and seconds is not None:
        requests["oracle"] = oracle
        kept = np.arange(true.shape[1]) < oracle[:, None]
        facts["oracle_throughput"] = float((len(oracle) + true[kept].sum()) / seconds[int(oracle.sum())])
    return Explanation(facts, decision.state, requests, candidates, curve, verdict(trace, made, cost), tuple(notes))


def _predicted(row: Any, decision: Decision, seconds: FloatArray | None) -> float:
    recorded = float(row["predicted_throughput"])
    if np.isfinite(recorded) or seconds is None:
        return recorded
    kept = np.arange(decision.survival.shape[1]) < decision.verify_lens[:, None]
    expected = len(decision.verify_lens) + float(decision.survival[kept].sum())
    return expected / float(seconds[int(decision.verify_lens.sum())])


def _accept_prob(trace: Trace, recording: Trace | None, decision: Decision, notes: list[str]) -> FloatArray | None:
    source = trace if recording is None else recording
    column = source.tables["anchors"]["accept_prob"]
    if not decision.draft_len:
        return None
    if not len(column) or column.null_count == len(column):
        notes.append("no acceptance probabilities are recorded, so what an oracle would choose is not known")
        return None
    table = trace.tables["drafts"].slice(decision.rows.start, decision.rows.stop - decision.rows.start)
    return signal_values(trace, "accept_prob", recording, table)[:, : decision.draft_len]


def _curve(decision: Decision, seconds: FloatArray | None, policy: Any, notes: list[str]) -> pd.DataFrame:
    if not decision.draft_len:
        notes.append("nothing was drafted, so there is nothing to rank")
        return pd.DataFrame()
    if seconds is None:
        notes.append("there is no cost table, so there is no curve of expected throughput; give one")
        return pd.DataFrame()
    if np.isnan(decision.survival).any():
        notes.append("no confidences are recorded, so there is no curve of expected throughput")
        return pd.DataFrame()
    count = decision.survival.size + 1
    expected = ranked(decision.survival)[1]
    frame = pd.DataFrame({"num_admitted": np.arange(count), "batch_tokens": len(decision.survival) + np.arange(count)})
    frame = frame.assign(expected_tokens=expected, seconds=seconds, throughput=expected / seconds)
    inner = getattr(policy, "inner", policy)
    frame["seen_throughput"] = np.nan
    if isinstance(inner, LaggedPrefixScheduler):
        frame["seen_throughput"] = ranked(decision.seen)[1] / seconds
    elif isinstance(inner, PrefixScheduler) and (np.diff(seconds) < 0).any():
        frame["seen_throughput"] = expected / never_falling(seconds)
    return frame


def _candidates(
    trace: Trace, decision: Decision, seconds: FloatArray | None, accept_prob: FloatArray | None
) -> pd.DataFrame:
    num_requests, width = decision.survival.shape
    if not width:
        return pd.DataFrame()
    order, expected = ranked(np.nan_to_num(decision.survival))
    request, depth = order % num_requests, order // num_requests
    drafted = depth < decision.draft_lens[request]
    table = trace.tables["drafts"].slice(decision.rows.start, num_requests)
    confidence = signal_values(trace, "confidence", None, table)
    frame = pd.DataFrame(
        {
            "rank": np.arange(1, order.size + 1),
            "request_id": np.array(decision.load.request_ids)[request],
            "depth": depth + 1,
            "confidence": confidence[request, depth],
            "survival": decision.survival[request, depth],
            "verified": depth < decision.verify_lens[request],
            "outcome": _outcomes(depth, decision.verify_lens[request], decision.num_accepted[request]),
            "accept_prob": np.nan if accept_prob is None else accept_prob[request, depth],
        }
    )
    if seconds is not None and not np.isnan(decision.survival).any():
        frame = frame.assign(expected_tokens=expected[1:], seconds=seconds[1:], throughput=expected[1:] / seconds[1:])
    kept: pd.DataFrame = frame[drafted].reset_index(drop=True)
    return kept


def _outcomes(depth: IntArray, verify_lens: IntArray, num_accepted: IntArray) -> Any:
    unverified, accepted, rejected = depth >= verify_lens, depth < num_accepted, depth == num_accepted
    words = ["not verified", "accepted", "rejected"]
    return np.select([unverified, accepted, rejected], words, "after a rejection")


def _range(steps: Any) -> str:
    return f"{steps.min()} to {steps.max()}" if steps.size else "none"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
