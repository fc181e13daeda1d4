"""Readers of request traces in CSV: the Azure LLM inference traces and BurstGPT.

Azure: ``TIMESTAMP`` is a date and time with up to nine digits of a second, with or without an offset. BurstGPT:
``Timestamp`` is in seconds, and a failed request has 0 ``Response tokens``. Files have up to tens of millions of
rows and are read in blocks; only when a row cannot be used is the file read again, for the number of its line.
"""

from __future__ import annotations

import csv
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from dspark_sim.errors import UserError
from dspark_sim.request_traces.formats import CSV_COLUMNS, Chunks, Notes, read_header

CsvFormat = Literal["azure", "burstgpt"]
_BLOCK_BYTES = 8 << 20
_EXAMPLES: dict[CsvFormat, str] = {"azure": "2023-11-16 18:15:46.6805900", "burstgpt": "118.0"}


def read_csv(path: Path, format: CsvFormat, notes: Notes) -> Chunks:
    """Chunks of rows; a note names columns that the format does not have.

    Raises
    ------
    UserError
        If columns are missing, or a row has too few or too many fields or a value that is no time or count.
    """
    (time, prompt, output), others = CSV_COLUMNS[format]
    header, header_line = read_header(path)
    missing = [name for name in (time, prompt, output) if name not in header]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}: its header line is {','.join(header)!r}; rename the columns, "
            f"or leave format {format} out"
        )
    unknown = [name for name in header if name not in (time, prompt, output, *others)]
    if unknown:
        notes.append(f"columns not used: {', '.join(unknown)}")
    num_rows, origin = 0, None
    try:
        with (
            path.open("rb") as file,
            _open(file, header_line, len(header), [header.index(n) for n in (time, prompt, output)]) as rows,
        ):
            for batch in rows:
                texts, prompts, outputs = (column.to_pandas() for column in batch.columns)
                times, origin = _times(texts, format, origin)
                prompt_len, output_len = _counts(prompts), _counts(outputs)
                bad = np.isnan(times) | np.isnan(prompt_len) | np.isnan(output_len)
                if bad.any():
                    _refuse_row(path, format, header, num_rows + int(np.argmax(bad)))
                yield times, prompt_len.astype(np.int64), output_len.astype(np.int64)
                num_rows += batch.num_rows
    except pa.ArrowInvalid as error:
        _refuse_ragged(path, header)
        raise UserError(f"{path} cannot be read as CSV ({error}); fetch it again") from error


def _open(file: Any, skip_rows: int, num_columns: int, places: list[int]) -> Any:
    """Record batches of the columns at `places`, as texts. A row of another width is an `ArrowInvalid`."""
    names = [str(place) for place in range(num_columns)]
    wanted = [str(place) for place in places]
    return pyarrow.csv.open_csv(
        file,
        pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=names, skip_rows=skip_rows),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
        ),
    )


def _times(texts: pd.Series[str], format: CsvFormat, origin: int | None) -> tuple[npt.NDArray[np.float64], int | None]:
    """Seconds [n] (nan: none) from the first row of the file, whose nanoseconds are `origin`."""
    if format == "burstgpt":
        times = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64)
        return np.where(np.isfinite(times), times, np.nan), None
    moments = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    # A year alone would pass for a date.
    bad = (moments.isna() | (texts.str.len() < 19)).to_numpy()
    nanoseconds = moments.dt.tz_localize(None).to_numpy(dtype="datetime64[ns]").astype(np.int64)
    if origin is None:
        origin = int(nanoseconds[~bad][0]) if not bad.all() else 0
    # Subtracted as integers: seconds since 1970 as a float are exact only to a quarter of a microsecond.
    return np.where(bad, np.nan, (nanoseconds - origin) / 1e9), origin


def _counts(texts: pd.Series[str]) -> npt.NDArray[np.float64]:
    """Token counts [n] as floats; nan where the text is none."""
    values = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64)
    return np.where((values >= 0) & (values < 2**53) & (values == np.floor(values)), values, np.nan)


def _refuse_row(path: Path, format: CsvFormat, header: list[str], number: int) -> NoReturn:
    """Raise for the data row of this number, counted from 0."""
    line, row = _rows_until(path, lambda index, row: index == number)
    if len(row) != len(header):
        _refuse_fields(path, line, row, header)
    (time, prompt, output), _ = CSV_COLUMNS[format]
    for name in (prompt, output):
        value = row[header.index(name)]
        if math.isnan(_counts(pd.Series([value]))[0]):
            raise UserError(f"{path} line {line}: {name} is {reprlib.repr(value)}; give a whole number, 0 or more")
    value = row[header.index(time)]
    raise UserError(f"{path} line {line}: {time} is {reprlib.repr(value)}; give a time such as {_EXAMPLES[format]}")


def _rows_until(path: Path, wanted: Callable[[int, list[str]], bool]) -> tuple[int, list[str]]:
    """Line and fields of the first data row that is wanted; no fields if none is."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        index = -1  # the header's
        for row in rows:
            if not row:
                continue
            if index >= 0 and wanted(index, row):
                return rows.line_num, row
            index += 1
    return 0, []


def _refuse_ragged(path: Path, header: list[str]) -> None:
    line, row = _rows_until(path, lambda index, row: len(row) != len(header))
    if row:
        _refuse_fields(path, line, row, header)


def _refuse_fields(path: Path, line: int, row: list[str], header: list[str]) -> NoReturn:
    raise UserError(
        f"{path} line {line} has {len(row)} fields and the header {len(header)}; mend the line, or fetch the file "
        "again if it is cut off"
    )
