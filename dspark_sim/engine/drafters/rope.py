"""Rotary position embedding of a drafter that brings its own parameters instead of borrowing the target's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dspark_sim.errors import UserError

_KINDS = ("default", "linear", "llama3", "yarn", "proportional")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a model's configuration holds, in transformers' present form.

    Parameters
    ----------
    config
        With ``rope_parameters`` (for one or for several kinds of layers: those of full attention count), or with the
        older ``rope_theta`` and ``rope_scaling``.

    Returns
    -------
    dict
        At least ``rope_type`` and ``rope_theta``, and ``max_position_embeddings`` where the configuration has it.

    Raises
    ------
    UserError
        If it says nothing, or names a kind that is not supported.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if isinstance(given.get("full_attention"), Mapping):
        given = dict(given["full_attention"])
    theta = given.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise UserError("the configuration has no rope_theta; take a complete config.json")
    kind = given.get("rope_type") or given.get("type") or "default"
    partial = float(given.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
    if kind not in _KINDS or (partial != 1.0 and kind != "proportional"):
        what = kind if kind not in _KINDS else f"{kind} on a part ({partial}) of each head"
        raise UserError(f"the rotary embedding is {what}; supported kinds: {', '.join(_KINDS)}")
    longest = given.get("max_position_embeddings", config.get("max_position_embeddings"))
    known = {name: value for name, value in given.items() if name != "type"}
    return {**known, "rope_type": kind, "rope_theta": float(theta)} | (
        {} if longest is None else {"max_position_embeddings": longest}
    )


class Rope:
    """Cosines and sines of a head size.

    Parameters
    ----------
    parameters
        As `rope_parameters` returns them.
    head_dim
        D.
    """

    def __init__(self, parameters: Mapping[str, Any], head_dim: int) -> None:
        from transformers import Qwen3Config
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        given = dict(parameters)
        self.scaling = 1.0
        if given["rope_type"] == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
            self.frequencies = 1.0 / (given["rope_theta"] ** exponents)
        else:
            longest = given.pop("max_position_embeddings", None) or 32768
            config = Qwen3Config(head_dim=head_dim, max_position_embeddings=longest, rope_parameters=given)
            self.frequencies, self.scaling = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, torch.device("cpu"))

    def __call__(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [..., D] at positions [...], in float32 arithmetic and the type of `like`."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(like.dtype), (angles.sin() * self.scaling).to(like.dtype)
