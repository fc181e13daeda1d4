"""The trace of a simulated run, collected as arrays: an iteration costs two appends.

What a round's table says follows from few numbers: the row of the anchor in the recorded tables, how many drafts there
were and were verified, and how many tokens came out. Those are kept, packed every few hundred iterations; tokens,
confidences, accepted counts and predictions are looked up when the trace is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dspark_sim.cost import CostModel
from dspark_sim.policy import SpeculationPolicy
from dspark_sim.request import Request
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.block_tables import expected_accepted, single_confidence
from dspark_sim.trace import SCHEMAS, Trace, list_column

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Detail = Literal["rounds", "steps", "requests"]
"""What a trace holds: everything; no table `drafts`; only the table `requests`."""

_PACK = 256
_ROUNDS = 2**15
_COUNTS = ("start", "num_running", "num_waiting", "num_prefill_tokens", "draft_len", "batch_tokens", "context_tokens")
_SECONDS = ("prefill_seconds", "draft_seconds", "verify_seconds", "host_seconds", "step_seconds")
# Request id, row of the anchor, its position; drafts, verified ones, tokens emitted.
_NUM_WIDE, _NUM_LINES = 3, 6


class ArrayRecorder:
    """Collects a simulated run.

    Parameters
    ----------
    detail
        What the trace shall hold; the less, the less memory a long run needs.
    """

    def __init__(self, detail: Detail = "rounds") -> None:
        self.detail = detail
        self.requests: list[Request] = []
        self._steps: list[tuple[Any, ...]] = []
        self._step_parts: list[FloatArray] = []
        self._rounds = np.zeros((_NUM_LINES, _ROUNDS if detail == "rounds" else 0), dtype=np.int32)
        self._num_rounds = 0
        self._round_parts: list[tuple[npt.NDArray[Any], ...]] = []

    def step(self, counts: tuple[Any, ...], seconds: tuple[float, ...], num_rounds: int) -> None:
        """Note an iteration: its counts up to the free pages, the seconds of its parts, and its decode rounds."""
        if self.detail == "requests":
            return
        self._steps.append((*counts, *seconds, num_rounds))
        if len(self._steps) == _PACK:
            self._pack_steps()

    def reserve(self, num: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Room for `num` decode rounds: the first free column of an array [6, N]; no columns if rounds are not kept.

        A column is a round: request id, row of its anchor, the anchor's position, drafts, verified, tokens emitted.
        """
        if self.detail != "rounds":
            return 0, self._rounds
        if self._num_rounds + num > self._rounds.shape[1]:
            self._pack_rounds()
            if num > self._rounds.shape[1]:
                self._rounds = np.zeros((_NUM_LINES, 2 * num), dtype=np.int32)
        place = self._num_rounds
        self._num_rounds += num
        return place, self._rounds

    def finish(self, request: Request) -> None:
        """Note a request that is done with, in whatever way."""
        self.requests.append(request)

    def _pack_steps(self) -> None:
        if self._steps:
            self._step_parts.append(np.array(self._steps, dtype=np.float64))
            self._steps.clear()

    def _pack_rounds(self) -> None:
        if self._num_rounds:
            lines = self._rounds[:, : self._num_rounds]
            self._round_parts.append((*lines[:_NUM_WIDE].copy(), *lines[_NUM_WIDE:].astype(np.int16)))
            self._num_rounds = 0

    def steps_and_rounds(self) -> tuple[FloatArray, list[npt.NDArray[Any]] | None]:
        """Iterations [S, columns], and their decode rounds as arrays [N] in the order of `reserve`."""
        self._pack_steps()
        self._pack_rounds()
        steps = np.concatenate(self._step_parts) if self._step_parts else np.zeros((0, len(_COUNTS) + 7))
        rounds = [np.concatenate(part) for part in zip(*self._round_parts, strict=True)] if self._round_parts else None
        return steps, rounds


def trace_of(
    recorders: Sequence[ArrayRecorder],
    anchors: RecordedAnchors,
    policy: SpeculationPolicy,
    cost: CostModel,
    num_pages: int,
    config: dict[str, Any],
    provenance: dict[str, Any],
    *,
    noisy: bool = False,
) -> Trace:
    """The run that one recorder for each replica has collected, as a trace.

    Parameters
    ----------
    recorders
        One for each replica, in order.
    anchors
        What was replayed.
    policy
        Its signal's survivals give the predicted throughput.
    cost
        Predicts the seconds of decode rounds.
    num_pages
        Of one KV cache.
    config, provenance
        Of the run.
    noisy
        Whether iterations took other seconds than `cost` says.
    """
    collected = [recorder.steps_and_rounds() for recorder in recorders]
    steps = np.concatenate([part for part, _ in collected])
    replica = np.repeat(np.arange(len(collected)), [len(part) for part, _ in collected])
    whole = [part for _, part in collected if part is not None]
    rounds = [np.concatenate(parts) for parts in zip(*whole, strict=True)] if whole else None
    order = np.lexsort((replica, steps[:, 0])) if len(collected) > 1 else np.arange(len(steps))
    step = np.empty(len(steps), dtype=np.int64)
    step[order] = np.arange(len(steps))
    step_of_round = np.repeat(step, steps[:, -1].astype(np.int64)) if rounds is not None else step[:0]
    if rounds is not None and len(collected) > 1:
        by_step = np.argsort(step_of_round, kind="stable")
        step_of_round, rounds = step_of_round[by_step], [values[by_step] for values in rounds]
    steps, replica = steps[order], replica[order]
    tables = {
        "requests": _request_table([request for recorder in recorders for request in recorder.requests]),
        "steps": _step_table(steps, replica, num_pages, _predictions(steps, rounds, anchors, policy, cost, noisy)),
        "drafts": _draft_table(step_of_round, rounds, anchors),
        "anchors": SCHEMAS["anchors"].empty_table(),
    }
    return Trace(tables, "virtual", config, provenance)


