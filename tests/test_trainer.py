"""One update the same however it is split, on a tiny random target: over passes, over processes, and as a whole."""

import csv
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import tiny_llama  # noqa: E402

from dspark_sim.engine.drafters.checkpoint import load_drafter  # noqa: E402
from dspark_sim.engine.drafters.dense import dense_target, dense_walks  # noqa: E402
from dspark_sim.engine.drafters.heads import greedy, run_head  # noqa: E402
from dspark_sim.engine.models import load_target  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.training import trainer  # noqa: E402
from dspark_sim.training.build import new_drafter  # noqa: E402
from dspark_sim.training.config import TrainConfig  # noqa: E402
from dspark_sim.training.corpus import SCHEMA  # noqa: E402
from dspark_sim.training.data import Batches, frequent_tokens, pack, read_sequences, valid_slots  # noqa: E402
from dspark_sim.training.evaluation import evaluate, greedy_acceptance  # noqa: E402
from dspark_sim.training.together import train_together  # noqa: E402
from dspark_sim.training.trainer import train  # noqa: E402

VOCABULARY = 60
KINDS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"drafter": "dflash"},
    "eagle3": {"drafter": "eagle3"},
    "mtp": {"drafter": "mtp"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target's folder, with a tokenizer of words w0 .. w59."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("target")
    tiny_llama(VOCABULARY, initializer_range=0.3, eos_token_id=0).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", eos_token="w0").save_pretrained(path)
    return path


@pytest.fixture
def config(folder, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "domain": "chat",
            "temperature": float(number % 2),
            "prompt_len": 4,
            "tokens": rng.integers(2, VOCABULARY, rng.integers(12, 40)).tolist(),
        }
        for number in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "text.parquet")
    return TrainConfig(
        data=str(tmp_path / "text.parquet"),
        out=str(tmp_path / "run"),
        target=str(folder),
        num_updates=3,
        sequences_per_update=6,
        anchors_per_sequence=5,
        block_size=3,
        num_layers=1,
        intermediate_size=32,
        target_layer_ids=(-1, 1, 2),
        markov_rank=4,
        draft_vocab_size=40,
        max_len=40,
        holdout=8,
        eval_every=1,
        save_every=2,
        dtype="float32",
        device="cpu",
    )


def _double(config):
    """A trainer in float64 with random heads, and its batches."""
    target = load_target(config.target, device="cpu")
    target.model.double()
    sequences = read_sequences(config.files, config.max_len, config.block_size, lambda _: None)
    drafter = new_drafter(config, target, frequent_tokens(sequences, VOCABULARY, config.draft_vocab_size)).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    batches = Batches(sequences, config.sequences_per_update, config.anchors_per_sequence, config.seed)
    return trainer.Trainer(config, target, drafter, None), batches


def _gradients(found):
    return {name: p.grad.clone() for name, p in found.drafter.named_parameters() if p.grad is not None}


