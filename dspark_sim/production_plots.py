"""Figures of the production prediction: predicted full with markers, published dashed, the paper's telemetry shaded.

Frames come from `production` and `production_scores`; nothing is computed here.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dspark_sim.analysis.paper_plots import INK, caption
from dspark_sim.production_scores import gains, lines
from dspark_sim.reference import curve

TARGETS = {"deepseek-v4-flash": "DeepSeek-V4-Flash", "deepseek-v4-pro": "DeepSeek-V4-Pro"}
STYLES = {
    "mtp-1": ("#56B4E9", "D", "MTP-1"),
    "fixed-5": ("#D55E00", "s", "static γ = 5"),
    "prefix": ("#CC79A7", "^", "Algorithm 1"),
    "lagged-2": ("#009E73", "o", "DSpark-5 (lag 2)"),
}
"""Colour, marker and printed name of what is served."""
PREDICTED = "lagged-2"


def draw_load(table: pd.DataFrame, note: str) -> Figure:
    """Figure 8's panels: throughput above budget, Flash left and Pro right.

    Parameters
    ----------
    table
        Of `production_scores.over_seeds`, all four policies.
    note
        Caption.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.2), sharex="col")
    rows = (
        ("throughput_tok_s_gpu", "fig8_throughput", "throughput (tokens/s/GPU)"),
        (
            "verification_budget_tokens",
            "fig8_verification_budget",
            "verification budget (tokens)",
        ),
    )
    for panel, (name, file, label) in zip(axes, rows, strict=True):
        for axis, (target, title) in zip(panel, TARGETS.items(), strict=True):
            _cloud(axis, f"{file}_scatter_envelope", target, "concurrency_requests", name)
            for drafter, served in (("mtp-1", "mtp-1"), ("dspark-5", PREDICTED)):
                line = curve(file, target_model=target, drafter=drafter)
                line = line[line["within_plotted_axis"] == 1]
                _published(axis, line["concurrency_requests"], line[name], served)
            for served in STYLES:
                _ours(axis, lines(table, target, served), "concurrency_requests", name, served)
            axis.set(xlim=(0, 212), title=title if name.startswith("thr") else "", ylabel=label)
            axis.set_ylim((0, None) if name.startswith("thr") else (1.0, 6.3))
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("concurrency (requests per GPU)")
    return caption(key(figure, axes[0][0]), note)


