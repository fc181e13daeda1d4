"""Figures: frames in, matplotlib figures out. Nothing is computed here but positions on paper.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; policies also differ by marker.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dspark_sim.errors import explain_os_errors

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def throughput_and_budget(frame: pd.DataFrame, note: str = "") -> Figure:
    """Output throughput and verification budget against concurrency, live and simulated.

    Parameters
    ----------
    frame
        Columns ``policy, concurrency, live_output_throughput, simulated_output_throughput, verification_budget,
        simulated_verification_budget``.
    note
        Caption: target, drafter, temperature, hardware.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
    panels = (
        ("live_output_throughput", "simulated_output_throughput", "output tokens per second"),
        ("verification_budget", "simulated_verification_budget", "tokens verified per request and round"),
    )
    for axis, (live, simulated, label) in zip(axes, panels, strict=True):
        for style, (policy, rows) in zip(_styles(), frame.groupby("policy", sort=False), strict=False):
            _pair(axis, rows, "concurrency", live, "concurrency", simulated, str(policy), style)
        axis.set_xscale("log", base=2)
        ticks = sorted(frame["concurrency"].unique())
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("concurrency (users)")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    return caption(figure, f"{note}\nFilled markers and lines: live. Open markers, dashed: simulated.".strip())


def frontier(frame: pd.DataFrame, note: str = "") -> Figure:
    """Per-user speed against throughput, one curve a policy, one point a concurrency.

    Parameters
    ----------
    frame
        Columns ``policy, concurrency`` and ``live_`` and ``simulated_`` of ``output_throughput`` and
        ``user_tokens_per_second``.
    note
        Caption.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    for style, (policy, rows) in zip(_styles(), frame.groupby("policy", sort=False), strict=False):
        _pair(
            axis,
            rows,
            "live_user_tokens_per_second",
            "live_output_throughput",
            "simulated_user_tokens_per_second",
            "simulated_output_throughput",
            str(policy),
            style,
        )
    axis.set_xlabel("per-user speed (tokens per second per user)")
    axis.set_ylabel("output tokens per second (all users)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    levels = ", ".join(str(level) for level in sorted(frame["concurrency"].unique()))
    text = f"{note}\nEach curve from right to left: concurrency {levels}. Filled: live. Open, dashed: simulated."
    return caption(figure, text.strip())


def lines_with_intervals(
    frame: pd.DataFrame, x: str, panels: Sequence[tuple[str, str]], group: str, labels: dict[str, str], note: str = ""
) -> Figure:
    """One panel a metric; lines over `x`, one a value of `group`, with interval bars.

    Parameters
    ----------
    frame
        Columns `x`, `group`, and for each metric ``metric, metric_low, metric_high``.
    x, group
        Columns.
    panels
        Pairs (metric, axis label with its unit).
    labels
        Axis label of `x` and legend title of `group`, by column.
    note
        Caption.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2), squeeze=False)
    for axis, (metric, label) in zip(axes[0], panels, strict=True):
        for style, (value, rows) in zip(_styles(), frame.groupby(group), strict=False):
            low, high = rows[metric] - rows[f"{metric}_low"], rows[f"{metric}_high"] - rows[metric]
            axis.errorbar(
                rows[x],
                rows[metric],
                yerr=[low.clip(lower=0), high.clip(lower=0)],
                capsize=2,
                label=f"{labels[group]} {value}",
                **style,
            )
        axis.set_xlabel(labels[x])
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted(frame[x].unique()))
        axis.grid(alpha=0.3)
    _legend(figure, axes[0][0])
    return caption(figure, note)


def caption(figure: Figure, text: str) -> Figure:
    """Put a small note under the panels."""
    sns.despine(figure)
    # About 17 characters an inch at this size; long device names must not run off the paper.
    width = int(17 * figure.get_figwidth())
    text = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, width))
    figure.tight_layout(rect=(0, 0.01 + 0.028 * len(text.splitlines()), 1, 0.93))
    figure.text(0.01, 0.01, text, fontsize=7.5, color="#444444", va="bottom")
    return figure


def save(figure: Figure, frame: pd.DataFrame, stem: Path | str) -> list[Path]:
    """Write a figure as PNG and PDF and its data as CSV; returns the paths.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    stem = Path(stem)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf", ".csv")]
    with explain_os_errors(stem, "write"):
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1])
        frame.to_csv(paths[2], index=False)
    plt.close(figure)
    return paths


def _styles() -> list[dict[str, Any]]:
    return [
        {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4}
        for color, marker in zip(PALETTE, MARKERS, strict=True)
    ]


def _pair(
    axis: Any, rows: pd.DataFrame, x: str, live: str, x_simulated: str, simulated: str, name: str, style: dict[str, Any]
) -> None:
    axis.plot(rows[x], rows[live], label=name, **style)
    open_style = {**style, "linestyle": "--", "linewidth": 1.0, "markersize": 9, "markerfacecolor": "none"}
    axis.plot(rows[x_simulated], rows[simulated], **open_style)


def _legend(figure: Figure, axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=min(len(names), 5), frameon=False, fontsize=9)
