"""The fidelity study as a page and three figures: how far, where not, and why as far as the data shows.

Everything is made from the frames of `fidelity_scores`; nothing is computed here but counts and medians.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dspark_sim.analysis import fidelity_scores as scores
from dspark_sim.analysis.tables import plain
from dspark_sim.files import whole_file, write_json

_NAMES = {"closed": "closed loop", "poisson": "open loop"}
_MOST_MISSES = 12


@dataclass(frozen=True)
class About:
    """What was studied, and where.

    Parameters
    ----------
    hardware, drafter, provenance
        Of the live runs.
    scale
        Requests and tokens.
    rates
        Rate and seed of the Poisson arrivals, by concurrency.
    shared_clock
        Whether the noise floor is granted.
    load_average
        Least and largest, at the ends of the live runs.
    """

    hardware: Mapping[str, Any]
    drafter: Mapping[str, Any]
    provenance: Mapping[str, Any]
    scale: Mapping[str, Any]
    rates: Mapping[str, Mapping[str, Any]]
    shared_clock: bool
    load_average: tuple[float, float] | None

    def note(self) -> str:
        """One line for captions."""
        return (
            f"Target {self.hardware['model']} ({self.hardware['dtype']}), drafter {self.drafter['name']} "
            f"(γ = {self.drafter['block_size']}), T = 0, {self.hardware['device']}, "
            f"{self.hardware['num_threads']} threads."
        )


def write_report(
    out: Path,
    about: About,
    errors: pd.DataFrame,
    identity: pd.DataFrame,
    ranking: pd.DataFrame,
    live: pd.DataFrame,
) -> str:
    """Write ``report.md``, ``cells.parquet``, ``summary.json`` and the figures to a folder.

    Parameters
    ----------
    out
        The folder.
    about
        What was studied.
    errors, identity, ranking, live
        See `fidelity_study.Results`.

    Returns
    -------
    str
        The page.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    from dspark_sim.analysis import fidelity_plots

    summary, missed = scores.split_summary(errors), scores.misses(errors)
    text = markdown(about, errors, identity, ranking, live)
    with whole_file(out / "report.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with whole_file(out / "cells.parquet") as partial:
        pq.write_table(pa.Table.from_pandas(errors, preserve_index=False), partial, compression="zstd")
    write_json(
        out / "summary.json",
        {
            "hardware": dict(about.hardware),
            "drafter": dict(about.drafter),
            "provenance": dict(about.provenance),
            "scale": dict(about.scale),
            "rates": {users: dict(found) for users, found in about.rates.items()},
            "summary": _rows(summary),
            "ranking": _rows(ranking),
            "identity": _rows(identity),
            "misses": _rows(missed[["split", *scores.CELL, "metric", "error", "limit", "cause"]]),
        },
    )
    fidelity_plots.write_figures(out, errors, about.note())
    return text


def markdown(
    about: About, errors: pd.DataFrame, identity: pd.DataFrame, ranking: pd.DataFrame, live: pd.DataFrame
) -> str:
    """The page."""
    summary, missed = scores.split_summary(errors), scores.misses(errors)
    parts = ["# Fidelity: live against simulated", _headline(errors, identity, ranking), _setup(about, live)]
    parts += ["## Rounds at temperature 0", _exactness(identity, errors)]
    parts += ["## Choosing a policy", _ranking(ranking)]
    parts.append(
        "## Errors\n\nsimulated / live - 1. Medians and 99th percentiles of its size over cells; *floor* is the "
        "median noise floor, *within* the cells inside target"
        + (" + floor" if about.shared_clock else "")
        + ". Same policy: costs fitted on all first repeats, judged on the second ones. Held-out: costs fitted on the "
        "runs of the other policies and the profile passes, or on the runs and passes at the other concurrencies; "
        "profile: on profile passes alone. These are judged on the mean of both repeats."
    )
    for split in dict.fromkeys(summary["split"]):
        parts += [f"### {str(split).capitalize()}", _summary_table(summary[summary["split"] == split])]
    parts += ["## Misses", _misses(missed, errors)]
    parts += [
        "## Figures",
        "\n\n".join(
            f"![{what}]({name}.png)"
            for name, what in (
                ("live_against_simulated", "Live against simulated"),
                ("errors", "Errors by split and metric"),
                ("throughput", "Throughput against concurrency, live and simulated"),
            )
        ),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float, signed: bool = False) -> str:
    """A fraction in per cent; - where there is none."""
    if not pd.notna(value):
        return "-"
    return f"{value:+.1%}" if signed else f"{value:.1%}"


def _headline(errors: pd.DataFrame, identity: pd.DataFrame, ranking: pd.DataFrame) -> str:
    equal = identity["rounds_equal"] & identity["batches_equal"]
    lines = [f"- Rounds, replayed with a run's own seconds: equal in {equal.sum()} of {len(identity)} live runs."]
    for split, rows in errors[~errors["metric"].isin(scores.EXACT_METRICS)].groupby("split", sort=False):
        speed = rows[rows["metric"] == "output_throughput"]["error"].abs()
        tpot = rows[rows["metric"] == "tpot_mean"]["error"].abs()
        lines.append(
            f"- {str(split).capitalize()}: {rows['within'].sum()} of {rows['within'].count()} times and throughputs "
            f"within target; median error of throughput {percent(speed.median())}, of mean tpot "
            f"{percent(tpot.median())}."
        )
    held = ranking[ranking["split"] == "held-out policy"]
    if len(held):
        lines.append(
            f"- Choosing an unseen policy by the simulator loses at most {percent(held['regret'].max())} live, median "
            f"{percent(held['regret'].median())}, over {len(held)} loads."
        )
    return "\n".join(lines)


def _setup(about: About, live: pd.DataFrame) -> str:
    packages = about.provenance.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("dspark-sim", "torch", "numpy") if packages.get(name))
    load = about.load_average
    lines = [
        about.note(),
        f"{versions}; Python {about.provenance.get('python')}, {about.provenance.get('num_cpus')} processors"
        + (f"; load average {load[0]:.1f} to {load[1]:.1f} over the live runs." if load else "."),
        f"{len(live)} live runs of {live['num_requests'].min()} to {live['num_requests'].max()} requests, at most "
        f"{about.scale['max_tokens']} output tokens each, {live['makespan_seconds'].sum() / 60:.0f} minutes in all. "
        f"Host time between iterations: {percent(live['host_gap'].median())} of the time (median over runs). "
        "Percentiles of so few requests are near their largest value.",
    ]
    plain_runs = live[(live["policy"] == "none") & (live["arrivals"] == "poisson")]
    running = plain_runs.groupby("concurrency")["mean_running"].mean()
    rates = [
        [users, f"{found['rate']:g}", f"{running[int(users)]:.1f}" if int(users) in running else "-"]
        for users, found in about.rates.items()
    ]
    share = about.scale["utilisation"]
    lines.append(
        f"Open loop of concurrency N: Poisson arrivals at {share:.0%} of what N users of plain decoding are served, by "
        "simulation with the preliminary profile; the same arrivals for all policies and both repeats."
    )
    table = markdown_table(["N", "requests per second", "running under plain decoding, live"], rates)
    return "\n".join(lines) + "\n\n" + table


