"""What an iteration costs, in seconds, fitted from the `steps` table of a profile run.

Every part of an iteration (prefill, draft, verify, host) is a `Curve`: a piecewise-linear function of one size, plus
non-negative linear terms. It does not fall, except that the target pass has a level of its own at every small batch
size: matrix kernels handle a few rows in groups, and a CPU may take longer for 3 tokens than for 4 or 8. Values
between probes are interpolated **in seconds**; interpolating rates instead underestimates the time between probes
and over-admits. All times are seconds, all sizes are token or request counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls

from dspark_sim.errors import UserError, explain_os_errors

FloatArray = npt.NDArray[np.float64]
_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
# Above so many tokens a matrix product's time no longer depends on how its rows divide into groups.
_STAIRCASE = 16
_ENOUGH = 4
HARDWARE_KEYS = ("device", "model", "dtype", "num_threads")


@dataclass(frozen=True)
class Curve:
    """Seconds as ``interpolate(size) + Σ coefficient · feature``.

    Parameters
    ----------
    knots, levels
        Sizes, rising, and the seconds at each. Above the last knot the last segment continues if it rises; below
        the first the first level holds.
    linear
        Pairs (feature name, seconds per unit).
    """

    knots: tuple[float, ...] = (1.0,)
    levels: tuple[float, ...] = (0.0,)
    linear: tuple[tuple[str, float], ...] = ()

    def seconds(self, size: npt.ArrayLike, **features: npt.ArrayLike) -> FloatArray:
        """Evaluate at `size`; features may be scalars or arrays of the same shape."""
        x = np.asarray(size, dtype=np.float64)
        total = np.interp(x, self.knots, self.levels)
        if len(self.knots) > 1:
            slope = (self.levels[-1] - self.levels[-2]) / (self.knots[-1] - self.knots[-2])
            total = total + max(slope, 0.0) * np.maximum(x - self.knots[-1], 0.0)
        for name, coefficient in self.linear:
            total = total + coefficient * np.asarray(features[name], dtype=np.float64)
        return np.asarray(total)

    @staticmethod
    def fit(size: FloatArray, seconds: FloatArray, staircase: int = 0, **features: FloatArray) -> Curve:
        """Non-negative least squares on relative error.

        Parameters
        ----------
        size, seconds
            [n], the size of each observation and its time.
        staircase
            Every size up to this one that was seen a few times is a knot with a free level; the curve rises from the
            last of them on.
        features
            [n] each, further non-negative terms.

        Raises
        ------
        UserError
            If there is no observation.
        """
        if size.size == 0:
            raise UserError("no step to fit a cost curve from; profile at least one step of every kind")
        # One knot per step of the ladder, at the largest size seen there: every level has data, so none is free.
        sizes, counts = np.unique(size, return_counts=True)
        rungs = np.searchsorted(_LADDER, sizes)
        free = sizes[(sizes <= staircase) & (counts >= _ENOUGH)]
        ladder = sizes[np.append(rungs[1:] > rungs[:-1], True)]
        free = np.union1d(free, sizes[:1])
        knots = np.union1d(free, ladder[ladder > free[-1]])
        num_free = len(free)
        steps = [np.interp(size, knots[:num_free], level) for level in np.eye(num_free)]
        ramps = [np.clip((size - low) / (high - low), 0.0, 1.0) for low, high in pairwise(knots[num_free - 1 :])]
        design = np.column_stack([*steps, *ramps, *features.values()])
        scale = np.maximum(np.abs(design).max(axis=0), 1e-30)
        predicted = np.maximum(seconds, 1e-9)
        coefficients = np.zeros(design.shape[1])
        # Weight by the fitted value, not by the observation: observations' reciprocals favour the fast ones.
        for _ in range(3):
            coefficients, _ = nnls(design / scale / predicted[:, None], seconds / predicted)
            predicted = np.maximum(design @ (coefficients / scale), 1e-3 * np.median(seconds) + 1e-9)
        coefficients = coefficients / scale
        rising = coefficients[num_free - 1] + np.cumsum(coefficients[num_free : len(knots)])
        levels = np.concatenate((coefficients[:num_free], rising))
        linear = zip(features, coefficients[len(knots) :].tolist(), strict=True)
        return Curve(tuple(knots.tolist()), tuple(levels.tolist()), tuple(linear))


@dataclass(frozen=True)
class CostModel:
    """Seconds of every part of an iteration.

    Parameters
    ----------
    verify
        Target pass by batch tokens, with terms for context tokens and requests.
    draft
        Backbone and head by number of requests, with terms for positions, drafted tokens and context.
    prefill
        Target pass over prompts by prompt tokens.
    host, prefill_host
        Policy, acceptance and bookkeeping of a decode round and of a prefill iteration, by requests.
    provenance
        Device, model, dtype and thread count it was measured on, and the fit's errors.
    """

    verify: Curve
    draft: Curve = field(default_factory=Curve)
    prefill: Curve = field(default_factory=Curve)
    host: Curve = field(default_factory=Curve)
    prefill_host: Curve = field(default_factory=Curve)
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @overload
    def step_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int) -> float: ...

    @overload
    def step_seconds(self, batch_tokens: npt.NDArray[Any], context_tokens: int, num_requests: int) -> FloatArray: ...

    def step_seconds(
        self, batch_tokens: int | npt.NDArray[Any], context_tokens: int, num_requests: int
    ) -> float | FloatArray:
        """Seconds of one target pass at `batch_tokens` (B) tokens; scalar in, scalar out."""
        seconds = self.verify.seconds(batch_tokens, context_tokens=context_tokens, num_requests=num_requests)
        return seconds if isinstance(batch_tokens, np.ndarray) else float(seconds)

    def draft_seconds(self, num_requests: int, draft_len: int, context_tokens: int) -> float:
        """Seconds of drafting `draft_len` tokens for each request; 0 for none."""
        if draft_len == 0 or num_requests == 0:
            return 0.0
        return float(
            self.draft.seconds(
                num_requests,
                draft_len=draft_len,
                draft_tokens=num_requests * draft_len,
                context_tokens=context_tokens,
            )
        )

    def prefill_seconds(self, num_tokens: int) -> float:
        """Seconds of a prefill iteration's target pass."""
        return float(self.prefill.seconds(num_tokens))

    def host_seconds(self, num_requests: int) -> float:
        """Seconds of a decode round outside draft and verify."""
        return float(self.host.seconds(num_requests))

    def prefill_host_seconds(self, num_requests: int) -> float:
        """Seconds of a prefill iteration outside the target pass."""
        return float(self.prefill_host.seconds(num_requests))

    def round_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int, draft_len: int) -> float:
        """Seconds of a whole decode round."""
        return (
            self.step_seconds(batch_tokens, context_tokens, num_requests)
            + self.draft_seconds(num_requests, draft_len, context_tokens)
            + self.host_seconds(num_requests)
        )

    def require_hardware(self, actual: Mapping[str, Any]) -> None:
        """Refuse a table that was measured elsewhere.

        Raises
        ------
        UserError
            If device, model, dtype or thread count differ; absent entries are not compared.
        """
        for key in HARDWARE_KEYS:
            mine, theirs = self.provenance.get(key), actual.get(key)
            if mine is not None and theirs is not None and mine != theirs:
                raise UserError(
                    f"the cost table was measured with {key} {mine} and this run has {theirs}; "
                    "profile this machine with `dspark-sim profile`"
                )

    def write(self, path: Path | str) -> None:
        """Write as JSON.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        path = Path(path)
        with explain_os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")
            partial.rename(path)

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> CostModel:
        """Inverse of `to_json`."""
        curves = {
            name: Curve(
                tuple(document[name]["knots"]),
                tuple(document[name]["levels"]),
                tuple((feature, value) for feature, value in document[name]["linear"]),
            )
            for name in ("verify", "draft", "prefill", "host", "prefill_host")
        }
        return CostModel(**curves, provenance=dict(document["provenance"]))

    @staticmethod
    def read(path: Path | str) -> CostModel:
        """Read a table written by `write`.

        Raises
        ------
        UserError
            If the file is missing, damaged, or not a cost table.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no cost table at {path}; make one with `dspark-sim profile`")
        with explain_os_errors(path, "read"):
            try:
                return CostModel.from_json(json.loads(path.read_text()))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is not a cost table ({error}); make one with `dspark-sim profile`") from error


