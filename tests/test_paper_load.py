"""Our engine under load for Figures 7 and 8: simulated from recordings and costs, and read against the paper's."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toy import toy_cost, toy_trace

from dspark_sim import Fixed, simulate
from dspark_sim.analysis.metrics import summary
from dspark_sim.paper_load import DRAFTERS, by_interpolation, published_load, simulated
from dspark_sim.reference import load

ROOT = Path(__file__).parent.parent
USERS = (1, 4)


@pytest.fixture(scope="module")
def inputs():
    traces = {"dspark": toy_trace(6, 24, 7, 0.8, 1), "mtp1": toy_trace(6, 24, 1, 0.8, 2)}
    return traces, dict.fromkeys(traces, toy_cost())


def test_every_point_is_the_simulators(tmp_path, inputs):
    traces, costs = inputs
    frame = simulated(traces, costs, USERS, 3, tmp_path)
    assert frame[["served", "concurrency_requests"]].to_numpy().tolist() == [[n, u] for n in DRAFTERS for u in USERS]
    rows = frame.set_index(["served", "concurrency_requests"])
    run = summary(simulate(traces["mtp1"], policy=Fixed(1), cost=costs["mtp1"], concurrency=4, num_requests=12))
    for name in ("output_throughput", "user_tokens_per_second", "mean_acceptance_length", "verification_budget"):
        assert rows.loc[("mtp1", 4), name] == pytest.approx(run[name])
        assert (frame[f"{name}_low"] <= frame[name] + 1e-9).all() and (
            frame[name] <= frame[f"{name}_high"] + 1e-9
        ).all()
    assert rows.loc[("mtp1", 1), "mtp1_speed_share"] == 1.0
    assert rows.loc[("fixed", 4), "mtp1_speed_share"] == rows.loc[("mtp1", 4), "mtp1_speed_share"] < 1.0
    # Algorithm 1 verifies no more than the whole block, and less under load.
    budget = rows["verification_budget"]
    assert budget["dspark", 4] < budget["dspark", 1] <= budget["fixed", 1]


def test_points_are_kept_as_long_as_their_inputs_stay(tmp_path, inputs):
    traces, costs = inputs
    first = simulated(traces, costs, USERS, 3, tmp_path)
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    pd.testing.assert_frame_equal(simulated(traces, costs, USERS, 3, tmp_path), first, check_exact=True)
    assert kept.stat().st_mtime_ns == written or kept.read_text().count("\n") == len(first)
    simulated({**traces, "mtp1": toy_trace(6, 24, 1, 0.5, 3)}, costs, USERS, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("target", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_the_papers_columns_are_figure_8s(target):
    frame = published_load(target)
    for served, drafter in (("mtp1", "mtp-1"), ("dspark", "dspark-5")):
        mine = frame[frame["served"] == served].set_index("concurrency_requests")
        line = load("fig8_throughput")
        line = line[(line["target_model"] == target) & (line["drafter"] == drafter)].set_index("concurrency_requests")
        assert mine.loc[50.0, "output_throughput"] == line.loc[50.0, "throughput_tok_s_gpu"]
        assert mine.loc[50.0, "user_tokens_per_second"] == pytest.approx(line.loc[50.0, "throughput_tok_s_gpu"] / 50)
        assert mine.index.min() == 1.0 and mine.index.max() <= 212
    mtp = frame[frame["served"] == "mtp1"].set_index("concurrency_requests")
    assert mtp.loc[1.0, "mtp1_speed_share"] == 1.0 and mtp["mtp1_speed_share"].is_monotonic_decreasing
    assert mtp["verification_budget"].dropna().to_numpy() == pytest.approx(2.0, abs=1e-3)


def test_a_curve_is_not_read_beyond_its_ends():
    line = pd.DataFrame({"x": [3.0, 1.0], "y": [30.0, 10.0]})
    assert by_interpolation(2.0, line, "x", "y") == 20.0
    assert np.isnan(by_interpolation(3.1, line, "x", "y"))


@pytest.mark.parametrize(
    ("share", "said"), [(0.34, "(a card) is full at 4 users"), (0.57, "(a card) is not full at 4")]
)
def test_the_sentences_name_the_machine_and_whether_it_is_full(tmp_path, inputs, share, said):
    frame = simulated(*inputs, USERS, 3, tmp_path)
    frame.loc[frame["concurrency_requests"] == 4, "mtp1_speed_share"] = share
    names = runpy.run_path(str(ROOT / "experiments/paper/fig8_load.py"))
    sentence = names["differs"](frame, {target: published_load(target) for target in names["TARGETS"]}, "a card")
    assert said in sentence and f"MTP-1 keeps {100 * share:.0f} %" in sentence and "CPU" not in sentence


@pytest.mark.slow
@pytest.mark.model
def test_both_figures_run_and_a_second_run_gives_the_same_tables(tmp_path):
    tables = []
    for script in ("fig8_load", "fig7_frontier", "fig8_load"):
        done = subprocess.run(
            [sys.executable, f"experiments/paper/{script}.py", "--scale", "smoke", "--out", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        tables.append((tmp_path / f"{script}.csv").read_bytes())
    assert tables[0] == tables[2] == tables[1]
