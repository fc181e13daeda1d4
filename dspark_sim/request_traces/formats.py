"""What readers of request traces share: the formats, how one is told from the others, and checks of values."""

from __future__ import annotations

import csv
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError

TraceFormat = Literal["azure", "burstgpt", "mooncake", "sharegpt", "vllm"]
FORMATS: tuple[TraceFormat, ...] = get_args(TraceFormat)

# Seconds [n] from any origin (None: the format has no times), prompt tokens [n], output tokens [n]; unsorted.
Chunk = tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.int64], npt.NDArray[np.int64]]
Chunks = Generator[Chunk, None, None]
Notes = list[str]

# Columns of time, prompt and output tokens; then those that are known and not used.
CSV_COLUMNS: dict[TraceFormat, tuple[tuple[str, str, str], tuple[str, ...]]] = {
    "azure": (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), ()),
    "burstgpt": (
        ("Timestamp", "Request tokens", "Response tokens"),
        ("Model", "Total tokens", "Log Type", "Session ID", "Elapsed time"),
    ),
}
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")
_VLLM_KEYS = {"input_lens", "output_lens", "request_throughput", "total_input_tokens"}
_KNOWN = "azure ({}), burstgpt ({}), mooncake ({}), sharegpt (conversations), vllm (input_lens, output_lens)".format(
    *(", ".join(columns) for columns, _ in CSV_COLUMNS.values()), ", ".join(MOONCAKE_KEYS)
)
_PEEK = 1 << 16


def detect_format(path: Path, asked: TraceFormat | None) -> TraceFormat:
    """The format that the beginning of a file shows.

    Parameters
    ----------
    path
        The file.
    asked
        The format the user says it is; taken at its word where the content shows none, so that its reader can name
        what is missing.

    Raises
    ------
    UserError
        If the file is empty, shows another format than `asked`, or none.
    """
    with path.open(encoding="utf-8-sig") as file:
        beginning = file.read(_PEEK).lstrip()
    if not beginning:
        raise UserError(f"{path} is empty; give a trace of requests")
    found = _from_json(beginning) if beginning[0] in "{[" else _from_header(read_header(path)[0])
    if asked is not None and found not in (asked, None):
        raise UserError(f"{path} is in format {found} and format {asked} was asked for; leave the format out")
    decided = found or asked
    if decided is not None:
        return decided
    if beginning[0] in "{[":
        names = list(dict.fromkeys(_keys(beginning)))[:8]
        raise UserError(f"{path} has the keys {', '.join(names) or 'of no object'}; known formats are {_KNOWN}")
    header, _ = read_header(path)
    for name, (columns, _) in CSV_COLUMNS.items():
        if set(columns) & set(header):
            missing = [column for column in columns if column not in header]
            raise UserError(
                f"{path} has columns of format {name} but not {', '.join(missing)}: its header line is "
                f"{','.join(header)!r}; rename the columns"
            )
    raise UserError(f"{path} has the unknown columns {', '.join(header)[:200]!r}; known formats are {_KNOWN}")


def read_header(path: Path) -> tuple[list[str], int]:
    """Column names of a CSV file, without the spaces around them, and the number of the line they end on."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        return [name.strip() for name in next((row for row in lines if row), [])], lines.line_num


def count(value: Any) -> int | None:
    """A number of tokens as an integer; ``None`` if the value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        return None
    return int(value) if value == int(value) else None


def seconds(value: Any) -> float | None:
    """A time as a float; ``None`` if the value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -(2**53) < value < 2**53:
        return None
    return float(value)


def _from_header(header: list[str]) -> TraceFormat | None:
    return next((name for name, (columns, _) in CSV_COLUMNS.items() if set(columns) <= set(header)), None)


def _from_json(beginning: str) -> TraceFormat | None:
    keys = set(_keys(beginning))
    if set(MOONCAKE_KEYS) <= keys:
        return "mooncake"
    if "conversations" in keys:
        return "sharegpt"
    return "vllm" if keys & _VLLM_KEYS else None


def _keys(text: str) -> list[str]:
    return re.findall(r'"([\w ./-]{1,60})"\s*:', text)
