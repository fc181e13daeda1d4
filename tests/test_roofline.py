"""The roofline against numbers worked by hand, published sizes, and its limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sim.cost_parts import Parametric, RooflinePass
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import SHAPES, dense_shape
from dspark_sim.roofline import (
    ACCELERATORS,
    DRAFTERS,
    Accelerator,
    DrafterShape,
    Efficiency,
    kv_capacity_tokens,
    roofline,
)

IDEAL = Efficiency(bandwidth=1.0, compute=1.0, pass_seconds=0.0, host_seconds=0.0)
TINY = dense_shape("tiny", 2, 4, 2, 1, 2, 8, 10)
SLOW = Accelerator("slow", bytes_per_second=100.0, flops_per_second=1000.0, memory_bytes=1e4)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("smollm2-135m", 134.5e6, None),
        ("llama-3.1-8b", 8.03e9, None),
        ("qwen3-4b", 4.02e9, None),
        ("qwen3-8b", 8.19e9, None),
        ("qwen3-14b", 14.77e9, None),
        ("qwen3-32b", 32.76e9, None),
        ("gemma-7b", 8.54e9, None),
        ("qwen3-30b-a3b", 30.5e9, 3.3e9),
        ("deepseek-v3", 671e9, 37e9),
        ("deepseek-v4-flash", 284e9, 13e9),
    ],
)
def test_shapes_have_the_published_numbers_of_parameters(name: str, total: float, active: float | None) -> None:
    shape = SHAPES[name]
    assert shape.num_params == pytest.approx(total, rel=2e-3)
    if active is not None:
        # Published counts of active parameters include the embedding, or not.
        assert min(shape.active_params, active) / max(shape.active_params, active) > 0.9


def test_cache_bytes_per_token() -> None:
    """Llama-3.1-8B: 2 · 8 heads · 128 · 32 layers · 2 bytes. DeepSeek-V3: (512 + 64) · 61 · 2 bytes."""
    assert SHAPES["llama-3.1-8b"].kv_bytes_per_token == 131072
    assert SHAPES["deepseek-v3"].kv_bytes_per_token == 70272
    assert kv_capacity_tokens(ACCELERATORS["h100"], SHAPES["llama-3.1-8b"], usable=1.0) == int(
        (80e9 - 2 * SHAPES["llama-3.1-8b"].num_params) // 131072
    )
    assert kv_capacity_tokens(ACCELERATORS["h100"], SHAPES["deepseek-v3"]) == 0


def test_a_tiny_model_by_hand() -> None:
    """Per layer 2·4·2·(2+1) = 48 in attention and 3·4·8 = 96 in the MLP; the head 40. Two layers: 288.

    One pass: 328 weights of 2 bytes over 100 bytes/s = 6.56 s; 656 operations a token over 1000/s = 0.656 s, so the
    two meet at 10 tokens. Cache: 2 layers · 4 numbers · 2 bytes = 16 bytes, 0.16 s per place of context. Attention:
    2 layers · 4·2·2 = 32 operations per pair, 0.032 s: five tokens of a request together take as long as one reading.
    """
    cost = roofline(SLOW, TINY, efficiency=IDEAL)
    assert TINY.dense_params == 288 and TINY.active_params == 328 and TINY.num_params == 368
    assert cost.step_seconds(1, 0, 1) == pytest.approx(6.56)
    assert cost.step_seconds(10, 0, 10) == pytest.approx(6.56)
    assert cost.step_seconds(11, 0, 11) == pytest.approx(7.216)
    assert cost.step_seconds(5, 50, 1) == pytest.approx(6.56 + 50 * 0.16)
    assert cost.step_seconds(8, 50, 1) == pytest.approx(6.56 + 50 * 8 * 0.032)
    assert cost.step_seconds(8, 50, 2) == pytest.approx(6.56 + 50 * 0.16)
    # 12 prompt tokens, no head: 12 · 576 operations, and 12²/2 pairs. In two prompts of 6 there are half as many.
    assert cost.prefill_seconds(12) == pytest.approx(6.912 + 72 * 0.032)
    assert cost.prefill_seconds(12, 0, 2) == pytest.approx(6.912 + 36 * 0.032)
    # A second chunk of 12 attends to 12 before it as well.
    assert cost.prefill_seconds(12, 12) == pytest.approx(6.912 + 72 * 0.032 + 12 * 12 * 0.032)
    assert cost.draft_seconds(4, 3, 100) == cost.host_seconds(2) == 0.0


def test_drafters_by_hand() -> None:
    """One layer of 144 weights and the head's 40: 3.68 s a pass, 0.368 s a token. A rank of 5 over 10 tokens: 1 s."""
    block = roofline(SLOW, TINY, DrafterShape("block", 1, 5), efficiency=IDEAL)
    # 2 requests, 4 drafts each: one pass over 8 tokens; the head reads 100 bytes at each of 4 positions.
    assert block.draft.scalar(2, 0, 2, 4) == pytest.approx(3.68)
    assert block.draft_seconds(2, 4, 0) == pytest.approx(3.68 + 4 * 1.0 + 8 * 0.1)
    assert block.draft.scalar(5, 0, 5, 4) == pytest.approx(20 * 0.368)
    # Half the layers read half the cache; 4 tokens a request are below the 5 that would be bound by arithmetic.
    assert block.draft.scalar(2, 30, 2, 4) == pytest.approx(3.68 + 30 * 0.08)
    chain = roofline(SLOW, TINY, DrafterShape("chain", 1, 0), efficiency=IDEAL)
    assert chain.head is None
    assert chain.draft_seconds(2, 4, 0) == pytest.approx(4 * 3.68)
    assert chain.draft_seconds(2, 4, 30) == pytest.approx(4 * (3.68 + 30 * 0.08))
    assert chain.draft_seconds(20, 1, 0) == pytest.approx(20 * 0.368)


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("deepseek")])
@pytest.mark.parametrize("device", ["h100", "h200", "mi300x"])
def test_limits(name: str, device: str) -> None:
    accelerator, shape = ACCELERATORS[device], SHAPES[name]
    cost = roofline(accelerator, shape, efficiency=IDEAL)
    # One token: what it meets of the weights, over the bandwidth.
    assert cost.step_seconds(1, 0, 1) == pytest.approx(2 * shape.active_params / accelerator.bytes_per_second)
    # Very many: two operations per weight that a token meets, over the rate.
    slope = (cost.step_seconds(60_000, 0, 60_000) - cost.step_seconds(40_000, 0, 40_000)) / 20_000
    assert slope == pytest.approx(2 * shape.active_params / accelerator.flops_per_second)


