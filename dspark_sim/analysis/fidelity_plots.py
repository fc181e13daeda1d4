"""Figures of the fidelity study: frames in, PNG files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.figure import Figure

from dspark_sim.analysis import fidelity_scores as scores
from dspark_sim.analysis.plots import MARKERS, PALETTE, caption
from dspark_sim.files import whole_file

SCATTER = {
    "output_throughput": "output tokens per second",
    "tpot_mean": "tpot, mean (s)",
    "e2e_latency_mean": "end-to-end latency, mean (s)",
    "ttft_mean": "ttft, mean (s)",
}
BOXES = ("output_throughput", "tpot_mean", "icl_mean", "e2e_latency_mean", "ttft_mean", "tpot_p99", "ttft_p99")
# An error beyond is drawn at the edge.
_WIDEST = 0.4


def write_figures(out: Path, errors: pd.DataFrame, note: str = "") -> list[Path]:
    """Write the three figures; returns their paths.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    figures = {
        "live_against_simulated": live_against_simulated(errors, note),
        "errors": error_boxes(errors, note),
        "throughput": throughput(errors, note),
    }
    paths = []
    for name, figure in figures.items():
        path = out / f"{name}.png"
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
        plt.close(figure)
        paths.append(path)
    return paths


def _shown_split(errors: pd.DataFrame) -> str:
    return "held-out policy" if (errors["split"] == "held-out policy").any() else str(errors["split"].iloc[0])


def live_against_simulated(errors: pd.DataFrame, note: str = "") -> Figure:
    """A point a cell, live across and simulated up, with the line where they are equal.

    Parameters
    ----------
    errors
        `fidelity_scores.error_table`.
    note
        Caption.
    """
    split = _shown_split(errors)
    frame = errors[errors["split"] == split]
    styles = dict(zip(dict.fromkeys(frame["policy"]), zip(PALETTE, MARKERS, strict=True), strict=False))
    figure, axes = plt.subplots(1, len(SCATTER), figsize=(13.5, 4.3))
    for axis, (metric, label) in zip(axes, SCATTER.items(), strict=True):
        rows = frame[frame["metric"] == metric]
        ends = np.array([rows[["live", "simulated"]].min().min(), rows[["live", "simulated"]].max().max()])
        axis.plot(ends * (0.85, 1.18), ends * (0.85, 1.18), color="#888888", linewidth=0.9, zorder=0)
        for policy, (color, marker) in styles.items():
            for arrivals, face in (("closed", color), ("poisson", "none")):
                points = rows[(rows["policy"] == policy) & (rows["arrivals"] == arrivals)]
                axis.errorbar(
                    points["live"],
                    points["simulated"],
                    xerr=_half_width(points),
                    linestyle="none",
                    marker=marker,
                    markersize=5.5,
                    markerfacecolor=face,
                    color=color,
                    elinewidth=0.9,
                    label=policy if arrivals == "closed" else None,
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_ticks(axis, ends)
        axis.set_title(label, fontsize=9.5)
        axis.set_xlabel("live")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("simulated")
    _legend(figure, axes[0])
    return caption(
        figure,
        f"{note}\nSplit: {split}. A point a cell. Filled: closed loop. Open: Poisson arrivals. Bars: from one live run "
        "to the other. Line: equal.".strip(),
    )


def error_boxes(errors: pd.DataFrame, note: str = "") -> Figure:
    """Errors over cells by metric and split, in front of the band of the target.

    Parameters
    ----------
    errors
        `fidelity_scores.error_table`.
    note
        Caption.
    """
    kinds = [kind for kind in ("closed", "poisson") if kind in set(errors["arrivals"])]
    splits = [split for split in scores.SPLITS if split in set(errors["split"])]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(11.5, 3.6 * len(kinds) + 0.6), sharex=True, squeeze=False)
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        shown = errors[(errors["arrivals"] == kind) & errors["metric"].isin(BOXES)]
        shown = shown.assign(error=100.0 * shown["error"].clip(-_WIDEST, _WIDEST))
        for place, metric in enumerate(BOXES):
            for split, shade in (("held-out policy", "#E4E4E4"), (scores.SAME_POLICY, "#C4C4C4")):
                height = 100.0 * scores.target(split, metric)
                axis.fill_between([place - 0.46, place + 0.46], -height, height, color=shade, linewidth=0, zorder=0)
        common: dict[str, Any] = {
            **{"data": shown, "x": "metric", "y": "error", "hue": "split", "order": BOXES, "hue_order": splits},
            **{"palette": list(PALETTE[: len(splits)]), "ax": axis, "dodge": True},
        }
        sns.boxplot(**common, fliersize=0, fill=False, linewidth=1.0, legend=axis is axes[0, 0], width=0.84)
        sns.stripplot(**common, size=2.2, alpha=0.55, legend=False, jitter=0.12)
        axis.axhline(0.0, color="#666666", linewidth=0.8)
        axis.set_ylabel("simulated / live - 1 (%)")
        axis.set_xlabel("")
        axis.set_title("closed loop" if kind == "closed" else "Poisson arrivals", fontsize=10, loc="left")
        axis.grid(axis="y", alpha=0.3)
        limit = min(100.0 * _WIDEST, max(12.0, 1.1 * float(shown["error"].abs().max())))
        axis.set_ylim(-limit, limit)
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].get_legend().remove()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, fontsize=9)
    return caption(
        figure,
        f"{note}\nA point a cell; boxes: quartiles. Bands: targets, dark for the same policy, light held out; on a CPU "
        f"the noise floor comes on top. Errors beyond ±{_WIDEST:.0%} are drawn there.".strip(),
    )


