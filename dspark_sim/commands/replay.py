"""Commands that take traces: simulate, compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from dspark_sim.commands.output import print_summary, print_table
from dspark_sim.options import LoadOptions, PolicyChoice


@dataclass(frozen=True)
class Simulate:
    """Replay a recording under another policy, block size or load."""

    trace: tyro.conf.Positional[Path]
    """Recording with dense anchors (made by `dspark-sim record`)."""
    cost: Path
    """Cost table (made by `dspark-sim profile`)."""
    policy: tyro.conf.OmitArgPrefixes[PolicyChoice] = field(default_factory=lambda: PolicyChoice("prefix"))
    block_size: int | None = None
    """At most the recorded one."""
    num_requests: int | None = None
    """Requests to serve; the recorded prompts are repeated."""
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = LoadOptions()
    allow_biased: bool = False
    """Also run argmax and tetris on a recording of mode rejection, where they would change the output if run live."""
    noise_seed: int | None = None
    """Let iterations scatter as the profiled ones did, drawn under this seed; default: each takes its mean seconds."""
    out: Path | None = None
    """Folder to write the simulated trace to."""
    json: Path | None = None
    """Also write the printed table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.api import simulate
        from dspark_sim.cost import CostModel
        from dspark_sim.trace import Trace, refuse_foreign

        if self.out is not None:
            refuse_foreign(self.out)
        recording, cost = Trace.read(self.trace), CostModel.read(self.cost)
        recorded = int(recording.config.get("block_size", 0))
        block_size = recorded if self.block_size is None else self.block_size
        trace = simulate(
            recording,
            policy=self.policy.make(block_size, cost),
            cost=cost,
            workload=self.load.load(),
            block_size=self.block_size,
            num_requests=self.num_requests,
            allow_biased=self.allow_biased,
            noise_seed=self.noise_seed,
            progress=True,
        )
        if self.out is not None:
            trace.write(self.out)
        print_summary(trace, self.json)


@dataclass(frozen=True)
class Compare:
    """Print live, simulated and error, metric by metric."""

    live: tyro.conf.Positional[Path]
    """Trace of a live run."""
    simulated: tyro.conf.Positional[Path]
    """Trace of a simulated run of the same requests."""
    repeat: Path | None = None
    """Trace of a second live run: the noise floor."""
    json: Path | None = None
    """Also write the table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.fidelity import compare, rounds_equal
        from dspark_sim.trace import Trace

        live, simulated = Trace.read(self.live), Trace.read(self.simulated)
        repeat = None if self.repeat is None else Trace.read(self.repeat)
        print_table(compare(live, simulated, repeat), self.json, {"error": "+.1%", "repeat_error": "+.1%"})
        print(rounds_equal(live, simulated).message)
