"""Step times of hardware one does not have: bytes over bandwidth, operations over rate.

A pass takes as long as its bytes take to read or its operations to compute, whichever is longer (`RooflinePass` has
the formula). At batch 1 that is the weights over the bandwidth; at large batches it rises by flops over rate per token;
speculation is cheap between the two. Real kernels reach a part of the published figures: `bandwidth_efficiency` and
`compute_efficiency` say which, and their defaults are assumptions of usual size, not measurements. Fit a profile where
there is one.

Sources of the accelerators' figures (dense, without sparsity): NVIDIA H100, H200, A100 and L40S data sheets; NVIDIA Ada
GPU architecture white paper (RTX 4090: 16-bit with float32 accumulation); AMD Instinct MI300X data sheet; Google Cloud
TPU v5e and v6e documentation. Sources of the shapes: the models' published ``config.json`` and DeepSeek's V3 report;
DeepSeek-V4-Flash from its ``config.json``, with its compressed attention read in full, an upper bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dspark_sim.cost_model import CostModel
from dspark_sim.cost_parts import Parametric, RooflinePass
from dspark_sim.errors import UserError


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
class ModelShape:
    """Sizes of a decoder that its step times depend on.

    Parameters
    ----------
    name
        As written in provenance.
    num_layers, hidden_size, vocab_size
        As in its configuration.
    attention_params, mlp_params
        Matrix weights per layer; in layers with experts `mlp_params` does not count.
    kv_elements, pair_flops
        Per layer: numbers in the KV cache per token, and operations per pair of a token and a place in its context.
    tied
        Whether the embedding is the head.
    num_expert_layers, num_experts, experts_per_token, expert_params, shared_params
        Layers with experts; experts in each, and how many a token is routed to; weights of one, and of the shared
        experts and router of a layer.
    weight_bytes, expert_bytes, kv_bytes
        Bytes of a weight, of an expert's weight, and of a number in the KV cache.
    """

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    attention_params: int
    mlp_params: int
    kv_elements: float
    pair_flops: float
    tied: bool = False
    num_expert_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_params: int = 0
    shared_params: int = 0
    weight_bytes: float = 2.0
    expert_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def head_params(self) -> int:
        """Weights of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def dense_params(self) -> int:
        """Matrix weights that every token meets, but for the head."""
        dense_layers = self.num_layers - self.num_expert_layers
        per_layer = self.num_layers * self.attention_params + dense_layers * self.mlp_params
        return per_layer + self.num_expert_layers * self.shared_params

    @property
    def num_params(self) -> int:
        """All weights, embedding included, norms and biases not."""
        experts = self.num_expert_layers * self.num_experts * self.expert_params
        return self.dense_params + experts + self.head_params * (1 if self.tied else 2)

    @property
    def active_params(self) -> int:
        """Matrix weights that one token meets, head included."""
        return (
            self.dense_params + self.num_expert_layers * self.experts_per_token * self.expert_params + self.head_params
        )

    @property
    def memory_bytes(self) -> float:
        """Bytes of all weights."""
        experts = self.num_expert_layers * self.num_experts * self.expert_params
        return (self.num_params - experts) * self.weight_bytes + experts * self.expert_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of the KV cache per token of context."""
        return self.num_layers * self.kv_elements * self.kv_bytes


def dense_shape(
    name: str,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    *,
    tied: bool = False,
) -> ModelShape:
    """A decoder with grouped-query attention and gated MLPs, in bfloat16, from the numbers of its configuration."""
    return ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        attention_params=2 * hidden_size * head_dim * (num_heads + num_kv_heads),
        mlp_params=3 * hidden_size * intermediate_size,
        kv_elements=2 * num_kv_heads * head_dim,
        pair_flops=4 * num_heads * head_dim,
        tied=tied,
    )


def _deepseek_v3() -> ModelShape:
    hidden, heads, q_rank, kv_rank, nope, rope, value, inner = 7168, 128, 1536, 512, 128, 64, 128, 2048
    return ModelShape(
        name="deepseek-v3",
        num_layers=61,
        hidden_size=hidden,
        vocab_size=129280,
        attention_params=hidden * q_rank
        + q_rank * heads * (nope + rope)
        + hidden * (kv_rank + rope)
        + kv_rank * heads * (nope + value)
        + heads * value * hidden,
        mlp_params=3 * hidden * 18432,
        # Latent attention: one compressed row per token for all heads, which decoding works on without expanding it.
        kv_elements=kv_rank + rope,
        pair_flops=2 * heads * (kv_rank + rope + kv_rank),
        num_expert_layers=58,
        num_experts=256,
        experts_per_token=8,
        expert_params=3 * hidden * inner,
        shared_params=3 * hidden * inner + hidden * 256,
        weight_bytes=1.0,
        expert_bytes=1.0,
    )


def _deepseek_v4_flash() -> ModelShape:
    hidden, heads, head_dim, q_rank, o_rank, groups, inner = 4096, 64, 512, 1024, 1024, 8, 2048
    return ModelShape(
        name="deepseek-v4-flash",
        num_layers=43,
        hidden_size=hidden,
        vocab_size=129280,
        attention_params=hidden * q_rank
        + q_rank * heads * head_dim
        + hidden * head_dim
        + heads * head_dim * o_rank
        + groups * o_rank * hidden,
        mlp_params=0,
        # 21 layers keep a row of 512 and an index key of 128 for every 4 tokens, 20 a row for every 128.
        kv_elements=(21 * (head_dim + 128) / 4 + 20 * head_dim / 128) / 43,
        pair_flops=4 * heads * head_dim * (21 / 4 + 20 / 128) / 43,
        num_expert_layers=43,
        num_experts=256,
        experts_per_token=6,
        expert_params=3 * hidden * inner,
        shared_params=3 * hidden * inner + hidden * 256,
        weight_bytes=1.0,
        # 4 bits, and a scale of 8 bits for every 32 weights.
        expert_bytes=0.53125,
    )


SHAPES = {
    "smollm2-135m": dense_shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
    "llama-3.1-8b": dense_shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    "qwen3-4b": dense_shape("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, tied=True),
    "qwen3-8b": dense_shape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-14b": dense_shape("qwen3-14b", 40, 5120, 40, 8, 128, 17408, 151936),
    "qwen3-32b": dense_shape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936),
    "gemma-7b": dense_shape("gemma-7b", 28, 3072, 16, 16, 256, 24576, 256000, tied=True),
    "qwen3-30b-a3b": replace(
        dense_shape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 0, 151936),
        num_expert_layers=48,
        num_experts=128,
        experts_per_token=8,
        expert_params=3 * 2048 * 768,
        shared_params=2048 * 128,
    ),
    "deepseek-v3": _deepseek_v3(),
    "deepseek-v4-flash": _deepseek_v4_flash(),
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
