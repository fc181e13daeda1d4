"""The command `dspark-sim cost`."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused, run
from test_cost import profile
from test_cost_parametric import steps
from toy import constant_cost, toy_cost, toy_trace

from dspark_sim import api
from dspark_sim.commands.cost import Roofline
from dspark_sim.cost import CostModel, fit
from dspark_sim.cost_parametric import fit_parametric
from dspark_sim.cost_parts import Parametric
from dspark_sim.model_shapes import SHAPES
from dspark_sim.policy import Fixed
from dspark_sim.roofline import ACCELERATORS, DRAFTERS

KINDS = ("show", "fit", "export-sglang", "import-sglang", "roofline")


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_is_explained(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cost", kind, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: dspark-sim cost {kind}") and "--json" in text
    assert "PATH (default" not in text and "INT (default" not in text and "FLOAT (default" not in text


def test_choices_are_the_presets() -> None:
    from typing import get_args, get_type_hints

    hints = get_type_hints(Roofline)
    assert get_args(hints["device"]) == tuple(ACCELERATORS)
    assert get_args(hints["model"]) == tuple(SHAPES)
    assert get_args(hints["drafter"]) == (*DRAFTERS, "none")


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = fit(profile(toy_cost(), 200, noise=0.05), {"device": "toy", "model": "m"})
    cost.write(tmp_path / "cost.json")
    out = tmp_path / "rows.json"
    assert run("cost", "show", str(tmp_path / "cost.json"), "--draft-len", "3", "--json", str(out)) == 0
    printed = capsys.readouterr().out
    assert "Of device toy, model m." in printed and "left-out batch size" in printed and "residuals" in printed
    row = rows(out)[2]
    assert row["num_requests"] == 4 and row["verify_seconds"] == cost.step_seconds(16, 4 * 512, 4)
    assert row["draft_seconds"] == cost.draft_seconds(4, 3, 4 * 512)

    fit_parametric(steps(), {"device": "toy"}).write(tmp_path / "coefficients.json")
    assert run("cost", "show", str(tmp_path / "coefficients.json")) == 0
    printed = capsys.readouterr().out
    assert "per_context_token" in printed and "not_identified" in printed


def test_fit_from_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = api.simulate(toy_trace(6), policy=Fixed(3), cost=toy_cost(), concurrency=4, num_requests=40)
    trace.write(tmp_path / "trace")
    for kind in ("curve", "parametric"):
        out = tmp_path / f"{kind}.json"
        assert run("cost", "fit", str(tmp_path / "trace"), "--out", str(out), "--kind", kind) == 0
        assert "left-out batch size" in capsys.readouterr().out
        cost = CostModel.read(out)
        assert isinstance(cost.verify, Parametric) == (kind == "parametric")
        assert cost.host_seconds(3) == pytest.approx(toy_cost().host_seconds(3), rel=0.02)


def test_roofline_then_sglang_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost, table, back = (str(tmp_path / name) for name in ("cost.json", "sglang.json", "back.json"))
    assert run("cost", "roofline", "--device", "h100", "--model", "qwen3-8b", "--out", cost) == 0
    assert "An estimate from published figures, not measured." in capsys.readouterr().out
    assert run("cost", "export-sglang", cost, table, "--probes", "1", "8", "64", "--context-len", "100") == 0
    out = tmp_path / "rows.json"
    assert run("cost", "import-sglang", table, back, "--device", "H100", "--model", "m", "--json", str(out)) == 0
    model, again = CostModel.read(cost), CostModel.read(back)
    for size, row in zip((1, 8, 64), rows(out), strict=True):
        expected = model.round_seconds(size, 100 * size, size, 0)
        assert row["batch_tokens"] == size and row["step_seconds"] == pytest.approx(expected)
        assert again.step_seconds(size, 0, 1) == pytest.approx(expected)
    assert again.provenance["device"] == "H100" and again.provenance["model"] == "m"


def test_simulate_takes_every_kind_and_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = tmp_path / "recording"
    toy_trace(6).write(recording)
    roof = str(tmp_path / "roofline.json")
    assert run("cost", "roofline", "--model", "smollm2-135m", "--out", roof) == 0
    assert run("simulate", str(recording), "--cost", roof, "--policy", "prefix") == 0
    capsys.readouterr()
    assert "no residuals" in refused(capsys, "simulate", str(recording), "--cost", roof, "--noise-seed", "1")
    fitted = str(tmp_path / "fitted.json")
    fit(profile(toy_cost(), 200, noise=0.2)).write(fitted)
    assert run("simulate", str(recording), "--cost", fitted, "--policy", "lagged", "--noise-seed", "1") == 0


def test_bad_input_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing, out = str(tmp_path / "none.json"), str(tmp_path / "out.json")
    assert "no cost table at" in refused(capfd, "cost", "show", missing)
    assert "cannot read" in refused(capfd, "cost", "import-sglang", missing, out, "--device", "d", "--model", "m")
    assert "give more devices" in refused(capfd, "cost", "roofline", "--model", "deepseek-v3", "--out", out)
    assert "efficiency is 2.0" in refused(capfd, "cost", "roofline", "--bandwidth-efficiency", "2", "--out", out)
    constant_cost(0.0, 0.0).write(tmp_path / "free.json")
    assert "takes 0.0 seconds" in refused(capfd, "cost", "export-sglang", str(tmp_path / "free.json"), out)
    assert "cannot be priced" in refused(capfd, "cost", "show", str(tmp_path / "free.json"), "--num-requests", "0")
    assert "cost --help" in refused(capfd, "cost", "nonsense")
    assert not Path(out).exists()
