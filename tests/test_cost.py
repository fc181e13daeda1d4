import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_cost

from dspark_sim.cost import CostModel, Curve, fit, leave_one_out_error
from dspark_sim.errors import UserError


def profile(cost: CostModel, num_steps: int = 600, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """A `steps` table as a profile run under `cost` would give it."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(num_steps):
        num_running, draft_len = int(rng.integers(1, 9)), int(rng.integers(0, 6))
        row = dict.fromkeys(("prefill", "draft", "head", "policy", "verify", "accept", "host"), 0.0)
        luck = float(np.exp(noise * rng.normal()))
        batch_tokens = num_running + int(rng.integers(0, num_running * draft_len + 1))
        context_tokens = int(rng.integers(50, 400)) * num_running
        prefill_tokens = int(rng.integers(5, 100)) if step % 5 == 0 else 0
        if prefill_tokens:
            batch_tokens, draft_len = prefill_tokens, 0
            row["prefill"] = cost.prefill_seconds(prefill_tokens) * luck
            row["host"] = cost.prefill_host_seconds(num_running)
        else:
            row["verify"] = cost.step_seconds(batch_tokens, context_tokens, num_running) * luck
            row["draft"] = cost.draft_seconds(num_running, draft_len, context_tokens) * luck
            row["policy"] = row["accept"] = cost.host_seconds(num_running) / 4
            row["host"] = cost.host_seconds(num_running) / 2
        rows.append(
            {f"{span}_seconds": value for span, value in row.items()}
            | {"num_running": num_running, "draft_len": draft_len, "batch_tokens": batch_tokens}
            | {"context_tokens": context_tokens, "num_prefill_tokens": prefill_tokens}
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.05, 0.05)])
def test_fit_recovers_a_known_law(noise: float, tolerance: float) -> None:
    truth = toy_cost()
    fitted = fit(profile(truth, noise=noise), {"device": "toy"})
    for num_running in (1, 2, 5, 8):
        for draft_len in (1, 3, 5):
            context = 200 * num_running
            batch_tokens = num_running * (1 + draft_len) // 2 + 1
            for method, arguments in (
                ("step_seconds", (batch_tokens, context, num_running)),
                ("draft_seconds", (num_running, draft_len, context)),
                ("host_seconds", (num_running,)),
                ("round_seconds", (batch_tokens, context, num_running, draft_len)),
            ):
                expected = getattr(truth, method)(*arguments)
                # What a draft costs the pass behind it is known only as well as that pass is.
                scale = truth.round_seconds(batch_tokens, context, num_running, draft_len)
                near = pytest.approx(expected, abs=tolerance * (scale if method == "draft_seconds" else expected))
                assert getattr(fitted, method)(*arguments) == near, method
    assert fitted.prefill_seconds(40) == pytest.approx(truth.prefill_seconds(40), rel=tolerance)
    assert fitted.prefill_host_seconds(3) == pytest.approx(0.002)
    assert fitted.provenance["device"] == "toy"
    assert fitted.provenance["num_decode_steps"] == 480
    assert fitted.provenance["verify_mean_abs_error"] <= max(noise, 1e-6)


def test_a_size_between_probes_is_interpolated() -> None:
    """Only 1, 2 and 4 were seen; 3 lies half-way between 2 and 4 and must not take either's value."""
    sizes = np.repeat([1.0, 2.0, 4.0], 5)
    curve = Curve.fit(sizes, 1.0 + sizes)
    assert curve.seconds(3) == pytest.approx(4.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 1.0)), min_size=1, max_size=30))
def test_fitted_curves_never_fall(points: list[tuple[int, float]]) -> None:
    size, seconds = np.array(points, dtype=float).T
    curve = Curve.fit(size, seconds)
    values = curve.seconds(np.arange(0, 400))
    assert (np.diff(values) >= -1e-12).all()
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_a_single_size_is_its_mean() -> None:
    assert Curve.fit(np.full(3, 8.0), np.array([1.0, 2.0, 3.0])).seconds(8) == pytest.approx(2.0, rel=0.1)


def test_curve_interpolates_seconds_not_rates() -> None:
    curve = Curve((2.0, 4.0, 8.0), (1.0, 2.0, 4.0), (("context_tokens", 0.5),))
    assert curve.seconds(3, context_tokens=0) == 1.5
    assert curve.seconds([1, 2, 10], context_tokens=2).tolist() == [2.0, 2.0, 6.0]


