"""The report of a folder of paper figures: per figure, the picture, ours beside the paper's, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dspark_sim.files import whole_file
from dspark_sim.paper_figures import read_mark

_DECIMALS = {"fraction": 3, "probability": 3, "tokens": 2, "%": 1, "points": 1}


def write_report(out: Path, scripts: Sequence[Path], failures: Mapping[str, str]) -> Path:
    """Write ``report.md`` of what is complete in `out`.

    Parameters
    ----------
    out
        Folder of results.
    scripts
        In the order of the report.
    failures
        Reason of each script that failed just now, by its name.

    Raises
    ------
    UserError
        If a file cannot be read or written.
    """
    found = {script.stem: _figures(out, script.stem) for script in scripts}
    lines = [
        "# The paper's table and figures from our own runs",
        "",
        "Paper: *DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation*, arXiv "
        "2607.05147; its values were read from its figures. Ours: `dspark-sim figures`. Intervals are 95 %, by "
        "bootstrap over prompts where nothing else is said; a dash is a value that does not exist.",
        "",
        "| figure | scale | seconds |",
        "| --- | --- | ---: |",
    ]
    for name, marks in found.items():
        lines += [
            f"| [{mark['title']}](#{_anchor(mark['title'])}) | {_scale(mark)} | {_seconds(mark)} |" for mark in marks
        ]
        if not marks:
            lines.append(f"| `{name}` | not made | - |")
    if failures:
        lines += ["", "## Failed", ""]
        lines += [f"* `{name}`: {reason} (see [its log](logs/{name}.log))" for name, reason in failures.items()]
    for name, marks in found.items():
        for mark in marks:
            lines += _section(out, name, mark)
    path = out / "report.md"
    with whole_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _figures(out: Path, script: str) -> list[dict[str, Any]]:
    """Marks of the complete figures of a script, the one with its name first."""
    names = [path.stem for path in sorted(out.glob("*.json"))]
    marks = [mark for name in names if (mark := read_mark(name, out)) and (mark["script"] or {}).get("name") == script]
    return sorted(marks, key=lambda mark: mark["name"] != script)


def _section(out: Path, script: str, mark: dict[str, Any]) -> list[str]:
    name = mark["name"]
    lines = ["", f"## {mark['title']}", ""]
    if f"{name}.png" in mark["files"]:
        lines += [f"![{mark['title']}]({name}.png)", ""]
    lines += [f"{mark['setting'].rstrip('.')}. Scale `{_scale(mark)}`, script `{script}.py`.", ""]
    lines += ["| quantity | ours | 95 % interval | paper | unit |", "| --- | ---: | --- | ---: | --- |"]
    rows = pd.read_csv(out / f"{name}_comparison.csv", keep_default_na=False, na_values=[""])
    for row in rows.to_dict("records"):
        unit = str(row["unit"]) if isinstance(row["unit"], str) else ""
        ours, low, high, paper = (_number(row[key], unit) for key in ("ours", "low", "high", "paper"))
        interval = "-" if low == high == "-" else f"[{low}, {high}]"
        lines.append(f"| {row['quantity']} | {ours} | {interval} | {paper} | {unit or '-'} |")
    if mark["scale"] == "smoke":
        lines += ["", "Scale `smoke` shows that it runs; of few prompts or runs it is too noisy to compare."]
    files = ", ".join(f"[{file}]({file})" for file in mark["files"])
    return [*lines, "", mark["differs"], "", f"Files: {files}."]


def _number(value: Any, unit: str) -> str:
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "-"
    if unit in _DECIMALS:
        return f"{value:.{_DECIMALS[unit]}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _scale(mark: dict[str, Any]) -> str:
    return str(mark["scale"] or "-")


def _seconds(mark: dict[str, Any]) -> str:
    return "-" if mark["seconds"] is None else f"{mark['seconds']:.0f}"


def _anchor(title: str) -> str:
    """The anchor that Markdown viewers give to a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")
