"""Readers of request traces in JSON: Mooncake, ShareGPT, and results of vLLM's ``bench serve``.

Mooncake: one object a line with ``timestamp`` in milliseconds, ``input_length`` and ``output_length``; ``hash_ids``
(blocks shared between prompts) are not used. ShareGPT: a list of conversations, or one a line; a request is the
first turn of a user and the answer to it. vLLM: one object with a list for each quantity, written with
``--save-detailed``; a failed request has output length 0.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from dspark_sim.errors import UserError
from dspark_sim.request_traces.formats import MOONCAKE_KEYS, Chunks, Notes, count, seconds

_CHUNK = 50_000
_USERS = ("human", "user")
_MOONCAKE_KNOWN = {*MOONCAKE_KEYS, "hash_ids"}


def read_mooncake(path: Path, notes: Notes) -> Chunks:
    """Chunks of lines; a note names keys that the format does not have.

    Raises
    ------
    UserError
        If a line is no object with a time and two lengths.
    """
    rows: list[tuple[float, int, int]] = []
    unknown: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = _object(path, number, line)
                unknown |= record.keys() - _MOONCAKE_KNOWN
                rows.append(_mooncake_row(path, number, record))
                if len(rows) == _CHUNK:
                    yield _mooncake_chunk(rows)
                    rows = []
        if rows:
            yield _mooncake_chunk(rows)
    finally:  # a caller with enough rows stops here
        if unknown:
            notes.append(f"keys not used: {', '.join(sorted(unknown))}")


def _mooncake_row(path: Path, number: int, record: dict[str, Any]) -> tuple[float, int, int]:
    missing = [key for key in MOONCAKE_KEYS if key not in record]
    if missing:
        raise UserError(f"{path} line {number} has no {', '.join(missing)}; add it, or drop the line")
    time, prompt_len, output_len = (record[key] for key in MOONCAKE_KEYS)
    row = (seconds(time), count(prompt_len), count(output_len))
    if None in row:
        key = MOONCAKE_KEYS[row.index(None)]
        meaning = "a number of milliseconds" if key == "timestamp" else "a whole number, 0 or more"
        raise UserError(f"{path} line {number}: {key} is {reprlib.repr(record[key])}; give {meaning}")
    return row  # type: ignore[return-value]


def _mooncake_chunk(rows: list[tuple[float, int, int]]) -> Any:
    times, inputs, outputs = zip(*rows, strict=True)
    return np.array(times, dtype=np.float64) / 1000.0, np.array(inputs, np.int64), np.array(outputs, np.int64)


def read_sharegpt(
    path: Path, notes: Notes, count_tokens: Callable[[str], int] | None, chars_per_token: float
) -> Chunks:
    """Chunks of conversations, without times.

    Conversations without a user's turn and an answer to it count as having neither prompt nor output.

    Parameters
    ----------
    path, notes
        The file; what its reader should know.
    count_tokens
        Number of tokens of a text.
    chars_per_token
        Without `count_tokens`: characters that make a token.

    Raises
    ------
    UserError
        If an entry is no object with a list of turns, or a turn no object with two texts.
    """
    if count_tokens is None:
        notes.append(f"lengths estimated at {chars_per_token:g} characters per token")
        measure: Callable[[str], int] = lambda text: ceil(len(text) / chars_per_token)  # noqa: E731
    else:
        measure = count_tokens
    lengths: list[tuple[int, int]] = []
    for number, entry in _entries(path):
        lengths.append(_exchange(path, number, entry, measure))
        if len(lengths) == _CHUNK:
            yield _lengths_chunk(lengths)
            lengths = []
    if lengths:
        yield _lengths_chunk(lengths)


def _lengths_chunk(lengths: list[tuple[int, int]]) -> Any:
    prompt_len, output_len = np.array(lengths, dtype=np.int64).T
    return None, prompt_len, output_len


def _exchange(path: Path, number: int, entry: Any, measure: Callable[[str], int]) -> tuple[int, int]:
    """Tokens of the first turn of a user and of the turn after it."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise UserError(f"{path} line {number} begins an entry without a list `conversations`; mend or drop it")
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise UserError(
                f"{path} line {number} begins a conversation with a turn that has no texts `from` and `value`; mend "
                "or drop it"
            )
    for asked, answered in pairwise(turns):
        if asked["from"] in _USERS and answered["from"] not in _USERS:
            return measure(asked["value"]), measure(answered["value"])
    return 0, 0


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON list, or of JSON Lines, each with the number of the line where it begins."""
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    place = _skip(text, 0, "")
    in_list = text[place : place + 1] == "["
    place = _skip(text, place + in_list, "")
    line, counted = 1, 0
    while place < len(text) and not (in_list and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            entry, end = decoder.raw_decode(text, place)
        except ValueError as error:
            number, what = (error.lineno, error.msg) if isinstance(error, json.JSONDecodeError) else (line, error)
            raise UserError(
                f"{path} line {number} is not JSON ({what}); mend it, or fetch the file again if it is cut off"
            ) from error
        yield line, entry
        place = _skip(text, end, "," if in_list else "")
    if in_list and place >= len(text):
        raise UserError(f"{path} line {text.count(chr(10)) + 1} ends inside the list; fetch the file again")


def _skip(text: str, place: int, also: str) -> int:
    while place < len(text) and (text[place].isspace() or text[place] in also):
        place += 1
    return place


def read_vllm(path: Path, notes: Notes) -> Chunks:
    """The requests of a result of vLLM's ``bench serve``; times if the result has ``start_times``.

    Under ``--max-concurrency`` these are the times at which requests were sent, not those at which a user would have
    asked; a note says so.

    Raises
    ------
    UserError
        If the file is no such result or has no detailed lists, or a value is no length or time.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        result = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "keep one result a file" if error.msg == "Extra data" else "mend it, or fetch the file again"
        raise UserError(f"{path} line {error.lineno} is not JSON ({error.msg}); {remedy}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path} cannot be read as JSON ({error}); mend it, or fetch the file again") from error
    if not isinstance(result, dict):
        raise UserError(f"{path} is no result of vLLM bench serve: it is not an object; leave format vllm out")
    missing = [key for key in ("input_lens", "output_lens") if not isinstance(result.get(key), list)]
    if missing:
        raise UserError(f"{path} has no list {', '.join(missing)}; run vLLM's bench serve with --save-detailed")
    inputs, outputs = (_numbers(path, key, result[key], count) for key in ("input_lens", "output_lens"))
    starts = result.get("start_times")
    times = None if not isinstance(starts, list) else _numbers(path, "start_times", starts, seconds)
    errors = result["errors"] if isinstance(result.get("errors"), list) else [""] * len(inputs)
    for key, values in (("output_lens", outputs), ("start_times", times), ("errors", errors)):
        if values is not None and len(values) != len(inputs):
            raise UserError(f"{path} has {len(inputs)} input_lens and {len(values)} {key}; keep one of each a request")
    if times is None:
        notes.append("no start_times: lengths only")
    elif result.get("max_concurrency") is not None:
        notes.append(f"times are of sending, at most {result['max_concurrency']} requests at once")
    failed = np.array([bool(error) for error in errors], dtype=np.bool_)
    yield (
        None if times is None else np.array(times, dtype=np.float64),
        np.array(inputs, dtype=np.int64),
        np.where(failed, 0, np.array(outputs, dtype=np.int64)),
    )


def _numbers(path: Path, key: str, values: list[Any], read: Callable[[Any], Any]) -> list[Any]:
    numbers = [read(value) for value in values]
    if None in numbers:
        place = numbers.index(None)
        meaning = "a number of seconds" if read is seconds else "a whole number, 0 or more"
        raise UserError(f"{path}: {key}[{place}] is {reprlib.repr(values[place])}; give {meaning}")
    return numbers


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{path} line {number} is not JSON ({error}); mend it, or fetch the file again if it is cut off"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{path} line {number} is no object; give one with {', '.join(MOONCAKE_KEYS)}")
    return record
