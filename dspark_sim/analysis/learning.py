"""Learning curves: how training runs went, in one figure.

A run's `learning_curve.csv` has a row for each evaluation: ``update``, ``seconds``, the loss and its parts on that
update's text, and on held-out text at temperature 0 ``mean_acceptance_length`` and the conditional acceptance of each
position, ``acceptance_1`` .. ``acceptance_γ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_sim.analysis.plots import MARKERS, PALETTE, caption
from dspark_sim.errors import UserError, explain_os_errors

_NEEDED = ("update", "loss", "mean_acceptance_length")
_PANELS = (
    ("loss", "training loss"),
    ("mean_acceptance_length", "mean acceptance length (tokens per round)"),
)


def read_learning_curves(runs: Sequence[Path | str]) -> pd.DataFrame:
    """The curves of runs, one after the other, with a column ``run``.

    Parameters
    ----------
    runs
        Folders of runs, or their CSV files. A run is named by its folder, by the whole path where two are alike.

    Raises
    ------
    UserError
        If a file is missing or not a learning curve, or a run is named twice.
    """
    paths = [Path(run) / "learning_curve.csv" if Path(run).is_dir() else Path(run) for run in runs]
    if not paths:
        raise UserError("zero runs given; name at least one folder with a learning_curve.csv")
    if len(set(paths)) < len(paths):
        raise UserError("a run is named twice; name each once")
    short = [path.resolve().parent.name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    return pd.concat([_read(path).assign(run=name) for path, name in zip(paths, names, strict=True)])


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"no learning curve at {path}; name the folder of a run of `dspark-sim train`")
    try:
        frame = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a learning curve ({str(error)[:80]}); name another run") from error
    missing = [name for name in _NEEDED if name not in frame]
    if missing or frame.empty:
        what = f"it has no column {missing[0]}" if missing else "it has no rows"
        raise UserError(f"{path} is not a learning curve ({what}); name another run")
    return frame


def learning_curve_figure(runs: Sequence[Path | str], note: str = "") -> Figure:
    """Loss, mean acceptance length and acceptance by position of runs.

    Parameters
    ----------
    runs
        As for `read_learning_curves`. Curves without acceptance by position are missing from the third panel.
    note
        Caption.
    """
    frame = read_learning_curves(runs)
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.2))
    for number, (run, rows) in enumerate(frame.groupby("run", sort=False)):
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        for axis, (name, _) in zip(axes, _PANELS, strict=False):
            axis.plot(rows["update"], rows[name], color=color, marker=marker, markersize=3, linewidth=1.2, label=run)
        last = rows.filter(regex=r"^acceptance_\d+$").iloc[-1].dropna()
        places = [int(str(name).rpartition("_")[2]) for name in last.index]
        axes[2].plot(places, last.to_numpy(), color=color, marker=marker, markersize=5, linewidth=1.4)
    for axis, (_, label) in zip(axes, _PANELS, strict=False):
        axis.set_xlabel("updates")
        axis.set_ylabel(label)
    axes[1].set_ylim(bottom=1)
    axes[2].set_xlabel("position in the block")
    axes[2].set_ylabel("acceptance, all before accepted")
    axes[2].set_ylim(0, 1)
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=min(len(names), 5), frameon=False, fontsize=9)
    text = "Middle and right: held-out text at temperature 0. Right: at the last evaluation."
    return caption(figure, f"{note}\n{text}".strip())


def save_learning_curves(runs: Sequence[Path | str], path: Path | str, note: str = "") -> Path:
    """Draw runs to a file of any kind that matplotlib writes.

    Raises
    ------
    UserError
        As `read_learning_curves`, or if the file cannot be written.
    """
    path = Path(path)
    figure = learning_curve_figure(runs, note)
    with explain_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path, dpi=150, format=path.suffix[1:])
        except ValueError as error:
            raise UserError(f"{path} is of no kind that figures are written as; choose .png, .pdf or .svg") from error
        finally:
            plt.close(figure)
    return path