def test_scalars_and_arrays_agree() -> None:
    cost = toy_cost()
    sizes = np.arange(1, 30)
    assert cost.step_seconds(sizes, 100, 4).tolist() == [cost.step_seconds(int(b), 100, 4) for b in sizes]
    assert isinstance(cost.step_seconds(3, 100, 4), float)
    assert cost.draft_seconds(4, 0, 100) == 0.0


def test_round_trip(tmp_path: Path) -> None:
    cost = fit(profile(toy_cost(), 50), {"device": "toy"})
    cost.write(tmp_path / "deep" / "cost.json")
    assert CostModel.read(tmp_path / "deep" / "cost.json") == cost
    assert CostModel.from_json(json.loads(json.dumps(cost.to_json()))) == cost


def test_other_hardware_is_refused() -> None:
    cost = CostModel(Curve(), provenance={"device": "H100", "model": "m", "num_threads": None})
    cost.require_hardware({"device": "H100", "model": "m", "num_threads": 2})
    cost.require_hardware({})
    with pytest.raises(UserError, match="measured with device H100 and this run has cpu"):
        cost.require_hardware({"device": "cpu"})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", json.dumps(asdict(toy_cost()) | {"verify": {"knots": [1]}}), "\x00\x01"]
)
def test_corrupt_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cost\.json is not a cost table"):
        CostModel.read(path)


def test_missing_file_and_empty_profile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cost table at"):
        CostModel.read(tmp_path / "cost.json")
    with pytest.raises(UserError, match="no decode round"):
        fit(profile(toy_cost(), 1))
    with pytest.raises(UserError, match="no step to fit"):
        Curve.fit(np.zeros(0), np.zeros(0))


def test_small_sizes_may_cost_more_than_larger_ones_and_large_sizes_may_not() -> None:
    sizes = np.repeat([1.0, 2.0, 3.0, 4.0, 8.0, 20.0, 24.0, 32.0], 5)
    seconds = np.repeat([1.0, 1.6, 1.9, 1.4, 1.4, 2.0, 1.5, 2.5], 5)
    curve = Curve.fit(sizes, seconds, 16)
    np.testing.assert_allclose(curve.seconds([1, 2, 3, 4]), [1.0, 1.6, 1.9, 1.4], rtol=1e-6)
    assert (np.diff(curve.seconds(np.arange(8, 60))) >= 0).all()
    rare = Curve.fit(np.append(sizes, 6.0), np.append(seconds, 99.0), 16)
    assert 6.0 not in rare.knots


def test_what_a_pass_takes_longer_behind_a_draft_is_the_drafts_cost() -> None:
    frame = profile(toy_cost())
    drafted = (frame["draft_len"] > 0) & (frame["num_prefill_tokens"] == 0)
    slower = frame.assign(verify_seconds=frame["verify_seconds"] + 0.004 * drafted)
    plain, fitted = fit(frame), fit(slower)
    assert fitted.step_seconds(4, 300, 3) == pytest.approx(plain.step_seconds(4, 300, 3), rel=1e-4)
    assert fitted.draft_seconds(3, 2, 300) == pytest.approx(plain.draft_seconds(3, 2, 300) + 0.004, rel=1e-3)
    # Another drafter's passes show the target's cost, and nothing of this drafter's.
    pooled = fit(frame, others=[slower])
    assert pooled.step_seconds(4, 300, 3) == pytest.approx(plain.step_seconds(4, 300, 3), rel=1e-4)
    assert pooled.draft_seconds(3, 2, 300) == pytest.approx(plain.draft_seconds(3, 2, 300), rel=1e-3)


def test_leave_one_out_error_is_small_for_a_line_and_large_for_a_cliff() -> None:
    line = profile(CostModel(Curve((1.0, 50.0), (0.01, 0.05))))
    line = line[line["num_prefill_tokens"] == 0]
    assert leave_one_out_error(line) < 1e-6
    cliff = line.assign(verify_seconds=np.where(line["batch_tokens"] > 8, 0.1, 0.01))
    assert leave_one_out_error(cliff) > 0.01


def test_a_profile_in_which_every_round_drafts_does_not_price_plain_rounds_at_nothing() -> None:
    truth = toy_cost()
    steps = profile(truth)
    fitted = fit(steps[(steps["draft_len"] > 0) | (steps["num_prefill_tokens"] > 0)])
    for batch_tokens, num_running in ((4, 4), (8, 8), (30, 8)):
        expected = truth.step_seconds(batch_tokens, 200 * num_running, num_running)
        assert fitted.step_seconds(batch_tokens, 200 * num_running, num_running) == pytest.approx(expected, rel=0.02)
