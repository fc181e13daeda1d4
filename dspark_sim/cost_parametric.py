"""A cost model of few coefficients: fixed + per request + per token + per context token, for every part.

It can be read, edited by hand and carried to sizes that were not profiled, where a curve cannot. Coefficients are
non-negative and least in squared relative error. A profile often moves two of them together: with a fixed draft
length the tokens of a batch are a multiple of its requests, and no fit can part what either costs. Then the first of
them takes all, and the other is named in the provenance, under ``not_identified``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dspark_sim.cost_curve import FloatArray, relative_least_squares
from dspark_sim.cost_model import CostModel
from dspark_sim.cost_parts import Parametric
from dspark_sim.cost_steps import column, spans, with_residuals
from dspark_sim.errors import UserError

# Of a column's variation, what the columns before it must leave unexplained for its coefficient to be told apart.
_LEAST_UNEXPLAINED = 0.02


def fit_parametric(
    steps: pd.DataFrame | Iterable[pd.DataFrame], provenance: Mapping[str, Any] | None = None
) -> CostModel:
    """Fit coefficients for verify, draft, head, host and prefill.

    Parameters
    ----------
    steps
        `steps` tables of schema version 1.
    provenance
        Hardware and model the steps were measured on.

    Returns
    -------
    CostModel
        Of `Parametric` parts. Its provenance has ``not_identified`` (part to names of coefficients) and, per part,
        ``…_leave_one_out_error``: the mean relative error when each batch size but the two extreme ones is left out
        of the fit in turn.

    Raises
    ------
    UserError
        If there is no decode round to fit.
    """
    frame = steps if isinstance(steps, pd.DataFrame) else pd.concat(list(steps), ignore_index=True)
    decode, prefill = frame[frame["num_prefill_tokens"] == 0], frame[frame["num_prefill_tokens"] > 0]
    if decode.empty:
        raise UserError("the profile has no decode round; profile longer or at a lower concurrency")
    drafted = decode[decode["draft_len"] > 0]
    by_part = {
        "verify": (_verify_columns(decode), column(decode, "verify_seconds"), column(decode, "batch_tokens")),
        "host": (_host_columns(decode), spans(decode, "policy", "accept", "host"), column(decode, "num_running")),
    }
    for name in ("draft", "head"):
        seconds = column(drafted, f"{name}_seconds")
        if seconds.any():
            by_part[name] = (_draft_columns(drafted), seconds, column(drafted, "num_running"))
    if not prefill.empty:
        tokens = column(prefill, "num_prefill_tokens")
        by_part["prefill"] = ({"fixed": np.ones(len(tokens)), "per_token": tokens}, spans(prefill, "prefill"), tokens)

    parts: dict[str, Parametric] = {}
    notes: dict[str, Any] = {"num_decode_steps": len(decode), "num_prefill_steps": len(prefill), "not_identified": {}}
    behind_draft = 0.0
    for name, (columns, seconds, sizes) in by_part.items():
        coefficients, lost = _coefficients(columns, seconds)
        # What a target pass takes longer behind a draft is the draft's cost, as in `cost.fit`.
        behind_draft += coefficients.pop("behind_draft", 0.0)
        parts[name] = Parametric(**coefficients)
        notes[f"{name}_leave_one_out_error"] = _leave_one_out(columns, seconds, sizes)
        if lost:
            notes["not_identified"][name] = lost
    draft = parts.get("draft", Parametric())
    draft = replace(draft, fixed=draft.fixed + behind_draft)
    # num_running counts the whole batch; the iteration's own requests are not recorded, and its host part is small.
    prefill_host = Parametric() if prefill.empty else Parametric(float(column(prefill, "host_seconds").mean()))
    model = CostModel(
        verify=parts["verify"],
        draft=draft,
        prefill=parts.get("prefill", Parametric()),
        host=parts["host"],
        prefill_host=prefill_host,
        provenance={**(provenance or {}), **notes},
        head=parts.get("head"),
    )
    return with_residuals(model, decode, prefill)


def coefficient_rows(cost: CostModel) -> list[dict[str, Any]]:
    """A row per parametric part: its coefficients, its leave-one-out error, and what could not be told apart."""
    lost: Mapping[str, list[str]] = cost.provenance.get("not_identified", {})
    rows = []
    for name in ("verify", "draft", "head", "host", "prefill", "prefill_host"):
        part = getattr(cost, name)
        if isinstance(part, Parametric):
            error = cost.provenance.get(f"{name}_leave_one_out_error")
            extra = {"leave_one_out_error": error, "not_identified": ", ".join(lost.get(name, [])) or "-"}
            rows.append({"part": name, **vars(part), **extra})
    return rows


def _verify_columns(decode: pd.DataFrame) -> dict[str, FloatArray]:
    drafted = (column(decode, "draft_len") > 0).astype(np.float64)
    return {
        "fixed": np.ones(len(decode)),
        "per_token": column(decode, "batch_tokens"),
        "per_context_token": column(decode, "context_tokens"),
        "per_request": column(decode, "num_running"),
        **({"behind_draft": drafted} if 0.0 < drafted.mean() < 1.0 else {}),
    }


def _draft_columns(drafted: pd.DataFrame) -> dict[str, FloatArray]:
    return {
        "fixed": np.ones(len(drafted)),
        "per_token": column(drafted, "draft_len") * column(drafted, "num_running"),
        "per_position": column(drafted, "draft_len"),
        "per_context_token": column(drafted, "context_tokens"),
        "per_request": column(drafted, "num_running"),
    }


def _host_columns(decode: pd.DataFrame) -> dict[str, FloatArray]:
    return {"fixed": np.ones(len(decode)), "per_request": column(decode, "num_running")}


def _coefficients(columns: Mapping[str, FloatArray], seconds: FloatArray) -> tuple[dict[str, float], list[str]]:
    """Fitted coefficients by name, and the names of those that the others explain."""
    kept: list[str] = []
    lost: list[str] = []
    for name, values in columns.items():
        (lost if _is_explained(values, [columns[other] for other in kept]) else kept).append(name)
    fitted = relative_least_squares(np.column_stack([columns[name] for name in kept]), seconds)
    return dict(zip(kept, fitted.tolist(), strict=True)), lost


def _is_explained(values: FloatArray, others: list[FloatArray]) -> bool:
    if not others:
        return False
    design = np.column_stack(others)
    scale = np.maximum(np.abs(design).max(axis=0), 1e-30)
    solution = np.linalg.lstsq(design / scale, values, rcond=None)[0]
    rest = np.linalg.norm(values - (design / scale) @ solution)
    return bool(rest <= _LEAST_UNEXPLAINED * np.linalg.norm(values))


def _leave_one_out(columns: Mapping[str, FloatArray], seconds: FloatArray, sizes: FloatArray) -> float | None:
    errors = []
    for size in np.unique(sizes)[1:-1]:
        held = sizes == size
        coefficients, _ = _coefficients({name: values[~held] for name, values in columns.items()}, seconds[~held])
        predicted = sum(value * columns[name][held].sum() for name, value in coefficients.items())
        if seconds[held].sum() > 0:
            errors.append(abs(float(predicted / seconds[held].sum()) - 1.0))
    return float(np.mean(errors)) if errors else None
