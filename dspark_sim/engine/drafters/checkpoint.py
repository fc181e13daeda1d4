"""A drafter's folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig
from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError, explain_os_errors


def save_drafter(drafter: BlockDrafter, folder: Path | str, notes: Mapping[str, Any] | None = None) -> None:
    """Write `config.json` and `model.safetensors` in bfloat16; `notes` go to the config under ``training``."""
    folder = Path(folder)
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in drafter.state_dict().items()
    }
    if drafter.config.draft_vocab_size:
        tensors["draft_token_ids"] = drafter.draft_token_ids.to("cpu", torch.int32)
    with explain_os_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".model.safetensors.partial"
        save_file(tensors, partial)
        partial.rename(folder / "model.safetensors")
        document = {**asdict(drafter.config), "training": dict(notes or {})}
        (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n")


def load_drafter(folder: Path | str, target: Target) -> BlockDrafter:
    """Read a drafter folder and attach it to its target.

    Raises
    ------
    UserError
        If a file is missing or damaged, a tensor is missing or unknown, or the target does not fit.
    """
    folder = Path(folder)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"no drafter at {folder}: {path.name} is missing; train one with `dspark-sim train`")
    try:
        document = json.loads(config_path.read_text())
        known = {field.name for field in fields(BlockDrafterConfig)}
        values = {name: value for name, value in document.items() if name in known}
        values["target_layer_ids"] = tuple(values["target_layer_ids"])
        config = BlockDrafterConfig(**values)
        tensors = load_file(weights_path)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the drafter at {folder} is damaged ({error}); train or download it again") from error
    drafter = BlockDrafter(config, tensors.pop("draft_token_ids", None))
    try:
        missing, unknown = drafter.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the drafter at {folder} does not match its config ({reason}); train it again") from error
    if missing or unknown:
        strange = [*missing, *unknown][0]
        raise UserError(f"the drafter at {folder} does not match its config (tensor {strange}); train it again")
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)
