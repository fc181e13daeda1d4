"""Evaluation: walks are live runs, counts are DeepSpec's, intervals cover, errors are sentences."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from toy import toy_cost, toy_trace

from dspark_sim.analysis import evaluation
from dspark_sim.analysis.blocks import Blocks, prompt_counts, walk
from dspark_sim.analysis.evaluation import ROW, acceptance_table, domain_ratios, position_table, threshold_table
from dspark_sim.analysis.evaluation_tables import paper_table, printed_table, speed_medians
from dspark_sim.analysis.metrics import per_request, summary
from dspark_sim.analysis.stats import Bootstrap
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed
from dspark_sim.policy_ranked import ConfidenceThreshold
from dspark_sim.reference import printed_gains, table1
from dspark_sim.simulate import simulate
from dspark_sim.trace import SCHEMAS, Trace
from dspark_sim.workload import ClosedLoop

FEW = Bootstrap(num_resamples=200)


def synthetic(
    accepted: list[list[int]], domains: list[str], gamma: int = 3, stops: bool = False, limit: int | None = None
) -> Trace:
    """Anchors with the given accepted counts, a list per request; outputs have a token more."""
    requests, anchors = [], []
    for number, counts in enumerate(accepted):
        length = len(counts) + 1
        requests.append(
            {
                **{"request_id": number, "prompt_id": f"p{number}", "domain": domains[number], "arrival": 0.0},
                **{"prompt_len": 5, "max_tokens": limit or length, "output_len": length},
                **{"first_token": 0.0, "finish": 1.0, "finish_reason": "stop" if stops else "length"},
                **{"num_preemptions": 0, "output_tokens": [1] * length},
            }
        )
        anchors += [
            {
                **{"request_id": number, "position": 5 + place, "draft_tokens": [1] * gamma},
                **{"confidence": [0.9] * gamma, "num_accepted": count},
            }
            for place, count in enumerate(counts)
        ]
    tables = {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    tables["requests"] = pa.Table.from_pylist(requests, schema=SCHEMAS["requests"])
    tables["anchors"] = pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"])
    return Trace(tables, "wall", {"block_size": gamma, "has_confidence": True, "mode": "greedy"})


def in_domains(trace: Trace, names: tuple[str, ...] = ("math", "code", "chat")) -> Trace:
    rows = trace.tables["requests"].to_pylist()
    for number, row in enumerate(rows):
        row["domain"] = names[number % len(names)]
    return Trace(
        {**trace.tables, "requests": pa.Table.from_pylist(rows, schema=SCHEMAS["requests"])}, "wall", trace.config
    )


def brute_force(trace: Trace) -> list[tuple[int, int, int]]:
    """Rounds as (request, output index of the anchor, accepted), token by token from the tables' rows."""
    found = []
    for request in trace.tables["requests"].to_pylist():
        at = {
            row["position"] - request["prompt_len"]: row["num_accepted"]
            for row in trace.tables["anchors"].to_pylist()
            if row["request_id"] == request["request_id"]
        }
        tokens = 1
        while tokens < request["output_len"]:
            accepted = 0
            while accepted < at[tokens - 1] and tokens + accepted + 1 < request["max_tokens"]:
                accepted += 1
            found.append((request["request_id"], tokens - 1, accepted))
            tokens += accepted + 1
    return found


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mode", ["greedy", "rejection"])
@pytest.mark.parametrize("seed", range(3))
def test_a_walk_equals_the_brute_force_loop(seed: int, mode: str, ragged: bool) -> None:
    trace = toy_trace(7, 24, seed=seed, ragged=ragged, mode=mode)
    blocks = Blocks.from_trace(trace)
    rounds = walk(blocks)
    found = zip(rounds["request"], blocks.place[rounds["row"]], rounds["num_accepted"], strict=True)
    assert [tuple(map(int, row)) for row in found] == brute_force(trace)


