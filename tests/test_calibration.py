"""Temperatures: they undo a known distortion, leave good estimates alone, and mean the same live as on a recording."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.special import expit, logit
from scipy.stats import mannwhitneyu

matplotlib.use("agg")

from dspark_sim import cli
from dspark_sim.analysis import calibration_metrics as metrics
from dspark_sim.analysis.reliability import reliability_diagram
from dspark_sim.analysis.stats import Bootstrap
from dspark_sim.errors import UserError
from dspark_sim.trace import SCHEMAS, Trace
from dspark_sim.training import calibration
from dspark_sim.training.calibration import (
    Outcomes,
    calibrated,
    expected_calibration_error,
    fit_constants,
    fit_temperatures,
    halves,
    survival,
)

TRUE = np.array([2.0, 0.6, 1.0, 1.7])
GAMMA, LENGTH = len(TRUE), 60
SMALL = Bootstrap(num_resamples=300)


def drawn(num_blocks=20_000, temperatures=TRUE, seed=0, num_prompts=50) -> Outcomes:
    """Blocks accepted with known conditional probabilities, whose confidences are these with scores times T."""
    rng = np.random.default_rng(seed)
    truth = expit(rng.normal(1.0, 1.5, (num_blocks, GAMMA)))
    num_accepted = np.cumprod(rng.random(truth.shape) < truth, axis=1).sum(axis=1)
    judged = np.arange(GAMMA) < rng.integers(1, 30, num_blocks)[:, None]
    prompts = np.array([f"p{index % num_prompts:02d}" for index in range(num_blocks)], dtype=object)
    return Outcomes(expit(logit(truth) * temperatures), num_accepted, judged, prompts)


def recorded(num_prompts=8, confidence=True, temperatures=(), domains=("toy",), seed=0) -> Trace:
    """A trace of outputs of `LENGTH` tokens after prompts of 7; drafts past an output's end count as rejected."""
    rng = np.random.default_rng(seed)
    requests, anchors = [], []
    for number in range(num_prompts):
        requests.append(
            {
                **{"request_id": number, "prompt_id": f"toy-{number}", "domain": domains[number % len(domains)]},
                **{"arrival": 0.0, "prompt_len": 7, "max_tokens": LENGTH, "output_len": LENGTH, "num_preemptions": 0},
                **{"first_token": 0.0, "finish": 1.0, "finish_reason": "length", "output_tokens": [1] * LENGTH},
            }
        )
        for place in range(LENGTH - 1):
            truth = expit(rng.normal(1.0, 1.5, GAMMA))
            hits = (rng.random(GAMMA) < truth) & (np.arange(GAMMA) < LENGTH - 1 - place)
            anchors.append(
                {
                    **{"request_id": number, "position": 7 + place, "draft_tokens": [1] * GAMMA},
                    "confidence": expit(logit(truth) * TRUE).tolist() if confidence else None,
                    "num_accepted": int(np.cumprod(hits).sum()),
                }
            )
    tables = {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    tables["requests"] = pa.Table.from_pylist(requests, schema=SCHEMAS["requests"])
    tables["anchors"] = pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"])
    source = {"kind": "head", "intercept": 0.0, "slope": 1.0, "temperatures": list(temperatures)}
    config = {"block_size": GAMMA, "drafter": "toy", "target": "tiny", "mode": "greedy", "confidence": source}
    return Trace(tables, "wall", config)


def mean_ece(forecast, outcomes) -> float:
    return float(
        np.mean(
            [
                expected_calibration_error(
                    forecast[outcomes.judged[:, k], k], outcomes.survived[outcomes.judged[:, k], k]
                )
                for k in range(GAMMA)
            ]
        )
    )


# ---- the fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_known_distortion_is_found_and_undone_on_other_blocks(seed):
    fitted = fit_temperatures(drawn(80_000, seed=seed))
    np.testing.assert_allclose(fitted, TRUE, rtol=0.15)
    held = drawn(seed=seed + 10)
    raw = mean_ece(survival(held.confidence), held)
    after = mean_ece(survival(calibrated(held.confidence, fitted)), held)
    assert raw > 0.04 and after <= min(0.02, raw / 3)


def test_exact_probabilities_are_left_alone():
    exact = np.ones(GAMMA)
    fitted = fit_temperatures(drawn(80_000, temperatures=exact))
    np.testing.assert_allclose(fitted, exact, rtol=0.15)
    held = drawn(temperatures=exact, seed=5)
    raw, after = (mean_ece(survival(c), held) for c in (held.confidence, calibrated(held.confidence, fitted)))
    assert after < raw + 0.004


def test_a_later_slot_changes_no_earlier_temperature():
    outcomes = drawn(4000)
    whole = fit_temperatures(outcomes)
    rng = np.random.default_rng(1)
    for kept in range(1, GAMMA):
        confidence = outcomes.confidence.copy()
        confidence[:, kept:] = rng.random(confidence[:, kept:].shape)
        others = Outcomes(confidence, outcomes.num_accepted, outcomes.judged, outcomes.prompts)
        assert (fit_temperatures(others)[:kept] == whole[:kept]).all()


def test_each_temperature_has_the_least_error_on_the_grid_given_those_before():
    outcomes = drawn(3000, seed=3)
    fitted = fit_temperatures(outcomes)
    for slot in range(GAMMA):
        judged = outcomes.judged[:, slot]

        def error(temperature, slot=slot, judged=judged):
            trial = np.array([*fitted[:slot], temperature])
            forecast = survival(calibrated(outcomes.confidence[:, : slot + 1], trial))[judged, slot]
            return expected_calibration_error(forecast, outcomes.survived[judged, slot])

        assert error(fitted[slot]) == pytest.approx(min(map(error, calibration.GRID)), abs=1e-12)


def test_ties_go_to_the_temperature_nearest_to_one():
    """Certain drafts stay certain at any temperature."""
    outcomes = Outcomes(np.ones((5, 2)), np.full(5, 2), np.ones((5, 2), dtype=bool), np.array(["a"] * 5, dtype=object))
    assert fit_temperatures(outcomes).tolist() == [1.0, 1.0]
    assert calibration.GRID[60] == 1.0


def test_calibrated_confidences_keep_their_order_and_survival_falls():
    outcomes = drawn(500)
    confidence = outcomes.confidence.copy()
    confidence[0] = 0.0, 1.0, 0.5, 1.0
    after = calibrated(confidence, TRUE)
    assert ((after >= 0) & (after <= 1)).all() and after[0].tolist() == [0.0, 1.0, 0.5, 1.0]
    for slot in range(GAMMA):
        assert (np.argsort(after[:, slot], kind="stable") == np.argsort(confidence[:, slot], kind="stable")).all()
    assert (np.diff(survival(after), axis=1) <= 0).all()
    np.testing.assert_array_equal(calibrated(confidence, np.ones(GAMMA)), expit(logit(confidence)))


def test_slots_past_the_end_of_an_output_are_not_looked_at():
    trace = recorded(12)
    outcomes = Outcomes.of_trace(trace)
    for row, anchor in zip(outcomes.judged, trace.tables["anchors"].to_pylist(), strict=True):
        assert row.tolist() == [anchor["position"] + 1 + slot < 7 + LENGTH for slot in range(GAMMA)]
    frame = trace.tables["anchors"].to_pandas()
    spoilt = [np.where(seen, c, 0.999) for c, seen in zip(frame["confidence"], outcomes.judged, strict=True)]
    frame["confidence"] = spoilt
    other = Outcomes.of_trace(trace.with_anchors(pa.Table.from_pandas(frame, schema=SCHEMAS["anchors"])))
    np.testing.assert_array_equal(fit_temperatures(outcomes), fit_temperatures(other))
    np.testing.assert_array_equal(fit_constants(outcomes), fit_constants(other))
    whole = metrics.score({"raw": survival(outcomes.confidence)}, outcomes, bootstrap=SMALL).table
    pd.testing.assert_frame_equal(
        whole, metrics.score({"raw": survival(other.confidence)}, other, bootstrap=SMALL).table
    )


def test_halves_share_no_prompt_and_hold_every_domain_alike():
    trace = recorded(12, domains=("a", "b", "c"))
    outcomes = Outcomes.of_trace(trace)
    domains = dict(zip(trace.requests["prompt_id"], trace.requests["domain"], strict=True))
    fit, held = halves(outcomes, domains, seed=3)
    first, second = set(fit.prompts), set(held.prompts)
    assert not first & second and first | second == set(outcomes.prompts)
    assert sorted(domains[prompt] for prompt in first) == sorted(domains[prompt] for prompt in second)
    assert set(halves(outcomes, domains, seed=3)[0].prompts) == first
    assert any(set(halves(outcomes, domains, seed)[0].prompts) != first for seed in range(5))


def test_what_cannot_be_fitted_is_one_sentence():
    def refused(said, call, *arguments):
        with pytest.raises(UserError, match=said) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)

    trace = recorded(3)
    refused("has no anchors", Outcomes.of_trace, trace.with_anchors(SCHEMAS["anchors"].empty_table()))
    refused("toy of the trace has no confidences", Outcomes.of_trace, recorded(3, confidence=False))
    refused("at temperatures already", Outcomes.of_trace, recorded(3, temperatures=[1.0, 2.0]))
    frame = trace.tables["anchors"].to_pandas()
    frame["confidence"] = [row * np.nan for row in frame["confidence"]]
    unknown = trace.with_anchors(pa.Table.from_pandas(frame, schema=SCHEMAS["anchors"]))
    refused("confidence of nan", Outcomes.of_trace, unknown)
    outcomes = Outcomes.of_trace(trace)
    short = Outcomes(outcomes.confidence, outcomes.num_accepted, outcomes.judged & False, outcomes.prompts)
    refused("more --max-tokens", fit_temperatures, short)
    refused("more --max-tokens", fit_constants, short)
    refused("1 prompt cannot be both", halves, outcomes.of(["toy-0"]))
    refused("zero prompts", halves, outcomes.of(["x"]))
    refused("3 temperatures for 4 slots", calibrated, outcomes.confidence, np.ones(3))
    refused("give positive numbers", calibrated, outcomes.confidence, np.array([1, 1, 0, 1]))
    refused("forecast x has the shape", metrics.score, {"x": outcomes.confidence[:2]}, outcomes)


