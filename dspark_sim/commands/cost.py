"""The command cost: look at cost tables, make them from traces or a roofline, and trade them with SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro

from dspark_sim.commands.output import print_table
from dspark_sim.cost import HARDWARE_KEYS, CostModel, fit
from dspark_sim.cost_parametric import coefficient_rows, fit_parametric
from dspark_sim.cost_table import PROBES, read_sglang_table, write_sglang_table
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import SHAPES
from dspark_sim.roofline import ACCELERATORS, DRAFTERS, Efficiency, kv_capacity_tokens, roofline


@dataclass(frozen=True)
class Show:
    """Print what a cost table says: seconds by batch size, where it is from, and the errors of its fit."""

    file: tyro.conf.Positional[Path]
    """Cost table."""
    draft_len: int = 7
    """Drafted tokens per request."""
    context_len: int = 512
    """Tokens in the KV cache of each request."""
    num_requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Numbers of running requests."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        cost = CostModel.read(self.file)
        if min(self.draft_len, self.context_len, *(number - 1 for number in self.num_requests)) < 0:
            raise UserError(
                f"num_requests {self.num_requests}, draft_len {self.draft_len} and context_len {self.context_len} "
                "cannot be priced; give at least 1 request and no negative length"
            )
        print_table(pd.DataFrame([self._row(cost, number) for number in self.num_requests]), self.json)
        coefficients = coefficient_rows(cost)
        if coefficients:
            print()
            print_table(pd.DataFrame(coefficients), None, {"leave_one_out_error": ".1%"})
        _print_origin(cost)

    def _row(self, cost: CostModel, num_requests: int) -> dict[str, Any]:
        context, tokens = num_requests * self.context_len, num_requests * (1 + self.draft_len)
        plain = cost.round_seconds(num_requests, context, num_requests, 0)
        return {
            "num_requests": num_requests,
            "plain_seconds": plain,
            "draft_seconds": cost.draft_seconds(num_requests, self.draft_len, context),
            "verify_seconds": cost.step_seconds(tokens, context, num_requests),
            "host_seconds": cost.host_seconds(num_requests),
            "round_over_plain": cost.round_seconds(tokens, context, num_requests, self.draft_len) / plain,
        }


@dataclass(frozen=True)
class Fit:
    """Fit a cost table to the steps of traces of this package."""

    traces: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of traces that were recorded on one machine with one target and drafter."""
    out: Path
    """Cost table to write."""
    kind: Literal["curve", "parametric"] = "curve"
    """curve: through the measured seconds at every batch size.
    parametric: seconds fixed, per request, per token and per context token."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.trace import Trace

        traces = [Trace.read(path) for path in self.traces]
        if not traces:
            raise UserError("no trace to fit to; give one or more folders")
        origin = {key: traces[0].provenance.get(key) for key in HARDWARE_KEYS}
        for path, trace in zip(self.traces, traces, strict=True):
            theirs = {key: trace.provenance.get(key) for key in HARDWARE_KEYS}
            if theirs != origin:
                raise UserError(f"{path} was recorded on {theirs} and {self.traces[0]} on {origin}; fit them apart")
        origin = {**origin, "drafter": traces[0].config.get("drafter")}
        make = fit if self.kind == "curve" else fit_parametric
        cost = make([trace.steps for trace in traces], origin)
        cost.write(self.out)
        Show(self.out, json=self.json).run()
        print(f"Wrote {self.out}.")


@dataclass(frozen=True)
class ExportSglang:
    """Write a cost table as SGLang's, for --speculative-dspark-sps-table-path."""

    file: tyro.conf.Positional[Path]
    """Cost table."""
    out: tyro.conf.Positional[Path]
    """SGLang's JSON file to write."""
    probes: tuple[int, ...] = PROBES
    """Batch tokens to write the rate at."""
    context_len: int = 512
    """Tokens in the KV cache of each request."""
    draft_len: int = 0
    """Tokens drafted per request; 0 is plain decoding, which SGLang's own profiler measures."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        cost = CostModel.read(self.file)
        write_sglang_table(cost, self.out, self.probes, context_len=self.context_len, draft_len=self.draft_len)
        _print_probes(read_sglang_table(self.out), self.probes, self.json)
        print(f"Wrote {self.out}.")


@dataclass(frozen=True)
class ImportSglang:
    """Make a cost table from SGLang's. Its seconds are those of whole steps; drafts then cost nothing extra."""

    file: tyro.conf.Positional[Path]
    """SGLang's JSON file."""
    out: tyro.conf.Positional[Path]
    """Cost table to write."""
    device: str
    """Name of the device it was measured on."""
    model: str
    """Name of the target it was measured with."""
    dtype: str | None = None
    """Type of the target's weights."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        origin = {"device": self.device, "model": self.model, "dtype": self.dtype}
        cost = read_sglang_table(self.file, origin)
        cost.write(self.out)
        _print_probes(cost, tuple(int(size) for size in getattr(cost.verify, "knots", ())), self.json)
        print(f"Wrote {self.out}.")


@dataclass(frozen=True)
class Roofline:
    """Make a cost table from published figures of an accelerator and a model, for hardware one does not have."""

    out: Path
    """Cost table to write."""
    device: Literal["h100", "h200", "a100", "l40s", "rtx4090", "mi300x", "tpu-v5e", "tpu-v6e"] = "h100"
    """Accelerator."""
    model: Literal[
        "smollm2-135m",
        "llama-3.1-8b",
        "qwen3-4b",
        "qwen3-8b",
        "qwen3-14b",
        "qwen3-32b",
        "gemma-7b",
        "qwen3-30b-a3b",
        "deepseek-v3",
        "deepseek-v4-flash",
    ] = "qwen3-8b"
    """Target."""
    drafter: Literal["dspark", "dflash", "eagle3", "mtp", "none"] = "dspark"
    """Drafter beside it."""
    num_devices: int = 1
    """Accelerators that share the model."""
    bandwidth_efficiency: float = Efficiency.bandwidth
    """Share of the published bandwidth that is reached."""
    compute_efficiency: float = Efficiency.compute
    """Share of the published rate of operations that is reached."""
    pass_seconds: float = Efficiency.pass_seconds
    """Seconds of every pass, whatever its size."""
    layer_seconds: float = Efficiency.layer_seconds
    """Seconds of every layer of a pass: launches, communication between devices."""
    host_seconds: float = Efficiency.host_seconds
    """Seconds of a round outside the passes."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        accelerator, shape = ACCELERATORS[self.device], SHAPES[self.model]
        cost = roofline(
            accelerator,
            shape,
            None if self.drafter == "none" else DRAFTERS[self.drafter],
            num_devices=self.num_devices,
            efficiency=Efficiency(
                self.bandwidth_efficiency,
                self.compute_efficiency,
                self.pass_seconds,
                self.layer_seconds,
                self.host_seconds,
            ),
        )
        cost.write(self.out)
        Show(self.out, json=self.json).run()
        capacity = kv_capacity_tokens(accelerator, shape, self.num_devices)
        print(f"{capacity} tokens of context fit in 90% of memory. An estimate from published figures, not measured.")
        print(f"Wrote {self.out}.")


