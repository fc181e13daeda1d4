"""Printed tables, the same rows as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from dspark_sim.analysis.metrics import summary
from dspark_sim.analysis.tables import aligned, write_rows
from dspark_sim.trace import Trace


def print_table(frame: pd.DataFrame, json: Path | None = None, formats: Mapping[str, str] | None = None) -> None:
    """Print a frame and, if `json` is given, write its rows there; `formats` as for `aligned`."""
    print(aligned(frame, None, formats or {}))
    if json is not None:
        write_rows(frame, json)


def print_summary(trace: Trace, json: Path | None) -> None:
    """Print a run's metrics."""
    print_table(summary(trace).rename_axis("metric").reset_index(), json)
