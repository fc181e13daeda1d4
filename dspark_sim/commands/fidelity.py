"""The command that checks the simulator against live runs on a whole grid: fidelity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Fidelity:
    """How far the simulator may be trusted on this machine: a grid of live runs, each simulated, and one report.

    Policies none, fixed 2, 4 and the whole block, threshold, prefix and lagged, at concurrencies 1 to 32, in closed
    loops and under Poisson arrivals, every cell twice. Nothing else should run on the machine meanwhile. The same
    call goes on where an interrupted one ended; of a finished study it makes the report anew.
    """

    out: Path = Path("runs/fidelity")
    """Folder for traces, and `report` in it for the page, the tables and the figures."""
    scale: Literal["smoke", "laptop", "gpu"] = "laptop"
    """How much runs live.
    smoke: two policies at two concurrencies, under 2 minutes; to see that it works.
    laptop: the whole grid with short outputs, about 30 minutes on 2 cores.
    gpu: the whole grid with longer outputs."""
    target: str | None = None
    """As for `record`."""
    drafter: str = "dspark"
    """A drafter with a block: dspark, dflash or a folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the target's weights; with others than float32 rounds may differ at near ties."""
    json: Path | None = None
    """Also write the errors as JSON rows here: a split, cell and metric each."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.fidelity_grid import SCALES
        from dspark_sim.fidelity_study import run_fidelity

        run_fidelity(
            self.out,
            scale=SCALES[self.scale],
            target=self.target,
            drafter=self.drafter,
            device=self.device,
            dtype=self.dtype,
            json_path=self.json,
        )
