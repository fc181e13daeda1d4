"""Other projects' checkpoints, written here tensor by tensor: all of them load, and what does not fit is refused."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from dspark_sim.cli import main  # noqa: E402
from dspark_sim.engine.attention import ATTENTION_NAME, register_attention  # noqa: E402
from dspark_sim.engine.drafters.block import RaggedBlockDrafter  # noqa: E402
from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.chain_model import ChainDrafter, ChainDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.checkpoint import load_drafter, save_drafter  # noqa: E402
from dspark_sim.engine.drafters.dense import dense_hidden, dense_target, dense_walks, teacher_forced  # noqa: E402
from dspark_sim.engine.drafters.diagnosis import rejects_nearly_all  # noqa: E402
from dspark_sim.engine.drafters.export import export_deepspec  # noqa: E402
from dspark_sim.engine.drafters.heads import greedy, run_head  # noqa: E402
from dspark_sim.engine.models import Target  # noqa: E402
from dspark_sim.engine.serve import Engine  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.policy import Fixed  # noqa: E402
from dspark_sim.workload import ClosedLoop, Prompt  # noqa: E402

VOCABULARY, HIDDEN, MLP, RANK, LAYERS, CAP = 50, 24, 32, 5, 2, 1.5
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
GEMMA = {
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": CAP,
    "rope_parameters": ROPE,
}


class _Tokenizer:
    eos_token_id, unk_token_id, chat_template = 0, None, None

    def __call__(self, text):
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def _random(model):
    """Weights large enough that every one matters."""
    for parameter in [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("layer_scalar"))]:
        parameter.data = torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0)
    return model.eval().requires_grad_(False)


def _target(kind, config):
    register_attention()
    torch.manual_seed(0)
    return Target("tiny", _random(kind(config)), _Tokenizer())


@pytest.fixture(scope="module")
def qwen3():
    config = transformers.Qwen3Config(
        **SHAPE,
        num_hidden_layers=4,
        attn_implementation=ATTENTION_NAME,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    return _target(transformers.Qwen3ForCausalLM, config)


@pytest.fixture(scope="module")
def gemma4():
    config = transformers.Gemma4TextConfig(
        **SHAPE,
        **GEMMA,
        num_hidden_layers=4,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_implementation=ATTENTION_NAME,
    )
    return _target(transformers.Gemma4ForCausalLM, config)


@pytest.fixture
def target(request):
    return request.getfixturevalue(request.param)


def _backbone(family, num_taps=3):
    """Names and shapes of a checkpoint's tensors, without embedding and heads."""
    size, keys = (16, 1) if family == "gemma4" else (8, 2)
    shapes = {
        "fc.weight": (HIDDEN, num_taps * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (4 * size, HIDDEN),
                "self_attn.k_proj": (keys * size, HIDDEN),
                "self_attn.v_proj": (keys * size, HIDDEN),
                "self_attn.o_proj": (HIDDEN, 4 * size),
                "self_attn.q_norm": (size,),
                "self_attn.k_norm": (size,),
                "mlp.gate_proj": (MLP, HIDDEN),
                "mlp.up_proj": (MLP, HIDDEN),
                "mlp.down_proj": (HIDDEN, MLP),
            }.items()
        }
        if family == "gemma4":
            del shapes[f"layers.{layer}.self_attn.v_proj.weight"]
            shapes[f"layers.{layer}.pre_feedforward_layernorm.weight"] = (HIDDEN,)
            shapes[f"layers.{layer}.post_feedforward_layernorm.weight"] = (HIDDEN,)
            shapes[f"layers.{layer}.layer_scalar"] = (1,)
    return shapes


def _heads(kind, *, bias=True, with_markov=True, head_size=VOCABULARY):
    shapes = {
        "markov_head.markov_w1.weight": (VOCABULARY, RANK),
        "markov_head.markov_w2.weight": (head_size, RANK),
        "confidence_head.proj.weight": (1, HIDDEN + RANK * with_markov),
        "confidence_head.proj.bias": (1,),
    }
    if kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (RANK, HIDDEN + RANK), "markov_head.gate_proj.bias": (RANK,)}
    if kind == "rnn":
        shapes |= {
            "markov_head.joint_proj.weight": (3 * RANK, HIDDEN + 2 * RANK),
            "markov_head.joint_proj.bias": (3 * RANK,),
        }
    return {name: shape for name, shape in shapes.items() if bias or not name.endswith("_proj.bias")}