def _curve(path):
    with open(path / "learning_curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_add_up_to_one_large_update(config, kind):
    config = replace(config, **KINDS[kind])
    whole, batches = _double(config)
    batch = batches.of(0)
    values = whole.gradients(batch)
    expected = _gradients(whole)
    for accumulate in (2, 3, 6):
        split, _ = _double(replace(config, accumulate=accumulate))
        torch.testing.assert_close(split.gradients(batch), values, rtol=1e-9, atol=1e-10)
        found = _gradients(split)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_law_of_distinct_positions_is_that_of_every_slot(config):
    found, batches = _double(config)
    batch = batches.of(1)
    packed = pack(batch, 3, torch.device("cpu"))
    final, _ = dense_target(found.target, packed.tokens, ())
    probs = found._target_probs(final.flatten(0, 1)[packed.places])
    for row, (sequence, anchors) in enumerate(batch):
        for column, anchor in enumerate(anchors):
            for slot in range(3):
                inside = anchor + slot + 1 < len(sequence.tokens)
                assert packed.valid[row, column, slot] == inside
                if inside:
                    assert packed.following[row, column, slot] == sequence.tokens[anchor + slot + 1]
                    law = found.target.head(final[row, anchor + slot]).softmax(-1)[found.drafter.draft_token_ids]
                    torch.testing.assert_close(probs[packed.rows[row, column, slot]], law)
    assert len(probs) == len(packed.places) < packed.valid.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_saved_and_read_back(config, folder, kind):
    # All of the training set in every update, so that losses compare.
    config = replace(config, **KINDS[kind], num_updates=20, sequences_per_update=32, eval_every=10)
    out = train(config)
    rows = _curve(out)
    assert [row["update"] for row in rows] == [10, 20]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [name for name in rows[0] if name.startswith("acceptance_")] == [f"acceptance_{k}" for k in (1, 2, 3)]
    assert load_drafter(out, load_target(str(folder), device="cpu")).config.block_size == 3


@pytest.mark.parametrize("kind", ["rnn", "eagle3"])
def test_acceptance_along_the_text_is_that_of_drafting(config, kind):
    found, _ = _double(replace(config, **KINDS[kind]))
    target, drafter = found.target, found.drafter
    # Text that the drafter itself would write from here and there, with wrong tokens strewn in.
    rng, sequences = np.random.default_rng(1), []
    for length in (14, 30, 22):
        text = torch.from_numpy(rng.integers(2, VOCABULARY, 5))
        while len(text) < length:
            _, features = dense_target(target, text[None], drafter.config.target_layer_ids, with_hidden=False)
            at = torch.tensor([len(text) - 1])
            walk = dense_walks(drafter, text, features[0], at)()
            text = torch.cat((text, run_head(drafter, walk, text[at], 3, greedy).tokens[0, : rng.integers(1, 4)]))
            if rng.random() < 0.4:
                text = torch.cat((text, torch.tensor([7])))
        sequences.append(trainer.Sequence(text[:length].numpy(), 4, 0.0))
    rounds = emitted = 0
    for sequence, accepted in zip(sequences, greedy_acceptance(drafter, target, sequences), strict=True):
        tokens = torch.from_numpy(sequence.tokens)
        anchors = torch.arange(4, len(tokens) - 1)
        _, features = dense_target(target, tokens[None], drafter.config.target_layer_ids, with_hidden=False)
        drafts = run_head(drafter, dense_walks(drafter, tokens, features[0], anchors)(), tokens[anchors], 3, greedy)
        for anchor, row, count in zip(anchors.tolist(), drafts.tokens.tolist(), accepted, strict=True):
            truth = sequence.tokens[anchor + 1 : anchor + 4].tolist()
            right = [k < len(truth) and row[k] == truth[k] for k in range(3)]
            assert count == [*right, False].index(False)
        at = 0
        while at < len(accepted):
            rounds, emitted, at = rounds + 1, emitted + accepted[at] + 1, at + accepted[at] + 1
    assert emitted > rounds
    said = evaluate(drafter, target, sequences)
    assert said["mean_acceptance_length"] == pytest.approx(emitted / rounds)


def test_batches_hold_sequences_of_like_length_and_each_once_per_epoch(config):
    rng = np.random.default_rng(0)
    sequences = [trainer.Sequence(np.zeros(n, dtype=np.int64), 4, 0.0) for n in rng.integers(12, 300, 400)]
    batches = Batches(sequences, 8, 5, 0)
    epoch = [batches.of(update) for update in range(50)]
    assert len({id(sequence) for batch in epoch for sequence, _ in batch}) == 400
    padding = [1 - np.mean([len(s.tokens) for s, _ in b]) / max(len(s.tokens) for s, _ in b) for b in epoch]
    assert np.mean(padding) < 0.1
    # The same whatever was asked for before.
    again = Batches(sequences, 8, 5, 0).of(57)
    for (ours, ours_at), (theirs, theirs_at) in zip(again, batches.of(57), strict=True):
        assert ours is theirs and (ours_at == theirs_at).all()
    assert valid_slots(again, 4).shape == (40, 4)


def test_two_processes_do_the_run_of_one(config, tmp_path):
    alone = _curve(train(replace(config, out=str(tmp_path / "alone"), draft_vocab_size=0)))
    together = tmp_path / "together"
    program = (
        "from dspark_sim.training.config import TrainConfig; from dspark_sim.training.trainer import train;"
        f"train({replace(config, out=str(together), draft_vocab_size=0)!r})"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*launch, sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    # The start says what broke; the launcher's own report, at the end, does not.
    said = "\n".join(line[:300] for line in done.stderr.splitlines() if "Extension modules" not in line)
    assert done.returncode == 0, said[:6000]
    assert "sequences to train on" in done.stdout
    both = _curve(together)
    assert len(both) == len(alone) == 3
    for ours, theirs in zip(both, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafter": "medusa"}, "drafter is 'medusa'"),
        ({"markov_head_type": "lstm"}, "markov_head_type is 'lstm'"),
        ({"accumulate": 7}, "lower accumulate"),
        ({"num_updates": 0}, "num_updates is 0"),
        ({"data": " , "}, "data names no file"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(config, change, message):
    with pytest.raises(UserError, match=message) as caught:
        replace(config, **change)
    assert "\n" not in str(caught.value)


def test_more_sequences_per_update_than_there_are_is_refused(config):
    with pytest.raises(UserError, match="lower sequences_per_update"):
        train(replace(config, sequences_per_update=99))


TOGETHER = (
    {"drafter": "dspark", "block_size": 3, "num_layers": 2},
    {"drafter": "dspark", "block_size": 1, "markov_head_type": "rnn"},
    {"drafter": "dflash", "block_size": 2},
)


def _together(config, root):
    return [replace(config, out=str(root / str(number)), **changes) for number, changes in enumerate(TOGETHER)]


def _weights(out):
    from safetensors.torch import load_file

    return load_file(f"{out}/state.safetensors")


def test_drafters_trained_together_are_those_trained_alone(config, tmp_path):
    for one, out in zip(
        _together(config, tmp_path / "alone"), train_together(_together(config, tmp_path / "together")), strict=True
    ):
        alone = train(one)
        ours, theirs = _curve(out), _curve(alone)
        assert len(ours) == 3
        for mine, its in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(its, abs=1e-4, nan_ok=True)
        weights, expected = _weights(out), _weights(alone)
        assert weights.keys() == expected.keys()
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_an_interrupted_run_together_goes_on_where_each_drafter_was_saved(config, tmp_path, monkeypatch):
    whole = [_curve(out) for out in train_together(_together(config, tmp_path / "whole"))]
    configs, save = _together(config, tmp_path / "halves"), trainer.Trainer.save

    def stop_at_the_second(self, update):
        if self.out.name == "1":
            raise KeyboardInterrupt
        save(self, update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "save", stop_at_the_second)
        train_together(configs)
    # The first drafter was saved after two updates and the others never.
    assert [(tmp_path / "halves" / name / "state.safetensors").exists() for name in "012"] == [True, False, False]
    for out, expected in zip(train_together(configs), whole, strict=True):
        found = _curve(out)
        assert [row["update"] for row in found][-3:] == [1, 2, 3] or [row["update"] for row in found] == [1, 2, 3]
        for mine, its in zip(found[-3:], expected, strict=True):
            assert mine == pytest.approx(its, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "zero drafters"),
        ([{}, {"out": "b", "drafter": "eagle3"}], "no block drafter"),
        ([{}, {"out": "b", "muon_lr": 1.0}], "muon_lr is 1.0 for one drafter and"),
        ([{}, {}], "two drafters have the same folder"),
        ([{"accumulate": 2}], "need 1"),
        ([{"block_size": 9}], "longest_block is 8"),
    ],
)
def test_drafters_that_cannot_share_batches_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        train_together([replace(config, **change) for change in changes], longest_block=8)
