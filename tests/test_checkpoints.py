"""A drafter's folder in our own form and in others': what is written comes back, and what does not fit is refused."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from tiny import HIDDEN, tiny_target  # noqa: E402

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.chain_model import ChainDrafter, ChainDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.checkpoint import load_drafter, save_drafter  # noqa: E402
from dspark_sim.engine.drafters.dense import teacher_forced  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402

VOCABULARY = 50
SHAPE = {
    "target": "tiny",
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "block_size": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(VOCABULARY)


def _block(target, kind="vanilla", draft_vocab_size=20):
    config = BlockDrafterConfig(
        **SHAPE,
        target_layer_ids=(-1, 1, 2),
        mask_token_id=VOCABULARY - 1,
        num_hidden_layers=2,
        markov_rank=5,
        markov_head_type=kind,
        enable_confidence_head=True,
        draft_vocab_size=draft_vocab_size,
    )
    return _new(BlockDrafter, config, target)


def _chain(target, kind="eagle3"):
    layers = (0, 1, 2) if kind == "eagle3" else (3,)
    return _new(ChainDrafter, ChainDrafterConfig(**SHAPE, kind=kind, target_layer_ids=layers), target)


def _new(network, config, target):
    torch.manual_seed(1)
    ids = torch.randperm(VOCABULARY)[: config.draft_vocab_size].sort().values if config.draft_vocab_size else None
    return network(config, ids).attach(target).eval().requires_grad_(False)


def _logits(drafter):
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (2, 15), generator=rng)
    features = torch.randn(2, 15, HIDDEN * len(drafter.config.target_layer_ids), generator=rng)
    logits, confidence = teacher_forced(drafter, tokens, features, torch.tensor([[1, 4, 9], [2, 3, 12]]))
    return logits if confidence is None else torch.cat((logits, confidence[..., None]), dim=-1)


MAKERS = {
    "vanilla": _block,
    "gated": lambda target: _block(target, "gated"),
    "rnn": lambda target: _block(target, "rnn", 0),
    "eagle3": _chain,
    "mtp": lambda target: _chain(target, "mtp"),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_float32_storage_is_read_back_bit_for_bit(target, tmp_path, name):
    drafter = MAKERS[name](target)
    save_drafter(drafter, tmp_path, {"updates_done": 3}, dtype="float32")
    again = load_drafter(tmp_path, target)
    assert type(again) is type(drafter) and again.config == drafter.config
    ours, theirs = drafter.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(_logits(drafter), _logits(again))


@pytest.mark.parametrize("name", list(MAKERS))
def test_int8_storage_errs_by_half_a_scale_at_most(target, tmp_path, name):
    drafter = MAKERS[name](target)
    matrix = next(parameter for parameter in drafter.parameters() if parameter.ndim == 2)
    matrix[0] = 0.0
    save_drafter(drafter, tmp_path, dtype="int8")
    again = load_drafter(tmp_path, target)
    stored, read = load_file(tmp_path / "model.safetensors"), again.state_dict()
    for key, value in drafter.state_dict().items():
        if value.ndim == 2:
            assert stored[key].dtype == torch.int8 and stored[f"{key}.scale"].shape == (len(value),)
            bound = 0.5 * stored[f"{key}.scale"][:, None] * (1 + 1e-5)
            assert ((read[key] - value).abs() <= bound).all()
            torch.testing.assert_close(stored[f"{key}.scale"], value.abs().amax(dim=1) / 127)
        else:
            assert torch.equal(read[key], value)
    assert torch.equal(_logits(again), _logits(load_drafter(tmp_path, target)))
    # What was read is stored again as it was.
    save_drafter(again, tmp_path / "second", dtype="int8")
    assert load_file(tmp_path / "second" / "model.safetensors").keys() == stored.keys()


def test_an_unknown_storage_and_architecture_are_refused(target, tmp_path):
    drafter = _block(target)
    with pytest.raises(UserError, match="dtype is 'int4'"):
        save_drafter(drafter, tmp_path, dtype="int4")
    save_drafter(drafter, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"BlockDrafter"', '"TreeDrafter"'))
    with pytest.raises(UserError, match="architecture 'TreeDrafter'"):
        load_drafter(tmp_path, target)