@pytest.mark.parametrize("policy", [Fixed(5), Fixed(2), ConfidenceThreshold(0.8), ConfidenceThreshold(0.0)])
def test_a_walk_is_the_replay_round_by_round(policy: Any) -> None:
    trace = toy_trace(9, 30, seed=3)
    blocks = Blocks.from_trace(trace)
    fixed = isinstance(policy, Fixed)
    lens = np.full(blocks.place.size, policy.verify_len) if fixed else blocks.threshold_lens(policy.threshold)
    rounds = walk(blocks, lens)
    replayed = simulate(trace, policy, ClosedLoop(1), toy_cost()).drafts.sort_values(["request_id", "step"])
    for name in ("verify_len", "num_accepted", "num_emitted"):
        assert rounds[name].tolist() == replayed[name].tolist(), name
    assert rounds["request"].tolist() == replayed["request_id"].tolist()


def test_a_shorter_limit_is_a_shorter_recording() -> None:
    """The prefix of an output, recorded with that limit, has the same rounds."""
    trace = toy_trace(4, 20, seed=1)
    limit = 11
    rows = [
        {**row, "output_len": min(row["output_len"], limit), "max_tokens": limit}
        for row in trace.tables["requests"].to_pylist()
    ]
    ends = {row["request_id"]: row["prompt_len"] + row["output_len"] - 1 for row in rows}
    kept = [
        {**row, "num_accepted": min(row["num_accepted"], ends[row["request_id"]] - row["position"])}
        for row in trace.tables["anchors"].to_pylist()
        if row["position"] < ends[row["request_id"]]
    ]
    tables = {
        **trace.tables,
        "requests": pa.Table.from_pylist(rows, schema=SCHEMAS["requests"]),
        "anchors": pa.Table.from_pylist(kept, schema=SCHEMAS["anchors"]),
    }
    short = walk(Blocks.from_trace(Trace(tables, "wall", trace.config)))
    columns = ["request", "verify_len", "num_accepted", "num_emitted"]
    pd.testing.assert_frame_equal(walk(Blocks.from_trace(trace), max_tokens=limit)[columns], short[columns])


def test_known_anchors_have_known_lengths_and_rates() -> None:
    # Output indices 0..9. Rounds: 0 (2 accepted) -> 3 (0) -> 4 (3) -> 8 (0, one token left).
    trace = synthetic([[2, 3, 0, 0, 3, 1, 0, 2, 1]], ["math"])
    blocks = Blocks.from_trace(trace)
    rounds = walk(blocks)
    assert blocks.place[rounds["row"]].tolist() == [0, 3, 4, 8]
    assert rounds["num_accepted"].tolist() == [2, 0, 3, 0] and rounds["num_emitted"].tolist() == [3, 1, 4, 1]
    counts = prompt_counts(blocks, rounds)
    table = acceptance_table({"dspark": counts}).set_index("domain")
    assert table.loc["math", "mean_acceptance_length"] == 9 / 4
    # A block of 3 and a bonus fit behind anchors 0 to 5: three whole rounds emit 8 tokens of 3 · (3 + 1) judged.
    assert table.loc["math", "accept_len"] == 8 / 3 and table.loc["math", "verify_rate"] == 8 / 12
    by_round = position_table(blocks, "rounds").query("domain == 'math'")
    assert by_round["accept_rate"].tolist() == [2 / 3, 2 / 3, 1 / 3]
    assert by_round["conditional_acceptance"].tolist() == [2 / 3, 1, 1 / 2]
    dense = position_table(blocks).query("domain == 'math'")
    # Slot 2 has no token behind anchor 8, slot 3 none behind anchors 7 and 8.
    assert dense["num_drafted"].tolist() == [9, 8, 7]
    assert dense["num_accepted"].tolist() == [6, 4, 2] and dense["num_reached"].tolist() == [9, 5, 3]


def test_an_accepted_end_has_no_bonus_in_deepspecs_count() -> None:
    trace = synthetic([[0, 3, 2, 1]], ["math"], stops=True, limit=40)
    blocks = Blocks.from_trace(trace)
    counts = prompt_counts(blocks, walk(blocks)).iloc[0]
    # Rounds: nothing accepted; three accepted, the last of them the end.
    assert (counts["num_tokens"], counts["rounds"]) == (1 + 4, 2)
    assert (counts["whole_emitted"], counts["whole_proposed"], counts["whole_rounds"]) == (1 + 3, 3 + 3, 2)