# ---- the metrics ----------------------------------------------------------------------------------------------------


def test_the_metrics_by_hand():
    """Bins of a half: 0.1 and 0.4 (one event of two), 0.6 and 1.0 (two of two)."""
    forecast, happened = np.array([0.1, 0.4, 0.6, 1.0]), np.array([False, True, True, True])
    assert expected_calibration_error(forecast, happened, 2) == pytest.approx((abs(0.5 - 1) + abs(1.6 - 2)) / 4)
    assert metrics.brier_score(forecast, happened) == pytest.approx((0.01 + 0.36 + 0.16 + 0.0) / 4)
    assert metrics.ranking_auc(forecast, happened) == 1.0
    assert metrics.ranking_auc(np.full(4, 0.5), happened) == 0.5
    assert np.isnan(metrics.ranking_auc(forecast, happened | True))
    frame = metrics.reliability(forecast, happened, 2)
    assert frame.to_dict("list") == {
        **{"bin_low": [0.0, 0.5], "bin_high": [0.5, 1.0], "num_blocks": [2, 2]},
        **{"forecast": [0.25, 0.8], "frequency": [0.5, 1.0]},
    }


def test_the_metrics_are_those_of_loops_and_of_scipy():
    rng = np.random.default_rng(4)
    forecast = np.round(rng.random(300), 2)
    happened = rng.random(300) < forecast**1.5
    edges = [k / 20 for k in range(21)]
    total = 0.0
    for low, high in pairwise(edges):
        # The same rounding of a forecast on an edge.
        held = [i for i in range(300) if min(int(forecast[i] * 20), 19) == round(low * 20)]
        if held:
            total += len(held) / 300 * abs(np.mean(forecast[held]) - np.mean(happened[held]))
        assert all(low - 1e-9 <= forecast[i] <= high + 1e-9 for i in held)
    assert expected_calibration_error(forecast, happened) == pytest.approx(total)
    statistic = mannwhitneyu(forecast[happened], forecast[~happened]).statistic
    pairs = happened.sum() * (~happened).sum()
    assert metrics.ranking_auc(forecast, happened) == pytest.approx(statistic / pairs)


