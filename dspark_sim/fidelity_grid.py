"""The live half of the fidelity study: what is to run, and a folder that holds what has.

Cells are policies × concurrencies × arrivals, at temperature 0. Every cell runs twice live: within a concurrency the
repeat is outermost, so that minutes lie between a cell's two runs and their difference shows what the machine's drift
and noise do; a profile pass follows each repeat. Policies that schedule decide by a table profiled beforehand, live
and simulated alike.

An open loop of concurrency N has Poisson arrivals at 80 % of the rate of requests that plain decoding serves with N
users, by simulation with the preliminary profile: plain decoding is then at 80 % of what it can do with N running
requests. The server has room for the largest concurrency in all open loops.

Everything that ran is on disk at once; the same call goes on where an interrupted one ended. The folder's `report`
holds what is worth keeping; the rest are traces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dspark_sim import cost as cost_model
from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.fidelity_splits import Arrivals, Cell, CellRuns
from dspark_sim.files import write_json
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import ConfidenceThreshold, LaggedPrefixScheduler
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.run import simulate
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop, Poisson, Workload, bundled_prompts

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine

# Two requests that arrive before a sleeping server is awake would be told apart by the simulator.
_WAKE_SECONDS = 0.01


@dataclass(frozen=True)
class FidelityScale:
    """Size of the study.

    Parameters
    ----------
    num_requests
        Pairs (concurrency, requests of a run at it).
    max_tokens
        Most output tokens per request.
    profile_tokens
        Most output tokens per request of a profile pass.
    all_policies
        Whether all policies run, or only the whole block and the prefix scheduler.
    utilisation
        Arrival rate of the open loops over the rate that plain decoding can serve at the same concurrency.
    """

    num_requests: tuple[tuple[int, int], ...]
    max_tokens: int
    profile_tokens: int
    all_policies: bool = True
    utilisation: float = 0.8


SMOKE = FidelityScale(((1, 2), (4, 8)), max_tokens=10, profile_tokens=8, all_policies=False)
LAPTOP = FidelityScale(((1, 4), (2, 6), (4, 12), (8, 20), (16, 32), (32, 48)), max_tokens=20, profile_tokens=16)
GPU = FidelityScale(((1, 16), (2, 24), (4, 48), (8, 96), (16, 192), (32, 384)), max_tokens=96, profile_tokens=48)
SCALES = {"smoke": SMOKE, "laptop": LAPTOP, "gpu": GPU}


def study_policies(
    block_size: int, has_confidence: bool, table: CostModel, *, all_policies: bool = True
) -> list[SpeculationPolicy]:
    """The policies of the study that a drafter allows, each once.

    Parameters
    ----------
    block_size
        Most tokens it drafts.
    has_confidence
        Whether it estimates acceptance.
    table
        What the scheduling policies decide by.
    all_policies
        See `FidelityScale`.
    """
    if not all_policies:
        return [Fixed(block_size), *([PrefixScheduler(table)] if has_confidence else [])]
    sizes = [0, *(size for size in (2, 4) if size < block_size), block_size]
    chosen: list[SpeculationPolicy] = [Fixed(size) for size in dict.fromkeys(sizes)]
    if has_confidence:
        chosen += [ConfidenceThreshold(0.5), PrefixScheduler(table), LaggedPrefixScheduler(table, 2)]
    return chosen


class Study:
    """The folder: what is to run, and what has.

    Parameters
    ----------
    out
        The folder; `open` makes it or refuses it.
    scale
        Size.
    """

    def __init__(self, out: Path, scale: FidelityScale) -> None:
        self.out, self.scale = out, scale
        self.plan: dict[str, Any] = {}
        self._prompts = bundled_prompts()[: max(count for _, count in scale.num_requests)]

    def open(self, config: dict[str, Any]) -> None:
        """See that the folder holds the same study, or nothing.

        Raises
        ------
        UserError
            If it holds something else, or a study of another configuration.
        """
        text = "\n".join(prompt.prompt_id + prompt.turns[0] for prompt in self._prompts)
        config = {**config, "prompts": hashlib.sha256(text.encode()).hexdigest()[:16]}
        path = self.out / "plan.json"
        if path.is_file():
            with explain_os_errors(path, "read"):
                try:
                    self.plan = dict(json.loads(path.read_text(encoding="utf-8")))
                    before = dict(self.plan["config"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path} is no plan of a fidelity study ({error}); give another folder") from error
            self._require("", before, config)
            return
        if self.out.is_file():
            raise UserError(f"{self.out} is a file; give a folder for the study")
        strange = sorted(entry.name for entry in self.out.iterdir()) if self.out.is_dir() else []
        if strange:
            raise UserError(f"{self.out} holds {strange[0]}, which is no fidelity study; give an empty or new folder")
        self.plan = {"config": config}

    def _require(self, of: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{self.out} holds a study with {of}{key} {before.get(key)} and this one has {now.get(key)}; "
                    "give another folder"
                )

    def _save_plan(self) -> None:
        write_json(self.out / "plan.json", self.plan)

    @property
    def is_complete(self) -> bool:
        """Whether every live run and profile pass is there."""
        return "rates" in self.plan and all(self._has(name) for name in self._live_names())

    def _has(self, name: str) -> bool:
        # A trace appears whole or not at all.
        return (self.out / name).is_dir()

    def _live_names(self) -> list[str]:
        cells = [self._name(cell, repeat) for repeat in (1, 2) for cell in self.cells()]
        return cells + [name for users, _ in self.scale.num_requests for name in _pass_names(users)]

    @staticmethod
    def _name(cell: Cell, repeat: int) -> str:
        return f"runs/c{cell.concurrency:02d}-{cell.policy}-{cell.arrivals}-{repeat}"

    def policies(self) -> list[SpeculationPolicy]:
        """The policies, in order; the preliminary profile must be there."""
        drafter = self.plan["drafter"]
        return study_policies(
            drafter["block_size"],
            drafter["has_confidence"],
            CostModel.read(self.out / "table.json"),
            all_policies=self.scale.all_policies,
        )

    def cells(self) -> list[Cell]:
        """The cells, in the order in which they run within a repeat."""
        labels = [policy.label() for policy in self.policies()]
        kinds: tuple[Arrivals, ...] = ("closed", "poisson")
        return [
            Cell(label, users, arrivals)
            for users, _ in self.scale.num_requests
            for label in labels
            for arrivals in kinds
        ]

    def workload(self, cell: Cell) -> Workload:
        """The cell's arrivals, the same for all policies and both repeats."""
        if cell.arrivals == "closed":
            return ClosedLoop(cell.concurrency)
        found = self.plan["rates"][str(cell.concurrency)]
        return Poisson(found["rate"], found["seed"])

    @property
    def anchors(self) -> RecordedAnchors:
        """The recording."""
        return RecordedAnchors.from_trace(Trace.read(self.out / "recording"))

    def runs(self) -> list[CellRuns]:
        """All cells, read from disk."""
        policies = {policy.label(): policy for policy in self.policies()}
        counts = dict(self.scale.num_requests)
        return [
            CellRuns(
                cell,
                policies[cell.policy],
                self.workload(cell),
                counts[cell.concurrency],
                *(Trace.read(self.out / self._name(cell, repeat)) for repeat in (1, 2)),
            )
            for cell in self.cells()
        ]

    def passes(self) -> dict[int, list[Trace]]:
        """All profile passes by concurrency, read from disk."""
        return {
            users: [Trace.read(self.out / name) for name in _pass_names(users)] for users, _ in self.scale.num_requests
        }

    # ---- live --------------------------------------------------------------------------------------------------------

    def record(self, engine: Engine, *, progress: bool = True) -> None:
        """Run what is missing, in order, and write every run at once.

        Raises
        ------
        UserError
            If the folder's runs are another machine's, model's or drafter's, or the drafter proposes nothing.
        """
        self._start(engine)
        print("Warming up …", flush=True)
        engine.warm_up(self._prompts)
        plain = engine.with_drafter("none")
        if not (self.out / "table.json").is_file():
            print("Profiling what an iteration costs …", flush=True)
            passes = [self._pass(engine, users, 0) for users, _ in self.scale.num_requests]
            cost_model.fit([trace.steps for trace in passes], engine.hardware).write(self.out / "table.json")
        if not self._has("recording"):
            print("Recording outputs, and drafting a block at every position of them …", flush=True)
            most = self.scale.num_requests[-1][0]
            base = plain.record(
                self._prompts, Fixed(0), ClosedLoop(most), max_tokens=self.scale.max_tokens, progress=progress
            )
            engine.anchors(base, progress=progress).write(self.out / "recording")
        anchors, table = self.anchors, CostModel.read(self.out / "table.json")
        if "rates" not in self.plan:
            counts = dict(self.scale.num_requests)
            self.plan["rates"] = {
                str(users): open_loop(anchors, table, users, counts[users], self.scale.utilisation) for users in counts
            }
            self._save_plan()
        self._run(engine, plain, anchors, table, progress)

    def _start(self, engine: Engine) -> None:
        drafter = {
            "name": engine.drafter_name,
            "block_size": engine.block_size,
            "has_confidence": engine.has_confidence,
        }
        if engine.block_size == 0:
            raise UserError(f"drafter {engine.drafter_name} proposes nothing; choose one with a block, such as dspark")
        if "hardware" in self.plan:
            self._require("", self.plan["hardware"], engine.hardware)
            self._require("drafter's ", self.plan["drafter"], drafter)
            return
        self.plan |= {"hardware": engine.hardware, "drafter": drafter}
        self._save_plan()

    def _run(self, engine: Engine, plain: Engine, anchors: RecordedAnchors, table: CostModel, progress: bool) -> None:
        policies = {policy.label(): policy for policy in self.policies()}
        counts = dict(self.scale.num_requests)
        cells = self.cells()
        # A run's share of the bar is what the preliminary profile says it takes.
        seconds = {
            cell: _makespan(anchors, policies[cell.policy], self.workload(cell), table, counts[cell.concurrency])
            for cell in cells
        }
        total = 2 * sum(seconds.values())
        missing = sum(seconds[cell] for cell in cells for k in (1, 2) if not self._has(self._name(cell, k)))
        print(f"Live runs: about {missing / 60:.0f} minutes, by the preliminary profile.", flush=True)
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} < {remaining}{postfix}"
        with tqdm(
            total=1.001 * total, initial=total - missing, desc="live runs", bar_format=form, disable=not progress
        ) as bar:
            for users in counts:
                for repeat in (1, 2):
                    for cell in (one for one in cells if one.concurrency == users):
                        name = self._name(cell, repeat)
                        if self._has(name):
                            continue
                        bar.set_postfix_str(name.removeprefix("runs/"))
                        trace = (plain if cell.policy == "none" else engine).record(
                            self._prompts,
                            policies[cell.policy],
                            self.workload(cell),
                            max_tokens=self.scale.max_tokens,
                            num_requests=counts[users],
                            progress=False,
                        )
                        trace.write(self.out / name)
                        bar.update(seconds[cell])
                    self._pass(engine, users, repeat)

    def _pass(self, engine: Engine, users: int, number: int) -> Trace:
        folder = self.out / _pass_names(users)[number]
        if folder.is_dir():
            return Trace.read(folder)
        trace = engine.profile_pass(
            self._prompts,
            users,
            max_tokens=self.scale.profile_tokens,
            num_requests=max(4, users),
            seed=3 * users + number,
        )
        trace.write(folder)
        return trace