def test_survival_of_whole_rounds_adds_up_to_the_acceptance_length() -> None:
    trace = in_domains(toy_trace(12, 40, seed=5))
    rows = [
        {**row, "finish_reason": "length"} for row in trace.tables["requests"].to_pylist() if row["request_id"] % 2 == 0
    ]
    anchors = [row for row in trace.tables["anchors"].to_pylist() if row["request_id"] % 2 == 0]
    tables = {
        **trace.tables,
        "requests": pa.Table.from_pylist(rows, schema=SCHEMAS["requests"]),
        "anchors": pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"]),
    }
    blocks = Blocks.from_trace(Trace(tables, "wall", trace.config))
    lengths = acceptance_table({"a": prompt_counts(blocks, walk(blocks))}, FEW).set_index("domain")["accept_len"]
    rates = position_table(blocks, "rounds", FEW).groupby("domain")["accept_rate"].sum()
    for domain, rate in rates.items():
        assert lengths[domain] == pytest.approx(1 + rate)


def test_a_live_cut_lowers_the_length_and_a_whole_round_does_not() -> None:
    """Geometric rounds have a known mean; only the uncut count finds it on short outputs."""
    chance, gamma = 0.7, 5
    trace = toy_trace(2000, 20, gamma, chance, seed=2)
    rows = [row for row in trace.tables["requests"].to_pylist() if row["finish_reason"] == "length"]
    chosen = {row["request_id"] for row in rows}
    anchors = [row for row in trace.tables["anchors"].to_pylist() if row["request_id"] in chosen]
    tables = {
        **trace.tables,
        "requests": pa.Table.from_pylist(rows, schema=SCHEMAS["requests"]),
        "anchors": pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"]),
    }
    blocks = Blocks.from_trace(Trace(tables, "wall", trace.config))
    row = acceptance_table({"a": prompt_counts(blocks, walk(blocks))}).iloc[0]
    expected = 1 + sum(chance**k for k in range(1, gamma + 1))
    assert row["accept_len_low"] <= expected <= row["accept_len_high"]
    assert row["high"] < expected


def test_thresholds_run_from_whole_blocks_to_none() -> None:
    blocks = Blocks.from_trace(in_domains(toy_trace(9, 40, seed=4)))
    table = threshold_table(blocks, (0.0, 0.7, 0.9, 1.0), FEW).query("domain == 'macro'")
    counts = prompt_counts(blocks, walk(blocks))
    full = acceptance_table({"a": counts}, FEW).query("domain == 'macro'").iloc[0]
    assert table.iloc[0]["mean_acceptance_length"] == full["mean_acceptance_length"]
    assert table["mean_verify_len"].is_monotonic_decreasing and table.iloc[-1]["mean_acceptance_length"] == 1.0
    assert threshold_table(Blocks.from_trace(toy_trace(confidence=False)), (0.5,)).empty
    with pytest.raises(UserError, match="gives none; choose another drafter"):
        Blocks.from_trace(toy_trace(confidence=False)).threshold_lens(0.5)


def many(chance: float, seed: int, num_prompts: int = 120) -> pd.DataFrame:
    blocks = Blocks.from_trace(in_domains(toy_trace(num_prompts, 40, 5, chance, seed=seed, copies=1)))
    return prompt_counts(blocks, walk(blocks))


def test_macro_is_the_mean_of_the_domains() -> None:
    table = acceptance_table({"dspark": many(0.8, 0), "other": many(0.5, 1)}, FEW)
    for _, rows in table.groupby("drafter"):
        cells = rows.set_index("domain")
        assert list(cells.index) == ["math", "code", "chat", "macro"]
        for name in ("mean_acceptance_length", "accept_len", "verify_rate"):
            assert cells.loc["macro", name] == pytest.approx(cells[name].iloc[:3].mean())


