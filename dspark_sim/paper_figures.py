"""One figure or table of the paper, made from our own runs, with the published values beside ours.

A script of `experiments/paper` makes a `PaperFigure` and gives it to `script_main`, which is its whole command line:

    def make(scale: Scale, out: Path) -> PaperFigure: ...

    if __name__ == "__main__":
        script_main(make)

Files of a figure ``name`` in ``out``: ``name.png`` and ``name.pdf`` (none for a table), ``name.csv`` (ours, what the
panels show), ``name_comparison.csv`` (ours, interval, paper) and, last, ``name.json``, which marks the others as
complete. The two tables depend on the runs alone: they hold no seconds of the script and no date.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import tyro

from dspark_sim.analysis.tables import aligned
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file, write_json
from dspark_sim.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["smoke", "laptop", "gpu"]
"""smoke: to see that it runs. laptop: what 2 CPU cores do in minutes. gpu: what needs a GPU."""
SCALES: tuple[Scale, ...] = get_args(Scale)
COMPARED = ("quantity", "ours", "low", "high", "paper", "unit")
"""Columns of a comparison; ``low`` and ``high`` are the ends of our 95 % interval, empty where there is none."""


@dataclass(frozen=True, eq=False)
class PaperFigure:
    """A figure or table of the paper from our runs.

    Parameters
    ----------
    name
        Of the files: lower-case letters, digits, ``_`` and ``-``; the first figure of a script has the script's name.
    title
        Heading in the report, such as "Figure 2: conditional acceptance by position".
    figure
        Panels in the paper's layout; ``None`` for a table.
    table
        Ours, as drawn.
    comparison
        Columns `COMPARED`. An empty cell (NaN) is a value that does not exist.
    setting
        Target, drafter, temperature and hardware of ours.
    differs
        Two sentences: how ours differs from the paper's, and why.

    Raises
    ------
    UserError
        If the name is no file name, or the comparison has other columns.
    """

    name: str
    title: str
    figure: Figure | None
    table: pd.DataFrame
    comparison: pd.DataFrame
    setting: str
    differs: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise UserError(f"a paper figure is named {self.name!r}; use lower-case letters, digits, _ and -")
        if tuple(self.comparison.columns) != COMPARED:
            found = ", ".join(map(str, self.comparison.columns))
            raise UserError(f"the comparison of {self.name} has columns {found}; give {', '.join(COMPARED)}")


Make = Callable[[Scale, Path], PaperFigure | Sequence[PaperFigure]]
"""Takes the scale and the folder of results (recordings are shared in its folder ``recordings``)."""


def compared(
    quantity: str, ours: float, paper: float | None, unit: str, interval: Sequence[float] = ()
) -> dict[str, Any]:
    """A row of a comparison.

    Parameters
    ----------
    quantity
        What is compared, with its condition: "DSpark, math, position 1".
    ours, paper
        Values in `unit`; a `paper` of ``None`` was not published.
    unit
        Such as ``tokens`` or ``fraction``.
    interval
        The two ends of our 95 % interval, if there is one.
    """
    low, high = interval or (float("nan"), float("nan"))
    published = float("nan") if paper is None else paper
    return dict(zip(COMPARED, (quantity, ours, low, high, published, unit), strict=True))


def write(
    figure: PaperFigure,
    out: Path,
    *,
    scale: Scale | None = None,
    seconds: float | None = None,
    script: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a figure's files; the last one, ``name.json``, marks the others as complete.

    Parameters
    ----------
    figure
        What to write; its panels are closed afterwards.
    out
        Folder, made where there is none.
    scale, seconds
        At what scale and how long it was made.
    script
        `identity` of the script that made it; a figure is complete as long as its script does not change.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    UserError
        If a file cannot be written.
    """
    mark = out / f"{figure.name}.json"
    with explain_os_errors(mark, "write"):
        # Files of an earlier run must not pass for those of this one.
        mark.unlink(missing_ok=True)
    paths = []
    if figure.figure is not None:
        import matplotlib.pyplot as plt

        # No date in the files, so that the same run gives the same bytes.
        for kind, options in (("png", {"dpi": 150}), ("pdf", {"metadata": {"CreationDate": None}})):
            paths.append(out / f"{figure.name}.{kind}")
            with whole_file(paths[-1]) as partial:
                figure.figure.savefig(partial, format=kind, **options)
        plt.close(figure.figure)
    for frame, ending in ((figure.table, ""), (figure.comparison, "_comparison")):
        paths.append(out / f"{figure.name}{ending}.csv")
        with whole_file(paths[-1]) as partial:
            frame.to_csv(partial, index=False, lineterminator="\n")
    document = {
        **{"name": figure.name, "title": figure.title, "scale": scale, "setting": figure.setting},
        **{"differs": figure.differs, "files": [path.name for path in paths], "seconds": seconds},
        "script": None if script is None else dict(script),
        "provenance": provenance(),
    }
    write_json(mark, document)
    return [*paths, mark]


def identity(script: Path) -> dict[str, str]:
    """``name`` and ``digest`` of a script as it is now: a changed one makes its figure anew."""
    with explain_os_errors(script, "read"):
        return {"name": script.stem, "digest": hashlib.sha256(script.read_bytes()).hexdigest()[:12]}


def read_mark(name: str, out: Path) -> dict[str, Any] | None:
    """What ``name.json`` says of a complete figure; ``None`` where it or a file that it names is missing."""
    try:
        document: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        names = list(document["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document if all((out / file).is_file() for file in names) else None


def is_complete(script: Path, out: Path, scale: Scale) -> bool:
    """Whether a script, as it is now, has finished at this scale."""
    document = read_mark(script.stem, out)
    return document is not None and document.get("scale") == scale and document.get("script") == identity(script)


def run_script(make: Make, scale: Scale, out: Path) -> list[PaperFigure]:
    """Make the figures of a script and write them, the one with the script's name last.

    Raises
    ------
    UserError
        If the first figure has another name than the script.
    """
    script, start = Path(inspect.getfile(make)), perf_counter()
    own = identity(script)
    made = make(scale, out)
    figures = [made] if isinstance(made, PaperFigure) else list(made)
    if not figures or figures[0].name != script.stem:
        found = figures[0].name if figures else "none"
        raise UserError(f"the first figure of {script.name} is {found}; name it {script.stem}")
    for figure in reversed(figures):
        write(figure, out, scale=scale, seconds=perf_counter() - start, script=own)
    return figures


def script_main(make: Make) -> None:
    """The command line of a script: ``--scale smoke|laptop|gpu`` and ``--out FOLDER``.

    A failure that the user can cure ends as one line and exit status 2, Ctrl-C as one line and 130.

    Parameters
    ----------
    make
        Makes the figure, or several of which the first has the script's name.
    """
    name = Path(inspect.getfile(make)).stem

    def main(scale: Scale = "laptop", out: Path = Path("runs/paper")) -> None:
        for figure in run_script(make, scale, out):
            print(f"\n{figure.title}. {figure.setting}\n\n{aligned(figure.comparison)}\n\n{figure.differs}")
            print(f"Wrote {out / figure.name}.csv and the files beside it.")

    about = inspect.getmodule(make).__doc__ or ""
    try:
        tyro.cli(main, prog=name, description=about)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was written so far is kept", file=sys.stderr)
        raise SystemExit(130) from None
