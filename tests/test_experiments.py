import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.model
def test_block_size(tmp_path: Path) -> None:
    first = run("block_size.py", "--scale", "smoke", "--out", str(tmp_path / "run"))
    assert first.returncode == 0, first.stderr
    frame = pd.read_csv(tmp_path / "run" / "block_size.csv")
    assert (tmp_path / "run" / "block_size.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "block_size.pdf").stat().st_size > 5_000
    # Every block size at every concurrency, in grid order.
    sizes = frame["block_size"].unique()
    assert frame[["concurrency", "block_size"]].to_numpy().tolist() == [[users, k] for users in (1, 4) for k in sizes]
    # Acceptance: none without drafts, never falling with γ for one anchor, never above 1 + γ, whatever the load.
    assert (frame.loc[frame["block_size"] == 0, "mean_acceptance_length"] == 1).all()
    assert frame["mean_acceptance_length"].between(1, 1 + frame["block_size"]).all()
    by_load = frame.pivot(index="block_size", columns="concurrency", values="mean_acceptance_length")
    assert by_load[1].tolist() == pytest.approx(by_load[4].tolist())
    for metric in ("output_throughput", "user_tokens_per_second", "mean_acceptance_length"):
        assert (frame[f"{metric}_low"] <= frame[metric] * (1 + 1e-12)).all()
        assert (frame[metric] <= frame[f"{metric}_high"] * (1 + 1e-12)).all()
        assert (frame[metric] > 0).all()

    # From the same recording and cost table: the same rows, without a live run.
    inputs = ["--trace", str(tmp_path / "run" / "trace"), "--cost", str(tmp_path / "run" / "cost.json")]
    again = run("block_size.py", "--scale", "smoke", *inputs, "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "again" / "block_size.csv"))


def test_load(tmp_path: Path) -> None:
    done = run("load.py", "--scale", "smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "load.csv").set_index(["policy", "concurrency"])
    assert (tmp_path / "load.png").stat().st_size > 10_000
    relative, length = frame["relative_throughput"], frame["mean_acceptance_length"]
    assert (relative["none"] == 1).all()
    assert relative["fixed-7", 1] > 2 and relative["fixed-7", 256] < 0.9 < relative["prefix", 256]
    assert length["prefix", 256] < 0.9 * length["prefix", 1]
    assert (frame["relative_throughput_low"] <= relative).all()


def test_block_size_refuses_a_missing_recording_in_one_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    result = run("block_size.py", "--trace", missing, "--cost", missing)
    assert result.returncode != 0
    assert result.stderr.startswith("block_size: no trace at") and result.stderr.count("\n") == 1


@pytest.mark.model
def test_tree_width(tmp_path: Path) -> None:
    done = run("tree_width.py", "--scale", "smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "tree_width.csv")
    assert (tmp_path / "tree_width.png").stat().st_size > 10_000
    fixed = frame[frame["budget"] > 0].set_index(["kind", "budget", "concurrency"])["mean_acceptance_length"]
    # With as many nodes, a best-first tree loses at most what its estimates mislead it by; more nodes never hurt.
    for kind in ("factorised", "markov", "sequoia"):
        assert fixed[kind, 2, 1] <= fixed[kind, 7, 1] <= fixed[kind, 12, 1] and fixed[kind, 7, 1] == fixed[kind, 7, 4]
    for _, chains in frame[(frame["kind"] == "chain") & (frame["budget"] > 0)].groupby("concurrency"):
        fastest = chains["output_throughput"] == chains["output_throughput"].max()
        assert ((chains["over_best"] == 0) == fastest).all()
    assert (frame.loc[frame["kind"] == "chain", "gain"].iloc[0] == 0) and frame["draft_share"].between(0, 1).all()
    live = pd.read_csv(tmp_path / "tree_live.csv")
    assert (live["simulated step"] > live["simulated draft"]).all() and (live["live step (ms)"] > 0).all()
    assert (live["rounds equal"].astype(str).isin(["True", "yes"])).all() and len(live) == 8
    # From the recordings and costs of the first run: the same table.
    again = run("tree_width.py", "--scale", "smoke", "--out", str(tmp_path))
    assert again.returncode == 0, again.stderr
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "tree_width.csv"))
