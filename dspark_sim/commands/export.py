"""The command export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dspark_sim.errors import UserError
from dspark_sim.options import NetworkOptions


@dataclass(frozen=True)
class Export:
    """Write a block drafter as a checkpoint of DeepSpec's form, with embedding and head."""

    out: Path = Path("runs/deepspec")
    """Folder for config.json and model.safetensors."""
    model: tyro.conf.OmitArgPrefixes[NetworkOptions] = field(default_factory=NetworkOptions)
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the exported weights; float32 with --dtype float32 is read back bit for bit."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.engine.drafters.block import RaggedBlockDrafter
        from dspark_sim.engine.drafters.export import export_deepspec

        engine = self.model.engine(1)
        if not isinstance(engine.drafter, RaggedBlockDrafter):
            raise UserError(f"drafter {engine.drafter_name} is not a block drafter; choose dspark, dflash or a folder")
        export_deepspec(engine.drafter.network, engine.target, self.out, self.storage)
        print(f"Wrote the drafter {engine.drafter_name} in DeepSpec's form to {self.out}.")