def _pass_names(users: int) -> list[str]:
    """A concurrency's passes: before all runs, and after each repeat."""
    return [f"profile/c{users:02d}-{number}" for number in (0, 1, 2)]


def open_loop(
    anchors: RecordedAnchors, table: CostModel, users: int, num_requests: int, utilisation: float
) -> dict[str, Any]:
    """Rate and seed of a concurrency's Poisson arrivals.

    Parameters
    ----------
    anchors, table
        A recording and a cost table to simulate plain decoding with.
    users
        The concurrency N.
    num_requests
        Requests of a run.
    utilisation
        The rate is this fraction of what N users of plain decoding are served in a second.

    Returns
    -------
    dict
        ``rate`` (requests per second) and ``seed``: the first from N on with which the server is awake before the
        second request comes.
    """
    count = max(num_requests, 12 * users)
    served = count / _makespan(anchors, Fixed(0), ClosedLoop(users), table, count)
    rate = float(f"{utilisation * served:.3g}")
    seed = users
    while num_requests > 1 and float(Poisson(rate, seed).arrivals(2)[1] - Poisson(rate, seed).arrivals(1)[0]) < min(
        _WAKE_SECONDS, 0.1 / rate
    ):
        seed += 1000
    return {"rate": rate, "seed": seed}


def _makespan(
    anchors: RecordedAnchors, policy: SpeculationPolicy, workload: Workload, table: CostModel, count: int
) -> float:
    requests = simulate(anchors, policy, workload, table, num_requests=count).requests
    return float(requests["finish"].max())
