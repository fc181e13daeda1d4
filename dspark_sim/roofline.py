"""Step times of hardware one does not have: bytes over bandwidth, operations over rate.

A pass takes as long as its bytes take to read or its operations to compute, whichever is longer (`RooflinePass` has
the formula). At batch 1 that is the weights over the bandwidth; at large batches it rises by flops over rate per token;
speculation is cheap between the two. Real kernels reach a part of the published figures: `Efficiency` says which,
and its defaults are assumptions of usual size, not measurements. Fit a profile where
there is one.

Sources of the accelerators' figures (dense, without sparsity): NVIDIA H100, H200, A100 and L40S data sheets; NVIDIA Ada
GPU architecture white paper (RTX 4090: 16-bit with float32 accumulation); AMD Instinct MI300X data sheet; Google Cloud
TPU v5e and v6e documentation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dspark_sim.cost_model import CostModel
from dspark_sim.cost_parts import Parametric, RooflinePass
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import ModelShape


@dataclass(frozen=True)
class Accelerator:
    """Published peak figures of one device.

    Parameters
    ----------
    name
        As written in provenance.
    bytes_per_second
        Memory bandwidth.
    flops_per_second
        Dense bfloat16 operations.
    memory_bytes
        Capacity.
    flops_per_second_fp8
        Dense 8-bit operations; ``None`` where there are none of their own.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    memory_bytes: float
    flops_per_second_fp8: float | None = None


ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 80GB HBM3", 3.35e12, 989.4e12, 80e9, 1978.9e12),
    "h200": Accelerator("NVIDIA H200", 4.8e12, 989.4e12, 141e9, 1978.9e12),
    "a100": Accelerator("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12, 80e9),
    "l40s": Accelerator("NVIDIA L40S", 864e9, 362.05e12, 48e9, 733e12),
    "rtx4090": Accelerator("NVIDIA GeForce RTX 4090", 1008e9, 165.2e12, 24e9, 330.3e12),
    "mi300x": Accelerator("AMD Instinct MI300X", 5.3e12, 1307.4e12, 192e9, 2614.9e12),
    "tpu-v5e": Accelerator("Google TPU v5e", 819e9, 197e12, 16e9),
    "tpu-v6e": Accelerator("Google TPU v6e", 1640e9, 918e12, 32e9),
}


@dataclass(frozen=True)
class DrafterShape:
    """A drafter as a part of its target.

    Parameters
    ----------
    pattern
        ``block``: one pass over all drafted tokens (DSpark, DFlash). ``chain``: a pass per position (Eagle3, MTP).
    num_layers
        Layers of the target's dense width.
    head_rank
        Rank of a sequential head, whose matrix over the vocabulary is read at every position; 0 without one.
    """

    pattern: Literal["block", "chain"] = "block"
    num_layers: int = 5
    head_rank: int = 256

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.head_rank < 0:
            raise UserError(
                f"a drafter of {self.num_layers} layers and head rank {self.head_rank}; give 1 layer or more"
            )


DRAFTERS = {
    "dspark": DrafterShape(),
    "dflash": DrafterShape(head_rank=0),
    "eagle3": DrafterShape("chain", 1, 0),
    "mtp": DrafterShape("chain", 1, 0),
}