def _write(folder, config, shapes, extra=None):
    rng = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=rng) * 0.3 + (1.0 if name.endswith(("norm.weight", "scalar")) else 0.0)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def _deepspec_config(family, kind="vanilla", **changes):
    gemma = family == "gemma4"
    return {
        **SHAPE,
        **(GEMMA if gemma else {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}),
        "architectures": ["Gemma4DSparkModel" if gemma else "Qwen3DSparkModel"],
        "model_type": "gemma4_text" if gemma else "qwen3",
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention"] * LAYERS,
        "num_target_layers": 4,
        "block_size": 4,
        "target_layer_ids": [0, 1, 2],
        "mask_token_id": 49,
        "num_anchors": 8,
        "markov_rank": RANK,
        "markov_head_type": kind,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        **changes,
    }


def _deepspec_shapes(family, kind="vanilla", **heads):
    whole = {"embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {**whole, **_backbone(family), **_heads(kind, **heads)}


def _logits(drafter):
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (2, 15), generator=rng)
    features = torch.randn(2, 15, HIDDEN * len(drafter.config.target_layer_ids), generator=rng)
    logits, confidence = teacher_forced(drafter, tokens, features, torch.tensor([[0, 4, 9], [2, 3, 12]]))
    return logits if confidence is None else torch.cat((logits, confidence[..., None]), dim=-1)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("target", ["qwen3", "gemma4"], indirect=True)
@pytest.mark.parametrize("bias", [True, False])
def test_deepspec_checkpoints_load_with_every_tensor_used(target, kind, bias, tmp_path, capsys):
    family = "gemma4" if "Gemma4" in type(target.model).__name__ else "qwen3"
    shapes = _deepspec_shapes(family, kind)
    if not bias:
        shapes = {
            name: shape for name, shape in shapes.items() if not name.endswith(("gate_proj.bias", "joint_proj.bias"))
        }
    tensors = _write(tmp_path / "theirs", _deepspec_config(family, kind), shapes)
    drafter = load_drafter(tmp_path / "theirs", target)
    said = capsys.readouterr().err
    assert "deepspec checkpoint" in said and "a+1+k" in said and f"{kind} head" in said and said.count("\n") == 1
    state = drafter.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    logits = _logits(drafter)
    # Every tensor has a say in what comes out.
    for name in shapes:
        with torch.no_grad():
            state[name].mul_(1.5).add_(0.1)
            assert not torch.equal(_logits(drafter), logits), name
            state[name].copy_(tensors[name])
    assert torch.equal(_logits(drafter), logits)
    export_deepspec(drafter, target, tmp_path / "ours", "float32")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert torch.equal(_logits(load_drafter(tmp_path / "ours", target)), logits)


@pytest.mark.parametrize("target", ["qwen3", "gemma4"], indirect=True)
def test_draft_layers_are_those_of_transformers(target, tmp_path):
    """Without context a block is a sequence whose tokens all see each other."""
    family = "gemma4" if "Gemma4" in type(target.model).__name__ else "qwen3"
    config = _deepspec_config(family, markov_rank=0, enable_confidence_head=False)
    shapes = {name: s for name, s in _deepspec_shapes(family).items() if "_head." not in name or name[:2] == "lm"}
    tensors = _write(tmp_path, config, shapes)
    drafter = load_drafter(tmp_path, target)
    kind = transformers.Gemma4ForCausalLM if family == "gemma4" else transformers.Qwen3ForCausalLM
    known = ("architectures", "model_type")
    reference = kind(
        type(target.config)(**{k: v for k, v in config.items() if k not in known}, attn_implementation="eager")
    )
    inner = {name: value for name, value in tensors.items() if not name.startswith(("lm_head", "fc", "hidden_norm"))}
    reference.model.load_state_dict(inner, strict=False)
    reference.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"])
    anchors, positions = torch.tensor([3]), torch.arange(11, 15)
    mask = torch.zeros(1, 1, 4, 4)
    with torch.no_grad():
        theirs = reference.eval()(
            input_ids=drafter.block_tokens(anchors),
            position_ids=positions[None],
            attention_mask={"full_attention": mask, "sliding_attention": mask},
            use_cache=False,
        ).logits[0]

    def attend(_layer, queries, keys, values):
        heads = [rows.transpose(0, 1)[None] for rows in (queries, keys, values)]
        return torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1)

    hidden = drafter.backbone(drafter.block_tokens(anchors)[0], positions, attend)
    torch.testing.assert_close(drafter.base_logits(hidden), theirs, rtol=1e-4, atol=1e-5)


