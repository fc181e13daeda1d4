"""What the rows of a `steps` table say about costs: columns, spans, padded sizes, and what a fit leaves over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from dspark_sim.cost_curve import FloatArray
from dspark_sim.cost_model import CostModel

_MOST_RESIDUALS = 512


def column(frame: pd.DataFrame, name: str) -> FloatArray:
    """A column as floats."""
    return frame[name].to_numpy(dtype=np.float64)


def spans(frame: pd.DataFrame, *names: str) -> FloatArray:
    """Sum of named spans, in seconds by row."""
    return sum((column(frame, f"{name}_seconds") for name in names), np.zeros(len(frame)))


def with_residuals(model: CostModel, decode: pd.DataFrame, prefill: pd.DataFrame) -> CostModel:
    """The model with what its fit left over, from decode rounds and prefill iterations of a `steps` table."""
    num_requests, draft_len = column(decode, "num_running"), column(decode, "draft_len")
    context_tokens = column(decode, "context_tokens")
    sizes = {"num_requests": num_requests, "context_tokens": context_tokens}
    fitted = model.verify.seconds(column(decode, "batch_tokens"), **sizes) + model.host.seconds(
        num_requests, num_requests=num_requests
    )
    for part in (model.draft, model.head):
        if part is not None:
            drafted = part.seconds(num_requests, **sizes, draft_len=draft_len, draft_tokens=num_requests * draft_len)
            fitted = fitted + np.where(draft_len > 0, drafted, 0.0)
    measured = spans(decode, "draft", "head", "policy", "verify", "accept", "host")
    prompts, together = column(prefill, "num_prefill_tokens"), column(prefill, "num_running")
    first = model.prefill.seconds(prompts) + model.prefill_host.seconds(together, num_requests=together)
    return replace(
        model,
        residuals=_residuals(measured, fitted),
        prefill_residuals=_residuals(spans(prefill, "prefill", "host"), first),
    )


def _residuals(measured: FloatArray, fitted: FloatArray) -> tuple[float, ...]:
    """Ratios of mean 1, rising; of many, so many quantiles."""
    ratios = measured[fitted > 0] / fitted[fitted > 0]
    if not ratios.size or not ratios.sum() > 0:
        return ()
    if ratios.size > _MOST_RESIDUALS:
        ratios = np.quantile(ratios, (np.arange(_MOST_RESIDUALS) + 0.5) / _MOST_RESIDUALS)
    return tuple(np.sort(ratios / ratios.mean()).tolist())


def captured_sizes(decode: pd.DataFrame) -> tuple[float, ...]:
    """Sizes that batches were padded to, rising: every padded size up to the largest that is more than the batch."""
    if "padded_tokens" not in decode:
        return ()
    padded, logical = column(decode, "padded_tokens"), column(decode, "batch_tokens")
    if not (padded > logical).any():
        return ()
    return tuple(np.unique(padded[padded <= padded[padded > logical].max()]).tolist())
