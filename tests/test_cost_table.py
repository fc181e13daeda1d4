"""SGLang's table: seconds at the probes, interpolated in seconds, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_cost

from dspark_sim.cost import CostModel, Curve
from dspark_sim.cost_table import read_sglang_table, sglang_table, write_sglang_table
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import SHAPES
from dspark_sim.roofline import ACCELERATORS, roofline


def table(path: Path, sizes: list[float], rates: list[float], **more: object) -> Path:
    path.write_text(json.dumps({"sample_batch_tokens": sizes, "sample_steps_per_sec": rates, **more}))
    return path


def test_probes_are_seconds(tmp_path: Path) -> None:
    cost = read_sglang_table(table(tmp_path / "t.json", [8, 16, 64], [100.0, 80.0, 20.0]), {"device": "H100"})
    assert [cost.step_seconds(size, 999, 3) for size in (8, 16, 64)] == [0.01, 0.0125, 0.05]
    assert cost.step_seconds(40, 0, 1) == pytest.approx((0.0125 + 0.05) / 2)
    assert cost.step_seconds(1, 0, 1) == 0.01
    assert cost.provenance["device"] == "H100"
    assert cost.draft_seconds(4, 7, 100) == cost.host_seconds(4) == 0.0


@pytest.mark.parametrize(("ratio", "error"), [(4.0, 0.36), (8.0, 0.605)])
def test_interpolated_rates_would_be_a_third_to_two_thirds_too_few_seconds(
    tmp_path: Path, ratio: float, error: float
) -> None:
    """Two probes of a device that is compute-bound: seconds in proportion to tokens."""
    low, high = 64.0, 64.0 * ratio
    rates = [1 / (1e-4 * low), 1 / (1e-4 * high)]
    cost = read_sglang_table(table(tmp_path / "t.json", [low, high], rates))
    sizes = np.linspace(low, high, 201)
    truth = 1e-4 * sizes
    np.testing.assert_allclose(cost.verify.seconds(sizes, context_tokens=0, num_requests=0), truth, rtol=1e-12)
    by_rates = 1.0 / np.interp(sizes, [low, high], rates)
    assert np.max(1.0 - by_rates / truth) == pytest.approx(error, abs=0.01)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.integers(1, 4096), st.floats(1e-3, 1e5), min_size=1, max_size=20), st.integers(0, 3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, probes: dict[int, float], draft_len: int) -> None:
    folder = tmp_path_factory.mktemp("sglang")
    sizes = sorted(probes)
    first = read_sglang_table(table(folder / "in.json", sizes, [probes[size] for size in sizes], max_batch_tokens=9999))
    write_sglang_table(first, folder / "out.json", sizes, draft_len=draft_len)
    second = read_sglang_table(folder / "out.json")
    assert isinstance(first.verify, Curve) and isinstance(second.verify, Curve)
    assert second.verify.knots == first.verify.knots
    np.testing.assert_allclose(second.verify.levels, first.verify.levels, rtol=1e-15)
    written = json.loads((folder / "out.json").read_text())
    assert list(written) == ["sample_batch_tokens", "sample_steps_per_sec", "max_batch_tokens"]
    assert written["max_batch_tokens"] == sizes[-1]


@pytest.mark.parametrize("cost", [toy_cost(), roofline(ACCELERATORS["a100"], SHAPES["qwen3-4b"])])
def test_any_cost_model_is_written_as_whole_rounds(cost: CostModel) -> None:
    plain = sglang_table(cost, (1, 8, 32), context_len=100)
    expected = [1 / cost.round_seconds(size, 100 * size, size, 0) for size in (1, 8, 32)]
    assert plain["sample_steps_per_sec"] == expected
    drafted = sglang_table(cost, (4, 32), context_len=100, draft_len=3)
    assert drafted["sample_steps_per_sec"] == [1 / cost.round_seconds(s, 100 * s // 4, s // 4, 3) for s in (4, 32)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not SGLang's table"),
        ("[1]", "no JSON object"),
        ('{"sample_batch_tokens": [1]}', "sample_steps_per_sec is missing"),
        ('{"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [3]}', "2 batch sizes and 1 rates"),
        ('{"sample_batch_tokens": [], "sample_steps_per_sec": []}', "0 batch sizes"),
        ('{"sample_batch_tokens": [2, 2], "sample_steps_per_sec": [3, 3]}', "do not rise"),
        ('{"sample_batch_tokens": [0, 2], "sample_steps_per_sec": [3, 3]}', "do not rise from at least 1"),
        ('{"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [3, 0]}', "not all positive"),
        ('{"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [3, NaN]}', "not all positive"),
        ('{"sample_batch_tokens": [1, "x"], "sample_steps_per_sec": [3, 3]}', "could not convert"),
        ('{"sample_batch_tokens": 1, "sample_steps_per_sec": [3, 3]}', "not SGLang's table"),
        ('{"bias_seconds": 1}', "additive"),
    ],
)
def test_what_is_no_table_is_one_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match="give lists sample_batch_tokens") as error:
        read_sglang_table(tmp_path / "t.json")
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for probes in ((), (0, 1), (2, 1)):
        with pytest.raises(UserError, match="rising from at least 1"):
            write_sglang_table(toy_cost(), tmp_path / "t.json", probes)
    with pytest.raises(UserError, match=r"takes 0\.0 seconds"):
        write_sglang_table(CostModel(Curve()), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot read"):
        read_sglang_table(tmp_path / "t.json")