def test_the_floor_is_the_mean_error_of_exact_probabilities():
    rng = np.random.default_rng(6)
    forecast = rng.beta(2, 2, 2000)
    errors = [expected_calibration_error(forecast, rng.random(2000) < forecast) for _ in range(400)]
    assert metrics.calibration_floor(forecast) == pytest.approx(np.mean(errors), rel=0.05)


def test_every_resample_is_the_metric_of_the_repeated_prompts():
    outcomes = drawn(240, num_prompts=6)
    forecast = survival(outcomes.confidence)
    weights = SMALL.weights(6)
    scores = metrics.score({"raw": forecast}, outcomes, bootstrap=SMALL)
    names = np.unique(outcomes.prompts.astype(str))
    for draw in (0, 7, 299):
        rows = np.concatenate(
            [np.flatnonzero(outcomes.prompts == name) for name, times in zip(names, weights[draw], strict=True)
             for _ in range(int(times))]
        )  # fmt: skip
        expected = {name: [] for name in metrics.METRICS}
        for slot in range(GAMMA):
            held = rows[outcomes.judged[rows, slot]]
            p, y = forecast[held, slot], outcomes.survived[held, slot]
            expected["ece"].append(expected_calibration_error(p, y))
            expected["brier"].append(metrics.brier_score(p, y))
            expected["auc"].append(metrics.ranking_auc(p, y))
        for name, values in expected.items():
            assert scores.resampled["raw", name][draw] == pytest.approx(np.nanmean(values))


