"""A policy's decisions, made again from a trace.

A trace holds what a policy looked at: the load in `steps`, the confidences of every round in `drafts`. So the policy
can be put together again from its recorded parameters and led through the run from its first round on, learning from
what was recorded, and every choice it makes can be held against the one in the trace. What it cannot find there:

* the cost table of a live run, which is a file of its own (a simulated trace has its own in the configuration);
* draft and acceptance probabilities, which policies `Tetris` and `Oracle` decide by. They are in the anchors of the
  recording that a simulation replayed; rounds are matched to them by prompt (above temperature 0 by request) and
  position, and their draft tokens must be the same.

Confidences are recorded in float32, as drafters give them. A choice that hangs on less than that may come out another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.loop import DraftBatch, survival_of
from dspark_sim.policy import Controller, FloatArray, IntArray, LoadView, Signal
from dspark_sim.policy_ranked import seen_survival
from dspark_sim.policy_zoo import Policy, policy_from_parameters
from dspark_sim.trace import Trace
from dspark_sim.tree_shapes import recorded_shape


@dataclass(frozen=True)
class Decision:
    """One decode round of R requests: what the policy saw, chose again, and had chosen.

    Parameters
    ----------
    load
        The load it saw.
    survival
        [R, γ], of this round's drafts, 0 where nothing was drafted.
    seen
        [R, γ], what the number of verified drafts was made of: of earlier rounds for a lagged policy.
    rows
        Slice of the table `drafts`.
    draft_len, verify_lens
        As recorded: asked for per request, and verified, [R].
    chosen_draft_len, chosen
        As chosen again.
    draft_lens, num_accepted, num_emitted
        [R], as recorded.
    state
        Numbers the controller had learnt before the round, by name.
    """

    load: LoadView
    survival: FloatArray
    seen: FloatArray
    rows: slice
    draft_len: int
    draft_lens: IntArray
    verify_lens: IntArray
    num_accepted: IntArray
    num_emitted: IntArray
    chosen_draft_len: int
    chosen: IntArray
    state: dict[str, Any]

    @property
    def agrees(self) -> bool:
        """Whether the policy chose again what was recorded."""
        return self.chosen_draft_len == self.draft_len and bool(np.array_equal(self.chosen, self.verify_lens))


def policy_of(trace: Trace, cost: CostModel | None = None) -> Policy:
    """The policy that ran, from the trace's configuration.

    Parameters
    ----------
    trace
        A live or simulated run.
    cost
        The policy's cost table; ``None`` takes the one in the trace.

    Raises
    ------
    UserError
        If the trace does not name its policy, or a cost table is needed and there is none.
    """
    parameters = trace.config.get("policy_parameters")
    if not isinstance(parameters, dict):
        raise UserError("the trace does not say which policy ran; record or simulate it with this version")
    return policy_from_parameters(parameters, cost if cost is not None else cost_of(trace))


def cost_of(trace: Trace) -> CostModel | None:
    """The cost model in a trace's configuration, if any.

    Raises
    ------
    UserError
        If it is damaged.
    """
    document = trace.config.get("cost")
    if document is None:
        return None
    try:
        return CostModel.from_json(document)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the trace's cost model cannot be read ({error}); give --cost") from error


def decisions(
    trace: Trace,
    *,
    cost: CostModel | None = None,
    recording: Trace | None = None,
    last: int | None = None,
) -> Iterator[Decision]:
    """Every decode round in order, decided again.

    Parameters
    ----------
    trace
        A live or simulated run.
    cost
        As for `policy_of`.
    recording
        The run whose anchors were replayed, for policies that decide by draft or acceptance probabilities. ``None``
        takes the trace's own anchors.
    last
        Stop after this iteration.

    Raises
    ------
    UserError
        As `policy_of`; if a signal the policy needs is not recorded, or `recording` is another run's.
    """
    policy = policy_of(trace, cost)
    if "block_size" not in trace.config:
        raise UserError("the trace does not say its block size; record or simulate it with this version")
    shape = recorded_shape(trace.config)
    block_size = int(trace.config["block_size"]) if shape is None else shape.num_nodes
    table = trace.tables["drafts"]
    if last is not None:
        table = table.filter(pc.less_equal(table["step"], last))
    columns = {
        name: table[name].to_numpy().astype(np.int64)
        for name in ("step", "request_id", "draft_len", "verify_len", "num_accepted", "num_emitted")
    }
    signal = signal_values(trace, policy.signal, recording, table)
    names = [name for name in ("num_waiting", "context_tokens", "draft_len", "replica") if name in trace.steps]
    facts = dict(zip(trace.steps["step"].tolist(), trace.steps[names].to_numpy().astype(np.int64), strict=True))
    edges = np.flatnonzero(np.diff(columns["step"], prepend=-1, append=-1))
    # Each replica has a controller of its own.
    controllers: dict[Any, Controller] = {}
    loads: dict[Any, deque[tuple[int, int, int]]] = {}
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        rows = slice(begin, end)
        step = int(columns["step"][begin])
        row = dict(zip(names, facts[step].tolist(), strict=True))
        replica = row.get("replica", 0)
        if replica not in controllers:
            controllers[replica] = policy.start()
            loads[replica] = deque(maxlen=int(trace.config.get("load_lag", 0)) + 1)
        controller = controllers[replica]
        # The policy saw the load of so many rounds ago.
        loads[replica].append((end - begin, row["num_waiting"], row["context_tokens"]))
        num_running, num_waiting, context_tokens = loads[replica][0]
        load = LoadView(
            step=step,
            num_running=num_running,
            num_waiting=num_waiting,
            context_tokens=context_tokens,
            block_size=block_size,
            request_ids=tuple(columns["request_id"][rows].tolist()),
        )
        state = _state(controller)
        chosen_draft_len = min(controller.draft_len(load), block_size)
        draft_len, draft_lens = row["draft_len"], columns["draft_len"][rows]
        values = signal[rows, :draft_len]
        survival = survival_of(DraftBatch(draft_lens, values, survival=None if shape is None else values))
        seen = seen_survival(controller, load, survival)
        chosen = np.minimum(controller.verify_lens(load, survival), draft_lens)
        verify_lens, num_accepted = columns["verify_len"][rows], columns["num_accepted"][rows]
        # It learns from what happened, so one different choice does not make the next ones different.
        controller.observe(load, verify_lens, num_accepted)
        yield Decision(
            *(load, survival, seen, rows, draft_len, draft_lens, verify_lens, num_accepted),
            *(columns["num_emitted"][rows], chosen_draft_len, chosen, state),
        )


@dataclass(frozen=True, slots=True)
class DecisionsVerdict:
    """Whether every choice came out as recorded (it counts as a bool), and in words."""

    equal: bool
    num_rounds: int
    first_difference: int | None
    message: str

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        return self.message


def check_decisions(
    trace: Trace, *, cost: CostModel | None = None, recording: Trace | None = None, last: int | None = None
) -> DecisionsVerdict:
    """Decide every round again and compare with the trace; arguments and errors as for `decisions`."""
    return verdict(trace, list(decisions(trace, cost=cost, recording=recording, last=last)), cost)


def verdict(trace: Trace, made: list[Decision], cost: CostModel | None = None) -> DecisionsVerdict:
    """What `check_decisions` says about these decisions, made with this cost table (``None``: the trace's)."""
    wrong = [decision for decision in made if not decision.agrees]
    if not wrong:
        return DecisionsVerdict(True, len(made), None, f"all {len(made)} choices come out as recorded")
    first = wrong[0]
    if first.chosen_draft_len != first.draft_len:
        what = f"asks for {first.chosen_draft_len} drafts per request and the trace has {first.draft_len}"
    else:
        row = int(np.flatnonzero(first.chosen != first.verify_lens)[0])
        what = (
            f"verifies {first.chosen[row]} drafts of request {first.load.request_ids[row]} and the trace has "
            f"{first.verify_lens[row]}"
        )
    message = (
        f"{len(wrong)} of {len(made)} choices come out differently; first at step {first.load.step}, where the policy "
        f"{what}: {_cause(trace, first, cost)}"
    )
    return DecisionsVerdict(False, len(made), first.load.step, message)


def _cause(trace: Trace, decision: Decision, cost: CostModel | None) -> str:
    """What the run had otherwise: its table, if that is known to be another."""
    cost = cost if cost is not None else cost_of(trace)
    row = trace.steps[trace.steps["step"] == decision.load.step].iloc[0]
    recorded = float(row["predicted_step_seconds"])
    if cost is not None and np.isfinite(recorded):
        size = (int(row["batch_tokens"]), decision.load.context_tokens, decision.load.num_running, decision.draft_len)
        ours = cost.round_seconds(*size)
        if abs(ours - recorded) > 1e-9 * recorded:
            return (
                f"the cost table is not the run's, which expected {recorded:.6g} seconds of this round where the table "
                f"gives {ours:.6g}; give the one it ran with (--cost)"
            )
    return "its parameters, its code or its cost table is not what the run had"


def signal_values(trace: Trace, signal: Signal, recording: Trace | None, table: pa.Table) -> FloatArray:
    """The signal of every row of `drafts`, [rows, γ]; NaN past what was drafted.

    Where drafts are trees it is the survival of their nodes, whatever the signal.

    Parameters
    ----------
    trace, signal, recording
        As for `decisions`.
    table
        Rows of the trace's table `drafts`.

    Raises
    ------
    UserError
        If the signal is not recorded, or `recording` is another run's.
    """
    shape = recorded_shape(trace.config)
    width = int(trace.config.get("block_size") or 0) if shape is None else shape.num_nodes
    if signal == "confidence" or shape is not None:
        return _matrix(table["confidence"], width)
    anchors = trace if recording is None else recording
    column = anchors.tables["anchors"][signal]
    if not len(column) or column.null_count == len(column):
        raise UserError(
            f"{signal} is not in the trace; give the recording that was replayed, with its anchors (--recording)"
        )
    found = _matching_anchors(trace, anchors, table)
    return _matrix(column, width)[found]


def reaction(trace: Trace, num_smoothed: int = 15) -> pd.DataFrame:
    """How the policy followed the load, one row per decode round.

    Parameters
    ----------
    trace
        A live or simulated run.
    num_smoothed
        Rounds in the moving average of throughput.

    Returns
    -------
    DataFrame
        ``step, start`` (seconds), ``num_running, num_waiting, batch_tokens, draft_len``; ``mean_verify_len`` over the
        round's requests; ``predicted_throughput`` (Θ by the trace's cost model, NaN without one) and
        ``realised_throughput`` = emitted tokens / step seconds, both tokens/s; ``smoothed_throughput``, emitted tokens
        over seconds of the last `num_smoothed` rounds.

    Raises
    ------
    UserError
        If the trace has no decode round.
    """
    rounds = trace.drafts.groupby("step").agg(
        num_decoding=("request_id", "size"), mean_verify_len=("verify_len", "mean"), emitted=("num_emitted", "sum")
    )
    if rounds.empty:
        raise UserError("the trace has no decode round; record or simulate requests of more than one token")
    columns = ["step", "start", "num_running", "num_waiting", "batch_tokens", "draft_len", "predicted_throughput"]
    frame = trace.steps[[*columns, "step_seconds"]].merge(rounds, left_on="step", right_index=True)
    frame = frame.sort_values("start", ignore_index=True)
    sums = frame[["emitted", "step_seconds"]].rolling(num_smoothed, min_periods=1).sum()
    frame["realised_throughput"] = frame["emitted"] / frame["step_seconds"]
    frame["smoothed_throughput"] = sums["emitted"] / sums["step_seconds"]
    wanted = ["mean_verify_len", "predicted_throughput", "realised_throughput", "smoothed_throughput"]
    return frame[[*columns[:-1], *wanted]]


def _state(controller: Controller) -> dict[str, Any]:
    """The controller's numbers and words; those of a wrapped policy after a dot."""
    if not is_dataclass(controller):
        return {}
    state: dict[str, Any] = {}
    for item in fields(controller):
        value = getattr(controller, item.name)
        if isinstance(value, bool | int | float | str):
            state[item.name] = value
        elif item.name == "inner":
            state |= {f"inner.{name}": inner for name, inner in _state(value).items()}
    return state


def _matrix(column: pa.ChunkedArray, width: int) -> FloatArray:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    matrix = np.full((len(column), max(width, int(lengths.max(initial=0)))), np.nan)
    inside = np.arange(matrix.shape[1]) < lengths[:, None]
    matrix[inside] = pc.list_flatten(column).to_numpy().astype(np.float64)
    return matrix


def _matching_anchors(trace: Trace, recording: Trace, table: pa.Table) -> npt.NDArray[np.int64]:
    """Row of the recording's `anchors` for each round in `table`."""
    requests, recorded = trace.requests, recording.requests.sort_values("request_id")
    if trace is recording:
        owner = {request_id: request_id for request_id in requests["request_id"]}
    elif recording.config.get("mode", "greedy") == "greedy":
        with_anchors = set(recording.anchors["request_id"])
        known = recorded[recorded["request_id"].isin(with_anchors)].drop_duplicates("prompt_id")
        by_prompt = dict(zip(known["prompt_id"], known["request_id"], strict=True))
        prompts = requests[["request_id", "prompt_id"]].itertuples(index=False, name=None)
        owner = {request_id: by_prompt.get(prompt_id) for request_id, prompt_id in prompts}
    else:
        ids = recorded["request_id"].tolist()
        owner = {request_id: ids[request_id % len(ids)] for request_id in requests["request_id"]}
    anchors = recording.tables["anchors"]
    places = {
        key: row
        for row, key in enumerate(zip(anchors["request_id"].to_pylist(), anchors["position"].to_pylist(), strict=True))
    }
    found = np.empty(table.num_rows, dtype=np.int64)
    rounds = zip(table["request_id"].to_pylist(), table["position"].to_pylist(), strict=True)
    for row, (request_id, position) in enumerate(rounds):
        place = places.get((owner.get(request_id), position))
        if place is None:
            raise UserError(
                f"the anchors have no block for request {request_id} at position {position}; "
                "give the recording that this run replayed, with its anchors"
            )
        found[row] = place
    drafted = table["draft_tokens"]
    if drafted.null_count == 0:
        blocks = anchors["draft_tokens"].take(pa.array(found))
        lens = table["draft_len"].to_numpy()
        mine, theirs = _matrix(drafted, 0), _matrix(blocks, 0)
        compared = np.arange(mine.shape[1]) < lens[:, None]
        if mine.shape[1] > theirs.shape[1] or (mine != theirs[:, : mine.shape[1]])[compared].any():
            raise UserError("the recording's drafts are not those of this run; give the recording that it replayed")
    return found
