"""The kinds of cost: one number, a run of numbers and the array path give the same bits; files; other hardware."""

import json
import pickle
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import profile
from toy import toy_cost, toy_trace

from dspark_sim import api
from dspark_sim.cost import CostModel, Curve, fit
from dspark_sim.cost_parametric import fit_parametric
from dspark_sim.cost_parts import Parametric, Part
from dspark_sim.errors import UserError
from dspark_sim.model_shapes import SHAPES
from dspark_sim.policy import LoadView, PrefixScheduler, round_seconds
from dspark_sim.policy_history import Goodput, goodputs
from dspark_sim.roofline import ACCELERATORS, DRAFTERS, roofline

ROOFLINES = [
    roofline(ACCELERATORS["h100"], SHAPES["qwen3-8b"], DRAFTERS["dspark"]),
    roofline(ACCELERATORS["h200"], SHAPES["qwen3-30b-a3b"], DRAFTERS["eagle3"]),
    roofline(ACCELERATORS["h200"], SHAPES["deepseek-v3"], DRAFTERS["mtp"], num_devices=8),
]
MEASURED = fit(profile(toy_cost(), 200, noise=0.1), {"device": "toy"})
COEFFICIENTS = fit_parametric(profile(toy_cost(), 200, noise=0.1), {"device": "toy"})
MIXED = replace(ROOFLINES[0], verify=MEASURED.verify, host=COEFFICIENTS.host)
MODELS = [toy_cost(), MEASURED, COEFFICIENTS, *ROOFLINES, MIXED]

seconds = st.floats(0.0, 1.0, allow_subnormal=False)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    sizes = st.integers(1, 3000).map(float)
    knots = sorted(draw(st.sets(sizes, min_size=1, max_size=8)))
    levels = draw(st.lists(seconds, min_size=len(knots), max_size=len(knots)))
    names = draw(st.permutations(["context_tokens", "num_requests", "draft_len", "draft_tokens"]))
    linear = tuple((name, draw(seconds)) for name in names[: draw(st.integers(0, 4))])
    return Curve(tuple(knots), tuple(levels), linear, tuple(sorted(draw(st.sets(sizes, max_size=4)))))


parts = st.one_of(
    curves(),
    st.builds(Parametric, seconds, seconds, seconds, seconds, seconds),
    st.sampled_from([part for cost in ROOFLINES for part in (cost.verify, cost.draft, cost.prefill)]),
)


@settings(deadline=None, max_examples=300)
@given(parts, st.integers(0, 5000), st.integers(0, 200), st.integers(0, 500_000), st.integers(1, 8))
def test_a_number_is_the_array_paths_to_the_bit(
    part: Part, size: int, requests: int, context: int, draft_len: int
) -> None:
    verify = {"context_tokens": context, "num_requests": requests, "draft_len": 0, "draft_tokens": 0}
    if not isinstance(part, Curve):
        # A target pass drafts nothing, and for these the absence is the sign of it.
        del verify["draft_len"], verify["draft_tokens"]
    if getattr(part, "pattern", "target") in ("target", "prompts"):
        assert part.scalar(size, context, requests, 0) == float(part.seconds(size, **verify))
        sizes = np.array([size, size + 3, 1, 7])
        assert part.seconds(sizes, **verify).tolist() == [part.scalar(int(s), context, requests, 0) for s in sizes]
    drafted = {**verify, "draft_len": draft_len, "draft_tokens": requests * draft_len}
    assert part.scalar(requests, context, requests, draft_len) == float(part.seconds(requests, **drafted))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(MODELS), st.integers(1, 200), st.integers(0, 12), st.integers(0, 500_000))
def test_a_rounds_table_is_its_seconds_to_the_bit(cost: CostModel, requests: int, draft_len: int, context: int) -> None:
    table = cost.round_table(requests, draft_len, context)
    expected = [cost.round_seconds(requests + i, context, requests, draft_len) for i in range(requests * draft_len + 1)]
    assert table.tolist() == expected
    load = LoadView(0, requests, 0, context, max(draft_len, 1))
    assert round_seconds(cost, load, requests, draft_len).tolist() == expected
    lens = np.arange(draft_len + 1)
    drafts = [cost.draft_seconds(requests, int(k), context) for k in lens]
    np.testing.assert_allclose(cost.draft_seconds(requests, lens, context), drafts, rtol=1e-14)


@pytest.mark.parametrize("cost", MODELS)
def test_every_kind_takes_every_place(cost: CostModel, tmp_path: Path) -> None:
    cost.write(tmp_path / "cost.json")
    again = CostModel.read(tmp_path / "cost.json")
    assert again == cost == pickle.loads(pickle.dumps(cost))
    assert {part["kind"] for part in again.to_json().values() if isinstance(part, dict) and "kind" in part} <= {
        "curve",
        "parametric",
        "roofline",
    }
    for value in (
        again.step_seconds(9, 100, 2),
        again.draft_seconds(2, 3, 100),
        again.host_seconds(2),
        again.prefill_seconds(40),
        again.prefill_host_seconds(2),
    ):
        assert type(value) is float and value >= 0.0
    trace = api.simulate(toy_trace(4), policy=PrefixScheduler(cost), cost=again, concurrency=3)
    assert CostModel.from_json(trace.config["cost"]) == cost
    assert (goodputs(cost, LoadView(0, 3, 0, 300, 5), 0.7) > 0).all()
    assert api.simulate(toy_trace(4), policy=Goodput(cost), cost=cost).requests["finish"].gt(0).all()