def _exactness(identity: pd.DataFrame, errors: pd.DataFrame) -> str:
    lines = [
        "Every live run was replayed with its own iterations' seconds. Equal means: every request went through the "
        "same rounds (position, drafted, verified, accepted, emitted), in the same iterations."
    ]
    rows = []
    for arrivals, runs in identity.groupby("arrivals", sort=False):
        equal = runs["rounds_equal"] & runs["batches_equal"]
        rows.append([_NAMES[str(arrivals)], f"{equal.sum()} of {len(runs)}", str(runs["num_rounds"].sum())])
    lines.append(markdown_table(["arrivals", "runs equal", "rounds"], rows))
    unequal = identity[~(identity["rounds_equal"] & identity["batches_equal"])]
    for row in unequal.to_dict("records"):
        lines.append(f"- {_cell(row)}, run {row['repeat']}: {row['message']}")
    cells = errors.drop_duplicates(["split", *scores.CELL])
    free = cells[cells["clock_free"]]
    clocked = cells[~cells["clock_free"]]
    lines.append(
        f"With fitted seconds the rounds are equal in {free['rounds_equal'].sum()} of {len(free)} simulations of cells "
        "whose rounds cannot depend on the clock (closed loops, and policies blind to the load)."
    )
    if len(clocked):
        shown = errors[~errors["clock_free"] & errors["metric"].isin(scores.EXACT_METRICS)]
        size = shown.assign(size=shown["error"].abs()).groupby("metric", sort=False)["size"]
        figures = "; ".join(
            f"{name}: median {percent(median)}, largest {percent(largest)}"
            for name, median, largest in zip(size.groups, size.median(), size.max(), strict=True)
        )
        lines.append(
            "Load-aware policies in an open loop choose by who is in the batch, which depends on the clock: with "
            f"fitted seconds {clocked['rounds_equal'].sum()} of {len(clocked)} have equal rounds. Their errors there: "
            f"{figures}."
        )
    return "\n\n".join(lines)