@dataclass(frozen=True)
class Efficiency:
    """What of the published figures is reached, and what else a round takes; assumptions, to be fitted if one can.

    Parameters
    ----------
    bandwidth, compute
        Share of the peak that is sustained, above 0 and at most 1.
    pass_seconds, layer_seconds
        Of every pass, and of each of its layers: launches, and communication between devices.
    host_seconds
        Of a round outside the passes.
    """

    bandwidth: float = 0.8
    compute: float = 0.6
    pass_seconds: float = 1e-4
    layer_seconds: float = 0.0
    host_seconds: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("bandwidth", "compute"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise UserError(f"{name} efficiency is {value}; give a share above 0 and at most 1")
        for name in ("pass_seconds", "layer_seconds", "host_seconds"):
            value = getattr(self, name)
            if not value >= 0.0:
                raise UserError(f"{name} is {value}; give 0 or more seconds")


def roofline(
    accelerator: Accelerator,
    shape: ModelShape,
    drafter: DrafterShape | None = None,
    *,
    num_devices: int = 1,
    efficiency: Efficiency | None = None,
) -> CostModel:
    """The cost model of a target, and of a drafter beside it, on one or more accelerators.

    Parameters
    ----------
    accelerator, shape, drafter
        What runs where; ``None`` drafts for nothing.
    num_devices
        Devices that share every matrix and the KV cache evenly.
    efficiency
        What is reached; ``None`` is the default.

    Raises
    ------
    UserError
        If there is no device, or the weights do not fit.
    """
    if num_devices < 1:
        raise UserError(f"num_devices is {num_devices}; give 1 or more")
    memory = accelerator.memory_bytes * num_devices
    if shape.memory_bytes > memory:
        raise UserError(
            f"the weights of {shape.name} take {shape.memory_bytes / 1e9:.0f} GB and {num_devices} × "
            f"{accelerator.name} have {memory / 1e9:.0f} GB; give more devices or another model"
        )
    reached = efficiency or Efficiency()
    rate = accelerator.flops_per_second
    if shape.weight_bytes <= 1.0 and accelerator.flops_per_second_fp8 is not None:
        rate = accelerator.flops_per_second_fp8
    bandwidth = accelerator.bytes_per_second * num_devices * reached.bandwidth
    target = RooflinePass(
        pattern="target",
        weight_bytes=(shape.dense_params + shape.head_params) * shape.weight_bytes,
        flops_per_token=2.0 * shape.active_params,
        bytes_per_second=bandwidth,
        flops_per_second=rate * num_devices * reached.compute,
        expert_bytes=shape.num_expert_layers * shape.expert_params * shape.expert_bytes,
        num_experts=shape.num_experts,
        experts_per_token=shape.experts_per_token,
        kv_bytes=shape.kv_bytes_per_token,
        flops_per_pair=shape.num_layers * shape.pair_flops,
        overhead_seconds=reached.pass_seconds + shape.num_layers * reached.layer_seconds,
    )
    # Only the last token of a prompt meets the head.
    prompts = replace(target, pattern="prompts", flops_per_token=2.0 * (shape.active_params - shape.head_params))
    host = Parametric(fixed=reached.host_seconds)
    draft = _drafter_pass(target, shape, drafter, reached) if drafter else Parametric()
    head = None
    if drafter and drafter.head_rank:
        head_bytes = drafter.head_rank * shape.vocab_size * shape.weight_bytes
        head = Parametric(
            per_position=head_bytes / bandwidth,
            per_token=2.0 * drafter.head_rank * shape.vocab_size / target.flops_per_second,
        )
    return CostModel(
        verify=target,
        draft=draft,
        prefill=prompts,
        host=host,
        prefill_host=host,
        provenance=_provenance(accelerator, shape, drafter, num_devices, reached),
        head=head,
    )


def kv_capacity_tokens(accelerator: Accelerator, shape: ModelShape, num_devices: int = 1, usable: float = 0.9) -> int:
    """Tokens of context that fit beside the weights in the `usable` part of memory."""
    free = accelerator.memory_bytes * num_devices * usable - shape.memory_bytes
    return max(int(free // shape.kv_bytes_per_token), 0)


def _drafter_pass(target: RooflinePass, shape: ModelShape, drafter: DrafterShape, reached: Efficiency) -> RooflinePass:
    # A target of experts alone has no dense MLP to copy: its drafter's is as wide as what one of its tokens meets.
    mlp = shape.mlp_params or shape.shared_params + shape.experts_per_token * shape.expert_params
    params = drafter.num_layers * (shape.attention_params + mlp) + shape.head_params
    return replace(
        target,
        pattern=drafter.pattern,
        weight_bytes=params * shape.weight_bytes,
        flops_per_token=2.0 * params,
        expert_bytes=0.0,
        num_experts=0,
        experts_per_token=0,
        kv_bytes=target.kv_bytes * drafter.num_layers / shape.num_layers,
        flops_per_pair=target.flops_per_pair * drafter.num_layers / shape.num_layers,
        overhead_seconds=reached.pass_seconds + drafter.num_layers * reached.layer_seconds,
    )


def _provenance(
    accelerator: Accelerator, shape: ModelShape, drafter: DrafterShape | None, num_devices: int, reached: Efficiency
) -> dict[str, Any]:
    return {
        "source": "roofline",
        "device": accelerator.name,
        "num_devices": num_devices,
        "model": shape.name,
        "drafter": None if drafter is None else asdict(drafter),
        "efficiency": asdict(reached),
    }
