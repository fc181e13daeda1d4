"""Columns of a trace's tables as numpy arrays: lists of unequal length become padded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dspark_sim.trace import Trace

IntArray = npt.NDArray[np.int64]


def integers(table: pa.Table, name: str) -> IntArray:
    """A column of whole numbers, [T]."""
    values: IntArray = table[name].to_numpy().astype(np.int64)
    return values


def lengths(table: pa.Table, name: str) -> IntArray:
    """Lengths of a column of lists, [T]; 0 where there is none."""
    values: IntArray = pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy().astype(np.int64)
    return values


def padded(table: pa.Table, name: str, width: int, fill: Any) -> npt.NDArray[Any]:
    """A column of lists as rows [T, width], behind its values `fill`, whose type the array has.

    What exceeds the width is left out.
    """
    lens = lengths(table, name)
    out = np.full((table.num_rows, width), fill)
    row = np.repeat(np.arange(lens.size), lens)
    column = np.arange(row.size) - np.repeat(np.cumsum(lens) - lens, lens)
    fits = column < width
    out[row[fits], column[fits]] = pc.list_flatten(table[name]).to_numpy()[fits]
    return out


def request_rows(trace: Trace) -> IntArray:
    """Row of the table `requests` that each anchor belongs to, [M]."""
    request_id = integers(trace.tables["requests"], "request_id")
    order = np.argsort(request_id)
    found = np.searchsorted(request_id[order], integers(trace.tables["anchors"], "request_id"))
    rows: IntArray = order[found]
    return rows


def room(trace: Trace) -> IntArray:
    """Output tokens behind each anchor, [M]: a slot past them was never compared with anything."""
    requests = trace.tables["requests"]
    last = integers(requests, "prompt_len") + integers(requests, "output_len") - 1
    behind: IntArray = last[request_rows(trace)] - integers(trace.tables["anchors"], "position")
    return behind