def draw_frontier(table: pd.DataFrame, note: str) -> Figure:
    """Figure 7's panels, throughput against speed per user, with the gains; arguments as for `draw_load`."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.0))
    limits = {"deepseek-v4-flash": ((41, 245), 20500), "deepseek-v4-pro": ((19, 150), 7900)}
    for axis, (target, title) in zip(axes, TARGETS.items(), strict=True):
        _cloud(axis, "fig7_scatter_envelope", target, "tps_tok_s_user", "throughput_tok_s_gpu")
        for drafter, served in (("mtp-1", "mtp-1"), ("dspark-5", PREDICTED)):
            line = curve("fig7_frontier", target_model=target, drafter=drafter)
            _published(axis, line["tps_tok_s_user"], line["throughput_tok_s_gpu"], served)
        for served in STYLES:
            _ours(axis, lines(table, target, served), "tps_tok_s_user", "throughput_tok_s_gpu", served)
        found = gains(lines(table, target), target)
        said = [
            f"{row['sla_anchor_tps_tok_s_user']:.0f} tok/s/user, same "
            f"{'speed' if row['gain_kind'] == 'throughput_at_matched_tps' else 'throughput'}: "
            f"{row['predicted_pct']:+,.0f} % (paper {row['published_pct']:+.0f} %)"
            for row in found.to_dict("records")
        ]
        axis.text(0.98, 0.97, "\n".join(said), transform=axis.transAxes, ha="right", va="top", fontsize=7.5, color=INK)
        axis.set(xlim=limits[target][0], ylim=(0, limits[target][1]), title=title)
        axis.set(xlabel="speed per user (tokens/s/user)", ylabel="throughput (tokens/s/GPU)")
        axis.grid(alpha=0.3)
    return caption(key(figure, axes[0]), f"{note} Gains: DSpark over MTP-1 at the paper's MTP-1 points.")


def draw_tornado(swept: pd.DataFrame, note: str) -> Figure:
    """How the mean errors of throughput and budget move with each prior, Flash above Pro.

    Parameters
    ----------
    swept
        Of `production.sensitivity`, both targets.
    note
        Caption.
    """
    figure, axes = plt.subplots(2, 2, figsize=(12.0, 8.6), sharey=True)
    columns = (
        ("throughput_mean_error", 100.0, "throughput: mean error (%)"),
        ("budget_mean_error", 1.0, "budget: mean error (tokens)"),
    )
    ends = swept[swept["prior"] != "central"].groupby("prior")["throughput_mean_error"]
    order = (ends.max() - ends.min()).sort_values().index.tolist()
    for panel, (target, title) in zip(axes, TARGETS.items(), strict=True):
        of_target = swept[swept["target_model"] == target]
        for axis, (name, factor, label) in zip(panel, columns, strict=True):
            widest = factor * (of_target[name].max() - of_target[name].min())
            central = factor * of_target.loc[of_target["prior"] == "central", name].iloc[0]
            for place, prior in enumerate(order):
                for row in of_target[of_target["prior"] == prior].to_dict("records"):
                    _bar(axis, place, central, factor * row[name], row["end"], row["value"], 0.01 * widest)
            axis.axvline(central, color=INK, linewidth=1.0)
            axis.axvline(0.0, color=INK, linewidth=1.0, linestyle="--")
            axis.set_yticks(range(len(order)), order, fontsize=8)
            axis.margins(x=0.22)
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(label)
    return caption(figure, f"{note} Full line: central priors. Dashed: no error. Blue, orange: either end.")


def _bar(axis: Axes, place: int, central: float, value: float, end: str, label: str, least: float) -> None:
    axis.barh(place, value - central, left=central, color="#0072B2" if end == "low" else "#E69F00", height=0.62)
    if abs(value - central) > least:
        side = 1 if value > central else -1
        style: dict[str, Any] = {"ha": "left" if side > 0 else "right", "va": "center", "fontsize": 7, "color": INK}
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axis.annotate(label, (value, place), xytext=(3 * side, 0), textcoords="offset points", bbox=paper, **style)


def _ours(axis: Axes, frame: pd.DataFrame, x: str, y: str, served: str) -> None:
    color, marker, name = STYLES[served]
    bars = [
        (frame[y] - frame[f"{y}_low"]).clip(lower=0).fillna(0),
        (frame[f"{y}_high"] - frame[y]).clip(lower=0).fillna(0),
    ]
    style: dict[str, Any] = {
        "color": color,
        "marker": marker,
        "markersize": 4.5,
        "linewidth": 1.4,
        "elinewidth": 0.9,
        "capsize": 2,
    }
    axis.errorbar(frame[x], frame[y], yerr=bars, label=name, zorder=3 + (served == PREDICTED), **style)


def _published(axis: Axes, x: pd.Series, y: pd.Series, served: str) -> None:
    axis.plot(x, y, color=STYLES[served][0], linestyle="--", linewidth=1.8, alpha=0.75, zorder=2)


def _cloud(axis: Axes, file: str, target: str, x: str, y: str) -> None:
    bins = curve(file, target_model=target, drafter="dspark-5")
    middle = (bins[f"{x}_bin_low"] + bins[f"{x}_bin_high"]) / 2
    axis.fill_between(middle, bins[f"{y}_p05"], bins[f"{y}_p95"], color=STYLES[PREDICTED][0], alpha=0.13, linewidth=0)


def key(figure: Figure, axis: Axes, ours: str = "predicted", paper: str = "published") -> Figure:
    """One legend above the panels: the names drawn in `axis`, then what full and dashed lines are."""
    handles, names = axis.get_legend_handles_labels()
    kinds = [
        Line2D([], [], color=INK, marker="o", markersize=4.5),
        Line2D([], [], color=INK, linestyle="--", linewidth=1.8),
    ]
    figure.legend([*handles, *kinds], [*names, ours, paper], loc="upper center", ncols=6, frameon=False, fontsize=9)
    return figure
