"""How far a simulator may be trusted, in numbers: errors against targets, rankings, and what choosing by it costs.

Frames in, frames out. A *cell* is a policy at a concurrency under a kind of arrivals; it ran twice live. An *error* is
simulated / live - 1, with a sign. The *noise floor* of a cell's metric is the larger of two figures: how far its own
two live runs lie apart, and the median of that over all cells with the same kind of arrivals, because two runs that
happen to agree are not free of noise. On a shared clock (a CPU) an error is within the target if it is at most target
plus floor; on a GPU at most the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

CELL = ("policy", "concurrency", "arrivals")
SAME_POLICY = "same policy"
SPLITS = (SAME_POLICY, "held-out policy", "held-out concurrency", "profile")
TIMES = ("tpot", "icl", "e2e_latency", "ttft")
EXACT_METRICS = ("mean_acceptance_length", "verification_budget")
METRICS = (
    "output_throughput",
    *(f"{name}_{kind}" for name in TIMES for kind in ("mean", "p50", "p99")),
    *EXACT_METRICS,
)
# What a ranking of policies is by; the throughput of an open loop is set by its arrivals.
RANKED_BY = {"closed": "output_throughput", "poisson": "e2e_latency_mean"}
TAU_TARGET, REGRET_TARGET = 0.9, 0.02


def target(split: str, metric: str) -> float:
    """The largest relative error aimed at, as a fraction (design, section 12).

    P99 10 %; ttft 5 %; everything else 2 % for a policy that the cost was fitted on, 5 % held out. Acceptance
    and verification budget are exact.
    """
    if metric in EXACT_METRICS:
        return 0.0
    if metric.endswith("_p99"):
        return 0.10
    return 0.02 if split == SAME_POLICY and not metric.startswith("ttft") else 0.05


def error_table(live: pd.DataFrame, simulated: pd.DataFrame, *, shared_clock: bool) -> pd.DataFrame:
    """Every simulated figure beside the live ones.

    Parameters
    ----------
    live
        A row per cell and repeat: ``policy, concurrency, arrivals, repeat`` (1 or 2), ``clock_free`` (whether the
        cell's rounds cannot depend on the clock) and the `METRICS`.
    simulated
        A row per split and cell: ``split`` and the cell, the `METRICS`, and any evidence (kept as it is).
    shared_clock
        Whether the noise floor is granted on top of the target.

    Returns
    -------
    DataFrame
        A row per split, cell and metric: ``live, simulated, error, repeat_error, floor, target, limit, within,
        clock_free`` and the evidence. The same-policy split is judged on the second repeat, for its costs were fitted
        on the first; the others on the mean of both. Where rounds may depend on the clock, acceptance and budget have
        no target: ``target`` and ``limit`` are NaN and ``within`` is missing.
    """
    metrics = [name for name in METRICS if name in simulated]
    runs = live.melt([*CELL, "repeat", "clock_free"], metrics, "metric", "value")
    pairs = runs.pivot(index=[*CELL, "clock_free", "metric"], columns="repeat", values="value").reset_index()
    pairs.columns.name = None
    pairs["repeat_error"] = _relative(pairs[2], pairs[1])
    typical = pairs["repeat_error"].abs().groupby([pairs["metric"], pairs["arrivals"]]).transform("median")
    pairs["floor"] = np.fmax(pairs["repeat_error"].abs(), typical)
    evidence = [name for name in simulated if name not in METRICS]
    frame = simulated.melt(evidence, metrics, "metric", "simulated").merge(pairs, on=[*CELL, "metric"])
    frame["live"] = frame[2].where(frame["split"] == SAME_POLICY, (frame[1] + frame[2]) / 2)
    frame["error"] = _relative(frame["simulated"], frame["live"])
    frame["target"] = [target(split, name) for split, name in zip(frame["split"], frame["metric"], strict=True)]
    exact = frame["metric"].isin(EXACT_METRICS)
    frame.loc[exact & ~frame["clock_free"], "target"] = np.nan
    frame["limit"] = frame["target"] + np.where(exact | (not shared_clock), 0.0, frame["floor"])
    within = (frame["error"].abs() <= frame["limit"] + 1e-12).astype("boolean")
    frame["within"] = within.mask(frame["limit"].isna() | frame["error"].isna())
    order = ["split", *CELL, "metric", "live", "simulated", "error", "repeat_error"]
    order += ["floor", "target", "limit", "within", "clock_free"]
    rest = [name for name in evidence if name not in order]
    for name, values in {"split": SPLITS, "metric": METRICS}.items():
        frame[name] = pd.Categorical(frame[name], [value for value in values if value in set(frame[name])])
    policies = list(dict.fromkeys(simulated["policy"]))
    frame["policy"] = pd.Categorical(frame["policy"], policies)
    frame = frame.sort_values(["split", "arrivals", "concurrency", "policy", "metric"], ignore_index=True)
    return frame[[*order, *rest]].astype({"split": str, "metric": str, "policy": str})


def split_summary(errors: pd.DataFrame) -> pd.DataFrame:
    """Errors over the cells of a split, metric by metric.

    Returns
    -------
    DataFrame
        A row per split, kind of arrivals and metric: ``num_cells``, ``median_error`` and ``p99_error`` (of the
        absolute error over cells), ``median_signed_error``, ``median_floor``, ``target``, ``num_judged`` (cells with
        a target) and ``num_within``.
    """
    groups = errors.groupby(["split", "arrivals", "metric"], sort=False)
    size = errors.assign(size=errors["error"].abs()).groupby(["split", "arrivals", "metric"], sort=False)["size"]
    return pd.DataFrame(
        {
            "num_cells": groups.size(),
            "median_error": size.median(),
            "p99_error": size.quantile(0.99),
            "median_signed_error": groups["error"].median(),
            "median_floor": groups["floor"].median(),
            "target": groups["target"].max(),
            "num_judged": groups["within"].count(),
            "num_within": groups["within"].sum().astype(int),
        }
    ).reset_index()


def ranking_table(errors: pd.DataFrame) -> pd.DataFrame:
    """Whether the simulator would have chosen the right policy.

    Policies are ranked by output throughput in a closed loop and by mean end-to-end latency in an open one. Where
    two policies differ live by no more than the larger of their noise floors, the live run does not say which is
    better: they count as tied.

    Returns
    -------
    DataFrame
        A row per split, concurrency and kind of arrivals: ``metric``; ``tau`` (Kendall's, of all pairs) and
        ``tau_clear`` (of the ``num_clear_pairs`` that differ by more than the noise floor; NaN if there is none) of
        ``num_pairs``; the policy that is best live, ``best``; the one that the simulator chooses, ``choice``; what
        choosing it loses, ``regret`` (a fraction of the best, by live figures); the ``floor`` of these two policies;
        and whether ``tau``, ``tau_clear`` and ``regret`` reach their targets.
    """
    rows = []
    for (split, users, arrivals), cells in errors.groupby(["split", "concurrency", "arrivals"], sort=False):
        metric = RANKED_BY[str(arrivals)]
        cells = cells[cells["metric"] == metric]
        if len(cells) < 2:
            continue
        sign = 1.0 if metric == "output_throughput" else -1.0
        live, simulated, floor = (cells[name].to_numpy(dtype=np.float64) for name in ("live", "simulated", "floor"))
        best, choice = int(np.argmax(sign * live)), int(np.argmax(sign * simulated))
        clear = clear_pairs(live, floor)
        regret = abs(1.0 - live[choice] / live[best])
        names = cells["policy"].tolist()
        rows.append(
            {
                **{"split": split, "concurrency": users, "arrivals": arrivals, "metric": metric},
                **{"tau": kendall_tau(live, simulated), "tau_clear": kendall_tau(live, simulated, clear)},
                **{"num_clear_pairs": int(clear.sum() // 2), "num_pairs": len(cells) * (len(cells) - 1) // 2},
                **{"best": names[best], "choice": names[choice], "regret": regret},
                "floor": max(floor[best], floor[choice]),
            }
        )
    columns = ("split", "concurrency", "arrivals", "metric", "tau", "tau_clear", "num_clear_pairs", "num_pairs")
    frame = pd.DataFrame(rows, columns=[*columns, "best", "choice", "regret", "floor"])
    for name in ("tau", "tau_clear"):
        frame[f"{name}_within"] = (frame[name] >= TAU_TARGET).astype("boolean").mask(frame[name].isna())
    return frame.assign(regret_within=frame["regret"] <= REGRET_TARGET)


def clear_pairs(live: npt.ArrayLike, floor: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which pairs of policies differ live by more than the noise floor: [n, n], symmetric.

    Parameters
    ----------
    live, floor
        [n], positive live figures and their noise floors as fractions. A pair's difference is the larger figure over
        the smaller, less 1; its floor is the larger of the two.
    """
    value, noise = np.asarray(live, dtype=np.float64), np.asarray(floor, dtype=np.float64)
    ratio = np.maximum(value[:, None] / value, value / value[:, None])
    return np.asarray(ratio - 1.0 > np.maximum(noise[:, None], noise))


def kendall_tau(
    first: Sequence[float] | npt.NDArray[np.float64],
    second: Sequence[float] | npt.NDArray[np.float64],
    counted: npt.NDArray[np.bool_] | None = None,
) -> float:
    """Kendall's rank correlation over the counted pairs.

    Parameters
    ----------
    first, second
        [n], two figures of the same n policies.
    counted
        [n, n], which pairs count. All by default, and then ties are corrected for (tau-b). Of chosen pairs it is
        (concordant - discordant) / counted; one that is tied in `second` counts for neither.

    Returns
    -------
    float
        From -1 to 1; NaN if no pair counts or all are tied.
    """
    signs = [np.sign(np.subtract.outer(values, values))[np.triu_indices(len(values), 1)] for values in (first, second)]
    agreement = signs[0] * signs[1]
    if counted is not None:
        chosen = counted[np.triu_indices(len(first), 1)]
        return float(agreement[chosen].mean()) if chosen.any() else float("nan")
    untied = np.sqrt(float(np.abs(signs[0]).sum() * np.abs(signs[1]).sum()))
    return float(agreement.sum() / untied) if untied else float("nan")


def misses(errors: pd.DataFrame) -> pd.DataFrame:
    """The rows outside their limit, each with its likeliest ``cause``, as far as the evidence shows.

    Parameters
    ----------
    errors
        `error_table` with the evidence ``price_error`` (what the fitted cost says of the very iterations that ran
        live, over what they took, less 1), ``price_drift`` (how much longer the second repeat's iterations took than
        the first's fit says) and ``extrapolated`` (whether the cell spends much of its time in batches well
        larger than any that the cost was fitted on).
    """
    missed = errors[errors["within"].eq(False).fillna(False)]
    return missed.assign(cause=[_cause(row) for row in missed.to_dict("records")])


def _cause(row: Mapping[Any, Any]) -> str:
    error, price, drift = (float(row[name]) for name in ("error", "price_error", "price_drift"))
    metric, limit = str(row["metric"]), float(row["limit"])
    if metric in EXACT_METRICS:
        return "rounds differ although nothing in them depends on the clock: a defect"
    priced = 1.0 / (1.0 + price) - 1.0 if metric == "output_throughput" else price
    explained = np.sign(priced) == np.sign(error) and abs(priced) >= 0.5 * abs(error)
    if bool(row["extrapolated"]) and explained:
        return "extrapolated: the cost was fitted on smaller batches only"
    if explained and row["split"] == SAME_POLICY and abs(drift) >= 0.5 * abs(price):
        return "drift: the machine's speed changed between the repeats"
    if explained:
        return "price: this cell's iterations cost otherwise than the fit says"
    if row["arrivals"] == "poisson" and metric.partition("_")[0] in ("ttft", "e2e"):
        return "queue: an open loop near saturation enlarges errors of price and noise"
    if metric.endswith("_p99") and error < 0:
        return "tail: the simulator pays mean seconds and has no slow iterations"
    if not row["clock_free"]:
        return "batches: a load-aware policy's batches depend on the clock in an open loop"
    if abs(error) <= 2.0 * limit:
        return "unclear, at most twice the limit"
    return "unexplained"


def _relative(value: pd.Series, reference: pd.Series) -> pd.Series:
    with np.errstate(invalid="ignore", divide="ignore"):
        error = value / reference - 1.0
    return error.where(value != reference, 0.0)
