"""The DSpark paper's published numbers, as CSV files beside this module, and their loaders.

Every file, its units and its error are listed in `README.md` beside it. Acceptance lengths are tokens per round, bonus
included; gains and acceptances are fractions. Figures were digitised from the paper's vector graphics. In those of
Figure 6, forecasts and outcomes are prefix survivals of Qwen3-4B's DSpark drafter on Alpaca, in 20 equal bins,
``before`` and ``after`` sequential temperature scaling.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dspark_sim.errors import UserError

_GAIN = "dspark_gain_over_this_drafter_pct_printed"


def load(name: str) -> pd.DataFrame:
    """A file of published numbers by its name without ``.csv``, columns as in the file.

    Raises
    ------
    UserError
        If there is no such file.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*.csv"))
    if name not in names:
        raise UserError(f"there are no published numbers {name!r}; choose one of {', '.join(names)}")
    return pd.read_csv(folder / f"{name}.csv")


def table1() -> pd.DataFrame:
    """Table 1's means (γ = 7, T = 1): domains, macro, and DSpark's gain over each drafter.

    Returns
    -------
    DataFrame
        A row per target and drafter: ``target, drafter, math, code, chat, macro, dspark_gain``. A domain is the mean of
        its three benchmarks and ``macro`` the mean of the nine. ``dspark_gain`` is a ratio of macro means less 1, as
        the paper prints it; NaN where it prints none (the Gemma target, and DSpark itself).
    """
    frame = load("table1_macro_average")
    names = {f"{name}_mean_accepted_length_tokens": name for name in ("math", "code", "chat", "macro")}
    frame = frame.rename(columns={**names, "target_model": "target"})
    frame["dspark_gain"] = frame[_GAIN] / 100.0
    return frame[["target", "drafter", *names.values(), "dspark_gain"]]


def printed_gains() -> dict[str, tuple[float, float]]:
    """The smallest and the largest gain of DSpark that the paper prints, by the drafter it is over."""
    gains = table1().dropna(subset=["dspark_gain"]).groupby("drafter")["dspark_gain"]
    return {str(name): (float(values.min()), float(values.max())) for name, values in gains}


def curve(name: str, **labels: str) -> pd.DataFrame:
    """The rows of a file that carry all the labels, without the columns of these labels, in the file's order.

    Parameters
    ----------
    name
        As for `load`, such as ``fig8_throughput`` or ``fig7_frontier``.
    labels
        Columns and what they hold, such as ``target_model="deepseek-v4-flash", drafter="mtp-1"``.

    Raises
    ------
    UserError
        If there is no such file, column or label.
    """
    frame = load(name)
    for column, label in labels.items():
        if column not in frame:
            raise UserError(f"{name} has no column {column!r}; choose one of {', '.join(frame.columns)}")
        if label not in set(frame[column]):
            raise UserError(f"{name} has no {column} {label!r}; choose one of {', '.join(sorted(set(frame[column])))}")
        frame = frame[frame[column] == label]
    return frame.drop(columns=list(labels)).reset_index(drop=True)
