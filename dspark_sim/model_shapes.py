"""Sizes of well-known decoders, as far as step times depend on them: weights, experts, and the KV cache.

Sources: the models' published ``config.json`` files and DeepSeek's V3 report. DeepSeek-V4-Flash is from its
``config.json``, with its compressed attention read in full, an upper bound. Numbers of parameters agree with the
published ones to 0.2 % (norms and biases are left out).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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
