"""What Figures 3 and 4 share: the measured drafters, and their accepted lengths with intervals.

At the scales smoke and laptop the measurements kept in `data` are read; at gpu, `train_depth_and_length.py` trains and
measures all drafters anew, in the folder ``depth_and_length`` of the results.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from dspark_sim.analysis.evaluation import Resampled, domain_ratios
from dspark_sim.analysis.stats import Bootstrap, Interval
from dspark_sim.errors import UserError
from dspark_sim.paper_figures import Scale

HERE = Path(__file__).parent
DATA = HERE / "data"
TARGET = "SmolLM2-135M-Instruct"
HARDWARE = "trained on 2 NVIDIA H100 (bfloat16 products)"
Key = tuple[str, int, int]
"""Head, layers, proposal length γ."""


@dataclass(frozen=True, eq=False)
class Study:
    """The measured drafters; lengths are DeepSpec's (a round that the length limit cuts does not count).

    Parameters
    ----------
    folder
        Holds ``depth_and_length.csv`` and ``round_latency.csv``.
    hardware
        Where they were trained.
    """

    folder: Path
    hardware: str

    @cached_property
    def frame(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "depth_and_length.csv")

    @property
    def about(self) -> str:
        """Target, training and hardware in one line."""
        updates = sorted(self.frame["num_updates"].unique())
        text = f"{updates[0]:,}" if len(updates) == 1 else f"{updates[0]:,} to {updates[-1]:,}"
        return (
            f"Target {TARGET}, drafters alike but for what is compared, {text} updates each, {self.hardware}, one seed"
        )

    def lengths(self, temperature: float) -> dict[Key, dict[str, Resampled]]:
        """Accepted length by drafter and domain (and ``macro``); all on the same resampled prompts."""
        found = {}
        rows = self.frame[self.frame["temperature"] == temperature]
        for (head, layers, gamma), own in rows.groupby(["head", "num_layers", "block_size"], sort=False):
            sums = own.set_index(["domain", "prompt_id"])[["whole_emitted", "whole_rounds"]].sort_index()
            above, below = (sums[name].to_numpy() for name in ("whole_emitted", "whole_rounds"))
            found[str(head), int(layers), int(gamma)] = domain_ratios(above, below, sums.index, Bootstrap())
        return found


def study(scale: Scale, out: Path) -> Study:
    """The kept measurements, or at scale gpu new ones.

    Raises
    ------
    UserError
        If training fails.
    """
    if scale != "gpu":
        return Study(DATA, HARDWARE)
    folder = out / "depth_and_length"
    command = [sys.executable, str(HERE / "train_depth_and_length.py"), "everything", "--out", str(folder)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"training the drafters failed; see above, then start again: {folder} keeps what is done")
    return Study(folder, f"trained on {device(folder)}")


def device(folder: Path) -> str:
    """The device of a study's latencies."""
    return str(pd.read_csv(folder / "round_latency.csv")["device"].iloc[0])


def interval(found: Resampled) -> Interval:
    """Estimate and 95 % interval."""
    return Bootstrap().interval(float(found.estimate[0]), found.draws[:, 0])


def table(lengths: dict[float, dict[Key, dict[str, Resampled]]], keys: list[Key]) -> pd.DataFrame:
    """A row per temperature, drafter and domain."""
    rows = []
    for temperature, found in lengths.items():
        for head, layers, gamma in keys:
            for domain, ratio in found[head, layers, gamma].items():
                ends = interval(ratio)
                rows.append(
                    {
                        **{"temperature": temperature, "domain": domain, "drafter": head, "drafter_layers": layers},
                        **{"proposal_length_gamma_tokens": gamma, "accepted_length_tokens": ends.estimate},
                        **{"low": ends.low, "high": ends.high},
                    }
                )
    return pd.DataFrame(rows)