def test_a_gain_over_itself_is_zero_and_a_planted_gain_is_covered() -> None:
    """Every round of one drafter accepts 3, of the other 1 or 2 with equal odds: the gain is 4 / 2.5 - 1."""
    rng = np.random.default_rng(0)
    names = [("math", "code", "chat")[number % 3] for number in range(60)]

    def counts(draw: Any) -> pd.DataFrame:
        rows = []
        for number, domain in enumerate(names):
            accepted = draw(30)
            rows.append(
                {
                    **{"domain": domain, "prompt_id": f"p{number:02d}", "rounds": 30, "num_verified": 210},
                    **{"num_accepted": accepted.sum(), "num_tokens": accepted.sum() + 30, "whole_rounds": 30},
                    **{"whole_proposed": 210, "whole_emitted": accepted.sum() + 30},
                }
            )
        return pd.DataFrame(rows).set_index(["domain", "prompt_id"]).sort_index()

    found = {"dspark": counts(lambda n: np.full(n, 3)), "other": counts(lambda n: rng.integers(1, 3, n))}
    table = acceptance_table(found).set_index(["drafter", "domain"])
    for name in ("dspark_gain", "dspark_gain_low", "dspark_gain_high"):
        assert (table.loc["dspark", name] == 0.0).all()
    row = table.loc[("other", "macro")]
    assert row["dspark_gain_low"] < 0.6 < row["dspark_gain_high"]
    assert row["dspark_gain_high"] - row["dspark_gain_low"] < 0.1
    lone = acceptance_table({"other": found["other"]})
    assert lone[["dspark_gain", "dspark_gain_low", "dspark_gain_high"]].isna().all(axis=None)


def test_pairing_removes_what_prompts_have_in_common() -> None:
    """Prompts differ a lot, drafters on one prompt by a fixed factor: the gain's interval is far narrower."""
    ease = np.random.default_rng(1).uniform(1.2, 6.0, 30)
    names = pd.MultiIndex.from_arrays([["math"] * 30, [f"p{k:02d}" for k in range(30)]], names=["domain", "prompt_id"])
    ones = np.ones(30)
    first, second = (domain_ratios(ease * factor, ones, names, Bootstrap())["macro"] for factor in (1.2, 1.0))
    gain = first.gain_over(second)
    assert np.allclose(gain.draws, 0.2) and np.std(first.draws) > 0.1


def test_one_prompt_has_an_estimate_and_no_interval() -> None:
    table = acceptance_table({"dspark": many(0.8, 0, num_prompts=1)}).iloc[0]
    assert table["mean_acceptance_length"] > 1 and np.isnan(table["low"]) and np.isnan(table["dspark_gain_low"])


def test_domains_are_resampled_each_by_itself() -> None:
    """The macro's variance is that of a mean of independent domains, although all have equally many prompts."""
    ease = np.tile(np.random.default_rng(2).uniform(1, 3, 40), 3)
    domains = np.repeat(["math", "code", "chat"], 40)
    names = pd.MultiIndex.from_arrays([domains, [f"p{k:03d}" for k in range(120)]], names=["domain", "prompt_id"])
    ratios = domain_ratios(ease, np.ones(120), names, Bootstrap(num_resamples=4000))
    assert np.std(ratios["macro"].draws) == pytest.approx(np.std(ratios["math"].draws) / 3**0.5, rel=0.08)


