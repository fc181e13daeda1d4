"""Reliability diagram: how often blocks survived against how often they were said to."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dspark_sim.analysis.plots import MARKERS, PALETTE, caption


def reliability_diagram(bins: pd.DataFrame, errors: Mapping[str, float], note: str = "") -> Figure:
    """One panel a slot, one line a method; the points' area shows how many blocks are in a bin.

    Parameters
    ----------
    bins
        Columns ``method, position`` and those of `calibration_metrics.reliability`.
    errors
        Mean ECE over slots of each method, as a fraction, for the legend.
    note
        Caption.
    """
    positions = list(dict.fromkeys(bins["position"]))
    columns = min(4, len(positions))
    lines = -(-len(positions) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns + 0.4, 2.9 * lines + 1.0), sharex=True, sharey=True, squeeze=False
    )
    colors = dict(zip(errors, PALETTE, strict=False))
    for axis, position in zip(axes.flat, positions, strict=False):
        panel = bins[bins["position"] == position]
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle="--")
        for method, marker in zip(errors, MARKERS, strict=False):
            rows = panel[panel["method"] == method]
            area = 4 + 60 * rows["num_blocks"] / panel["num_blocks"].max()
            label = f"{method}, mean ECE {errors[method]:.1%}"
            axis.plot(rows["forecast"], rows["frequency"], color=colors[method], linewidth=1.1)
            axis.scatter(
                rows["forecast"], rows["frequency"], s=area, color=colors[method], marker=marker, alpha=0.7, label=label
            )
        num_blocks = panel.groupby("method")["num_blocks"].sum().max()
        axis.set_title(
            f"drafts 1 to {position} accepted, n = {num_blocks}"
            if position > 1
            else f"draft 1 accepted, n = {num_blocks}",
            fontsize=9,
        )
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axis.grid(alpha=0.3)
    for empty in range(len(positions), lines * columns):
        axes.flat[empty - columns].tick_params(labelbottom=True)
        axes.flat[empty].remove()
    figure.supxlabel("predicted survival (probability, mean of a bin)", fontsize=10, y=0.06)
    figure.supylabel("observed survival (fraction of blocks)", fontsize=10)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, fontsize=9)
    sns.despine(figure)
    return caption(figure, note)
