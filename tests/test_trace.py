import errno
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import toy_cost, toy_trace

from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed
from dspark_sim.request import Request
from dspark_sim.simulate import simulate
from dspark_sim.trace import SCHEMAS, DraftRows, StepRow, Trace, TraceRecorder, list_column
from dspark_sim.workload import ClosedLoop


def same(left: Trace, right: Trace) -> bool:
    # The text of the values, because NaN differs from itself.
    return all(
        str(left.tables[name].to_pylist()) == str(right.tables[name].to_pylist())
        and left.tables[name].schema.equals(right.tables[name].schema)
        for name in SCHEMAS
    )


@pytest.fixture
def full_trace() -> Trace:
    recorded = toy_trace(ragged=True, confidence=False)
    run = simulate(recorded, Fixed(3), ClosedLoop(2), toy_cost())
    return run.with_anchors(recorded.tables["anchors"], source="both")


def test_round_trip_of_all_tables(full_trace: Trace, tmp_path: Path) -> None:
    assert all(full_trace.tables[name].num_rows for name in SCHEMAS)
    assert full_trace.steps["predicted_step_seconds"].isna().any()
    back = Trace.read(full_trace.write(tmp_path / "deep" / "trace"))
    assert same(full_trace, back)
    assert (back.clock, back.config, back.provenance) == ("virtual", full_trace.config, full_trace.provenance)
    assert back.config["source"] == "both"


def test_lists_keep_their_lengths_and_nan(tmp_path: Path) -> None:
    recorder = TraceRecorder("wall")
    request = Request(3, "p", "toy", 5, 4)
    request.append(4, False, 1.0)
    recorder.finish(request)
    recorder.step(StepRow(0, 0.0, 2, 0, 0, 3, 5, 8, 10, 0.5, {"verify": 0.25}, 0.5, np.nan, np.nan))
    ints = np.array([2, 0])
    confidence = np.array([[0.5, np.nan, 9.0], [9.0, 9.0, 9.0]])
    tokens = np.array([[11, 12, -1], [-1, -1, -1]], dtype=np.int32)
    recorder.drafts(DraftRows(0, np.array([3, 4]), ints, ints, ints, ints, ints, tokens, confidence))
    trace = Trace.read(recorder.trace(outputs={3: [1, 2, 3, 4]}).write(tmp_path / "t"))
    drafts = trace.tables["drafts"].to_pylist()
    assert [row["draft_tokens"] for row in drafts] == [[11, 12], []]
    assert str([row["confidence"] for row in drafts]) == "[[0.5, nan], []]"
    assert trace.tables["requests"]["output_tokens"].to_pylist() == [[1, 2, 3, 4]]
    assert trace.steps["verify_seconds"].tolist() == [0.25]
    assert trace.steps["draft_seconds"].tolist() == [0.0]
    assert trace.clock == "wall"


def test_drafts_without_tokens_are_null_not_empty(tmp_path: Path) -> None:
    recorder = TraceRecorder("wall")
    ints = np.array([1])
    recorder.drafts(DraftRows(0, ints, ints, ints, ints, ints, ints, None, np.array([[0.5]])))
    assert recorder.trace().tables["drafts"]["draft_tokens"].to_pylist() == [None]


def test_list_column() -> None:
    column = list_column(np.array([1, 2, 3]), np.array([2, 0, 1]), pa.int32())
    assert column.to_pylist() == [[1, 2], [], [3]]


def test_writing_again_replaces(tmp_path: Path, full_trace: Trace) -> None:
    toy_trace(2).write(tmp_path / "t")
    full_trace.write(tmp_path / "t")
    assert same(Trace.read(tmp_path / "t"), full_trace)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_other_schema_version_is_refused(tmp_path: Path) -> None:
    folder = toy_trace().write(tmp_path / "t")
    table = pq.read_table(folder / "steps.parquet")
    old = {**table.schema.metadata, b"dspark_sim.schema_version": b"99"}
    pq.write_table(table.replace_schema_metadata(old), folder / "steps.parquet")
    with pytest.raises(UserError, match=r"steps\.parquet has trace schema version 99 and this package reads 1"):
        Trace.read(folder)


@pytest.mark.parametrize("keep", [0, 3, 200, -9])
def test_truncated_table_is_one_sentence(tmp_path: Path, keep: int) -> None:
    folder = toy_trace().write(tmp_path / "t")
    path = folder / "anchors.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"anchors\.parquet is truncated or not Parquet") as error:
        Trace.read(folder)
    assert "\n" not in str(error.value)


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder does not exist"):
        Trace.read(tmp_path / "nowhere")
    folder = toy_trace().write(tmp_path / "t")
    (folder / "drafts.parquet").unlink()
    with pytest.raises(UserError, match=r"drafts\.parquet is missing"):
        Trace.read(folder)
    for name in SCHEMAS:
        pq.write_table(pa.table({"x": [1]}), folder / f"{name}.parquet")
    with pytest.raises(UserError, match="was not written by dspark_sim"):
        Trace.read(folder)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    folder = toy_trace().write(tmp_path / "t")
    table = pq.read_table(folder / "steps.parquet")
    pq.write_table(table.drop_columns(["kv_usage"]), folder / "steps.parquet")
    with pytest.raises(UserError, match="kv_usage"):
        Trace.read(folder)


def test_folder_with_foreign_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.txt, which is no part of a trace"):
        toy_trace().write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(UserError, match="is a file"):
        toy_trace().write(tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("code", "sentence"), [(errno.ENOSPC, "no space left to write"), (errno.EACCES, "cannot write")]
)
def test_failed_write_keeps_the_old_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, sentence: str
) -> None:
    old = toy_trace(3)
    folder = old.write(tmp_path / "t")
    real, calls = pq.write_table, []

    def fill_up(table: pa.Table, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(code, "failed")
        real(table, path, **options)

    monkeypatch.setattr("dspark_sim.trace.pq.write_table", fill_up)
    with pytest.raises(UserError, match=sentence):
        toy_trace(5).write(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert same(Trace.read(folder), old)
