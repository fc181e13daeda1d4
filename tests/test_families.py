"""Tiny random targets of every supported family: ragged, dense and transformers' own passes agree, decoding too."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dspark_sim.engine.attention import ATTENTION_NAME, RaggedBatch, register_attention  # noqa: E402
from dspark_sim.engine.drafters import SequenceState  # noqa: E402
from dspark_sim.engine.drafters.block import RaggedBlockDrafter  # noqa: E402
from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.choose import DraftRule  # noqa: E402
from dspark_sim.engine.drafters.dense import dense_target, dense_walks  # noqa: E402
from dspark_sim.engine.drafters.heads import greedy, run_head  # noqa: E402
from dspark_sim.engine.models import Target, _refuse_unsupported  # noqa: E402
from dspark_sim.engine.serve import Engine  # noqa: E402
from dspark_sim.engine.timing import SpanTimer  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.policy import Fixed  # noqa: E402
from dspark_sim.workload import ClosedLoop, Prompt  # noqa: E402

VOCABULARY, HIDDEN, WINDOW = 60, 24, 5
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 = {**COMMON, **SLIDING, "head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": VOCABULARY}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON),
    "mistral, all layers sliding": ("MistralForCausalLM", "MistralConfig", {**COMMON, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**COMMON, "head_dim": 8}),
    "qwen3, sliding": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**COMMON, **SLIDING, "head_dim": 8, "use_sliding_window": True},
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**COMMON, "head_dim": 8}),
    "gemma2, capped": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **COMMON,
            **SLIDING,
            "head_dim": 8,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.7,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**COMMON, **SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 0.7,
        },
    ),
    "gemma4, shared keys": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {**GEMMA4, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 2},
    ),
}


class _Tokenizer:
    """Words are token ids."""

    eos_token_id, unk_token_id, chat_template = 2, None, None

    def __call__(self, text):
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def make_model(family, attention, dtype):
    """A random model of a family; the same weights for every attention."""
    model_kind, config_kind, values = FAMILIES[family]
    register_attention()
    torch.manual_seed(0)
    config = getattr(transformers, config_kind)(**values, attn_implementation=attention)
    model = getattr(transformers, model_kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, tiny models hardly look at their context.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5))
    return model.to(dtype).eval().requires_grad_(False)


def make_target(family, dtype=torch.float64):
    """The same with the engine's attention."""
    return Target("tiny", make_model(family, ATTENTION_NAME, dtype), _Tokenizer())


def make_drafter(target, **changes):
    """A random DSpark drafter of a target."""
    values = {
        "target": "tiny",
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "block_size": 4,
        "target_layer_ids": (-1, 1, 2),
        "mask_token_id": VOCABULARY - 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": target.head_dim,
        "intermediate_size": 16,
        "rms_norm_eps": 1e-5,
        "markov_rank": 5,
        "enable_confidence_head": True,
        "draft_vocab_size": 0,
        **changes,
    }
    torch.manual_seed(1)
    network = BlockDrafter(BlockDrafterConfig(**values))
    return network.to(target.dtype).attach(target).eval().requires_grad_(False)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_ragged_equals_dense_and_transformers_own(family):
    target = make_target(family)
    reference = make_model(family, "eager", torch.float64)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, VOCABULARY, length) for length in (9, 17, 12)]
    slots, cache = np.array([2, 0, 1]), target.new_cache(3, 64)
    done = np.zeros(3, dtype=np.int64)
    rows = [[], [], []]
    # Chunks, blocks and single tokens, shorter and longer than the window.
    for lens in ([4, 1, 7], [1, 9, 1], [4, 7, 4]):
        tokens = np.concatenate([s[a : a + n] for s, a, n in zip(sequences, done, lens, strict=True)])
        batch = RaggedBatch(cache, slots, done, np.array(lens), target.device)
        logits, features = target.forward(torch.from_numpy(tokens), batch, torch.arange(len(tokens)), (-1, 1, 2))
        for request, part in enumerate(torch.cat((logits, features), dim=-1).split(lens)):
            rows[request].append(part)
        done = done + lens
    for sequence, parts in zip(sequences, rows, strict=True):
        whole = torch.from_numpy(sequence)[None]
        hidden, features = dense_target(target, whole, (-1, 1, 2))
        dense = torch.cat((target.head(hidden), features), dim=-1)[0]
        torch.testing.assert_close(torch.cat(parts), dense, rtol=1e-8, atol=1e-9)
        # Transformers' eager attention takes its softmax in float32.
        theirs = reference(whole, output_hidden_states=True)
        outputs = [theirs.logits, *(theirs.hidden_states[layer + 1] for layer in (-1, 1, 2))]
        torch.testing.assert_close(dense, torch.cat(outputs, dim=-1)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_dense_walk_equals_the_ragged_drafter(family):
    target = make_target(family)
    network = make_drafter(target)
    drafter = RaggedBlockDrafter("tiny", network, 2, 64)
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, VOCABULARY, 20))
    features = dense_target(target, tokens[None], drafter.feature_layers)[1][0]
    for start, at in ((0, 6), (6, 15)):
        drafter.observe(np.array([1]), np.array([start]), np.array([at - start]), features[start:at])
        states = [SequenceState(0, 1, tokens[: at + 1].tolist(), 1)]
        drafted = drafter.draft(states, 4, np.array([9]), DraftRule(with_prob=True), SpanTimer(target.device))
        walk = dense_walks(network, tokens, features, torch.tensor([at]))()
        out = run_head(network, walk, tokens[at : at + 1], 4, greedy, with_prob=True)
        assert drafted.tokens.tolist() == out.tokens.tolist()
        np.testing.assert_allclose(drafted.confidence, out.confidence.numpy(), rtol=1e-5)
        np.testing.assert_allclose(drafted.draft_prob, out.draft_prob.numpy(), rtol=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_live_greedy_decoding_is_what_generate_writes(family):
    target = make_target(family, torch.float32)
    drafter = RaggedBlockDrafter("tiny", make_drafter(target), 3, 64)
    engine = Engine(target, drafter, "tiny", 1, 3, 64, target.new_cache(3, 64))
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(f"p{row}", "chat", (" ".join(map(str, rng.integers(3, VOCABULARY, length))),))
        for row, length in enumerate((4, 11, 7))
    ]
    trace = engine.record(prompts, Fixed(3), ClosedLoop(3), max_tokens=24, progress=False)
    assert trace.tables["drafts"].num_rows > 0
    reference = make_model(family, "eager", torch.float32)
    for row in trace.tables["requests"].to_pylist():
        ids = trace.config["prompts"][row["prompt_id"]]
        theirs = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
        )
        assert row["output_tokens"] == theirs[0, len(ids) :].tolist()


@pytest.mark.parametrize(("family", "capped"), [("gemma2, capped", True), ("gemma4", True), ("llama", False)])
def test_draft_logits_are_capped_where_the_targets_are(family, capped):
    target = make_target(family)
    network = make_drafter(target)
    hidden = torch.randn(3, HIDDEN, dtype=torch.float64) * 100
    assert (network.base_logits(hidden).abs() <= 0.7).all() == capped
    torch.testing.assert_close(network.base_logits(hidden), target.head(hidden))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.GPT2Config(), "family gpt2"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "both ways"),
        (transformers.Qwen3Config(num_hidden_layers=1, layer_types=["chunked_attention"]), "chunked_attention"),
    ],
)
def test_what_is_not_supported_is_refused(config, reason):
    with pytest.raises(UserError, match=reason):
        _refuse_unsupported("tiny", config)