def test_files_without_kinds_are_curves() -> None:
    cost = CostModel(Curve((1.0, 4.0), (0.1, 0.2), (("context_tokens", 1e-6),)), provenance={"device": "toy"})
    old = {
        name: {key: value for key, value in asdict(getattr(cost, name)).items() if key != "captured"}
        for name in ("verify", "draft", "prefill", "host", "prefill_host")
    }
    assert CostModel.from_json(json.loads(json.dumps({**old, "provenance": cost.provenance}))) == cost


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "tachyon"}, "no part of kind 'tachyon'; known are curve, parametric, roofline"),
        ({"knots": [1, 1], "levels": [1, 2]}, "rising order"),
        ({"knots": [1], "levels": [1, 2]}, "1 sizes and 2 levels"),
        ({"captured": [4, 2]}, "captured sizes"),
        ({"kind": "parametric"}, "unexpected keyword"),
    ],
)
def test_a_part_that_is_none_is_one_sentence(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    document = toy_cost().to_json()
    document["verify"] |= change
    (tmp_path / "cost.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"cost\.json is not a cost table") as error:
        CostModel.read(tmp_path / "cost.json")
    assert complaint in str(error.value)


def test_a_captured_batch_costs_what_its_padded_size_does() -> None:
    curve = Curve((1.0, 2.0, 4.0, 8.0, 16.0, 32.0), (1.0, 1.1, 1.3, 1.2, 2.0, 4.0), captured=(1, 2, 4, 8, 16))
    steps = curve.seconds(np.arange(0, 17)).tolist()
    assert steps == [1.0, 1.0, 1.1, 1.3, 1.3, *[1.2] * 4, *[2.0] * 8]
    # Above the largest graph nothing is padded.
    assert curve.seconds([17, 24, 32, 48]).tolist() == [2.125, 3.0, 4.0, 6.0]
    # Trimming within a step of the staircase saves nothing, so the scheduler does not.
    flat = CostModel(curve).round_table(4, 3, 0)
    assert (flat[5:] == flat[5]).all()


def padded(frame: pd.DataFrame, sizes: tuple[int, ...]) -> pd.DataFrame:
    """The profile as an engine with captured graphs gives it: same seconds for all sizes that are padded alike."""
    logical = frame["batch_tokens"].to_numpy()
    ladder = np.array([*sizes, 10**9])
    up = np.where(logical <= sizes[-1], ladder[np.searchsorted(ladder, logical)], logical)
    return frame.assign(padded_tokens=up, verify_seconds=0.01 + 1e-4 * up)


def test_captured_sizes_are_found_in_the_profile_and_fitted() -> None:
    frame = padded(profile(toy_cost()), (1, 2, 4, 8, 16))
    fitted = fit(frame)
    assert isinstance(fitted.verify, Curve) and fitted.verify.captured == (1, 2, 4, 8, 16)
    for size, up in ((3, 4), (5, 8), (8, 8), (9, 16), (16, 16), (20, 20), (30, 30)):
        assert fitted.step_seconds(size, 0, 0) == pytest.approx(0.01 + 1e-4 * up, rel=1e-3)
    assert fitted.provenance["verify_leave_one_out_error"] < 0.02
    assert fit(frame, captured=()).verify.captured == ()  # type: ignore[union-attr]
    # Without padding there is no staircase.
    assert fit(frame.assign(padded_tokens=frame["batch_tokens"])).verify.captured == ()  # type: ignore[union-attr]


def test_other_hardware_is_refused_unless_forced() -> None:
    cost = replace(toy_cost(), provenance={"device": "H100", "model": "m", "dtype": "bfloat16", "num_threads": 2})
    here = {"device": "H100", "model": "n", "dtype": "bfloat16", "num_threads": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost.require_hardware({**here, "model": "m", "num_threads": 2}, force=True) is cost
        with pytest.raises(UserError, match="model m and this run has n, num_threads 2 and this run has 4; profile"):
            cost.require_hardware(here)
    with pytest.warns(UserWarning, match="forced to use it all the same") as record:
        forced = cost.require_hardware(here, force=True)
    assert len(record) == 1 and "\n" not in str(record[0].message)
    assert forced.provenance["forced"] == {"model": ["m", "n"], "num_threads": [2, 4]}
    assert CostModel.from_json(json.loads(json.dumps(forced.to_json()))) == forced
    assert cost.provenance.get("forced") is None and forced.verify == cost.verify


def test_one_number_is_cheap() -> None:
    """A microsecond on an idle machine; the bound leaves room for a busy one."""
    for cost in MODELS:
        rounds = []
        for _ in range(5):
            start = perf_counter()
            for _ in range(2000):
                cost.step_seconds(200, 30_000, 64)
            rounds.append((perf_counter() - start) / 2000)
        assert min(rounds) < 5e-6


def test_sizes_beyond_the_table_and_between_whole_ones() -> None:
    curve = toy_cost().verify
    assert isinstance(curve, Curve)
    for size in (1023, 1024, 5000, 200_000, 2.5, np.int64(7), np.float64(9.0)):
        assert curve.scalar(size, 0, 0, 0) == pytest.approx(float(curve.level(size)), rel=1e-15)  # type: ignore[arg-type]
    assert curve.run(131_000, 131_100, 0, 0).tolist() == curve.level(np.arange(131_000, 131_101)).tolist()