def test_scores_rank_sts_before_raw_and_pair_their_difference():
    outcomes = drawn(8000)
    fit, held = halves(outcomes)
    forecasts = {
        "raw": survival(held.confidence),
        "STS": survival(calibrated(held.confidence, fit_temperatures(fit))),
        "constant": np.broadcast_to(fit_constants(fit), held.confidence.shape),
    }
    scores = metrics.score(forecasts, held, bootstrap=SMALL)
    assert scores.difference("STS", "raw").high < 0
    assert scores.mean("STS", "brier").estimate < scores.mean("constant", "brier").estimate
    assert scores.mean("constant", "auc").estimate == 0.5
    for metric in metrics.METRICS:
        rows = scores.table[(scores.table["method"] == "STS")]
        assert scores.mean("STS", metric).estimate == pytest.approx(rows[metric].iloc[:-1].mean())
    one = metrics.score({"raw": forecasts["raw"][:3]}, Outcomes(*(getattr(held, n)[:3] for n in held.__slots__)))
    assert one.table["ece"].notna().all()
    single = held.of([held.prompts[0]])
    alone = metrics.score({"raw": survival(single.confidence)}, single, bootstrap=SMALL)
    assert np.isnan(alone.mean("raw").low) and np.isfinite(alone.mean("raw").estimate)


def test_the_figure_has_a_panel_a_slot_with_units_and_counts():
    outcomes = drawn(2000)
    shown = {"raw": outcomes.confidence, "STS": calibrated(outcomes.confidence, TRUE)}
    bins = pd.concat(
        [
            metrics.reliability(survival(c)[:, k], outcomes.survived[:, k]).assign(method=name, position=k + 1)
            for name, c in shown.items()
            for k in range(GAMMA)
        ]
    )
    figure = reliability_diagram(bins, {"raw": 0.1, "STS": 0.01}, "a note")
    assert len(figure.axes) == GAMMA
    assert all("n = 2000" in axis.get_title() for axis in figure.axes)
    said = " ".join(text.get_text() for text in [*figure.texts, *figure.legends[0].get_texts()])
    for word in ("probability", "fraction", "raw, mean ECE 10.0%", "STS, mean ECE 1.0%", "a note"):
        assert word in said
    matplotlib.pyplot.close(figure)


# ---- the engine and the files ---------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_confidence import heads_up_to, tiny_drafter  # noqa: E402

from dspark_sim.engine.drafters.choose import Confidence  # noqa: E402
from dspark_sim.engine.temperatures import (  # noqa: E402
    TemperatureFile,
    calibrated_confidence,
    default_confidence,
    read_temperatures,
)
from dspark_sim.options import ModelOptions  # noqa: E402


@pytest.mark.parametrize("kind", ["head", "top1", "margin"])
def test_a_live_head_gives_the_calibrated_confidences_of_its_raw_ones(kind):
    drafter = tiny_drafter(5)
    # What caps a target's logits: these have no cap.
    drafter._target = SimpleNamespace(cap_logits=lambda logits: logits)
    hidden = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1))
    tokens = torch.zeros(6, 4, dtype=torch.long)
    raw = heads_up_to(drafter, Confidence(kind), hidden, tokens)
    assert torch.equal(heads_up_to(drafter, Confidence(kind, temperatures=()), hidden, tokens), raw)
    judge = Confidence(kind, temperatures=tuple(TRUE))
    after = heads_up_to(drafter, judge, hidden, tokens)
    np.testing.assert_allclose(after.numpy(), calibrated(raw.numpy(), TRUE), atol=2e-6)
    # A round may draft less than a block.
    assert torch.allclose(heads_up_to(drafter, judge, hidden[:, :2], tokens[:, :2]), after[:, :2])
    with pytest.raises(UserError, match="there are 3 temperatures and the drafter proposes 4 tokens"):
        heads_up_to(drafter, Confidence(kind, temperatures=(1.0, 2.0, 3.0)), hidden, tokens)