def _speculators_config(**changes):
    layer = {**SHAPE, "model_type": "qwen3", "num_hidden_layers": LAYERS, "rope_parameters": {"rope_theta": 7e4}}
    # Left out, as by `to_diff_dict`: what equals the default.
    layer["rms_norm_eps"] = 1e-6
    del layer["rms_norm_eps"]
    return {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "speculators_config": {"algorithm": "dspark", "verifier": {"architectures": ["Qwen3ForCausalLM"]}},
        "transformer_layer_config": layer,
        "draft_vocab_size": VOCABULARY,
        "block_size": 4,
        "aux_hidden_state_layer_ids": [1, 2, 3],
        "mask_token_id": 49,
        "sample_from_anchor": True,
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": False,
        **changes,
    }


def _same_as_deepspec(target, folder, tensors):
    """The same drafter written in DeepSpec's form, with the target's embedding and head."""
    config = _deepspec_config("qwen3", confidence_head_with_markov=False, rms_norm_eps=1e-6)
    whole = {
        **tensors,
        "embed_tokens.weight": target.model.get_input_embeddings().weight.clone(),
        "lm_head.weight": target.model.get_output_embeddings().weight.clone(),
    }
    folder.mkdir()
    save_file(whole, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return load_drafter(folder, target)


def test_speculators_checkpoints_are_the_same_drafter_in_other_words(qwen3, tmp_path, capsys):
    shapes = {**_backbone("qwen3"), **_heads("vanilla", with_markov=False)}
    tensors = _write(tmp_path / "theirs", _speculators_config(), shapes)
    drafter = load_drafter(tmp_path / "theirs", qwen3)
    assert "speculators checkpoint" in capsys.readouterr().err
    assert drafter.config.target_layer_ids == (0, 1, 2) and drafter.config.rms_norm_eps == 1e-6
    assert torch.equal(_logits(drafter), _logits(_same_as_deepspec(qwen3, tmp_path / "same", tensors)))


@pytest.mark.parametrize("with_head", [True, False])
def test_a_draft_vocabulary_comes_as_two_tables(qwen3, tmp_path, with_head):
    ids = torch.tensor([0, 1, 5, 6, 17, 30, 49])
    tables = {"d2t": ids - torch.arange(7), "t2d": torch.zeros(VOCABULARY, dtype=torch.bool)}
    tables["t2d"][ids] = True
    shapes = {**_backbone("qwen3"), **_heads("vanilla", with_markov=False, head_size=7)}
    if with_head:
        shapes["lm_head.weight"] = (7, HIDDEN)
    _write(tmp_path / "theirs", _speculators_config(draft_vocab_size=7), shapes, tables)
    drafter = load_drafter(tmp_path / "theirs", qwen3)
    assert drafter.draft_token_ids.tolist() == ids.tolist() and drafter.config.own_head == with_head
    hidden = torch.randn(2, HIDDEN)
    head = drafter.lm_head.weight if with_head else qwen3.model.lm_head.weight[ids]
    torch.testing.assert_close(drafter.base_logits(hidden), hidden @ head.T)
    # W1 has a row for every token of the target.
    previous = torch.arange(VOCABULARY)
    assert torch.equal(drafter.previous_embedding(previous), drafter.markov_head.markov_w1.weight)
    export_deepspec(drafter, qwen3, tmp_path / "ours", "float32")
    assert torch.equal(_logits(load_drafter(tmp_path / "ours", qwen3)), _logits(drafter))
    tables["d2t"][2] += 1
    _write(tmp_path / "wrong", _speculators_config(draft_vocab_size=7), shapes, tables)
    with pytest.raises(UserError, match="d2t and t2d do not say the same"):
        load_drafter(tmp_path / "wrong", qwen3)


def _dflash_config(**changes):
    return {
        **SHAPE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "num_hidden_layers": LAYERS,
        "num_target_layers": 4,
        "block_size": 5,
        "dflash_config": {"mask_token_id": 49, "target_layer_ids": [0, 1, 2]},
        **changes,
    }


def test_dflash_slots_predict_their_own_position(qwen3, tmp_path, capsys):
    tensors = _write(tmp_path / "theirs", _dflash_config(), _backbone("qwen3"))
    drafter = load_drafter(tmp_path / "theirs", qwen3)
    assert "4 drafts from 5 slots (slot k predicts position a+k)" in capsys.readouterr().err
    assert drafter.state_dict().keys() == tensors.keys()
    # As DeepSpec's the same weights would predict one position further from every slot.
    same = BlockDrafter(BlockDrafterConfig(**{**vars(drafter.config), "layout": "anchor_first"})).attach(qwen3).eval()
    same.load_state_dict(tensors)
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (1, 15), generator=rng)
    features, anchors = torch.randn(1, 15, 3 * HIDDEN, generator=rng), torch.tensor([[4, 9]])
    ours, theirs = (dense_hidden(network, tokens, features, anchors) for network in (drafter, same))
    assert torch.equal(ours[:, :, :4], theirs[:, :, 1:])

    # The live batch drafts from the same slots, and the output stays the target's.
    drafted = RaggedBlockDrafter("theirs", drafter, 3, 64)
    assert drafted.block_size == 4
    engine = Engine(qwen3, drafted, "theirs", 1, 3, 64, qwen3.new_cache(3, 64))
    prompts = [Prompt(f"p{n}", "chat", (" ".join(map(str, range(3 + n, 9 + 2 * n))),)) for n in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = engine.record(prompts, Fixed(4), ClosedLoop(3), max_tokens=20, progress=False)
        plain = engine.with_drafter("none").record(prompts, Fixed(0), ClosedLoop(1), max_tokens=20, progress=False)
    outputs = [t.requests.sort_values("request_id")["output_tokens"].map(list).tolist() for t in (trace, plain)]
    assert outputs[0] == outputs[1]
    rows = trace.tables["drafts"].to_pylist()
    assert max(row["draft_len"] for row in rows) == 4
    whole = {
        r["request_id"]: trace.config["prompts"][r["prompt_id"]] + r["output_tokens"]
        for r in trace.tables["requests"].to_pylist()
    }
    for row in rows[:6]:
        sequence = torch.tensor(whole[row["request_id"]])
        seen = dense_target(qwen3, sequence[None], drafter.config.target_layer_ids)[1][0]
        walk = dense_walks(drafter, sequence, seen, torch.tensor([row["position"]]))()
        out = run_head(drafter, walk, sequence[row["position"]][None], 4, greedy)
        assert list(row["draft_tokens"] or []) == out.tokens[0, : row["draft_len"]].tolist()


def test_a_raw_embedding_is_scaled_as_the_checkpoint_says(gemma4, tmp_path):
    config = _dflash_config(
        dflash_config={"mask_token_id": 49, "target_layer_ids": [0, 1], "input_embedding_scale": 2.0}
    )
    _write(tmp_path, config, _backbone("qwen3", 2))
    drafter = load_drafter(tmp_path, gemma4)
    tokens = torch.arange(5)
    table = gemma4.model.get_input_embeddings()
    assert torch.equal(drafter.embed(tokens), table.weight[:5] * 2.0)
    hidden = torch.randn(2, HIDDEN)
    torch.testing.assert_close(drafter.base_logits(hidden), hidden @ gemma4.model.lm_head.weight.T)


def test_speculators_read_the_stored_embedding_and_cap_nothing(gemma4, tmp_path):
    config = _speculators_config(speculators_config={"verifier": {"architectures": ["Gemma4ForCausalLM"]}})
    _write(tmp_path, config, {**_backbone("qwen3"), **_heads("vanilla", with_markov=False)})
    drafter = load_drafter(tmp_path, gemma4)
    assert torch.equal(drafter.embed(torch.arange(5)), gemma4.model.get_input_embeddings().weight[:5])
    hidden = torch.randn(2, HIDDEN)
    torch.testing.assert_close(drafter.base_logits(hidden), hidden @ gemma4.model.lm_head.weight.T)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
@pytest.mark.parametrize("target", ["qwen3", "gemma4"], indirect=True)
@pytest.mark.parametrize("draft_vocab_size", [0, 20])
def test_our_drafters_exported_and_loaded_again_give_the_same_logits(target, kind, draft_vocab_size, tmp_path):
    config = BlockDrafterConfig(
        target="tiny",
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        block_size=4,
        target_layer_ids=(-1, 1, 2),
        mask_token_id=VOCABULARY - 1,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=target.head_dim,
        intermediate_size=MLP,
        rms_norm_eps=1e-5,
        markov_rank=0 if kind == "none" else RANK,
        markov_head_type="vanilla" if kind == "none" else kind,
        enable_confidence_head=True,
        draft_vocab_size=draft_vocab_size,
    )
    torch.manual_seed(2)
    ids = torch.randperm(VOCABULARY)[:draft_vocab_size].sort().values if draft_vocab_size else None
    drafter = _random(BlockDrafter(config, ids).attach(target))
    export_deepspec(drafter, target, tmp_path / "theirs", "float32")
    again = load_drafter(tmp_path / "theirs", target)
    assert again.config.source == "deepspec" and again.config.layer_family == "llama"
    assert torch.equal(again.draft_token_ids, drafter.draft_token_ids)
    assert torch.equal(_logits(again), _logits(drafter))
    # And in our own form, what was theirs stays what it was.
    save_drafter(again, tmp_path / "ours", dtype="float32")
    third = load_drafter(tmp_path / "ours", target)
    assert third.config == again.config and torch.equal(_logits(third), _logits(drafter))


def test_what_deepspec_has_no_place_for_is_not_exported(qwen3, tmp_path):
    config = ChainDrafterConfig(
        **{
            k: SHAPE[k] for k in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        },
        target="tiny",
        kind="eagle3",
        block_size=3,
        target_layer_ids=(0, 1),
        intermediate_size=MLP,
        rms_norm_eps=1e-5,
    )
    with pytest.raises(UserError, match="autoregressive"):
        export_deepspec(ChainDrafter(config).attach(qwen3), qwen3, tmp_path)
    _write(tmp_path / "dflash", _dflash_config(), _backbone("qwen3"))
    with pytest.raises(UserError, match=r"1\+N"):
        export_deepspec(load_drafter(tmp_path / "dflash", qwen3), qwen3, tmp_path / "out")
    with pytest.raises(UserError, match="dtype is 'int8'"):
        export_deepspec(load_drafter(tmp_path / "dflash", qwen3), qwen3, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


DEEPSPEC_CHANGES = [
    ({"architectures": ["OtherModel"]}, "architecture OtherModel is not known"),
    ({"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 5}, "whole target with a drafter inside"),
    ({"model_type": "gemma4_text"}, "family gemma4_text and tiny is of qwen3"),
    ({"vocab_size": 51}, "vocab_size 51"),
    ({"hidden_size": 32}, "hidden_size 32"),
    ({"num_target_layers": 36}, "target of 36 layers"),
    ({"target_layer_ids": [0, 1, 3]}, "no such inner layer"),
    ({"target_layer_ids": [0, 1, 9]}, "target layer 9"),
    ({"markov_head_type": "fir"}, "markov_head_type is 'fir'"),
    ({"layer_types": ["sliding_attention"] * LAYERS}, "sliding_attention"),
    ({"is_causal": True}, "attend causally"),
    ({"hidden_act": "relu"}, "activation is relu"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rotary embedding is longrope"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "on a part"),
    ({"rope_parameters": None}, "no rope_theta"),
    ({"block_size": 0}, "block_size is 0"),
    ({"markov_rank": 0}, "reads a Markov head that it does not have"),
    ({"markov_rank": 0, "enable_confidence_head": False}, "has no place in it"),
    ({"markov_rank": 7}, "size mismatch"),
    ({"confidence_head_with_markov": False}, "size mismatch for confidence_head"),
    ({"num_hidden_layers": 3, "layer_types": None}, "is missing"),
    ({"markov_head_type": "gated"}, "markov_head.gate_proj.weight is missing"),
    ({"block_size": None}, "incomplete or damaged"),
]


@pytest.mark.parametrize(("changes", "reason"), DEEPSPEC_CHANGES, ids=[reason for _, reason in DEEPSPEC_CHANGES])
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_sentence(qwen3, tmp_path, changes, reason):
    _write(tmp_path, _deepspec_config("qwen3", **changes), _deepspec_shapes("qwen3"))
    with pytest.raises(UserError, match=reason) as caught:
        load_drafter(tmp_path, qwen3)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("missing", ["block_size", "mask_token_id", "target_layer_ids", "num_attention_heads"])
def test_a_missing_field_is_named(qwen3, tmp_path, missing):
    config = _deepspec_config("qwen3")
    del config[missing]
    _write(tmp_path, config, _deepspec_shapes("qwen3"))
    with pytest.raises(UserError, match=f"'{missing}' is missing"):
        load_drafter(tmp_path, qwen3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (_speculators_config(speculators_model_type="eagle3"), "type 'eagle3'"),
        (
            _speculators_config(speculators_config={"verifier": {"architectures": ["GlmForCausalLM"]}}),
            "class GlmForCausalLM and tiny is a Qwen3ForCausalLM",
        ),
        (_speculators_config(target_hidden_size=64), "hidden states of 64"),
        (_speculators_config(sample_from_anchor=False, markov_head_type="rnn"), "starts at a slot"),
        (_speculators_config(draft_vocab_size=7), "d2t has 0 tokens and its config a draft vocabulary of 7"),
        (_speculators_config(aux_hidden_state_layer_ids=[1, 2, 4]), "no such inner layer"),
        (_dflash_config(), "Markov head"),
        (_dflash_config(architectures=["DFlash2DraftModel"]), "DFlash2DraftModel is not known"),
    ],
)
def test_other_dialects_that_do_not_fit_are_refused(qwen3, tmp_path, config, reason):
    _write(tmp_path, config, {**_backbone("qwen3"), **_heads("vanilla", with_markov=False)})
    with pytest.raises(UserError, match=reason) as caught:
        load_drafter(tmp_path, qwen3)
    assert "\n" not in str(caught.value)


def test_pickles_are_never_opened_and_shards_are(qwen3, tmp_path):
    tensors = _write(tmp_path / "whole", _deepspec_config("qwen3"), _deepspec_shapes("qwen3"))
    for name in ("pickle", "shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match="pickle, which is never opened"):
        load_drafter(tmp_path / "pickle", qwen3)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: tensors[name] for name in parts["model-1.safetensors"]}, tmp_path / "shards/model-1.safetensors")
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        load_drafter(tmp_path / "shards", qwen3)
    save_file({name: tensors[name] for name in parts["model-2.safetensors"]}, tmp_path / "shards/model-2.safetensors")
    whole, sharded = (load_drafter(tmp_path / name, qwen3) for name in ("whole", "shards"))
    assert torch.equal(_logits(whole), _logits(sharded))


def test_nearly_nothing_accepted_is_noticed():
    assert rejects_nearly_all([4] * 32, [0] * 32)
    assert rejects_nearly_all([4] * 32, [3, 1, 1] + [0] * 29)
    assert not rejects_nearly_all([4] * 32, [1] * 4 + [0] * 28)
    # Too few rounds, or rounds in which nothing was verified, say nothing; only the first ones count.
    assert not rejects_nearly_all([4] * 15, [0] * 15)
    assert not rejects_nearly_all([0] * 99, [0] * 99)
    assert not rejects_nearly_all([4] * 99, [1] * 32 + [0] * 67)
    assert rejects_nearly_all([0, 4] * 40, [0, 0] * 40)


def test_a_foreign_drafter_that_is_rejected_is_warned_of(qwen3, tmp_path):
    _write(tmp_path / "theirs", _deepspec_config("qwen3"), _deepspec_shapes("qwen3"))
    engine = Engine(qwen3, None, "none", 1, 2, 64, qwen3.new_cache(2, 64))
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{n}", "chat", (" ".join(map(str, rng.integers(1, 40, 6))),)) for n in range(2)]
    foreign = engine.with_drafter(str(tmp_path / "theirs"))
    with pytest.warns(UserWarning, match="rejects nearly all drafts of theirs") as caught:
        foreign.record(prompts, Fixed(4), ClosedLoop(2), max_tokens=30, progress=False)
    assert "\n" not in str(caught[0].message)


@pytest.mark.model
def test_the_command_exports_what_loads_again(engine, tmp_path, capsys):
    main(["export", "--out", str(tmp_path / "theirs"), "--storage", "float32", "--device", "cpu"])
    assert "in DeepSpec's form" in capsys.readouterr().out
    bundled = engine.with_drafter("dspark").drafter.network
    again = engine.with_drafter(str(tmp_path / "theirs")).drafter.network
    rng = torch.Generator().manual_seed(5)
    tokens, anchors = torch.randint(100, 40_000, (1, 30), generator=rng), torch.tensor([[3, 20]])
    features = dense_target(engine.target, tokens, bundled.config.target_layer_ids)[1]
    ours, theirs = (teacher_forced(network, tokens, features, anchors) for network in (bundled, again))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    with pytest.raises(SystemExit):
        main(["export", "--drafter", "ngram", "--out", str(tmp_path / "none"), "--device", "cpu"])
    assert "not a block drafter" in capsys.readouterr().err