def _request_table(requests: list[Request]) -> pa.Table:
    schema = SCHEMAS["requests"]
    rows = sorted(requests, key=lambda request: request.request_id)
    given = {"output_len": "num_generated"}
    columns = {
        name: [getattr(request, given.get(name, name)) for request in rows]
        for name in schema.names
        if name != "output_tokens"
    }
    columns["output_tokens"] = [None] * len(rows)
    return pa.table([pa.array(columns[name], type=schema.field(name).type) for name in schema.names], schema=schema)


def _step_table(
    steps: FloatArray, replica: IntArray, num_pages: int, predicted: tuple[FloatArray, FloatArray]
) -> pa.Table:
    schema = SCHEMAS["steps"]
    named = dict(zip(_COUNTS, steps.T, strict=False))
    free, *seconds = steps.T[len(_COUNTS) : -1]
    named |= dict(zip(_SECONDS, seconds, strict=True))
    named |= {
        "step": np.arange(len(steps)),
        "replica": replica,
        "padded_tokens": named["batch_tokens"],
        "kv_usage": 1.0 - free / num_pages,
        "predicted_step_seconds": predicted[0],
        "predicted_throughput": predicted[1],
    }
    nothing = np.zeros(len(steps))
    columns = [
        pa.array(
            np.asarray(named.get(name, nothing)).astype(schema.field(name).type.to_pandas_dtype()),
            type=schema.field(name).type,
        )
        for name in schema.names
    ]
    return pa.table(columns, schema=schema)


def _predictions(
    steps: FloatArray,
    rounds: list[npt.NDArray[Any]] | None,
    anchors: RecordedAnchors,
    policy: SpeculationPolicy,
    cost: CostModel,
    noisy: bool,
) -> tuple[FloatArray, FloatArray]:
    """Predicted seconds and throughput of every iteration; not a number where nothing was decoded."""
    seconds, throughput = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    decoding = np.flatnonzero(steps[:, -1] > 0)
    running = steps[decoding, -1]
    if noisy:
        names = ("batch_tokens", "context_tokens", "draft_len")
        counts = steps[decoding][:, [*map(_COUNTS.index, names), -1]].astype(np.int64).tolist()
        seconds[decoding] = [
            cost.draft_seconds(num, draft_len, context)
            + cost.step_seconds(tokens, context, num)
            + cost.host_seconds(num)
            for tokens, context, draft_len, num in counts
        ]
    else:
        seconds[decoding] = steps[decoding, len(_COUNTS) + len(_SECONDS)]
    if rounds is not None and len(decoding):
        table = expected_accepted(anchors, policy.signal)
        expected = table.ravel().take(rounds[1].astype(np.int64) * table.shape[1] + rounds[4])
        ends = np.cumsum(running.astype(np.int64))
        admitted = np.add.reduceat(expected, np.concatenate(([0], ends[:-1])))
        throughput[decoding] = (running + admitted) / seconds[decoding]
    return seconds, throughput


def _draft_table(step: IntArray, rounds: list[npt.NDArray[Any]] | None, anchors: RecordedAnchors) -> pa.Table:
    schema = SCHEMAS["drafts"]
    if rounds is None:
        return schema.empty_table()
    request_id, row, position, draft_len, verify_len, emitted = rounds
    lens = draft_len.astype(np.int64)
    columns = {
        "step": step,
        "request_id": request_id,
        "position": position,
        "draft_len": draft_len,
        "verify_len": verify_len,
        "num_accepted": anchors.accepted(row, verify_len),
        "num_emitted": emitted,
    }
    arrays: dict[str, pa.Array] = {
        name: pa.array(values.astype(np.int64), type=schema.field(name).type) for name, values in columns.items()
    }
    gamma, tree = anchors.round_size, anchors.tree
    shown = None if (draft_len == gamma).all() else np.arange(gamma) < draft_len[:, None]
    known: dict[str, npt.NDArray[Any]] = {"confidence": single_confidence(anchors)}
    if tree is None:
        known["draft_tokens"] = anchors.draft_tokens
    for name, table in known.items():
        blocks = table.take(row, axis=0)
        values = blocks.ravel() if shown is None else blocks[shown]
        arrays[name] = list_column(values, lens, schema.field(name).type.value_type)
    if tree is not None:
        accepted = columns["num_accepted"]
        path = tree.node_rank.take(row, axis=0)
        path = path[np.arange(path.shape[1]) < accepted[:, None]]
        arrays["accepted_path"] = list_column(path, accepted, schema.field("accepted_path").type.value_type)
        if tree.parents is not None:
            parents = np.broadcast_to(tree.parents, (len(lens), gamma))
            parents = parents.ravel() if shown is None else parents[shown]
            arrays["parents"] = list_column(parents, lens, schema.field("parents").type.value_type)
    for name in schema.names:
        if name not in arrays:
            arrays[name] = pa.nulls(len(lens), schema.field(name).type)
    return pa.table([arrays[name] for name in schema.names], schema=schema)
