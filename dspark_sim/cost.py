"""What an iteration costs, in seconds, fitted from the `steps` table of a profile run.

`fit` draws a curve through the measured seconds of every part of an iteration. Other cost models are made by
`cost_parametric` (coefficients), `cost_table` (SGLang's tables) and `roofline` (hardware one does not have);
`cost_noise` adds the scatter that `fit` has kept. All are a `CostModel`. Times are seconds, sizes are token or request
counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dspark_sim.cost_curve import Curve, FloatArray, round_up
from dspark_sim.cost_model import HARDWARE_KEYS, CostModel, IterationSeconds
from dspark_sim.cost_parts import Part
from dspark_sim.cost_steps import captured_sizes, column, spans, with_residuals
from dspark_sim.errors import UserError

__all__ = ["HARDWARE_KEYS", "CostModel", "Curve", "IterationSeconds", "Part", "fit", "leave_one_out_error"]

# Above so many tokens a matrix product's time no longer depends on how its rows divide into groups.
_STAIRCASE = 16


def fit(
    steps: pd.DataFrame | Iterable[pd.DataFrame],
    provenance: Mapping[str, Any] | None = None,
    others: Iterable[pd.DataFrame] = (),
    captured: tuple[float, ...] | None = None,
) -> CostModel:
    """Fit a cost model of curves from the `steps` tables of one or more runs.

    A target pass may take longer behind a draft than without one, because the drafter's weights have displaced the
    target's from the caches. That part is fitted beside the target pass and counted as the draft's cost.

    Parameters
    ----------
    steps
        Tables of schema version 1. Decode rounds give verify, draft and host; prefill iterations give prefill.
    provenance
        Hardware and model the steps were measured on.
    others
        Tables of runs of the same target under other drafters: they too show what the target's passes cost.
    captured
        Sizes of captured CUDA graphs; ``None`` takes them from rounds that were padded (padded_tokens above
        batch_tokens).

    Raises
    ------
    UserError
        If there is no decode round to fit.
    """
    own = steps if isinstance(steps, pd.DataFrame) else pd.concat(list(steps), ignore_index=True)
    frame = pd.concat([own.assign(foreign=False), *(other.assign(foreign=True) for other in others)], ignore_index=True)
    every = frame[frame["num_prefill_tokens"] == 0]
    decode = every[~every["foreign"]]
    prefill = frame[frame["num_prefill_tokens"] > 0]
    if decode.empty:
        raise UserError("the profile has no decode round; profile longer or at a lower concurrency")
    drafted = decode[decode["draft_len"] > 0]
    captured = captured_sizes(every) if captured is None else captured
    with_draft = _fit_verify(every, captured)
    behind_draft = dict(with_draft.linear).get("drafted", 0.0)
    verify = replace(with_draft, linear=tuple(pair for pair in with_draft.linear if "drafted" not in pair[0]))
    draft = Curve()
    if not drafted.empty:
        draft = Curve.fit(
            column(drafted, "num_running"),
            column(drafted, "draft_seconds") + column(drafted, "head_seconds"),
            draft_len=column(drafted, "draft_len"),
            draft_tokens=column(drafted, "draft_len") * column(drafted, "num_running"),
            context_tokens=column(drafted, "context_tokens"),
        )
        draft = replace(draft, levels=tuple(level + behind_draft for level in draft.levels))
    host = Curve.fit(column(decode, "num_running"), _host_seconds(decode))
    prefill_curve = prefill_host = Curve()
    if not prefill.empty:
        prefill_curve = Curve.fit(column(prefill, "num_prefill_tokens"), column(prefill, "prefill_seconds"))
        # num_running counts the whole batch; the iteration's own requests are not recorded, and its host part is small.
        prefill_host = Curve(levels=(float(column(prefill, "host_seconds").mean()),))
    notes = {
        "num_decode_steps": len(decode),
        "num_prefill_steps": len(prefill),
        "verify_mean_abs_error": float(np.mean(np.abs(_predict(with_draft, every) / _verify_seconds(every) - 1.0))),
        "verify_leave_one_out_error": leave_one_out_error(every, captured),
    }
    model = CostModel(verify, draft, prefill_curve, host, prefill_host, {**(provenance or {}), **notes})
    return with_residuals(model, decode, prefill)


def leave_one_out_error(decode: pd.DataFrame, captured: tuple[float, ...] = ()) -> float:
    """Mean relative error of verify seconds when each batch size in turn is left out of the fit.

    Batch sizes at the two ends are not left out: the curve is asked to interpolate, not to extrapolate. With captured
    sizes, these count instead of the sizes that are padded to them.
    """
    sizes = round_up(column(decode, "batch_tokens"), captured)
    errors = []
    for size in np.unique(sizes)[1:-1]:
        held = sizes == size
        kept = tuple(value for value in captured if value != size)
        errors.append(abs(_bias(_fit_verify(decode[~held], kept), decode[held])))
    return float(np.mean(errors)) if errors else float("nan")


def _fit_verify(decode: pd.DataFrame, captured: tuple[float, ...] = ()) -> Curve:
    features = _verify_features(decode)
    if (decode["draft_len"] > 0).all():
        # Nothing tells what a pass costs without a draft before it: a term for the draft would take the level's place.
        features = {name: values for name, values in features.items() if not name.startswith("drafted")}
    return Curve.fit(column(decode, "batch_tokens"), _verify_seconds(decode), _STAIRCASE, captured, **features)


def _predict(curve: Curve, decode: pd.DataFrame) -> FloatArray:
    return curve.seconds(column(decode, "batch_tokens"), **_verify_features(decode))


def _bias(curve: Curve, decode: pd.DataFrame) -> float:
    return float(_predict(curve, decode).sum() / _verify_seconds(decode).sum() - 1.0)


def _verify_features(decode: pd.DataFrame) -> dict[str, FloatArray]:
    drafted = (decode["draft_len"] > 0).to_numpy()
    foreign = decode["foreign"].to_numpy(dtype=np.bool_) if "foreign" in decode else np.zeros(len(decode), np.bool_)
    return {
        "context_tokens": column(decode, "context_tokens"),
        "num_requests": column(decode, "num_running"),
        "drafted": (drafted & ~foreign).astype(np.float64),
        "drafted_otherwise": (drafted & foreign).astype(np.float64),
    }


def _verify_seconds(decode: pd.DataFrame) -> FloatArray:
    return column(decode, "verify_seconds")


def _host_seconds(decode: pd.DataFrame) -> FloatArray:
    return spans(decode, "policy", "accept", "host")