def test_certain_confidences_stay_certain():
    edge = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    assert torch.equal(Confidence(temperatures=tuple(TRUE)).calibrate(edge), edge)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_a_positive_number(value):
    with pytest.raises(UserError, match="give positive numbers"):
        Confidence(temperatures=(1.0, value))


FILE = TemperatureFile(
    Confidence("margin", -1.25, 1 / 3, tuple(TRUE)),
    **{"drafter": "dflash", "target": "tiny", "dataset": "toys", "num_samples": 12},
    **{"ece_before": (0.1, 0.2, 0.3, 0.4), "ece_after": (0.01, 0.02, 0.03, 0.04), "notes": {"mode": "greedy"}},
)


def test_both_forms_of_the_file_hold_the_temperatures_exactly(tmp_path: Path):
    own, foreign = tmp_path / "deep" / "own.json", tmp_path / "deep" / "sglang.json"
    FILE.write(own)
    FILE.write_sglang(foreign)
    assert sorted(path.name for path in own.parent.iterdir()) == ["own.json", "sglang.json"]
    assert read_temperatures(own) == FILE
    document = json.loads(foreign.read_text())
    # The fields of SGLang's struct, of the types that it insists on.
    assert document == {
        **{"temperatures": TRUE.tolist(), "dataset": "toys", "num_samples": 12},
        **{"ece_before": [0.1, 0.2, 0.3, 0.4], "ece_after": [0.01, 0.02, 0.03, 0.04]},
    }
    assert type(document["num_samples"]) is int
    assert document.items() <= json.loads(own.read_text()).items()
    read = read_temperatures(foreign)
    assert read.confidence == Confidence("head", temperatures=tuple(TRUE)) and read.drafter == ""
    assert read.ece_after == FILE.ece_after and read.num_samples == 12
    # SGLang leaves out what has its default, and may hold whole numbers.
    foreign.write_text('{"temperatures":[1,2.5]}')
    assert read_temperatures(foreign).confidence.temperatures == (1.0, 2.5)
    with pytest.raises(UserError, match="zero temperatures to write"):
        TemperatureFile(Confidence()).write(own)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "[1.0, 2.0]", "{}", '{"temperatures": []}', '{"temperatures": 1}', '{"temperatures": "ab"}'),
        *('{"temperatures": [1, 0]}', '{"temperatures": [NaN]}', '{"temperatures": [true]}', "\xff", "PK\x03\x04"),
        *('{"temperatures": [1], "confidence": 3}', '{"temperatures": [1], "confidence": {"kind": "x"}}'),
        *('{"temperatures": [1], "num_samples": "x"}', '{"temperatures": [1], "ece_before": {}}'),
    ],
)
def test_another_file_is_one_sentence(tmp_path: Path, text: str):
    path = tmp_path / "temperatures.json"
    with pytest.raises(UserError, match=r"no temperature file at .*calibrate"):
        read_temperatures(path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"is not a temperature file \(.*calibrate") as caught:
        read_temperatures(path)
    assert "\n" not in str(caught.value)


def test_temperatures_go_with_their_drafter_and_source(tmp_path: Path):
    path = tmp_path / "own.json"
    FILE.write(path)
    source = Confidence("margin", -1.25, 1 / 3)
    assert calibrated_confidence(path, source, "x/dflash") == calibrated_confidence(path, source) == FILE.confidence
    with pytest.raises(UserError, match=r"fitted to drafter dflash and this one is dspark; .*--drafter dspark"):
        calibrated_confidence(path, source, "dspark")
    with pytest.raises(UserError, match=r"fitted to confidence margin \(-1.25 \+ 0.333.*this is confidence head"):
        calibrated_confidence(path, Confidence())


def test_a_folder_says_what_its_drafter_uses_by_default(tmp_path: Path):
    assert default_confidence(tmp_path) is None
    FILE.write(tmp_path / "temperatures.json")
    assert default_confidence(tmp_path) == FILE.confidence
    (tmp_path / "temperatures.json").write_text("{}")
    with pytest.raises(UserError, match="not a temperature file"):
        default_confidence(tmp_path)


