"""Files of training text: checked when read, merged without a prompt twice, split by prompt and not by place."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.errors import UserError
from dspark_sim.training import synthesis
from dspark_sim.training.corpus import SCHEMA, digest, merge, read_corpus, write_corpus
from dspark_sim.training.data import Sequence, read_sequences, split_held_out, without_prompts


def _table(prompts, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "domain": "chat",
            "temperature": 0.0,
            "prompt_len": len(prompt),
            "tokens": [*prompt, *rng.integers(0, 99, 20).tolist()],
        }
        for prompt in prompts
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_a_file_comes_back_with_what_made_it(tmp_path, capsys):
    table, path = _table([[1, 2], [3]]), tmp_path / "text.parquet"
    write_corpus(table, path, {"config": {"seed": 7}})
    again, document = read_corpus(path)
    assert again.equals(table)
    assert document["schema_version"] == 1 and document["num_sequences"] == 2 and document["config"] == {"seed": 7}
    assert document["sha256"] == digest(table) and document["dspark_sim"]
    assert capsys.readouterr().out == ""


def test_the_digest_knows_tokens_their_order_and_where_prompts_end():
    table = _table([[1, 2], [3]])
    rows = table.to_pylist()
    changed = [
        [rows[1], rows[0]],
        [rows[0]],
        [{**rows[0], "prompt_len": 1}, rows[1]],
        [{**rows[0], "tokens": [9, *rows[0]["tokens"][1:]]}, rows[1]],
        [
            {**rows[0], "tokens": rows[0]["tokens"][:-1]},
            {**rows[1], "tokens": rows[0]["tokens"][-1:] + rows[1]["tokens"]},
        ],
    ]
    assert len({digest(pa.Table.from_pylist(other, schema=SCHEMA)) for other in [rows, *changed]}) == 6
    # How rows lie in memory is no content.
    assert digest(pa.concat_tables([table[:1], table[1:]])) == digest(table)


def test_changed_tokens_and_other_versions_are_refused_in_one_sentence(tmp_path):
    table, path = _table([[1, 2], [3]]), tmp_path / "text.parquet"
    write_corpus(table, path, {})
    metadata = pq.read_schema(path).metadata
    pq.write_table(_table([[1, 2], [4]]).replace_schema_metadata(metadata), path)
    with pytest.raises(UserError, match="SHA-256 differs") as caught:
        read_corpus(path)
    assert "\n" not in str(caught.value)
    newer = json.dumps({"schema_version": 2}).encode()
    pq.write_table(table.replace_schema_metadata({b"dspark_sim.synthesis": newer}), path)
    with pytest.raises(UserError, match="schema version 2 and this release reads 1"):
        read_corpus(path)


def test_a_file_of_before_versions_is_read_and_said_to_be_unchecked(tmp_path, capsys):
    path = tmp_path / "old.parquet"
    old = json.dumps({"out": "x", "seed": 100}).encode()
    pq.write_table(_table([[1, 2], [3]]).replace_schema_metadata({b"dspark_sim.synthesis": old}), path)
    assert len(read_sequences(path, 99, 3)) == 2
    assert "cannot be checked" in capsys.readouterr().out


def test_synthesis_writes_a_checked_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    from types import SimpleNamespace

    wave = _table([[1, 2], [3]]).to_pylist()
    monkeypatch.setattr(synthesis, "load_target", lambda *_, **__: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(synthesis, "_wave", lambda *_, **__: wave)
    config = synthesis.SynthesisConfig(out=str(tmp_path / "new" / "text.parquet"), num_tokens=70)
    path = synthesis.synthesise(config)
    table, document = read_corpus(path)
    assert table.to_pylist() == 2 * wave
    assert document["config"] == asdict(config)
    assert [file.name for file in path.parent.iterdir()] == ["text.parquet"]


def test_merging_keeps_the_first_of_each_prompt(tmp_path):
    parts = [_table([[1], [2], [1]], 0), _table([[2], [3], [1, 2]], 1)]
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_corpus(parts[0], files[0], {"config": {"seed": 0}})
    write_corpus(parts[1], files[1], {"config": {"seed": 1}})
    report = merge(files, tmp_path / "both.parquet")
    assert (report.num_kept, report.num_dropped) == (4, 2)
    table, document = read_corpus(tmp_path / "both.parquet")
    assert table.to_pylist() == [*parts[0].to_pylist()[:2], *parts[1].to_pylist()[1:]]
    assert [source["num_kept"] for source in document["merged_from"]] == [2, 2]
    assert document["merged_from"][1]["metadata"]["config"] == {"seed": 1}
    with pytest.raises(UserError, match="exists already"):
        merge(files, tmp_path / "both.parquet")


def test_a_prompt_is_held_out_or_not_whatever_file_it_is_in():
    rng = np.random.default_rng(0)
    # Prompts come twice, with answers of their own.
    sequences = [
        Sequence(np.concatenate([[number // 2, 7, number // 2], rng.integers(0, 99, 9)]), 3, float(number % 2))
        for number in range(80)
    ]
    train_set, held_out = split_held_out(sequences, 6)
    assert len(held_out) == 12 and len(train_set) == 68
    assert {s.prompt for s in held_out}.isdisjoint(s.prompt for s in train_set)
    shuffled = [sequences[index] for index in rng.permutation(80)]
    again = split_held_out(shuffled, 6)[1]
    assert {id(s) for s in again} == {id(s) for s in held_out}
    # More held-out prompts hold fewer ones too.
    assert {s.prompt for s in held_out} < {s.prompt for s in split_held_out(sequences, 9)[1]}
    with pytest.raises(UserError, match="40 prompts; holdout 21"):
        split_held_out(sequences, 21)


def test_answers_to_given_prompts_are_left_out():
    sequences = [Sequence(np.array(tokens), 2, 0.0) for tokens in ([1, 2, 3, 4], [1, 3, 3, 4], [1, 2, 9, 9])]
    # A prompt counts whole: not where it is the start of a longer one.
    assert without_prompts(sequences, [[1, 2], [1], [1, 3, 3]]) == [sequences[1]]
