import json
import math
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_sim.errors import UserError
from dspark_sim.sweep import sweep

GRID = [{"block_size": size, "users": users} for size in (3, 1, 2) for users in (4, 1)]


def product(block_size: int, users: int) -> dict[str, Any]:
    return {"product": block_size * users, "share": users / 7, "undefined": math.nan if users == 1 else 0.5}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Counting:
    """Counts calls; stops with an exception at one of them."""

    def __init__(self, stop_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls: list[dict[str, Any]] = []
        self.stop_at, self.error = stop_at, error

    def __call__(self, **point: Any) -> dict[str, Any]:
        if len(self.calls) == self.stop_at:
            raise self.error("stopped")
        self.calls.append(point)
        return product(**point)


class Reversed(Executor):
    """Finishes what was submitted last first, when asked for the first time."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Any, dict[str, Any]]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, function, kwargs))
        if len(self.jobs) == len(GRID):
            for waiting, call, point in reversed(self.jobs):
                waiting.set_result(call(**point))
        return future


def test_rows_are_in_grid_order_whoever_works(tmp_path: Path) -> None:
    alone = sweep(product, GRID, tmp_path / "alone.jsonl", progress=False)
    assert list(alone.columns) == ["block_size", "users", "product", "share", "undefined"]
    assert alone[["block_size", "users"]].to_dict("records") == GRID
    assert (alone["product"] == alone["block_size"] * alone["users"]).all()
    assert alone["undefined"].isna().tolist() == [point["users"] == 1 for point in GRID]
    for name, executor in (("one", ThreadPoolExecutor(1)), ("three", ThreadPoolExecutor(3)), ("back", Reversed())):
        with executor:
            frame = sweep(product, GRID, tmp_path / f"{name}.jsonl", executor=executor, progress=False)
        pd.testing.assert_frame_equal(frame, alone, check_exact=True)
        assert len(lines(tmp_path / f"{name}.jsonl")) == len(GRID)


def test_process_pool(tmp_path: Path) -> None:
    alone = sweep(product, GRID, tmp_path / "alone.jsonl", progress=False)
    with ProcessPoolExecutor(2) as pool:
        pooled = sweep(product, GRID, tmp_path / "pool.jsonl", executor=pool, progress=False)
    pd.testing.assert_frame_equal(pooled, alone, check_exact=True)


def test_a_second_call_runs_nothing_and_returns_the_same(tmp_path: Path) -> None:
    first = sweep(product, GRID, tmp_path / "out.jsonl", progress=False)
    counting = Counting()
    second = sweep(counting, GRID, tmp_path / "out.jsonl", progress=False)
    assert counting.calls == []
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_a_larger_grid_runs_only_what_is_new(tmp_path: Path) -> None:
    sweep(product, GRID[1:4], tmp_path / "out.jsonl", progress=False)
    counting = Counting()
    frame = sweep(counting, GRID, tmp_path / "out.jsonl", progress=False)
    assert counting.calls == [GRID[0], *GRID[4:]]
    assert frame[["block_size", "users"]].to_dict("records") == GRID


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interruption_keeps_what_was_finished(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    with pytest.raises(error):
        sweep(Counting(2, error), GRID, out, progress=False)
    assert [line["point"] for line in lines(out)] == GRID[:2]
    counting = Counting()
    frame = sweep(counting, GRID, out, progress=False)
    assert counting.calls == GRID[2:]
    assert len(frame) == len(lines(out)) == len(GRID)


def test_a_failure_in_an_executor_is_raised_and_the_rest_kept(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="stopped"):
        sweep(Counting(3, ValueError), GRID, tmp_path / "out.jsonl", executor=pool, progress=False)
    assert [line["point"] for line in lines(tmp_path / "out.jsonl")] == GRID[:3]


@pytest.mark.parametrize("cut", [1, 2, 9, 40])
def test_a_truncated_last_line_is_run_again(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out.jsonl"
    first = sweep(product, GRID, out, progress=False)
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    counting = Counting()
    frame = sweep(counting, GRID, out, progress=False)
    assert counting.calls == GRID[-1:]
    assert out.read_bytes() == whole
    pd.testing.assert_frame_equal(frame, first, check_exact=True)


def test_a_point_listed_twice_runs_once(tmp_path: Path) -> None:
    counting = Counting()
    frame = sweep(counting, [GRID[0], GRID[1], GRID[0]], tmp_path / "out.jsonl", progress=False)
    assert len(counting.calls) == 2
    assert frame["product"].tolist() == [12, 3, 12]


def test_numpy_numbers_are_the_same_points(tmp_path: Path) -> None:
    sweep(product, GRID, tmp_path / "out.jsonl", progress=False)
    counting = Counting()
    grid = [{"block_size": np.int64(3), "users": np.int32(4)}]
    frame = sweep(counting, grid, tmp_path / "out.jsonl", progress=False)
    assert counting.calls == [] and frame["product"].tolist() == [12]


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="zero points"):
        sweep(product, [], out)
    with pytest.raises(UserError, match="entry users of a point is a list"):
        sweep(product, [{"block_size": 1, "users": [1]}], out, progress=False)
    with pytest.raises(UserError, match="entry values of a result is a ndarray"):
        sweep(lambda a: {"values": np.zeros(2)}, [{"a": 1}], out, progress=False)
    with pytest.raises(UserError, match="a result of the sweep is a float"):
        sweep(lambda a: 1.0, [{"a": 1}], out, progress=False)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="repeats its entry a"):
        sweep(lambda a: {"a": 2}, [{"a": 1}], out, progress=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot"):
        sweep(product, GRID, tmp_path / "file" / "out.jsonl", progress=False)


@pytest.mark.parametrize("content", ["foreign", "foreign\n", '{"point": {}}\n', "[1]\n"])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    out = tmp_path / "notes.txt"
    out.write_text(content)
    with pytest.raises(UserError, match="give another file"):
        sweep(product, GRID, out, progress=False)
    assert out.read_text() == content
