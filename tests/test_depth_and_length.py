"""Figures 3 and 4 from the kept measurements, and how the study shares its work. No model is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dspark_sim.reference import load

pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parent.parent / "experiments" / "paper"
NAMES = ("fig3_drafter_depth", "fig4_proposal_length")


def run(*arguments, **changes):
    root = str(FOLDER.parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "MPLBACKEND": "agg", **changes}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_drawn_from_the_kept_measurements_and_twice_the_same(tmp_path, name):
    # Once more for one of them: the tables depend on the measurements alone.
    folders = ("one", "two") if name == NAMES[0] else ("one",)
    for folder in folders:
        done = run(FOLDER / f"{name}.py", "--scale", "smoke", "--out", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    assert len({(tmp_path / folder / f"{name}.csv").read_bytes() for folder in folders}) == 1
    assert (tmp_path / "one" / f"{name}.png").stat().st_size > 20_000
    ours = pd.read_csv(tmp_path / "one" / f"{name}.csv").dropna(subset=["accepted_length_tokens"])
    length, gamma = ours["accepted_length_tokens"], ours["proposal_length_gamma_tokens"]
    assert length.between(1, 1 + gamma).all()
    assert ((ours["low"] <= length) & (length <= ours["high"])).all()
    # A length of ours is tokens over rounds of the measured prompts.
    kept = pd.read_csv(FOLDER / "data" / "depth_and_length.csv")
    keys = ["head", "num_layers", "block_size", "temperature", "domain"]
    sums = kept.groupby(keys)[["whole_emitted", "whole_rounds"]].sum()
    expected = (sums["whole_emitted"] / sums["whole_rounds"]).to_dict()
    for _, row in ours[ours["domain"] != "macro"].iterrows():
        key = (row["drafter"], row["drafter_layers"], row["proposal_length_gamma_tokens"])
        assert row["accepted_length_tokens"] == pytest.approx(expected[*key, row["temperature"], row["domain"]])
    comparison = pd.read_csv(tmp_path / "one" / f"{name}_comparison.csv")
    assert comparison["paper"].notna().sum() >= 15


def test_the_paper_s_gains_are_those_of_its_lengths():
    paper = load("fig4_proposal_length").set_index(["domain", "proposal_length_gamma_tokens", "drafter"])
    length = paper["accepted_length_tokens"].unstack("drafter")
    for head in ("dspark-markov", "dspark-rnn"):
        gain = 100 * (length[head] / length["dflash"] - 1)
        theirs = paper["gain_over_dflash_pct"].unstack("drafter")[head]
        assert gain.to_numpy() == pytest.approx(theirs.to_numpy(), abs=1e-3)


def test_all_drafters_had_the_same_prompts_updates_and_room():
    kept = pd.read_csv(FOLDER / "data" / "depth_and_length.csv")
    assert kept[["num_updates", "seed"]].drop_duplicates().to_numpy().tolist() == [[3500, 0]]
    sets = kept.groupby(["head", "num_layers", "block_size", "temperature"])["prompt_id"].agg(frozenset)
    assert len(sets) == 34 and sets.nunique() == 1 and len(sets.iloc[0]) == 72
    assert (kept["num_tokens"] <= kept["rounds"] * (1 + kept["block_size"])).all()
    assert (kept["whole_rounds"] <= kept["rounds"]).all()


def test_parts_share_the_drafters_without_gap_or_overlap():
    code = (
        "from train_depth_and_length import part_of, variants\n"
        "for n in (1, 2, 6, 17, 20):\n"
        "    parts = [part_of(f'{i}/{n}') for i in range(1, n + 1)]\n"
        "    names = sorted(v.name for part in parts for v in part)\n"
        "    assert names == sorted(v.name for v in variants()) and len(set(names)) == 17\n"
    )
    pytest.importorskip("torch")
    done = run("-c", code, PYTHONPATH=f"{FOLDER}{os.pathsep}{FOLDER.parent.parent}")
    assert done.returncode == 0, done.stderr


def test_a_part_that_is_none_is_refused_in_one_sentence(tmp_path):
    pytest.importorskip("torch")
    done = run(FOLDER / "train_depth_and_length.py", "train", "--part", "7/6", "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith("train_depth_and_length: part is '7/6'") and done.stderr.count("\n") == 1
