"""A drafter's folder in this package's own form; `load_drafter` reads other projects' forms too (see `dialects`).

The tensors are stored as ``bfloat16``, as ``float32``, or as ``int8``: there each matrix is a table of whole numbers
with one float32 scale per row (a file half the size of bfloat16, an error of at most half a scale), and vectors stay
float32. Which of them is recorded in `config.json` under ``storage``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig
from dspark_sim.engine.drafters.chain_model import ChainDrafter, ChainDrafterConfig
from dspark_sim.engine.drafters.dialects import describe, load_foreign
from dspark_sim.engine.drafters.folder import damaged, fill, read_config, read_tensors, write_checkpoint
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError

Storage = Literal["bfloat16", "float32", "int8"]

_ARCHITECTURES: dict[str, tuple[type[Any], type[DraftNetwork]]] = {
    "BlockDrafter": (BlockDrafterConfig, BlockDrafter),
    "ChainDrafter": (ChainDrafterConfig, ChainDrafter),
}
_SCALE = ".scale"


def save_drafter(
    drafter: DraftNetwork,
    folder: Path | str,
    notes: Mapping[str, Any] | None = None,
    *,
    dtype: Storage = "bfloat16",
) -> None:
    """Write `config.json` and `model.safetensors`.

    Parameters
    ----------
    drafter
        Of any architecture.
    folder
        Made where it is missing; files of a drafter in it are replaced.
    notes
        Kept in the config under ``training``.
    dtype
        How tensors are stored. ``float32`` is exact for float32 weights; ``int8`` rounds each entry of a matrix by at
        most half of its row's scale, max|row| / 127.

    Raises
    ------
    UserError
        If there is no such `dtype`, or the folder cannot be written.
    """
    if dtype not in get_args(Storage):
        raise UserError(f"dtype is {dtype!r}; store a drafter as one of {', '.join(get_args(Storage))}")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in drafter.state_dict().items():
        tensors.update(_packed(name, value.detach().cpu(), dtype))
    if drafter.config.draft_vocab_size:
        tensors["draft_token_ids"] = drafter.draft_token_ids.to("cpu", torch.int32)
    document = {**asdict(drafter.config), "storage": dtype, "training": dict(notes or {})}
    write_checkpoint(Path(folder), document, tensors)


def load_drafter(folder: Path | str, target: Target) -> DraftNetwork:
    """Read a drafter's folder and attach it to its target.

    For another project's checkpoint a line on standard error says what was recognised.

    Raises
    ------
    UserError
        If a file is missing or damaged, a tensor is missing or unknown, or the target does not fit.
    """
    folder = Path(folder)
    document = read_config(folder)
    if "architecture" not in document:
        foreign = load_foreign(folder, document, target)
        print(describe(foreign, folder), file=sys.stderr)
        return foreign
    architecture = document["architecture"]
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"the drafter at {folder} has architecture {architecture!r}; choose one of {', '.join(_ARCHITECTURES)}"
        )
    config_kind, network_kind = _ARCHITECTURES[architecture]
    try:
        known = {field.name for field in fields(config_kind)}
        values = {name: value for name, value in document.items() if name in known}
        values["target_layer_ids"] = tuple(values["target_layer_ids"])
        config = config_kind(**values)
        tensors = _unpacked(read_tensors(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, error) from error
    drafter = network_kind(config, tensors.pop("draft_token_ids", None))
    fill(drafter, tensors, folder)
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)


def _packed(name: str, value: torch.Tensor, dtype: Storage) -> dict[str, torch.Tensor]:
    """What is stored of one tensor."""
    if dtype != "int8":
        return {name: value.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)}
    value = value.float()
    if value.ndim != 2:
        return {name: value}
    scale = value.abs().amax(dim=1) / 127.0
    # A row of zeros has scale 0; any divisor leaves it zero.
    whole = (value / torch.where(scale > 0, scale, 1.0)[:, None]).round().clamp(-127, 127)
    return {name: whole.to(torch.int8), name + _SCALE: scale}


def _unpacked(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `_packed`: tensors with a scale become float32."""
    scales = {name.removesuffix(_SCALE): stored.pop(name) for name in list(stored) if name.endswith(_SCALE)}
    return {name: value.float() * scales[name][:, None] if name in scales else value for name, value in stored.items()}
