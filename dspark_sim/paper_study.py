"""Run the scripts of `experiments/paper`, each in a process of its own, and report what they found.

A script that finished at the same scale, and was not changed since, is not run again. One that fails does not stop
the others. What a script prints goes to ``logs/NAME.log``; the report is written after every script, so an interrupted
run has one of what was done.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
from tqdm import tqdm

import dspark_sim
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.paper_figures import Scale, is_complete
from dspark_sim.paper_report import write_report

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = (2.0, 10.0)
"""How long an interrupted script may take to end by itself, and then when it was told to."""
_PLACE = Path("experiments") / "paper"
_MAKES_A_FIGURE = re.compile(r"\b(script_main|run_script)\(")


def find_scripts(folder: Path | None = None) -> list[Path]:
    """The scripts, in the paper's order: tables, figures by number, then the others by name.

    Parameters
    ----------
    folder
        Where they are; ``None`` looks beside the package and in the current folder.

    Raises
    ------
    UserError
        If there are none.
    """
    clone = Path(dspark_sim.__file__).resolve().parent.parent
    places = [clone / _PLACE, Path.cwd() / _PLACE] if folder is None else [folder]
    for place in places:
        # Others there are modules that scripts share, or make what they need.
        found = [path for path in place.glob("*.py") if _MAKES_A_FIGURE.search(path.read_text(encoding="utf-8"))]
        if found:
            return sorted(found, key=_order)
    remedy = "run this in a clone of the project, or give --scripts" if folder is None else "give another folder"
    raise UserError(f"no scripts of paper figures in {' or '.join(map(str, places))}; {remedy}")


def choose(scripts: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The scripts whose name is, or begins with, one of the names (``fig2`` is no beginning of ``fig20_...``).

    Raises
    ------
    UserError
        If a name fits none.
    """
    chosen: list[Path] = []
    for name in names:
        stem = name.removesuffix(".py")
        fitting = [script for script in scripts if script.stem == stem or script.stem.startswith(f"{stem}_")]
        if not fitting:
            known = ", ".join(script.stem for script in scripts)
            raise UserError(f"no paper figure {name!r}; choose from {known}")
        chosen += fitting
    return [script for script in scripts if script in chosen]


def run_scripts(scripts: Sequence[Path], chosen: Sequence[Path], scale: Scale, out: Path) -> pd.DataFrame:
    """Run what is not complete of the chosen scripts, and write the report of all.

    Parameters
    ----------
    scripts
        All there are, in the order of the report.
    chosen
        Those to run.
    scale
        Passed to each.
    out
        Folder of results, passed to each.

    Returns
    -------
    DataFrame
        A row per chosen script: ``script, state`` (made, kept or failed), ``seconds``, and the ``reason`` of a failure.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    logs = out / "logs"
    with explain_os_errors(logs, "write"):
        logs.mkdir(parents=True, exist_ok=True)
    kept = [script for script in chosen if is_complete(script, out, scale)]
    rows: dict[str, dict[str, Any]] = {
        script.stem: {"script": script.stem, "state": "kept", "seconds": 0.0, "reason": ""} for script in kept
    }
    failures: dict[str, str] = {}
    with tqdm(total=len(chosen), initial=len(kept), desc="figures", unit="figure") as bar:
        for script in chosen:
            if script in kept:
                continue
            start = perf_counter()
            reason = _run(script, scale, out, logs / f"{script.stem}.log", bar)
            if reason:
                failures[script.stem] = reason
            seconds = perf_counter() - start
            state = "failed" if reason else "made"
            rows[script.stem] = {"script": script.stem, "state": state, "seconds": seconds, "reason": reason}
            write_report(out, scripts, failures)
            bar.update()
    write_report(out, scripts, failures)
    return pd.DataFrame([rows[script.stem] for script in chosen])


def _run(script: Path, scale: Scale, out: Path, log: Path, bar: tqdm[Any]) -> str:
    """Run a script; returns why it failed, or nothing."""
    command = [sys.executable, str(script.resolve()), "--scale", scale, "--out", str(out)]
    package = str(Path(dspark_sim.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}
    bar.set_postfix_str(script.stem)
    with explain_os_errors(log, "write"), log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                bar.set_postfix_str(f"{script.stem} {_last_line(log)[:60]}")
        except BaseException:
            _stop(process)
            raise
    if process.returncode:
        last = _last_line(log).removeprefix(f"{script.stem}: ") or f"exit status {process.returncode}"
        return last if process.returncode > 0 else f"ended by signal {-process.returncode}"
    return "" if is_complete(script, out, scale) else f"it ended without {script.stem}.json"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a script: a terminal's Ctrl-C has reached it already, a signal to this process alone has not."""
    first, second = _PATIENCE_SECONDS
    for patience, number in ((first, signal.SIGINT), (second, signal.SIGKILL)):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    process.wait()


def _last_line(log: Path) -> str:
    """The last line of a log; a bar redraws its line behind a carriage return."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        text = file.read().decode("utf-8", "replace")
    # Without the escapes by which several bars share a terminal.
    lines = [line.strip() for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text))]
    return next((line for line in reversed(lines) if line), "")


def _order(script: Path) -> tuple[int, int, str]:
    kind = re.match(r"(table|fig|appendix)?(\d*)", script.stem)
    assert kind is not None
    rank = {"table": 0, "fig": 1, "appendix": 2}.get(kind[1] or "", 3)
    return rank, int(kind[2] or 0), script.stem
