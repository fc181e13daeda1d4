"""Figures of an evaluation: frames in, matplotlib figures out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from dspark_sim.analysis.plots import MARKERS, PALETTE, caption


def conditional_acceptance(frame: pd.DataFrame, note: str = "") -> Figure:
    """Acceptance by position in the block, given that all before it were accepted; one panel a temperature.

    Parameters
    ----------
    frame
        Columns ``drafter, temperature, position, conditional_acceptance, conditional_acceptance_low,
        conditional_acceptance_high``; positions without a value are left out.
    note
        Caption: target, prompts, what the bars are.
    """
    temperatures = sorted(frame["temperature"].unique())
    figure, axes = plt.subplots(
        1, len(temperatures), figsize=(max(6.0, 4.6 * len(temperatures)), 4.4), sharey=True, squeeze=False
    )
    drafters = list(frame["drafter"].unique())
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        for number, drafter in enumerate(drafters):
            chosen = (frame["drafter"] == drafter) & (frame["temperature"] == temperature)
            rows = frame[chosen].dropna(subset=["conditional_acceptance"])
            value = rows["conditional_acceptance"]
            low, high = (rows[f"conditional_acceptance_{end}"] for end in ("low", "high"))
            axis.errorbar(
                # Side by side, so that no bar hides another.
                rows["position"] + 0.06 * (number - (len(drafters) - 1) / 2),
                value,
                yerr=[(value - low).clip(lower=0), (high - value).clip(lower=0)],
                color=PALETTE[number % len(PALETTE)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                linewidth=1.4,
                elinewidth=0.9,
                capsize=2,
                label=str(drafter),
            )
        axis.set_title(f"temperature {temperature:g}", fontsize=10)
        axis.set_xlabel("position in the block (1 is the first draft)")
        axis.set_xticks(range(1, int(frame["position"].max()) + 1))
        axis.set_ylim(0.0, 1.0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("P(accepted | all before it accepted)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=min(len(names), 6), frameon=False, fontsize=9)
    return caption(figure, note)
