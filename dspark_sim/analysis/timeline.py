"""A trace as a timeline in Chrome's trace event format, for ui.perfetto.dev or chrome://tracing.

Three processes of the timeline: the engine with its iterations and the spans inside each (prefill, draft, head, policy,
verify, accept, host, laid end to end, for the trace holds their lengths and not their instants); its counters (requests
running and waiting, batch tokens, KV usage); and the requests with their phases queue, prefill and decode, and in the
decode their rounds. Requests have a track each, or share as many tracks as were in the server at once (slots).

Times in the file are microseconds, from the start of the run, whole nanoseconds: so what follows or contains another
event does so exactly. The format is Google's "Trace Event Format": complete events (``ph`` X), counters (C), names (M).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.analysis.vllm_export import scheduled_instants
from dspark_sim.analysis.window import Window
from dspark_sim.errors import UserError
from dspark_sim.files import whole_file
from dspark_sim.trace import SPANS, Trace

Event = dict[str, Any]
Nanoseconds = npt.NDArray[np.int64]
ENGINE, REQUESTS = 1, 2
_MOST_TRACKS = 256


def timeline(
    trace: Trace, *, tracks: Literal["auto", "request", "slot"] = "auto", window: Window | None = None
) -> Iterator[Event]:
    """The events of a run: names first, then every track's in order of time, an event before those inside it.

    Parameters
    ----------
    trace
        A live or simulated run.
    tracks
        One track per request, or per slot; ``"auto"`` takes slots above 256 requests.
    window
        Only iterations that begin in it, and requests that are in the server during it.

    Raises
    ------
    UserError
        If nothing is left to show.
    """
    steps, requests = trace.steps, trace.requests[trace.requests["finish"].notna()]
    # One that gave up before its first token was in the queue to the end.
    requests = requests.assign(first_token=requests["first_token"].fillna(requests["finish"]))
    if window is not None:
        steps = steps[window.holds(steps["start"])]
        requests = requests[(requests["arrival"] <= window.end) & (requests["finish"] >= window.start)]
    if steps.empty and requests.empty:
        raise UserError("nothing happened in the chosen part of the trace; choose another, or leave it out")
    yield _name("process_name", ENGINE, 0, "engine")
    yield _name("process_name", REQUESTS, 0, "requests")
    steps = steps.sort_values("start", ignore_index=True)
    # Replicas run side by side: a track and counters each.
    engines = [part for _, part in steps.groupby("replica")] if "replica" in steps else [steps]
    steps = pd.concat([part.assign(begin=_nanoseconds(part["start"]), end=_ends(part)) for part in engines])
    for number, part in enumerate(engines):
        suffix = f" of replica {number}" if len(engines) > 1 else ""
        yield _name("thread_name", ENGINE, number + 1, f"iterations{suffix}")
        yield from _iterations(part, number + 1)
        yield from _counters(part, suffix)
    requests = requests.sort_values(["arrival", "request_id"], ignore_index=True)
    if tracks == "auto":
        tracks = "request" if len(requests) <= _MOST_TRACKS else "slot"
    places = requests["request_id"].to_numpy() if tracks == "request" else _slots(requests)
    for place in np.unique(places).tolist():
        yield _name("thread_name", REQUESTS, place + 1, f"{tracks} {place}")
    yield from _lives(trace, steps, requests, places)


def write_timeline(trace: Trace, path: Path | str, **options: Any) -> Path:
    """Write the timeline as one JSON object; `options` as for `timeline`.

    Raises
    ------
    UserError
        If the file cannot be written, or as `timeline`.
    """
    path = Path(path)
    events = timeline(trace, **options)
    first = next(events)
    other = {"clock": trace.clock, "policy": str(trace.config.get("policy", "unknown"))}
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        # Event by event: a long run's list would not fit in memory.
        file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps(other) + ', "traceEvents": [\n')
        file.write(json.dumps(first, allow_nan=False))
        for event in events:
            file.write(",\n" + json.dumps(event, allow_nan=False))
        file.write("\n]}\n")
    return path


def _iterations(steps: pd.DataFrame, tid: int) -> Iterator[Event]:
    spans = [name for name in SPANS if f"{name}_seconds" in steps]
    starts = _nanoseconds(steps["start"])
    ends = _ends(steps)
    lengths = np.nan_to_num(steps[[f"{name}_seconds" for name in spans]].to_numpy(dtype=np.float64))
    bounds = starts[:, None] + np.rint(np.cumsum(lengths, axis=1) * 1e9).astype(np.int64)
    bounds = np.minimum(bounds, ends[:, None])
    columns = ("step", "num_running", "num_waiting", "num_prefill_tokens", "draft_len", "batch_tokens", "padded_tokens")
    facts: list[Event] = steps[[*columns, "context_tokens"]].to_dict("records")  # type: ignore[assignment]
    predictions = steps["predicted_throughput"].to_numpy(dtype=np.float64)
    for row, fact in enumerate(facts):
        name = "prefill" if fact["num_prefill_tokens"] else "decode"
        args: Event = {key: int(value) for key, value in fact.items() if pd.notna(value)}
        if np.isfinite(predictions[row]):
            args["predicted_throughput"] = float(predictions[row])
        yield _span(f"{name} iteration", ENGINE, tid, starts[row], ends[row], args, "iteration")
        begin = int(starts[row])
        for column, span in enumerate(spans):
            end = int(bounds[row, column])
            if end > begin:
                yield _span(span, ENGINE, tid, begin, end, None, "span")
            begin = max(begin, end)


def _counters(steps: pd.DataFrame, suffix: str) -> Iterator[Event]:
    if steps.empty:
        return
    groups = {
        "requests": {"running": "num_running", "waiting": "num_waiting"},
        "batch tokens": {"tokens": "batch_tokens"},
        "KV usage (fraction)": {"used": "kv_usage"},
    }
    starts = _nanoseconds(steps["start"])
    for group, columns in groups.items():
        name = group + suffix
        values = np.nan_to_num(steps[list(columns.values())].to_numpy(dtype=np.float64))
        for start, row in zip(starts, values.tolist(), strict=True):
            yield {
                "ph": "C",
                "name": name,
                "pid": ENGINE,
                "ts": start / 1e3,
                "args": dict(zip(columns, row, strict=True)),
            }
        end = _ends(steps)[-1]
        yield {"ph": "C", "name": name, "pid": ENGINE, "ts": end / 1e3, "args": dict.fromkeys(columns, 0.0)}


def _lives(trace: Trace, steps: pd.DataFrame, requests: pd.DataFrame, places: npt.NDArray[np.int64]) -> Iterator[Event]:
    scheduled = scheduled_instants(trace).reindex(requests["request_id"])
    scheduled = scheduled.fillna(requests.set_index("request_id")["first_token"])
    instants = [requests["arrival"], scheduled, requests["first_token"], requests["finish"]]
    bounds = np.maximum.accumulate(np.stack([_nanoseconds(column) for column in instants], axis=1), axis=1)
    times = steps.set_index("step")[["begin", "end"]]
    rounds = trace.drafts[trace.drafts["step"].isin(times.index)].join(times, on="step")
    by_request = {request_id: part.sort_values("begin") for request_id, part in rounds.groupby("request_id")}
    columns = ("request_id", "prompt_id", "domain", "prompt_len", "output_len", "finish_reason", "num_preemptions")
    facts: list[Event] = requests[list(columns)].astype(object).to_dict("records")  # type: ignore[assignment]
    shown = ("step", "draft_len", "verify_len", "num_accepted", "num_emitted")
    for row, fact in enumerate(facts):
        tid = int(places[row]) + 1
        args = {key: value for key, value in fact.items() if value is not None and value == value}
        yield _span(f"request {fact['request_id']}", REQUESTS, tid, bounds[row, 0], bounds[row, 3], args, "request")
        for phase, name in enumerate(("queue", "prefill", "decode")):
            begin, end = bounds[row, phase], bounds[row, phase + 1]
            if end > begin:
                yield _span(name, REQUESTS, tid, begin, end, None, "phase")
        own = by_request.get(fact["request_id"], rounds.iloc[:0])
        spans = np.clip(own[["begin", "end"]].to_numpy(dtype=np.int64), bounds[row, 2], bounds[row, 3])
        for (begin, end), numbers in zip(spans.tolist(), own[list(shown)].to_numpy(np.int64).tolist(), strict=True):
            counts = dict(zip(shown, numbers, strict=True))
            yield _span(f"{counts['num_emitted']} tokens", REQUESTS, tid, begin, end, counts, "round")


def _slots(requests: pd.DataFrame) -> npt.NDArray[np.int64]:
    """The lowest track that is free when each request arrives; [n], rows in order of arrival."""
    arrivals, finishes = _nanoseconds(requests["arrival"]), _nanoseconds(requests["finish"])
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    slots = np.zeros(len(requests), dtype=np.int64)
    for row, (arrival, finish) in enumerate(zip(arrivals.tolist(), finishes.tolist(), strict=True)):
        while busy and busy[0][0] <= arrival:
            heappush(free, heappop(busy)[1])
        slots[row] = heappop(free) if free else len(busy)
        heappush(busy, (finish, int(slots[row])))
    return slots


def _ends(steps: pd.DataFrame) -> Nanoseconds:
    """When each iteration ends: never after the next one of a single engine begins."""
    ends = _nanoseconds(steps["start"] + steps["step_seconds"])
    starts = _nanoseconds(steps["start"])
    if len(starts) > 1:
        ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return np.maximum(ends, starts)


def _nanoseconds(seconds: pd.Series[Any]) -> Nanoseconds:
    return np.rint(seconds.to_numpy(dtype=np.float64) * 1e9).astype(np.int64)


def _span(name: str, pid: int, tid: int, begin: int, end: int, args: Event | None, category: str) -> Event:
    event = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid}
    # Not end/1e3 - begin/1e3, which would round twice.
    event |= {"ts": int(begin) / 1e3, "dur": int(end - begin) / 1e3}
    return event if args is None else {**event, "args": args}


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