def throughput(errors: pd.DataFrame, note: str = "") -> Figure:
    """Output throughput of a closed loop against concurrency, one curve a policy, live and simulated side by side.

    Parameters
    ----------
    errors
        `fidelity_scores.error_table`.
    note
        Caption.
    """
    split = _shown_split(errors)
    chosen = (errors["split"] == split) & (errors["arrivals"] == "closed") & (errors["metric"] == "output_throughput")
    frame = errors[chosen]
    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.6), sharey=True)
    ticks = sorted(frame["concurrency"].unique())
    for axis, side in zip(axes, ("live", "simulated"), strict=True):
        for (policy, rows), color, marker in zip(frame.groupby("policy", sort=False), PALETTE, MARKERS, strict=False):
            noise = _half_width(rows) if side == "live" else None
            axis.errorbar(
                rows["concurrency"],
                rows[side],
                yerr=noise,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                elinewidth=0.9,
                label=str(policy),
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("concurrency (users)")
        axis.set_title(side, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("output tokens per second")
    axes[0].set_ylim(bottom=0)
    _legend(figure, axes[0])
    return caption(
        figure,
        f"{note}\nClosed loop. Bars: from one live run to the other. Simulated: costs fitted on the runs of the other "
        "policies.".strip(),
    )


def _half_width(rows: pd.DataFrame) -> pd.Series:
    """Half of the distance between two live runs of which `live` is the mean."""
    return rows["live"] * rows["repeat_error"].abs() / (2.0 + rows["repeat_error"])


def _plain_ticks(axis: Any, ends: Any) -> None:
    """Few round numbers on logarithmic axes."""
    low, high = np.log10(ends)
    steps = (1.0, 2.0, 5.0) if high - low < 1.6 else (1.0, 3.0)
    marks = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    marks = [mark for mark in marks if 0.8 * ends[0] <= mark <= 1.25 * ends[1]] or [float(ends[0])]
    for ticked in (axis.xaxis, axis.yaxis):
        ticked.set_major_locator(ticker.FixedLocator(marks))
        ticked.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ticked.set_minor_locator(ticker.NullLocator())


def _legend(figure: Figure, axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=min(len(names), 8), frameon=False, fontsize=9)
