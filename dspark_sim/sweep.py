"""Sweeps: a function over a grid of points, resumable, on one process or many.

Every finished point becomes one JSON line of a file, ``{"point": {...}, "result": {...}}``, in the order of
finishing. A sweep that was interrupted or failed is called again in the same way and runs only what is missing.
The frame that comes back is in grid order whoever did the work.

A line knows its point, not its function: whatever else the result depends on (the recording, the cost table) belongs
into the point or into the name of the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from tqdm import tqdm

from dspark_sim.analysis.tables import plain
from dspark_sim.errors import UserError, explain_os_errors

_POLL_SECONDS = 0.02
_SCALAR = (bool, int, float, str, type(None))


class Executor(Protocol):
    """Anything that takes work as `concurrent.futures` does: a process pool, a thread pool, submitit.

    What `submit` returns needs ``done()`` and ``result()``; ``cancel()`` is used where there is one.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Start the call and return its future."""
        ...


def sweep(
    function: Callable[..., Mapping[str, Any]],
    grid: Sequence[Mapping[str, Any]],
    out: Path | str,
    *,
    executor: Executor | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run ``function(**point)`` for every point of a grid and keep each result as soon as it is there.

    Parameters
    ----------
    function
        Takes a point's entries as keywords and returns a mapping of names to numbers or texts. With an `executor`
        of other processes it must be importable there (no lambda).
    grid
        Points: mappings of names to numbers or texts. A point listed twice is run once.
    out
        The file of JSON lines. Points it already holds are not run again; a truncated last line is dropped and its
        point run again.
    executor
        Where to run; ``None`` runs here, one point after another.
    progress
        Show a bar of finished points on stderr.

    Returns
    -------
    DataFrame
        One row per point in grid order, with the columns of the points and then those of the results. Undefined
        numbers are NaN. It is the same whether a row was computed now or read from the file.

    Raises
    ------
    UserError
        If the grid is empty, a point or a result holds something else than numbers and texts, a result repeats the
        name of a point's entry, or the file is no sweep or cannot be written.

    Notes
    -----
    If a point fails, or on Ctrl-C, waiting points are cancelled, finished ones are kept in the file, and the
    exception goes on to the caller.
    """
    if not grid:
        raise UserError("the grid has zero points; give at least one")
    out = Path(out)
    points = {_key(point): dict(point) for point in grid}
    finished = _resume(out)
    missing = {key: point for key, point in points.items() if key not in finished}
    with explain_os_errors(out, "write"):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("a", encoding="utf-8")
    bar = tqdm(total=len(points), initial=len(points) - len(missing), unit="point", disable=not progress)

    def keep(key: str, result: Mapping[str, Any]) -> None:
        values = _scalars(result, "result")
        repeated = sorted(values.keys() & points[key].keys())
        if repeated:
            raise UserError(f"the result of point {key} repeats its entry {repeated[0]}; name it otherwise")
        with explain_os_errors(out, "write"):
            file.write(json.dumps({"point": json.loads(key), "result": values}, allow_nan=False) + "\n")
            file.flush()
        finished[key] = values
        bar.update()

    with file, bar:
        if executor is None:
            for key, point in missing.items():
                keep(key, function(**point))
        else:
            _collect(function, missing, executor, keep)
    rows = [{**_scalars(point, "point"), **finished[_key(point)]} for point in grid]
    return pd.DataFrame([{name: _defined(value) for name, value in row.items()} for row in rows])


def _collect(
    function: Callable[..., Mapping[str, Any]],
    points: Mapping[str, Mapping[str, Any]],
    executor: Executor,
    keep: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Submit all points and keep results as they finish; the first failure is raised after what had finished."""
    waiting: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        for key, point in points.items():
            waiting[key] = executor.submit(function, **point)
        while waiting and failure is None:
            ready = [key for key, future in waiting.items() if future.done()]
            for key in ready:
                future = waiting.pop(key)
                try:
                    result = future.result()
                except Exception as error:
                    failure = failure or error
                    continue
                keep(key, result)
            if not ready:
                time.sleep(_POLL_SECONDS)
    finally:
        for future in waiting.values():
            if hasattr(future, "cancel"):
                future.cancel()
    if failure is not None:
        raise failure


def _resume(out: Path) -> dict[str, dict[str, Any]]:
    """Results of the file by point; cuts off what a killed process left half written."""
    if not out.exists():
        return {}
    with explain_os_errors(out, "read"):
        content = out.read_bytes()
    whole = content.rfind(b"\n") + 1
    finished = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            finished[_key(entry["point"])] = dict(entry["result"])
        except (ValueError, KeyError, TypeError, UserError) as error:
            raise UserError(f"{out} line {number} is no line of a sweep ({error}); give another file") from error
    if whole < len(content):
        # A foreign file without a line break is not ours to cut.
        if whole == 0 and not content.startswith(b'{"point"'[: len(content)]):
            raise UserError(f"{out} is not the file of a sweep; give another file")
        with explain_os_errors(out, "write"), out.open("r+b") as file:
            file.truncate(whole)
    return finished


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps(_scalars(point, "point"), sort_keys=True)


def _scalars(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The entries as JSON values; undefined numbers become None."""
    if not isinstance(values, Mapping):
        raise UserError(f"a {kind} of the sweep is a {type(values).__name__}; give names and values")
    scalars = {}
    for name, value in values.items():
        scalar = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not isinstance(scalar, _SCALAR):
            raise UserError(f"entry {name} of a {kind} is a {type(value).__name__}; give a number or a text")
        scalars[str(name)] = plain(scalar)
    return scalars


def _defined(value: Any) -> Any:
    return float("nan") if value is None else value
