"""The cost model: seconds of every part of an iteration, its file, and the hardware it is of.

Every part of an iteration (prefill, draft, head, verify, host) is a `Part`: a curve through measured values, a sum of
coefficients, or a roofline. Any of them may stand in any place, so a cost model may be measured, analytical, or mixed.
All times are seconds, all sizes are token or request counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from dspark_sim.cost_curve import Curve, FloatArray
from dspark_sim.cost_parts import Part, part_from_json, part_to_json
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file

_PARTS = ("verify", "draft", "prefill", "host", "prefill_host")
HARDWARE_KEYS = ("device", "model", "dtype", "num_threads")


class IterationSeconds(Protocol):
    """What a simulator asks of a cost: the seconds of every part, in the order in which an iteration spends them."""

    def prefill_seconds(self, num_tokens: int, context_tokens: int = 0, num_requests: int = 1) -> float:
        """Target pass over prompt tokens of some requests, behind what earlier chunks have put into the KV cache."""
        ...

    def prefill_host_seconds(self, num_requests: int) -> float:
        """The rest of a prefill iteration, asked for once, last."""
        ...

    def draft_seconds(self, num_requests: int, draft_len: int, context_tokens: int) -> float:
        """Drafting `draft_len` tokens for each request."""
        ...

    def step_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int) -> float:
        """Target pass of a decode round."""
        ...

    def host_seconds(self, num_requests: int) -> float:
        """The rest of a decode round, asked for once, last."""
        ...


@dataclass(frozen=True)
class CostModel:
    """Seconds of every part of an iteration.

    Parameters
    ----------
    verify
        Target pass by batch tokens, with terms for context tokens and requests.
    draft
        Backbone (and head, unless it has a part of its own) by number of requests, with terms for positions, drafted
        tokens and context.
    prefill
        Target pass over prompts by prompt tokens.
    host, prefill_host
        Policy, acceptance and bookkeeping of a decode round and of a prefill iteration, by requests.
    provenance
        Device, model, dtype and thread count it was measured on, and the fit's errors.
    head
        The drafter's sequential head, where it is known apart from the backbone.
    residuals, prefill_residuals
        Measured over fitted seconds of decode rounds and of prefill iterations, mean 1, rising; see `cost_noise`.
    """

    verify: Part
    draft: Part = field(default_factory=Curve)
    prefill: Part = field(default_factory=Curve)
    host: Part = field(default_factory=Curve)
    prefill_host: Part = field(default_factory=Curve)
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)
    head: Part | None = None
    residuals: tuple[float, ...] = ()
    prefill_residuals: tuple[float, ...] = ()

    @property
    def largest_batch(self) -> float:
        """Most batch tokens that the target pass was measured at; infinite for a formula."""
        return self.verify.knots[-1] if isinstance(self.verify, Curve) else float("inf")

    @overload
    def step_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int) -> float: ...

    @overload
    def step_seconds(self, batch_tokens: npt.NDArray[Any], context_tokens: int, num_requests: int) -> FloatArray: ...

    def step_seconds(
        self, batch_tokens: int | npt.NDArray[Any], context_tokens: int, num_requests: int
    ) -> float | FloatArray:
        """Seconds of one target pass at `batch_tokens` (B) tokens; scalar in, scalar out."""
        if isinstance(batch_tokens, np.ndarray):
            return self.verify.seconds(batch_tokens, context_tokens=context_tokens, num_requests=num_requests)
        return self.verify.scalar(batch_tokens, context_tokens, num_requests, 0)

    @overload
    def draft_seconds(self, num_requests: int, draft_len: int, context_tokens: int) -> float: ...

    @overload
    def draft_seconds(self, num_requests: int, draft_len: npt.NDArray[Any], context_tokens: int) -> FloatArray: ...

    def draft_seconds(
        self, num_requests: int, draft_len: int | npt.NDArray[Any], context_tokens: int
    ) -> float | FloatArray:
        """Seconds of drafting `draft_len` tokens for each request, head included; 0 for none."""
        if isinstance(draft_len, np.ndarray):
            total = np.zeros(draft_len.shape)
            for part in (self.draft, self.head):
                if part is not None:
                    total = total + part.seconds(
                        num_requests,
                        num_requests=num_requests,
                        draft_len=draft_len,
                        draft_tokens=num_requests * draft_len,
                        context_tokens=context_tokens,
                    )
            return np.where((draft_len == 0) | (num_requests == 0), 0.0, total)
        if draft_len == 0 or num_requests == 0:
            return 0.0
        seconds = self.draft.scalar(num_requests, context_tokens, num_requests, draft_len)
        if self.head is not None:
            seconds += self.head.scalar(num_requests, context_tokens, num_requests, draft_len)
        return seconds

    def prefill_seconds(self, num_tokens: int, context_tokens: int = 0, num_requests: int = 1) -> float:
        """Seconds of a prefill iteration's target pass over `num_tokens` tokens of `num_requests` prompts.

        `context_tokens` are those of the prompts that earlier chunks have put into the KV cache.
        """
        return self.prefill.scalar(num_tokens, context_tokens, num_requests, 0)

    def host_seconds(self, num_requests: int) -> float:
        """Seconds of a decode round outside draft and verify."""
        return self.host.scalar(num_requests, 0, num_requests, 0)

    def prefill_host_seconds(self, num_requests: int) -> float:
        """Seconds of a prefill iteration outside the target pass."""
        return self.prefill_host.scalar(num_requests, 0, num_requests, 0)

    def round_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int, draft_len: int) -> float:
        """Seconds of a whole decode round."""
        rest = self.draft_seconds(num_requests, draft_len, context_tokens) + self.host_seconds(num_requests)
        return self.verify.scalar(batch_tokens, context_tokens, num_requests, 0, rest)

    def round_table(self, num_requests: int, draft_len: int, context_tokens: int) -> FloatArray:
        """Seconds of a whole decode round by drafted tokens verified: a slice of a table plus a number.

        Returns
        -------
        array
            [R·γ + 1]; entry i is `round_seconds` at R + i batch tokens, to the bit.
        """
        rest = self.draft_seconds(num_requests, draft_len, context_tokens) + self.host_seconds(num_requests)
        return self.verify.run(num_requests, num_requests * (1 + draft_len), context_tokens, num_requests, rest)

    def require_hardware(self, actual: Mapping[str, Any], *, force: bool = False) -> CostModel:
        """Refuse a table that was measured elsewhere.

        Parameters
        ----------
        actual
            Device, model, dtype and thread count of this run; absent entries are not compared.
        force
            Warn instead, in one line.

        Returns
        -------
        CostModel
            This one; forced, a copy whose provenance has the differences under ``forced``.

        Raises
        ------
        UserError
            If any of them differ and `force` is not set.
        """
        differences = {}
        for key in HARDWARE_KEYS:
            mine, theirs = self.provenance.get(key), actual.get(key)
            if mine is not None and theirs is not None and mine != theirs:
                differences[key] = [mine, theirs]
        if not differences:
            return self
        said = ", ".join(f"{key} {mine} and this run has {theirs}" for key, (mine, theirs) in differences.items())
        if not force:
            raise UserError(
                f"the cost table was measured with {said}; profile this machine with `dspark-sim profile`, or use "
                "--force-cost"
            )
        warnings.warn(f"the cost table was measured with {said}; forced to use it all the same", stacklevel=2)
        return replace(self, provenance={**self.provenance, "forced": differences})

    def write(self, path: Path | str) -> None:
        """Write as JSON.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        with whole_file(path) as partial:
            # A fit's error may be no number, which JSON proper does not have.
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` reads it back."""
        return {
            **{name: part_to_json(getattr(self, name)) for name in _PARTS},
            "head": None if self.head is None else part_to_json(self.head),
            "residuals": list(self.residuals),
            "prefill_residuals": list(self.prefill_residuals),
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> CostModel:
        """Inverse of `to_json`; parts without a `kind` are curves, as written before there were others."""
        parts = {name: part_from_json(document[name]) for name in _PARTS}
        head = document.get("head")
        return CostModel(
            **parts,
            provenance=dict(document["provenance"]),
            head=None if head is None else part_from_json(head),
            residuals=tuple(map(float, document.get("residuals", ()))),
            prefill_residuals=tuple(map(float, document.get("prefill_residuals", ()))),
        )

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
            except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
                raise UserError(f"{path} is not a cost table ({error}); make one with `dspark-sim profile`") from error
