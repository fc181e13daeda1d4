"""Does the simulator tell the truth? Live and simulated runs of the same workload, side by side.

Two questions. `rounds_equal`: did every request go through the same rounds (exact at temperature 0)? `compare`: how
far are the simulated times from the live ones, and how far is a second live run (the noise floor)?
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dspark_sim.analysis.metrics import summary
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace

ROUND_COLUMNS = ("position", "draft_len", "verify_len", "num_accepted", "num_emitted")


def compare(live: Trace, simulated: Trace, repeat: Trace | None = None) -> pd.DataFrame:
    """Metric by metric: live, simulated, and their difference.

    Parameters
    ----------
    live, simulated
        Two runs of the same requests.
    repeat
        A second live run of the same requests; its difference from the first is the noise floor.

    Returns
    -------
    DataFrame
        A row per metric of `metrics.summary`: ``metric, live, simulated, error, repeat_error``. Errors are
        fractions of the live value with a sign, e.g. 0.02 for 2 % too high; ``repeat_error`` is NaN without a
        repeat.

    Raises
    ------
    UserError
        If the runs did not serve the same prompts equally often.
    """
    require_same_prompts(live, simulated)
    frame = pd.DataFrame({"live": summary(live), "simulated": summary(simulated)})
    frame["error"] = _relative(frame["simulated"], frame["live"])
    frame["repeat_error"] = np.nan
    if repeat is not None:
        require_same_prompts(live, repeat)
        frame["repeat_error"] = _relative(summary(repeat), frame["live"])
    return frame.rename_axis("metric").reset_index()


@dataclass(frozen=True, slots=True)
class RoundsVerdict:
    """Whether all rounds agree (it counts as a bool), and in words what was found."""

    equal: bool
    message: str

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        return self.message


def rounds_equal(live: Trace, simulated: Trace) -> RoundsVerdict:
    """Check that every request went through the same rounds.

    Requests are matched by `request_id` and their rounds by order; a round is its anchor's position, the tokens
    drafted, verified, accepted and emitted. When the rounds ran plays no part.

    Parameters
    ----------
    live, simulated
        Two runs of the same requests.

    Returns
    -------
    RoundsVerdict
        True or false, with the first differing round in words.

    Raises
    ------
    UserError
        If the runs did not serve the same prompts, or not under the same request numbers.
    """
    require_same_prompts(live, simulated)
    ours, theirs = (trace.requests.set_index("request_id")["prompt_id"] for trace in (live, simulated))
    for request_id, prompt_id in ours.items():
        if theirs.get(request_id) != prompt_id:
            raise UserError(
                f"request {request_id} is prompt {prompt_id} in the live run and {theirs.get(request_id)} in the "
                "simulated one; give both runs the same list of requests"
            )
    left, right = _rounds(live).add_suffix("_live"), _rounds(simulated).add_suffix("_simulated")
    both = left.join(right, how="outer").sort_index()
    sides = [both[[f"{name}{suffix}" for name in ROUND_COLUMNS]].to_numpy() for suffix in ("_live", "_simulated")]
    differs = sides[0] != sides[1]  # A missing round is NaN, which equals nothing.
    if not differs.any():
        return RoundsVerdict(True, f"all {len(left)} rounds of {len(ours)} requests are equal")
    row = int(differs.any(axis=1).argmax())
    request_id, number = both.index[row]
    where = f"request {request_id} (prompt {ours[request_id]}), round {number + 1}"
    for side, other, values in (("live", "simulated", sides[0]), ("simulated", "live", sides[1])):
        if np.isnan(values[row].astype(np.float64)).all():
            return RoundsVerdict(False, f"{where}: only the {other} run has it, the {side} run had ended")
    column = int(differs[row].argmax())
    mine, yours = int(sides[0][row, column]), int(sides[1][row, column])
    return RoundsVerdict(False, f"{where}: {ROUND_COLUMNS[column]} is {mine} live and {yours} simulated")


def require_same_prompts(first: Trace, second: Trace) -> None:
    """Refuse to compare runs of different prompts.

    Raises
    ------
    UserError
        If a prompt was served more often in one run than in the other.
    """
    counts = [Counter(trace.requests["prompt_id"]) for trace in (first, second)]
    for prompt_id in sorted(counts[0].keys() | counts[1].keys()):
        if counts[0][prompt_id] != counts[1][prompt_id]:
            raise UserError(
                f"prompt {prompt_id} was served {counts[0][prompt_id]} times in one run and {counts[1][prompt_id]} "
                "times in the other; compare runs of the same prompts and number of requests"
            )


def _rounds(trace: Trace) -> pd.DataFrame:
    rounds = trace.drafts.sort_values(["request_id", "step"])
    rounds = rounds[rounds["request_id"].isin(trace.requests["request_id"])]
    return rounds.assign(round=rounds.groupby("request_id").cumcount()).set_index(["request_id", "round"])[
        list(ROUND_COLUMNS)
    ]


def _relative(value: pd.Series, reference: pd.Series) -> pd.Series:
    with np.errstate(invalid="ignore", divide="ignore"):
        error = value / reference - 1.0
    return error.where(value != reference, 0.0)