def fit(
    steps: pd.DataFrame | Iterable[pd.DataFrame],
    provenance: Mapping[str, Any] | None = None,
    others: Iterable[pd.DataFrame] = (),
) -> CostModel:
    """Fit a cost model from the `steps` tables of one or more runs.

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
    with_draft = _fit_verify(every)
    behind_draft = dict(with_draft.linear)["drafted"]
    verify = replace(with_draft, linear=tuple(pair for pair in with_draft.linear if "drafted" not in pair[0]))
    draft = Curve()
    if not drafted.empty:
        draft = Curve.fit(
            _column(drafted, "num_running"),
            _column(drafted, "draft_seconds") + _column(drafted, "head_seconds"),
            draft_len=_column(drafted, "draft_len"),
            draft_tokens=_column(drafted, "draft_len") * _column(drafted, "num_running"),
            context_tokens=_column(drafted, "context_tokens"),
        )
        draft = replace(draft, levels=tuple(level + behind_draft for level in draft.levels))
    host = Curve.fit(_column(decode, "num_running"), _host_seconds(decode))
    prefill_curve = prefill_host = Curve()
    if not prefill.empty:
        prefill_curve = Curve.fit(_column(prefill, "num_prefill_tokens"), _column(prefill, "prefill_seconds"))
        # num_running counts the whole batch; the iteration's own requests are not recorded, and its host part is small.
        prefill_host = Curve(levels=(float(_column(prefill, "host_seconds").mean()),))
    notes = {
        "num_decode_steps": len(decode),
        "num_prefill_steps": len(prefill),
        "verify_mean_abs_error": float(np.mean(np.abs(_predict(with_draft, every) / _verify_seconds(every) - 1.0))),
        "verify_leave_one_out_error": leave_one_out_error(every),
    }
    return CostModel(verify, draft, prefill_curve, host, prefill_host, {**(provenance or {}), **notes})


def leave_one_out_error(decode: pd.DataFrame) -> float:
    """Mean relative error of verify seconds when each batch size in turn is left out of the fit.

    Batch sizes at the two ends are not left out: the curve is asked to interpolate, not to extrapolate.
    """
    sizes = np.sort(decode["batch_tokens"].unique())
    errors = []
    for size in sizes[1:-1]:
        held = decode["batch_tokens"] == size
        errors.append(abs(_bias(_fit_verify(decode[~held]), decode[held])))
    return float(np.mean(errors)) if errors else float("nan")


def _fit_verify(decode: pd.DataFrame) -> Curve:
    return Curve.fit(_column(decode, "batch_tokens"), _verify_seconds(decode), _STAIRCASE, **_verify_features(decode))


def _predict(curve: Curve, decode: pd.DataFrame) -> FloatArray:
    return curve.seconds(_column(decode, "batch_tokens"), **_verify_features(decode))


def _bias(curve: Curve, decode: pd.DataFrame) -> float:
    return float(_predict(curve, decode).sum() / _verify_seconds(decode).sum() - 1.0)


def _verify_features(decode: pd.DataFrame) -> dict[str, FloatArray]:
    drafted = (decode["draft_len"] > 0).to_numpy()
    foreign = decode["foreign"].to_numpy(dtype=np.bool_) if "foreign" in decode else np.zeros(len(decode), np.bool_)
    return {
        "context_tokens": _column(decode, "context_tokens"),
        "num_requests": _column(decode, "num_running"),
        "drafted": (drafted & ~foreign).astype(np.float64),
        "drafted_otherwise": (drafted & foreign).astype(np.float64),
    }


def _verify_seconds(decode: pd.DataFrame) -> FloatArray:
    return _column(decode, "verify_seconds")


def _host_seconds(decode: pd.DataFrame) -> FloatArray:
    return sum((_column(decode, f"{span}_seconds") for span in ("policy", "accept", "host")), np.zeros(len(decode)))


def _column(frame: pd.DataFrame, name: str) -> FloatArray:
    return frame[name].to_numpy(dtype=np.float64)
