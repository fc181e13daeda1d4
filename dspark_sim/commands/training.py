"""Commands around training: train, merge-synthesis, learning-curves, model-card."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from dspark_sim.training.config import TrainConfig


def train_and_draw(config: TrainConfig) -> None:
    """Train, then draw the learning curve into the run's folder where matplotlib is installed."""
    from dspark_sim.training.trainer import train

    out = train(config)
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"Wrote the drafter to {out}.")
    if all(importlib.util.find_spec(name) for name in ("matplotlib", "seaborn")):
        from dspark_sim.analysis.learning import save_learning_curves

        print(f"Wrote the learning curve to {save_learning_curves([out], out / 'learning_curve.png')}.")
    else:
        print(f"The learning curve is {out / 'learning_curve.csv'}; a figure needs pip install 'dspark-sim[plots]'.")


@dataclass(frozen=True)
class MergeSynthesis:
    """Make one file of training text from several, in which no prompt occurs twice."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files made by `dspark-sim synthesise`; of conversations with the same prompt the first is kept."""
    out: Path
    """File to write; it must not exist."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.training.corpus import merge

        report = merge(self.files, self.out)
        print(
            f"Wrote {report.num_kept} conversations to {self.out}; {report.num_dropped} dropped, "
            "because their prompt was there already."
        )


@dataclass(frozen=True)
class LearningCurves:
    """Draw training runs in one figure: loss, acceptance length, and acceptance by position."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or their learning_curve.csv."""
    out: Path = Path("learning_curves.png")
    """Figure to write: .png, .pdf or .svg."""
    note: str = ""
    """Caption."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.learning import save_learning_curves

        print(f"Wrote the figure to {save_learning_curves(self.runs, self.out, self.note)}.")


@dataclass(frozen=True)
class ModelCard:
    """Write README.md into drafters' folders: shape, data, recipe, learning curve, evaluation."""

    drafters: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of trained drafters."""
    data: str
    """What they were trained on: a sentence."""
    evaluation: Path | None = None
    """summary.json of `dspark-sim evaluate`."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.analysis.model_card import write_model_card

        for folder in self.drafters:
            print(f"Wrote {write_model_card(folder, self.data, self.evaluation)}.")
