"""The files of a drafter's folder, whoever wrote them: `config.json` and safetensors. Pickles are never opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dspark_sim.errors import UserError
from dspark_sim.files import whole_file, write_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The document in `config.json`.

    Raises
    ------
    UserError
        If it is missing or damaged, or the folder has no safetensors.
    """
    _require(folder, "config.json")
    if not (folder / _INDEX).is_file():
        if not (folder / _WEIGHTS).is_file() and any(folder.glob("*.bin")) | any(folder.glob("*.pt")):
            raise UserError(f"the drafter at {folder} is a pickle, which is never opened; convert it to safetensors")
        _require(folder, _WEIGHTS)
    try:
        document = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise damaged(folder, error) from error
    if not isinstance(document, dict):
        raise damaged(folder, "config.json is not an object")
    return document


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, from one file or from those of an index.

    Raises
    ------
    UserError
        If a file is missing or damaged.
    """
    names = [_WEIGHTS]
    tensors: dict[str, torch.Tensor] = {}
    try:
        if (folder / _INDEX).is_file():
            listed = json.loads((folder / _INDEX).read_text())["weight_map"].values()
            names = sorted({Path(name).name for name in listed})
        for name in names:
            _require(folder, name)
            tensors.update(load_file(folder / name))
    except (ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise damaged(folder, error) from error
    return tensors


def fill(network: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy tensors into a network: every one is used, and none is missing.

    Raises
    ------
    UserError
        If a tensor is missing, unknown or of another shape.
    """
    try:
        missing, unknown = network.load_state_dict(
            {name: value.float() for name, value in tensors.items()}, strict=False
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(f"the drafter at {folder} does not match its config ({reason}); download it again") from error
    for names, what in ((missing, "is missing"), (unknown, "has no place in it")):
        if names:
            raise UserError(
                f"the drafter at {folder} does not match its config (tensor {names[0]} {what}); train or download it "
                "again"
            )


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the two files, the weights at once or not at all."""
    with whole_file(folder / _WEIGHTS) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    write_json(folder / "config.json", config)


def damaged(folder: Path, reason: object) -> UserError:
    """The error for files that cannot be read."""
    return UserError(f"the drafter at {folder} is damaged ({reason}); train or download it again")


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(f"no drafter at {folder}: {name} is missing; train one with `dspark-sim train`")
