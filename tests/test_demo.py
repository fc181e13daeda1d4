"""The demonstration as a whole, at the smallest scale: rounds are exact, files are written, errors are fractions."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from dspark_sim.cost import CostModel
from dspark_sim.demo import DemoScale, run_demo
from dspark_sim.trace import Trace

SMALL = DemoScale(num_requests=((1, 1), (2, 3)), max_tokens=6, profile_tokens=8)
ROW = (
    "policy",
    "concurrency",
    "live_output_throughput",
    "simulated_output_throughput",
    "error",
    "repeat_error",
    "mean_acceptance_length",
    "verification_budget",
)


@pytest.mark.model
def test_the_demo_at_the_smallest_scale(tmp_path, capsys):
    frame = run_demo(tmp_path / "demo", device="cpu", scale=SMALL, json_path=tmp_path / "table.json")
    assert list(zip(frame["policy"], frame["concurrency"], strict=True)) == [
        (policy, users) for users in (1, 2) for policy in ("none", "ngram fixed-7", "dspark fixed-7", "dspark prefix")
    ]
    assert frame["rounds_equal"].all()
    assert (frame["mean_acceptance_length"] == frame["simulated_mean_acceptance_length"]).all()
    expected = frame["simulated_output_throughput"] / frame["live_output_throughput"] - 1
    assert frame["error"].to_numpy() == pytest.approx(expected.to_numpy())
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert len(rows) == len(frame) and set(ROW) <= rows[0].keys()
    printed = capsys.readouterr().out
    assert "dspark prefix" in printed and "rounds equal" in printed
    for name in ("throughput_and_budget", "frontier"):
        assert (tmp_path / "demo" / f"{name}.png").stat().st_size > 10_000
    assert CostModel.read(tmp_path / "demo" / "cost.json").provenance["drafter"] == "dspark"
    assert len(Trace.read(tmp_path / "demo" / "recording").anchors) > 0
    assert Trace.read(tmp_path / "demo" / "traces" / "dspark-prefix-c2").clock == "wall"