def test_experts_touched() -> None:
    """Uniform routing of 8 of 128: against draws, and between k at one token and all at very many."""
    cost = roofline(ACCELERATORS["h100"], SHAPES["qwen3-30b-a3b"])
    assert isinstance(cost.verify, RooflinePass)
    touched = cost.verify.experts_touched(np.array([1, 32, 10_000]))
    assert touched[0] == pytest.approx(8) and touched[2] == pytest.approx(128)
    rng = np.random.default_rng(0)
    drawn = [len({int(e) for _ in range(32) for e in rng.choice(128, 8, replace=False)}) for _ in range(300)]
    assert touched[1] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(300))


def test_verifying_is_cheap_for_a_dense_target_and_not_for_experts() -> None:
    """Eight tokens cost a dense model what one does; in a sparse one they touch 5 times the experts."""
    dense = roofline(ACCELERATORS["h100"], SHAPES["qwen3-8b"], efficiency=IDEAL)
    assert dense.step_seconds(8, 0, 1) == dense.step_seconds(1, 0, 1)
    sparse = roofline(ACCELERATORS["h100"], SHAPES["qwen3-30b-a3b"], efficiency=IDEAL)
    assert 2.0 < sparse.step_seconds(8, 0, 1) / sparse.step_seconds(1, 0, 1) < 8.0


