"""Commands that exercise the whole package: demo, verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspark_sim.analysis.tables import aligned, write_rows


@dataclass(frozen=True)
class Demo:
    """Decode live, simulate the same, print both and the error between them (about 5 minutes on 2 cores)."""

    out: Path = Path("runs/demo")
    """Folder for traces, cost table, table and figures."""
    quick: bool = False
    """A smaller run, under 90 seconds."""
    target: str | None = None
    """As for `record`."""
    drafter: str = "dspark"
    """A drafter with a block: dspark, dflash or a folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the target's weights."""
    json: Path | None = None
    """Also write the table as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.demo import run_demo

        run_demo(
            self.out,
            quick=self.quick,
            target=self.target,
            drafter=self.drafter,
            device=self.device,
            dtype=self.dtype,
            json_path=self.json,
        )


@dataclass(frozen=True)
class Verify:
    """Check on this machine that speculative decoding changes the speed and never the output.

    A small drafter proposes tokens, the target accepts or replaces them, and what comes out must be what the target
    would have written alone. The checks: on toy models, the exact probabilities of every output, for all policies and
    acceptance modes that may run together, and the frequencies of sampled ones; on the embedded model, outputs under
    different schedules, token by token, and simulated runs against live ones, round by round. Known errors are planted
    too, and must be found. One line per check, and exit status 1 if any fails.
    """

    quick: bool = False
    """Fewer cases."""
    json: Path | None = None
    """Also write the table as JSON rows here, with the seconds each check took."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.exactness.battery import run

        checks = run(quick=self.quick)
        headers = ("group", "case", "num_cases", "found", "wanted", "status")
        print(aligned(checks, {name: name.removeprefix("num_") for name in headers}))
        if self.json is not None:
            write_rows(checks, self.json)
        judged = checks[checks["status"] != "info"]
        failed = judged[judged["status"] == "FAIL"]
        what = "all passed" if failed.empty else "failed: " + "; ".join(failed["group"] + ": " + failed["case"])
        print(f"{len(judged)} checks, {judged['num_cases'].sum()} comparisons: {what}")
        if not failed.empty:
            raise SystemExit(1)
