"""Commands that take traces: simulate, compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dspark_sim.commands.output import print_summary, print_table
from dspark_sim.errors import UserError
from dspark_sim.options import LoadOptions, PolicyChoice, ServerOptions

if TYPE_CHECKING:
    from dspark_sim.simulate.synthetic import SyntheticAcceptance

_PRESET = "preset:"


def _preset(name: str) -> SyntheticAcceptance:
    from dspark_sim.simulate.presets import preset

    parts = name.removeprefix(_PRESET).split("/")
    if len(parts) != 3:
        raise UserError(f"{name} names no law; give preset:TARGET/DRAFTER/DOMAIN, such as preset:qwen3-4b/dspark/math")
    return preset(parts[0], drafter=parts[1], domain=parts[2])


@dataclass(frozen=True)
class Simulate:
    """Replay a recording under another policy, block size or load."""

    trace: tyro.conf.Positional[Path]
    """Recording with dense anchors (made by `dspark-sim record`), or a law with the paper's acceptance, such as
    preset:qwen3-4b/dspark/math; its requests have 1000 prompt and 250 output tokens."""
    cost: Path
    """Cost table (made by `dspark-sim profile` or `dspark-sim cost`)."""
    policy: tyro.conf.OmitArgPrefixes[PolicyChoice] = field(default_factory=lambda: PolicyChoice("prefix"))
    block_size: int | None = None
    """At most the recorded one."""
    tree: str | None = None
    """Shape of the drafts, of the recorded kind: chain, width:WIDTH,DEPTH, best-first:BUDGET, markov:BUDGET,
    dynamic:TOP_K,DEPTH,BUDGET or sequoia:BUDGET; default: as recorded."""
    num_requests: int | None = None
    """Requests to serve; the recorded prompts are repeated. A law needs the number."""
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = LoadOptions()
    server: tyro.conf.OmitArgPrefixes[ServerOptions] = ServerOptions()
    mix: str | None = None
    """Shares of domains, such as math:2,code:1; they drift to later ones given by place in the list of requests:
    "math:1 0.5=code:1 1=chat:1"."""
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
        from dspark_sim.api import most_drafted, simulate
        from dspark_sim.cost import CostModel
        from dspark_sim.mixes import parse_mix
        from dspark_sim.trace import Trace, refuse_foreign

        if self.out is not None:
            refuse_foreign(self.out)
        cost = CostModel.read(self.cost)
        named = str(self.trace)
        recording = _preset(named) if named.startswith(_PRESET) else Trace.read(self.trace)
        drafted = most_drafted(recording, self.block_size, self.tree) or 0
        workload = self.load.load()
        trace = simulate(
            recording,
            policy=self.policy.make(drafted, cost),
            cost=cost,
            workload=workload,
            scheduler=self.server.config(workload),
            num_replicas=self.server.num_replicas,
            router=self.server.router,
            load_lag=self.server.load_lag,
            block_size=self.block_size,
            tree=self.tree,
            num_requests=self.num_requests,
            allow_biased=self.allow_biased,
            noise_seed=self.noise_seed,
            mix=None if self.mix is None else parse_mix(self.mix, self.load.seed),
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