Cost = Show | Fit | ExportSglang | ImportSglang | Roofline
"""What `dspark-sim cost` does."""


def _print_probes(cost: CostModel, probes: tuple[int, ...], json: Path | None) -> None:
    seconds = [cost.step_seconds(size, 0, 1) for size in probes]
    rows = [
        {"batch_tokens": size, "step_seconds": value, "steps_per_second": 1.0 / value}
        for size, value in zip(probes, seconds, strict=True)
    ]
    print_table(pd.DataFrame(rows), json)


def _print_origin(cost: CostModel) -> None:
    known = cost.provenance
    names = ("source", "device", "num_devices", "model", "dtype", "num_threads", "drafter")
    said = [f"{name} {known[name]}" for name in names if isinstance(known.get(name), str | int)]
    print(f"Of {', '.join(said) or 'unknown origin'}.")
    error, held_out = known.get("verify_mean_abs_error"), known.get("verify_leave_one_out_error")
    if error is not None:
        print(f"Mean absolute error of a target pass {error:.1%}.")
    if held_out is not None:
        print(f"Mean error of a left-out batch size {held_out:.1%}.")
    if cost.residuals:
        low, high = cost.residuals[0], cost.residuals[-1]
        print(f"{len(cost.residuals)} residuals of round seconds kept, from {low:.2f} to {high:.2f} of the fit.")