def test_errors_are_sentences() -> None:
    with pytest.raises(UserError, match="not evaluated with every drafter"):
        acceptance_table({"a": many(0.8, 0, 6), "b": many(0.8, 0, 9)}, FEW)
    with pytest.raises(UserError, match="domain macro"):
        position_table(Blocks.from_trace(in_domains(toy_trace(), ("macro",))), bootstrap=FEW)
    bare = toy_trace()
    with pytest.raises(UserError, match="make the dense pass anew"):
        Blocks.from_trace(Trace({**bare.tables, "anchors": SCHEMAS["anchors"].empty_table()}, "wall", bare.config))
    empty = {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    with pytest.raises(UserError, match="no finished request"):
        Blocks.from_trace(Trace(empty, "wall"))


def test_the_papers_margins() -> None:
    assert printed_gains() == {"dflash": (0.163, 0.184), "eagle3": (0.267, 0.309)}
    frame = table1().set_index(["target", "drafter"])
    ratios = frame.xs("dspark", level=1)["macro"] / frame["macro"] - 1
    assert np.allclose((ratios - frame["dspark_gain"]).dropna(), 0, atol=1e-3)
    assert "qwen3-4b" in paper_table() and "+30.9%" in paper_table()


def test_the_printed_table_has_a_line_a_drafter_and_a_column_a_domain() -> None:
    table = acceptance_table({"dspark": many(0.8, 0, 12), "dflash": many(0.6, 1, 12)}, FEW).assign(temperature=0.0)
    speed = speed_medians(
        [
            {
                **{"drafter": "dspark", "temperature": 0.0, "draft_cost": 0.2, "speedup": value},
                "live_mean_acceptance_length": 3.0,
            }
            for value in (1.0, 2.0, 9.0)
        ]
    )
    assert speed.loc[0, "speedup"] == 2.0 and speed.loc[0, "speedup_high"] == 9.0
    lines = printed_table(table, speed).splitlines()
    assert all(
        heading in lines[0] for heading in ("math", "code", "chat", "macro", "DSpark gain", "paper's", "speed-up")
    )
    assert len(lines) == 4 and "+16% to +18%" in lines[3] and lines[3].rstrip().endswith("-")
    assert printed_table(table, speed_medians([])).count("\n") == 3


def test_speed_is_decode_tokens_over_decode_seconds() -> None:
    def run(step: float, draft: float) -> Trace:
        spans = {"draft_seconds": draft, "head_seconds": draft, "verify_seconds": 0.5 * step, "step_seconds": step}
        steps = [
            {"step": k, "start": 0.0, "num_prefill_tokens": 9 * (k == 0), "draft_len": 3 * (draft > 0 < k), **spans}
            for k in range(5)
        ]
        tables = dict(toy_trace(1, 9).tables)
        tables["steps"] = pa.Table.from_pylist(steps, schema=SCHEMAS["steps"])
        return Trace(tables, "wall")

    row = evaluation.speed_row(run(2.0, 0.0), run(1.0, 0.1))
    assert row["plain_tokens_per_second"] == 8 / 8 and row["speedup"] == 2.0
    assert row["draft_cost"] == pytest.approx(0.2 / 1.0)


def test_the_figure_draws_a_panel_a_temperature() -> None:
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    from dspark_sim.analysis.acceptance_plots import conditional_acceptance

    blocks = Blocks.from_trace(in_domains(toy_trace(9, 30)))
    frame = position_table(blocks, bootstrap=FEW).query("domain == 'macro'")
    both = pd.concat([frame.assign(temperature=level, drafter=name) for level in (0.0, 1.0) for name in ("a", "b")])
    figure = conditional_acceptance(both, "note")
    assert [axis.get_title() for axis in figure.axes] == ["temperature 0", "temperature 1"]
    assert figure.axes[0].get_ylabel() and all(axis.get_xlabel() for axis in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("draft_len", [1, 2, 3])
def test_the_toys_live_length_is_the_walked_one(draft_len: int) -> None:
    """The real engine on the toy, plain outputs with anchors against a live run: exact at temperature 0."""
    pytest.importorskip("torch")
    from dspark_sim.engine.sampling import SamplingParams
    from dspark_sim.exactness.toy import Toy
    from dspark_sim.exactness.toy_replay import anchored, record

    toy, params = Toy.make(), SamplingParams()
    plain = anchored(toy, record(toy, Fixed(0), "greedy", params, 3, 30), "greedy", params)
    live = record(toy, Fixed(draft_len), "greedy", params, 3, 30)
    blocks = Blocks.from_trace(plain)
    rounds = walk(blocks, np.full(blocks.place.size, draft_len))
    assert (rounds["num_accepted"] + 1).mean() == summary(live)["mean_acceptance_length"]
    assert rounds.groupby("request").size().tolist() == per_request(live)["rounds"].tolist()


def test_walks_of_sampled_outputs_have_the_live_law() -> None:
    """Rejection sampling: rounds per request of walked anchors and of other live runs have one mean."""
    pytest.importorskip("torch")
    from dspark_sim.engine.sampling import SamplingParams
    from dspark_sim.exactness.toy import Toy
    from dspark_sim.exactness.toy_replay import anchored, record

    toy = Toy.make()
    ours, other = SamplingParams(1.0, seed=1), SamplingParams(1.0, seed=2)
    dense = anchored(toy, record(toy, Fixed(0), "rejection", ours, 300, 16), "rejection", ours)
    walked = walk(Blocks.from_trace(dense)).groupby("request").size().to_numpy(dtype=float)
    live = per_request(record(toy, Fixed(3), "rejection", other, 300, 16))["rounds"].to_numpy(dtype=float)
    error = np.sqrt(walked.var(ddof=1) / walked.size + live.var(ddof=1) / live.size)
    assert abs(walked.mean() - live.mean()) < 4 * error


@pytest.mark.model
def test_the_command_on_the_embedded_model(engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, rows, and the same acceptance length as a live run of Fixed(7)."""
    pytest.importorskip("matplotlib")
    from dspark_sim.evaluate import EvaluationScale, run_evaluation
    from dspark_sim.workload import bundled_prompts

    prompts = bundled_prompts(per_domain=2)
    rows_file = tmp_path / "rows.json"
    frame = run_evaluation(
        prompts,
        tmp_path / "out",
        drafters=("dspark", "ngram"),
        scale=EvaluationScale(1, 14, 1, 1, 8),
        json_path=rows_file,
        engine=engine,
    )
    rows = json.loads(rows_file.read_text())["rows"]
    assert len(rows) == 2 * 2 * 4 and all(tuple(row) == ROW for row in rows)
    assert {row["domain"] for row in rows} == {"math", "code", "chat", "macro"}
    assert all(row["low"] is None for row in rows)  # one prompt a domain
    live = engine.record(prompts[:3], Fixed(7), ClosedLoop(2), max_tokens=14, progress=False)
    sums = pd.read_parquet(tmp_path / "out" / "prompts.parquet").query("drafter == 'dspark' and temperature == 0")
    assert sums["num_tokens"].sum() / sums["rounds"].sum() == summary(live)["mean_acceptance_length"]
    speed = pd.read_parquet(tmp_path / "out" / "speed.parquet")
    assert (speed["live_mean_acceptance_length"] == speed["walked_mean_acceptance_length"]).all()
    thresholds = pd.read_parquet(tmp_path / "out" / "thresholds.parquet")
    assert set(thresholds["drafter"]) == {"dspark"} and set(thresholds["temperature"]) == {0.0, 1.0}
    positions = pd.read_parquet(tmp_path / "out" / "positions.parquet")
    assert set(positions["source"]) == {"anchors", "rounds"}
    stored = pd.read_parquet(tmp_path / "out" / "acceptance.parquet")
    assert tuple(stored.columns[: len(ROW)]) == ROW and len(stored) == len(frame)
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document["config"]["drafters"] == {"dspark": 7, "ngram": 7} and "packages" in document["provenance"]
    assert (tmp_path / "out" / "conditional_acceptance.png").stat().st_size > 10_000
    assert "paper's" in capsys.readouterr().out

    for bad, message in (
        ({"drafters": ("nonesuch",)}, "no drafter 'nonesuch'"),
        ({"drafters": ("none",)}, "proposes nothing"),
        ({"drafters": ("ngram", "ngram")}, "two drafters are named ngram"),
        ({"drafters": ()}, "zero drafters"),
        ({"temperatures": (-1.0,)}, "temperature is -1"),
        ({"temperatures": ()}, "zero temperatures"),
        ({"scale": EvaluationScale(max_tokens=1)}, "max_tokens is 1"),
        ({"scale": EvaluationScale(per_domain=0)}, "zero prompts"),
    ):
        with pytest.raises(UserError, match=message):
            run_evaluation(prompts, tmp_path / "bad", engine=engine, **bad)


def test_an_unreadable_prompt_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dspark_sim.cli import main

    path = tmp_path / "prompts.jsonl"
    path.write_text("not json\n")
    for arguments, message in (
        (["--prompts", str(path)], "is not a prompt"),
        (["--prompts", "absent"], "no prompt file"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *arguments, "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1
