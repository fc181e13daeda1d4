"""Training on the CPU: resumable to the same curve, saved exactly, and never over other work."""

import csv
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.engine.drafters.block_model import BlockDrafter  # noqa: E402
from dspark_sim.engine.drafters.checkpoint import load_drafter, save_drafter  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.training import trainer  # noqa: E402
from dspark_sim.training.config import TrainConfig  # noqa: E402
from dspark_sim.training.corpus import SCHEMA  # noqa: E402
from dspark_sim.training.data import frequent_tokens, read_sequences  # noqa: E402
from dspark_sim.training.synthesis import SynthesisConfig, synthesise  # noqa: E402
from dspark_sim.training.trainer import train  # noqa: E402


def _write(path, num=10, length=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "domain": "chat",
            "temperature": float(number % 2),
            "prompt_len": 8,
            "tokens": rng.integers(100, 400, length).tolist(),
        }
        for number in range(num)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        data=str(_write(tmp_path / "text.parquet")),
        out=str(tmp_path / "whole"),
        num_updates=4,
        anchors_per_sequence=6,
        block_size=3,
        num_layers=1,
        intermediate_size=64,
        markov_rank=4,
        draft_vocab_size=128,
        max_len=40,
        holdout=2,
        eval_every=1,
        save_every=2,
        dtype="float32",
        device="cpu",
    )


def _curve(folder):
    with open(f"{folder}/learning_curve.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


class Interrupted(Exception):
    pass


@pytest.mark.model
def test_a_resumed_run_has_the_curve_and_the_weights_of_a_whole_one(config, tmp_path, monkeypatch):
    train(config)
    whole = _curve(config.out)
    assert [row["update"] for row in whole] == ["1", "2", "3", "4"]

    halves = replace(config, out=str(tmp_path / "halves"))
    update = trainer.Trainer.update

    def stop_at_2(self, number, batch):
        if number == 2:
            raise Interrupted
        return update(self, number, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.Trainer, "update", stop_at_2)
        train(halves)
    assert _curve(halves.out) == whole[:2]
    train(halves)
    assert _curve(halves.out) == whole
    names = ("model.safetensors", "state.safetensors")
    from safetensors.torch import load_file

    for name in names:
        ours, theirs = load_file(f"{config.out}/{name}"), load_file(f"{halves.out}/{name}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    # A finished run has nothing left to do; another configuration must not continue it.
    train(halves)
    assert _curve(halves.out) == whole
    for change in ({"muon_lr": 0.5}, {"seed": 1}, {"num_updates": 9}):
        with pytest.raises(UserError, match="other settings") as caught:
            train(replace(halves, **change))
        assert "\n" not in str(caught.value)
    other = _write(tmp_path / "other.parquet", seed=5)
    with pytest.raises(UserError, match="a run on other text"):
        train(replace(halves, data=str(other)))
    assert _curve(halves.out) == whole


@pytest.mark.model
def test_an_interruption_between_saves_leaves_no_row_twice(config, tmp_path, monkeypatch):
    train(config)
    halves = replace(config, out=str(tmp_path / "halves"))
    update = trainer.Trainer.update

    def stop_at_3(self, number, batch):
        if number == 3:
            raise Interrupted
        return update(self, number, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.Trainer, "update", stop_at_3)
        train(halves)
    train(halves)
    assert _curve(halves.out) == _curve(config.out)


@pytest.mark.model
@pytest.mark.parametrize("name", ["dspark", "dflash"])
def test_a_saved_drafter_is_read_back_bit_for_bit(engine, tmp_path, name):
    drafter = engine.with_drafter(name).drafter.network
    save_drafter(drafter, tmp_path / "copy", {"updates_done": 3}, dtype="float32")
    again = load_drafter(tmp_path / "copy", engine.target)
    assert isinstance(again, BlockDrafter)
    assert again.config == drafter.config
    assert torch.equal(again.draft_token_ids, drafter.draft_token_ids)
    ours, theirs = drafter.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    save_drafter(again, tmp_path / "second", {"updates_done": 3}, dtype="float32")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_existing_synthesis_output_is_refused_and_kept(tmp_path):
    path = tmp_path / "text.parquet"
    path.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        synthesise(SynthesisConfig(out=str(path)))
    assert path.read_text() == "precious"


def test_sequences_are_cut_and_short_answers_left_out(tmp_path):
    path = _write(tmp_path / "text.parquet", num=5, length=30)
    assert [len(sequence.tokens) for sequence in read_sequences(path, 20, 3)] == [20] * 5
    assert [sequence.temperature for sequence in read_sequences(path, 99, 3)] == [0.0, 1.0, 0.0, 1.0, 0.0]
    whole = pq.read_table(path)["tokens"].to_pylist()
    assert [sequence.tokens.tolist() for sequence in read_sequences(path, 99, 3)] == whole
    with pytest.raises(UserError, match="longer answers"):
        read_sequences(path, 11, 3)


def test_unusable_training_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="synthesise"):
        read_sequences(tmp_path / "missing.parquet", 40, 3)
    broken = tmp_path / "broken.parquet"
    for content in (b"", b"PAR1 and then nothing", _write(tmp_path / "text.parquet").read_bytes()[:-40]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="not a synthesis file") as caught:
            read_sequences(broken, 40, 3)
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"other": [1]}), broken)
    with pytest.raises(UserError, match="not a synthesis file"):
        read_sequences(broken, 40, 3)


def test_frequent_tokens_are_those_of_answers_in_ascending_order():
    tokens = np.array([7, 7, 7, 7, 1, 3, 3, 3, 2, 2, 9])
    sequences = [trainer.Sequence(tokens, 4, 0.0), trainer.Sequence(np.array([5, 9, 9]), 1, 1.0)]
    assert frequent_tokens(sequences, 12, 3).tolist() == [2, 3, 9]


@pytest.mark.model
def test_too_few_sequences_are_refused(config):
    with pytest.raises(UserError, match="holdout"):
        train(replace(config, holdout=6))