def test_options_name_the_source_of_confidence(tmp_path: Path):
    path = tmp_path / "t.json"
    TemperatureFile(Confidence(temperatures=tuple(TRUE)), drafter="dspark").write(path)
    assert ModelOptions()._source() is None
    assert ModelOptions(temperatures=path)._source() == Confidence(temperatures=tuple(TRUE))
    assert ModelOptions(temperatures=Path("none"))._source() == Confidence()
    with pytest.raises(UserError, match="fitted to confidence head and this is confidence top1"):
        ModelOptions(confidence="top1", temperatures=path)._source()


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_calibrate_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recorded(30).write(tmp_path / "trace")
    out, sglang, rows, figure = (tmp_path / name for name in ("t.json", "s.json", "rows.json", "figure.png"))
    flags = ("--out", str(out), "--sglang", str(sglang), "--json", str(rows), "--figure", str(figure))
    assert run("calibrate", "--trace", str(tmp_path / "trace"), "--no-margin", *flags) == 0
    printed = capsys.readouterr().out.splitlines()
    heading = ["position", "n", "survival", "T", "ECE raw", "ECE STS", "ECE constant", "ECE floor", "AUC", "AUC STS"]
    assert printed[0].split("  ")[0] == "position" and all(name in printed[0] for name in [*heading, "Brier STS"])
    assert [line.split()[0] for line in printed[2 : 3 + GAMMA]] == ["1", "2", "3", "4", "mean"]
    assert any(line.startswith("ECE of STS less raw -") for line in printed)
    file = read_temperatures(out)
    assert (file.drafter, file.target, file.num_samples) == ("toy", "tiny", 15 * (LENGTH - 1))
    table = pd.DataFrame(json.loads(rows.read_text())["rows"])
    assert set(table["method"]) == {"raw", "STS", "constant"} and len(table) == 3 * (GAMMA + 1)
    after = table[(table["method"] == "STS") & (table["position"] != "mean")]["ece"]
    assert file.ece_after == tuple(after)
    assert read_temperatures(sglang).confidence == file.confidence
    assert all(figure.with_suffix(suffix).stat().st_size > 1000 for suffix in (".png", ".pdf", ".csv"))
    assert file.notes["mean_ece"]["STS"] < file.notes["mean_ece"]["raw"]


def test_what_calibrate_cannot_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(said: str, *arguments: str) -> None:
        assert run("calibrate", *arguments, "--out", str(tmp_path / "t.json")) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and said in captured.err
        assert captured.out == "" and not (tmp_path / "t.json").exists()

    refused("no trace at", "--trace", str(tmp_path / "nothing"))
    for name, trace, said in (
        ("without", recorded(4, confidence=False), "has no confidences"),
        ("one", recorded(1), "1 prompt cannot be both fitted and judged"),
        ("again", recorded(4, temperatures=[1.0] * GAMMA), "at temperatures already"),
    ):
        trace.write(tmp_path / name)
        refused(said, "--trace", str(tmp_path / name))


@pytest.mark.model
def test_temperatures_of_a_live_drafter_are_used_in_its_traces(engine, tmp_path: Path):
    from dspark_sim.policy import Fixed
    from dspark_sim.workload import ClosedLoop, bundled_prompts

    prompts = bundled_prompts(per_domain=1)[:2]
    temperatures = tuple(float(t) for t in np.geomspace(0.5, 2.0, engine.block_size))
    judged = engine.with_drafter("dspark", Confidence(temperatures=temperatures))

    def traced(one):
        live = one.record(prompts, Fixed(one.block_size), ClosedLoop(2), max_tokens=10, progress=False)
        return one.anchors(live, progress=False)

    raw, after = traced(engine.with_drafter("dspark", Confidence())), traced(judged)
    for table in ("drafts", "anchors"):
        pairs = list(zip(*(getattr(trace, table)["confidence"] for trace in (raw, after)), strict=True))
        assert sum(len(before) for before, _ in pairs) >= 7
        for before, now in pairs:
            # A round near an output's end drafts less than a block.
            np.testing.assert_allclose(now, calibrated(before, temperatures[: len(before)]), atol=1e-4)
    json.dumps(after.config)
    after.write(tmp_path / "trace")
    assert Trace.read(tmp_path / "trace").config["confidence"]["temperatures"] == list(temperatures)
    with pytest.raises(UserError, match="there are 2 temperatures and the drafter proposes 7 tokens"):
        engine.with_drafter("dspark", Confidence(temperatures=(1.0, 1.0)))
