"""The printed tables of an evaluation: ours in the layout of the paper's Table 1, and the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dspark_sim.analysis.evaluation import MACRO
from dspark_sim.analysis.tables import aligned
from dspark_sim.reference import printed_gains, table1


def speed_medians(speed: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Medians over pairs of runs.

    Returns
    -------
    DataFrame
        A row per drafter and temperature: ``draft_cost, speedup, live_mean_acceptance_length`` (of the timed prompts),
        ``speedup_low, speedup_high`` (smallest and largest).
    """
    columns = ["draft_cost", "speedup", "live_mean_acceptance_length"]
    keys = ["drafter", "temperature"]
    if not speed:
        return pd.DataFrame(columns=[*keys, *columns, "speedup_low", "speedup_high"])
    groups = pd.DataFrame(list(speed)).groupby(keys, sort=False)
    ends = groups["speedup"].agg(["min", "max"]).rename(columns={"min": "speedup_low", "max": "speedup_high"})
    return groups[columns].median().join(ends).reset_index()


def printed_table(acceptance: pd.DataFrame, speed: pd.DataFrame) -> str:
    """The layout of the paper's Table 1: a line a drafter and temperature, a column a domain."""
    domains = list(dict.fromkeys(acceptance["domain"]))
    gains = {name: f"{low:+.0%} to {high:+.0%}" for name, (low, high) in printed_gains().items()}
    lines = []
    for (temperature, drafter), rows in acceptance.groupby(["temperature", "drafter"], sort=False):
        cells = rows.set_index("domain")
        macro = {str(name): cells[name][MACRO] for name in cells.columns}
        line: dict[str, Any] = {"T": temperature, "drafter": drafter}
        line |= {name: cells.loc[name, "mean_acceptance_length"] for name in domains}
        line["95 %"] = _interval(macro["low"], macro["high"], ".2f")
        line["DSpark gain"] = macro["dspark_gain"]
        line[" 95 %"] = _interval(macro["dspark_gain_low"], macro["dspark_gain_high"], "+.1%")
        line["paper's"] = gains.get(str(drafter), "-")
        line |= {name: macro[name] for name in ("accept_len", "verify_rate")}
        lines.append(line)
    frame = pd.DataFrame(lines)
    if len(speed):
        own = speed.set_index(["drafter", "temperature"]).reindex(list(zip(frame["drafter"], frame["T"], strict=True)))
        names = {"draft_cost": "draft cost", "speedup": "speed-up", "live_mean_acceptance_length": "timed len"}
        for name, heading in names.items():
            frame[heading] = own[name].to_numpy()
    lengths = dict.fromkeys([*domains, "accept_len", "speed-up", "timed len"], ".2f")
    formats = {**lengths, "T": "g", "DSpark gain": "+.1%", "verify_rate": ".3f", "draft cost": ".3f"}
    return aligned(frame, None, formats)


def paper_table() -> str:
    """The paper's Table 1, means only."""
    frame = table1()
    domains = ("math", "code", "chat", "macro")
    return aligned(frame, None, {**dict.fromkeys(domains, ".2f"), "dspark_gain": "+.1%"})


def _interval(low: Any, high: Any, spec: str) -> str:
    return f"{low:{spec}} to {high:{spec}}" if np.isfinite(low) and np.isfinite(high) else "-"
