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

from dspark_sim.analysis.decisions import reaction
from dspark_sim.analysis.explain import Explanation
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.trace import Trace

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
        Columns; lines are in the order of the frame.
    panels
        Pairs (metric, axis label with its unit).
    labels
        Axis label of `x` and legend title of `group`, by column.
    note
        Caption.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2), squeeze=False)
    for axis, (metric, label) in zip(axes[0], panels, strict=True):
        for style, (value, rows) in zip(_styles(), frame.groupby(group, sort=False), strict=False):
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


def policy_decision(explanation: Explanation, note: str = "", most_requests: int = 40) -> Figure:
    """One round's Θ curve with what was chosen and what is largest, and each request's drafts and their fate.

    Parameters
    ----------
    explanation
        Of `explain.explain`.
    note
        Caption.
    most_requests
        Show the first so many requests of the batch.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4))
    facts, curve = explanation.facts, explanation.curve
    if len(curve):
        admitted, throughput = curve["num_admitted"], curve["throughput"]
        left.plot(admitted, throughput, color=PALETTE[0], label="Θ by this round's survivals")
        if curve["seen_throughput"].notna().any():
            left.plot(admitted, curve["seen_throughput"], color=PALETTE[1], ls="--", label="Θ that set the number")
        chosen = facts["num_verified"]
        left.plot(chosen, throughput[chosen], "o", color=PALETTE[6], label=f"verified: {chosen}")
        best = int(throughput.argmax())
        left.plot(best, throughput[best], "*", color=PALETTE[2], markersize=11, label=f"largest: {best}")
    if "oracle" in explanation.requests:
        oracle = int(explanation.requests["oracle"].sum())
        left.axvline(oracle, color=PALETTE[3], ls=":", label=f"oracle: {oracle}")
    left.set_xlabel("drafts verified in the round (tokens)")
    left.set_ylabel("expected throughput Θ (tokens per second)")
    left.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=8)
    requests = explanation.requests.head(most_requests)
    accepted, verified = requests["num_accepted"], requests["verify_len"]
    names = requests["request_id"].astype(str)
    bars = (
        ("accepted", 0, accepted, PALETTE[2]),
        ("verified, not kept", accepted, verified - accepted, PALETTE[1]),
        ("not verified", verified, requests["draft_len"] - verified, "#DDDDDD"),
    )
    for label, bottom, height, color in bars:
        right.bar(names, height, bottom=bottom, color=color, label=label)
    right.set_xlabel("request" + ("" if len(requests) == len(explanation.requests) else f" (first {most_requests})"))
    right.set_ylabel("drafted tokens")
    right.tick_params(axis="x", labelrotation=90 if len(requests) > 12 else 0, labelsize=8)
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)
    load = f"{facts['num_running']} running, {facts['num_waiting']} waiting"
    figure.suptitle(f"step {facts['step']}, policy {facts['policy']}: {load}", fontsize=10)
    return caption(figure, f"{note}\n{explanation.check.message}".strip())


def policy_reaction(trace: Trace, note: str = "", start: float | None = None, end: float | None = None) -> Figure:
    """How a policy follows the load: requests, verified drafts per request, and throughput over time.

    Parameters
    ----------
    trace
        A live or simulated run; its rounds are those of `decisions.reaction`.
    note
        Caption.
    start, end
        Seconds of the run to show; ``None`` shows from its start or to its end.

    Raises
    ------
    UserError
        If there is no decode round between `start` and `end`.
    """
    frame = reaction(trace)
    low, high = frame["start"].min() if start is None else start, frame["start"].max() if end is None else end
    frame = frame[(frame["start"] >= low) & (frame["start"] <= high)]
    if frame.empty:
        raise UserError(f"no decode round begins between {low:.6g} and {high:.6g} seconds; show another part")
    figure, axes = plt.subplots(3, 1, figsize=(8.5, 7.0), sharex=True)
    time = frame["start"]
    panels = (
        ("requests", (("num_running", "running"), ("num_waiting", "waiting"))),
        ("tokens per request", (("mean_verify_len", "verified drafts, mean"), ("draft_len", "drafts asked for"))),
        (
            "tokens per second",
            (("smoothed_throughput", "realised, 15 rounds"), ("predicted_throughput", "predicted (Θ)")),
        ),
    )
    axes[2].plot(time, frame["realised_throughput"], ".", color="#BBBBBB", markersize=3, label="realised, each round")
    for axis, (label, columns) in zip(axes, panels, strict=True):
        for color, (column, name) in zip(PALETTE, columns, strict=False):
            if frame[column].notna().any():
                axis.step(time, frame[column], where="post", color=color, linewidth=1.1, label=name)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[2].set_xlabel("time since the start of the run (seconds)")
    axes[0].set_title(f"policy {trace.config.get('policy', 'unknown')}", fontsize=10)
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
    figure.legend(handles, names, loc="upper center", ncols=min(len(names), 8), frameon=False, fontsize=9)
