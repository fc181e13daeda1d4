"""The command that regenerates the paper's table and figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from dspark_sim.paper_figures import Scale


@dataclass(frozen=True)
class Figures:
    """Regenerate the DSpark paper's table and figures from our own runs, with the published values beside them.

    Runs the scripts of `experiments/paper`, each in a process of its own, and writes per figure PNG, PDF and CSV, and
    one report.md with ours, the paper's, and how they differ. The same call goes on where an interrupted one ended.
    Without names and without --all it lists what there is.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Scripts, or how they begin: table1 fig2 appendix_a."""
    all: bool = False
    """Run every script."""
    scale: Scale = "laptop"
    """How much is run.
    smoke: all figures in under 5 minutes on 2 cores, to see that it works.
    laptop: all figures in under 60 minutes on 2 cores.
    gpu: longer outputs and larger runs, on a GPU."""
    out: Path = Path("runs/paper")
    """Folder of figures, report, logs and recordings."""
    scripts: Path | None = None
    """Folder of the scripts; default: experiments/paper beside the package or in the current folder."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.tables import aligned
        from dspark_sim.paper_figures import is_complete
        from dspark_sim.paper_study import choose, find_scripts, run_scripts

        scripts = find_scripts(self.scripts)
        chosen = scripts if self.all else choose(scripts, self.names)
        if not chosen:
            done = {script: "yes" if is_complete(script, self.out, self.scale) else "no" for script in scripts}
            print("\n".join(f"{script.stem:32} complete at {self.scale}: {state}" for script, state in done.items()))
            print("Name some of them, or give --all.")
            return
        import matplotlib  # noqa: F401  (a missing one is said once, not by every script)

        table = run_scripts(scripts, chosen, self.scale, self.out)
        print(aligned(table.drop(columns="reason"), None, {"seconds": ".0f"}))
        print(f"Wrote the report to {self.out / 'report.md'}.")
        failed = table[table["state"] == "failed"]
        if len(failed):
            reasons = "; ".join(f"{row.script} ({row.reason})" for row in failed.itertuples())
            print(f"error: {len(failed)} of {len(chosen)} scripts failed: {reasons}", file=sys.stderr)
            raise SystemExit(1)
