"""The fidelity study: the same grid live and simulated, and how far the two lie apart.

The live half is `fidelity_grid`, the simulated one `fidelity_splits`; figures and judgement are in
`analysis.fidelity_scores` and `analysis.fidelity_report`. This module puts them together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd

from dspark_sim.analysis import fidelity_report, fidelity_scores
from dspark_sim.analysis.tables import write_rows
from dspark_sim.fidelity_grid import LAPTOP, FidelityScale, Study
from dspark_sim.fidelity_splits import CellRuns, identity_table, live_table, simulated_table
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.trace import Trace

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine


@dataclass(frozen=True)
class Results:
    """What the study found.

    Parameters
    ----------
    errors
        A row per split, cell and metric; see `fidelity_scores.error_table`.
    identity
        A row per live run; see `fidelity_splits.identity_table`.
    ranking
        A row per split, concurrency and kind of arrivals; see `fidelity_scores.ranking_table`.
    live
        A row per live run; see `fidelity_splits.live_table`.
    """

    errors: pd.DataFrame
    identity: pd.DataFrame
    ranking: pd.DataFrame
    live: pd.DataFrame


def run_fidelity(
    out: Path | str = "runs/fidelity",
    *,
    scale: FidelityScale = LAPTOP,
    target: str | None = None,
    drafter: str = "dspark",
    device: str = "auto",
    dtype: str = "float32",
    json_path: Path | str | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> Results:
    """Run what is missing of the study, analyse it, and write the report.

    Parameters
    ----------
    out
        Folder; a new one, an empty one, or one of the same study.
    scale
        Size.
    target, drafter, device, dtype
        See `Engine.load`; ignored where `engine` is given.
    json_path
        File for the rows of the error table.
    engine
        A loaded engine, to save loading one.
    progress
        Show bars.

    Raises
    ------
    UserError
        If `out` holds something else, or a study of another machine, model or configuration; if target or drafter
        cannot be had; or if a file cannot be written.
    """
    start = perf_counter()
    study = Study(Path(out), scale)
    wanted = {"target": target, "drafter": drafter, "device": device, "dtype": dtype}
    study.open({**({} if engine else wanted), "scale": json.loads(json.dumps(asdict(scale)))})
    if not study.is_complete:
        study.record(engine or _load(target, drafter, device, dtype, scale), progress=progress)
    results = analyse(study.runs(), study.passes(), study.anchors, study.plan["hardware"], progress=progress)
    _report(study, results, json_path)
    print(f"Wrote the report to {study.out / 'report'} in {perf_counter() - start:.0f} s.")
    return results


def analyse(
    runs: list[CellRuns],
    passes: Mapping[int, list[Trace]],
    anchors: RecordedAnchors,
    hardware: Mapping[str, Any],
    *,
    progress: bool = False,
) -> Results:
    """Replay and simulate finished live runs.

    Parameters
    ----------
    runs
        All cells.
    passes
        Profile passes by concurrency.
    anchors
        The recording.
    hardware
        Device, model, dtype and thread count of the live runs.
    progress
        Show bars.
    """
    live = live_table(runs)
    identity = identity_table(runs, anchors, progress=progress)
    simulated, _ = simulated_table(runs, passes, anchors, hardware, progress=progress)
    errors = fidelity_scores.error_table(live, simulated, shared_clock=is_shared(hardware))
    return Results(errors, identity, fidelity_scores.ranking_table(errors), live)


def is_shared(hardware: Mapping[str, Any]) -> bool:
    """Whether live times carry the noise of a CPU that others use too; a GPU's do not."""
    return not any(name in str(hardware["device"]) for name in ("NVIDIA", "AMD Instinct"))


def _load(target: str | None, drafter: str, device: str, dtype: str, scale: FidelityScale) -> Engine:
    from dspark_sim.engine.models import EMBEDDED
    from dspark_sim.engine.serve import Engine

    print("Loading the target and the drafter …", flush=True)
    most = max(users for users, _ in scale.num_requests)
    return Engine.load(target or EMBEDDED, drafter, device=device, dtype=dtype, max_num_seqs=most, max_model_len=512)


def _report(study: Study, results: Results, json_path: Path | str | None) -> None:
    first = study.runs()[0].first
    loads = results.live["load_average"].dropna()
    about = fidelity_report.About(
        hardware=study.plan["hardware"],
        drafter=study.plan["drafter"],
        provenance=first.provenance,
        scale=study.plan["config"]["scale"],
        rates=study.plan["rates"],
        shared_clock=is_shared(study.plan["hardware"]),
        load_average=(float(loads.min()), float(loads.max())) if len(loads) else None,
    )
    text = fidelity_report.write_report(
        study.out / "report", about, results.errors, results.identity, results.ranking, results.live
    )
    print(f"\n{text}")
    if json_path is not None:
        write_rows(results.errors, json_path)