def test_latent_attention_is_bound_by_arithmetic_when_verifying() -> None:
    """128 heads share a row of 576 numbers: 8 tokens of a request take more than reading it once."""
    v3 = roofline(ACCELERATORS["h200"], SHAPES["deepseek-v3"], num_devices=8, efficiency=IDEAL)
    context = 100_000
    one = v3.step_seconds(1, context, 1) - v3.step_seconds(1, 0, 1)
    eight = v3.step_seconds(8, context, 1) - v3.step_seconds(8, 0, 1)
    assert one == pytest.approx(context * 70272 / (8 * 4.8e12), rel=1e-6)
    assert eight == pytest.approx(context * 8 * 61 * 2 * 128 * 1088 / (8 * 1978.9e12), rel=1e-6) and eight > 2 * one
    dense = roofline(ACCELERATORS["h200"], SHAPES["qwen3-8b"], efficiency=IDEAL)
    assert dense.step_seconds(8, context, 1) - dense.step_seconds(8, 0, 1) == pytest.approx(context * 147456 / 4.8e12)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(sorted(DRAFTERS)),
    st.integers(1, 2000),
    st.integers(1, 500),
    st.integers(0, 300_000),
    st.integers(1, 12),
    st.floats(0.1, 1.0),
)
def test_nothing_falls_with_more_work_and_nothing_rises_with_more_hardware(
    name: str, drafter: str, tokens: int, requests: int, context: int, draft_len: int, share: float
) -> None:
    shape = SHAPES[name]
    small = roofline(ACCELERATORS["h200"], shape, DRAFTERS[drafter], num_devices=8, efficiency=Efficiency(share, share))
    large = roofline(ACCELERATORS["h200"], shape, DRAFTERS[drafter], num_devices=16)
    best = roofline(ACCELERATORS["h200"], shape, DRAFTERS[drafter], num_devices=16, efficiency=IDEAL)
    step, draft = small.step_seconds(tokens, context, requests), small.draft_seconds(requests, draft_len, context)
    assert small.step_seconds(tokens + 1, context, requests) >= step > 0
    assert small.step_seconds(tokens, context + 100, requests) > step
    assert small.draft_seconds(requests, draft_len + 1, context) >= draft > 0
    assert small.draft_seconds(requests + 1, draft_len, context) >= draft
    assert small.prefill_seconds(tokens + 1) >= small.prefill_seconds(tokens)
    assert best.step_seconds(tokens, context, requests) <= large.step_seconds(tokens, context, requests)
    assert best.step_seconds(tokens, context, requests) <= step


def test_overheads_are_added_and_origin_is_kept() -> None:
    overheads = Efficiency(1.0, 1.0, pass_seconds=1e-3, layer_seconds=1e-5, host_seconds=2e-3)
    cost = roofline(ACCELERATORS["h100"], SHAPES["qwen3-8b"], DRAFTERS["mtp"], efficiency=overheads)
    ideal = roofline(ACCELERATORS["h100"], SHAPES["qwen3-8b"], DRAFTERS["mtp"], efficiency=IDEAL)
    assert cost.step_seconds(4, 0, 4) - ideal.step_seconds(4, 0, 4) == pytest.approx(1e-3 + 36e-5)
    assert cost.draft_seconds(4, 3, 0) - ideal.draft_seconds(4, 3, 0) == pytest.approx(3 * (1e-3 + 1e-5))
    assert cost.host_seconds(9) == cost.prefill_host_seconds(9) == 2e-3 and cost.host == Parametric(2e-3)
    assert cost.provenance["source"] == "roofline" and cost.provenance["model"] == "qwen3-8b"
    with pytest.raises(UserError, match="measured with device NVIDIA H100"):
        cost.require_hardware({"device": "a laptop"})


def test_impossible_configurations_are_one_sentence() -> None:
    with pytest.raises(UserError, match="take 671 GB and 1 × NVIDIA H100 80GB HBM3 have 80 GB; give more devices"):
        roofline(ACCELERATORS["h100"], SHAPES["deepseek-v3"])
    with pytest.raises(UserError, match="num_devices is 0"):
        roofline(ACCELERATORS["h100"], SHAPES["qwen3-4b"], num_devices=0)
    for wrong in ({"bandwidth": 0.0}, {"compute": 1.1}, {"compute": float("nan")}):
        with pytest.raises(UserError, match="give a share above 0 and at most 1"):
            Efficiency(**wrong)
    with pytest.raises(UserError, match="host_seconds is -1"):
        Efficiency(host_seconds=-1)
    with pytest.raises(UserError, match="0 layers"):
        DrafterShape("chain", 0)
