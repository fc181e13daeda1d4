"""Tables as text for the terminal and as JSON rows for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dspark_sim.files import write_json


def aligned(frame: pd.DataFrame, headers: Mapping[str, str] | None = None, formats: Mapping[str, str] = {}) -> str:
    """A frame as aligned text, numbers to the right.

    Parameters
    ----------
    frame
        The rows.
    headers
        Columns to show, in order, with their headings; ``None`` shows all under their names.
    formats
        Format specifications by column, e.g. ``"+.1%"``; others are chosen by type. Undefined numbers print as -.
    """
    headers = headers or {str(name): str(name) for name in frame.columns}
    columns = []
    for name, heading in headers.items():
        cells = [_cell(value, formats.get(name)) for value in frame[name]]
        is_text = not pd.api.types.is_numeric_dtype(frame[name]) or pd.api.types.is_bool_dtype(frame[name])
        width = max(map(len, [heading, *cells]))
        columns.append([text.ljust(width) if is_text else text.rjust(width) for text in (heading, *cells)])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write_rows(frame: pd.DataFrame, path: Path | str) -> Path:
    """Write ``{"rows": [...]}``, one object per row; undefined numbers become null.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    path = Path(path)
    rows = [{str(name): plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
    write_json(path, {"rows": rows})
    return path


def plain(value: Any) -> Any:
    """A numpy or pandas scalar as a JSON value; not-a-number and infinities become None."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _cell(value: Any, spec: str | None) -> str:
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if spec is None:
        spec = ".4g" if isinstance(value, float) else ""
    return format(value, spec)
