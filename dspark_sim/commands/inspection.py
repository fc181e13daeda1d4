"""Commands that look into traces: metrics, explain, export-trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file

if TYPE_CHECKING:
    from dspark_sim.analysis.slo import Objectives
    from dspark_sim.analysis.window import Window
    from dspark_sim.trace import Trace


@dataclass(frozen=True)
class Metrics:
    """All metrics of one run, or of several that differ in their seeds, with intervals.

    One trace: intervals by bootstrap over prompts, of rates and states of the server by batch means. Several traces:
    Student's t over them. The last column says which.
    """

    traces: tyro.conf.Positional[tuple[Path, ...]]
    """Traces of live or simulated runs."""
    slo: tuple[str, ...] = ()
    """Objectives in seconds, such as "ttft:0.5 tpot:0.05 e2e:10"; with "code=ttft:0.3" for one domain. Adds goodput and
    attainment."""
    goodput: tuple[str, ...] = ()
    """The same in milliseconds, as vLLM's bench serve has it: "ttft:500 tpot:50 e2el:10000"."""
    window: Literal["whole", "steady"] = "whole"
    """whole: first arrival to last finish. steady: from the end of the initial transient to the last arrival."""
    warmup_seconds: float = 0.0
    """Leave out so much at the start of the run (window whole)."""
    drain_seconds: float = 0.0
    """Leave out so much at its end."""
    by_domain: bool = False
    """A row per domain, too."""
    json: Path | None = None
    """Also write all rows and columns as JSON here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.measure import measure
        from dspark_sim.analysis.tables import aligned, write_rows
        from dspark_sim.trace import Trace

        if not self.traces:
            raise UserError("zero traces to measure; give at least one folder")
        objectives = objectives_of(self.slo, self.goodput)
        traces = [Trace.read(path) for path in self.traces]
        windows = [self._window(trace) for trace in traces]
        by_trace = dict(zip(map(id, traces), windows, strict=True))
        frame = measure(
            traces, objectives=objectives, window=lambda trace: by_trace[id(trace)], by_domain=self.by_domain
        )
        columns: tuple[str, ...] = (
            "metric",
            "domain",
            "unit",
            "per",
            "num",
            "mean",
            "low",
            "high",
            "p50",
            "p90",
            "p95",
            "p99",
            "method",
        )
        if not self.by_domain and objectives is None:
            columns = tuple(name for name in columns if name != "domain")
        for path, window in zip(self.traces, windows, strict=True):
            print(f"{path}: {window.start:.6g} to {window.end:.6g} s ({self.window})")
        print(aligned(frame, {name: name for name in columns}))
        if self.json is not None:
            write_rows(frame, self.json)

    def _window(self, trace: Trace) -> Window:
        from dspark_sim.analysis.window import steady, trimmed

        if self.window == "steady":
            if self.warmup_seconds or self.drain_seconds:
                raise UserError("--window steady finds its own warm-up; leave out --warmup-seconds and --drain-seconds")
            return steady(trace)
        return trimmed(trace, self.warmup_seconds, self.drain_seconds)


@dataclass(frozen=True)
class Explain:
    """What a policy saw and chose in one decode round: load, ranked drafts, expected throughput, what came of it.

    Everything is computed again from the trace, the choice included, and held against what was recorded.
    """

    trace: tyro.conf.Positional[Path]
    """Trace of a live or simulated run."""
    step: int
    """Number of the iteration."""
    cost: Path | None = None
    """The policy's cost table; default: the one in the trace."""
    recording: Path | None = None
    """The recording that was replayed: for what an oracle would choose, and for tetris and oracle themselves; default:
    the trace's own anchors."""
    top: int = 20
    """Candidates and points of the curve to print."""
    figure: Path | None = None
    """Draw the curve and the requests' drafts here (.png, .pdf or .svg)."""
    reaction: Path | None = None
    """Draw load, verified drafts and throughput of the whole run here."""
    json: Path | None = None
    """Also write it all as JSON here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.explain import explain
        from dspark_sim.cost import CostModel
        from dspark_sim.trace import Trace

        if self.top < 1:
            raise UserError(f"top is {self.top}; give at least 1")
        trace = Trace.read(self.trace)
        explanation = explain(
            trace,
            self.step,
            cost=None if self.cost is None else CostModel.read(self.cost),
            recording=None if self.recording is None else Trace.read(self.recording),
        )
        print(explanation.text(self.top))
        if self.json is not None:
            write_json(explanation.to_json(), self.json)
        if self.figure is not None or self.reaction is not None:
            from dspark_sim.analysis.plots import policy_decision, policy_reaction

            note = f"{'Simulated' if trace.clock == 'virtual' else 'Live'} run."
            if self.figure is not None:
                _draw(policy_decision(explanation, note), self.figure)
            if self.reaction is not None:
                _draw(policy_reaction(trace, note), self.reaction)


@dataclass(frozen=True)
class ExportTrace:
    """Write a trace in another tool's format."""

    trace: tyro.conf.Positional[Path]
    """Trace of a live or simulated run."""
    out: Path
    """File to write."""
    format: Literal["vllm", "vllm-requests", "perfetto"] = "vllm"
    """vllm: the result file of `vllm bench serve --save-result --save-detailed`.
    vllm-requests: JSON Lines, each request's usage and metrics as vLLM's responses have them.
    perfetto: a timeline for ui.perfetto.dev or chrome://tracing."""
    goodput: tuple[str, ...] = ()
    """For vllm: objectives in milliseconds, such as "ttft:500 tpot:50"."""
    tracks: Literal["auto", "request", "slot"] = "auto"
    """For perfetto: a track per request, or per slot (auto: slots above 256 requests)."""
    start: float | None = None
    """For perfetto: leave out what was before this second of the run."""
    end: float | None = None
    """For perfetto: leave out what was after it."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.timeline import write_timeline
        from dspark_sim.analysis.vllm_export import bench_serve, per_request_metrics
        from dspark_sim.analysis.window import Window, whole
        from dspark_sim.trace import Trace

        if self.out.is_dir():
            raise UserError(f"{self.out} is a folder; give a file to write")
        if self.goodput and self.format != "vllm":
            raise UserError(f"--goodput goes with format vllm and the format is {self.format}; leave it out")
        if (self.start is not None or self.end is not None) and self.format != "perfetto":
            raise UserError(
                f"--start and --end go with format perfetto and the format is {self.format}; leave them out"
            )
        trace = Trace.read(self.trace)
        if self.format == "vllm":
            write_json(bench_serve(trace, objectives_of((), self.goodput)), self.out)
        elif self.format == "vllm-requests":
            lines = [json.dumps(row, allow_nan=False) for row in per_request_metrics(trace)]
            _write(self.out, "\n".join(lines) + "\n")
        else:
            window = None
            if self.start is not None or self.end is not None:
                run = whole(trace)
                window = Window(
                    run.start if self.start is None else self.start, run.end if self.end is None else self.end
                )
            write_timeline(trace, self.out, tracks=self.tracks, window=window)
        print(f"Wrote {self.trace} as {self.format} to {self.out}.")


def objectives_of(slo: tuple[str, ...], goodput: tuple[str, ...]) -> Objectives | None:
    """Objectives from either flag; ``None`` without one.

    Raises
    ------
    UserError
        If both are given or one cannot be read.
    """
    from dspark_sim.analysis.slo import parse_goodput, parse_slo

    if slo and goodput:
        raise UserError("--slo (seconds) and --goodput (milliseconds) are both given; give one of them")
    if slo:
        return parse_slo(slo)
    return parse_goodput(goodput) if goodput else None


def write_json(document: Any, path: Path) -> None:
    """Write one JSON document whole or not at all.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    _write(path, json.dumps(document, allow_nan=False, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _draw(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in known:
        plt.close(figure)
        raise UserError(f"{path} has no known picture format; end its name in .png, .pdf or .svg")
    with explain_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    plt.close(figure)