def _summary_table(summary: pd.DataFrame) -> str:
    """A row a metric; the kinds of arrivals beside each other."""
    kinds = [kind for kind in _NAMES if kind in set(summary["arrivals"])]
    header = ["metric", "target"]
    for kind in kinds:
        header += [f"{_NAMES[kind]}: median", "P99", "floor", "within"]
    rows = []
    for metric, found in summary.groupby("metric", sort=False):
        by_kind = {str(one["arrivals"]): one for one in found.to_dict("records")}
        exact = metric in scores.EXACT_METRICS
        row = [str(metric), "exact" if exact else percent(found["target"].max())]
        for kind in kinds:
            one = by_kind[kind]
            row += [percent(one[name]) for name in ("median_error", "p99_error", "median_floor")]
            row.append(f"{one['num_within']} of {one['num_judged']}" if one["num_judged"] else "-")
        rows.append(row)
    return markdown_table(header, rows)


def _ranking(ranking: pd.DataFrame) -> str:
    if ranking.empty:
        return "Fewer than two policies ran."
    lines = [
        "Policies ranked by output throughput (closed loop) or mean end-to-end latency (open loop), simulated against "
        "live. τ is Kendall's over all pairs of policies; τ clear counts only pairs that differ live by more than the "
        "noise floor. Regret: what the simulator's choice loses live against the best.",
    ]
    rows = []
    for (split, arrivals), cells in ranking.groupby(["split", "arrivals"], sort=False):
        clear = cells["tau_clear"].dropna()
        rows.append(
            [
                f"{split}, {_NAMES[str(arrivals)]}",
                f"{cells['tau'].median():.2f}",
                f"{cells['tau_within'].sum()} of {cells['tau_within'].count()}",
                f"{clear.median():.2f}" if len(clear) else "-",
                f"{cells['tau_clear_within'].sum()} of {len(clear)}",
                f"{cells['num_clear_pairs'].sum()} of {cells['num_pairs'].sum()}",
                percent(cells["regret"].max()),
                f"{cells['regret_within'].sum()} of {len(cells)}",
            ]
        )
    header = ["split", "τ, median", "≥ 0.9", "τ clear, median", "≥ 0.9", "pairs clear", "largest regret", "≤ 2 %"]
    lines.append(markdown_table(header, rows))
    worst = ranking[~ranking["regret_within"]].sort_values("regret", ascending=False)
    for row in worst.head(_MOST_MISSES).to_dict("records"):
        noisy = ", inside the noise floor" if row["regret"] <= row["floor"] else ""
        lines.append(
            f"- {row['split']}, {_NAMES[row['arrivals']]}, concurrency {row['concurrency']}: chooses {row['choice']}, "
            f"best live {row['best']}, regret {percent(row['regret'])} (floor {percent(row['floor'])}{noisy})"
        )
    return "\n\n".join(lines[:2]) + ("\n\n" + "\n".join(lines[2:]) if lines[2:] else "")


def _misses(missed: pd.DataFrame, errors: pd.DataFrame) -> str:
    num_judged = int(errors["within"].count())
    if missed.empty:
        return f"None: all {num_judged} figures with a target are within it."
    lines = [f"{len(missed)} of {num_judged} figures with a target are outside it. By split and cause:"]
    counts = (missed["split"] + ": " + missed["cause"]).value_counts()
    rows = [[str(cause), str(count)] for cause, count in counts.items()]
    lines.append(markdown_table(["cause", "misses"], rows))
    first = errors[errors["split"] == scores.SAME_POLICY].drop_duplicates(list(scores.CELL))
    drift = first.groupby("concurrency")["price_drift"].median()
    by_level = ", ".join(f"{percent(value, signed=True)} at {users}" for users, value in drift.items())
    lines.append(
        "How much longer the second repeat's iterations took than the first's, as the same-policy fit prices them, "
        f"median over cells: {by_level}."
    )
    worst = missed.assign(excess=missed["error"].abs() - missed["limit"]).sort_values("excess", ascending=False)
    lines.append(f"The {min(len(worst), _MOST_MISSES)} furthest out:")
    rows = [
        [
            f"{row['split']}: {_cell(row)}, {row['metric']}",
            percent(row["error"], signed=True),
            percent(row["limit"]),
            percent(row["repeat_error"], signed=True),
            percent(row["price_error"], signed=True),
            row["cause"],
        ]
        for row in worst.head(_MOST_MISSES).to_dict("records")
    ]
    header = ["figure", "error", "limit", "between repeats", "price of its iterations", "cause"]
    lines.append(markdown_table(header, rows))
    lines.append(
        "*Price of its iterations* is what the fitted costs say of the very iterations that ran live, over what they "
        "took, less 1: an error of the costs and of the machine's drift, not of the simulator's queue and batches."
    )
    return "\n\n".join(lines)


def _cell(row: Mapping[Any, Any]) -> str:
    return f"{row['policy']}, {_NAMES[row['arrivals']]}, concurrency {row['concurrency']}"


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    records = frame.astype(object).to_dict("records")
    text = [{str(name): None if value is pd.NA else plain(value) for name, value in row.items()} for row in records]
    rows: list[dict[str, Any]] = json.loads(json.dumps(text))
    return rows
