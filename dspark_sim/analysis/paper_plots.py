"""How ours and the paper's values look in one panel, the same in every figure of the paper.

Ours: full lines, filled markers, error bars. The paper's: dashed, lighter, open markers, the same colour and shape.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; drafters also differ by marker.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dspark_sim.analysis.plots import caption

INK = "#333333"
STYLES: dict[str, tuple[str, str, str]] = {
    "dspark": ("#009E73", "o", "DSpark"),
    "dspark-markov": ("#009E73", "o", "DSpark (Markov head)"),
    "dspark-rnn": ("#CC79A7", "v", "DSpark (RNN head)"),
    "dspark-5": ("#009E73", "o", "DSpark-5"),
    "dflash": ("#0072B2", "s", "DFlash"),
    "eagle3": ("#D55E00", "^", "Eagle3"),
    "mtp1": ("#56B4E9", "D", "MTP-1"),
    "mtp-1": ("#56B4E9", "D", "MTP-1"),
    "ngram": ("#000000", "X", "n-gram"),
}
"""Colour, marker and printed name of a drafter, under our names and the paper's."""


def draw_ours(
    axis: Axes,
    drafter: str,
    x: npt.ArrayLike,
    y: pd.Series,
    low: pd.Series | None = None,
    high: pd.Series | None = None,
) -> None:
    """A line of ours with its intervals (left out where NaN)."""
    color, marker, name = STYLES[drafter]
    bars = None if low is None or high is None else [(y - low).clip(lower=0), (high - y).clip(lower=0)]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.6, "elinewidth": 0.9}
    axis.errorbar(x, y, yerr=bars, capsize=2, label=name, zorder=3, **style)


def draw_paper(axis: Axes, drafter: str, x: npt.ArrayLike, y: npt.ArrayLike) -> None:
    """A line of the paper's."""
    color, marker, _ = STYLES[drafter]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.1, "linestyle": "--"}
    axis.plot(x, y, markerfacecolor="white", alpha=0.6, zorder=2, **style)


def legend(figure: Figure, axis: Axes, paper: str = "the paper's") -> None:
    """One legend above the panels: the names drawn in `axis`, then what full and dashed lines are."""
    handles, names = axis.get_legend_handles_labels()
    handles += [
        Line2D([], [], color=INK, marker="o", markersize=5, linewidth=1.6),
        Line2D([], [], color=INK, marker="o", markersize=5, markerfacecolor="white", linestyle="--", alpha=0.6),
    ]
    figure.legend(handles, [*names, "ours", paper], loc="upper center", ncols=len(handles), frameon=False, fontsize=9)


def panels(num_panels: int, width: float = 3.4, height: float = 3.7, **options: Any) -> tuple[Figure, list[Axes]]:
    """A row of panels; options as of `matplotlib.pyplot.subplots`."""
    figure, axes = plt.subplots(1, num_panels, figsize=(width * num_panels, height), squeeze=False, **options)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


__all__ = ["INK", "STYLES", "caption", "draw_ours", "draw_paper", "legend", "panels"]
