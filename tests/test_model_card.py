"""A drafter's card says what its files say."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_sim.analysis.model_card import num_parameters, write_model_card
from dspark_sim.cli import main
from dspark_sim.errors import UserError

CONFIG = {
    **{"target": "tiny", "architecture": "BlockDrafter", "block_size": 3, "num_hidden_layers": 2, "hidden_size": 4},
    **{"target_layer_ids": [1, 2], "markov_rank": 0, "markov_head_type": "vanilla", "draft_vocab_size": 5},
    "training": {"num_updates": 2000, "muon_lr": 0.002, "seed": 0, "seconds": 12.5, "num_layers": 2},
}
SUMMARY = {
    "config": {"num_prompts": 72, "scale": {"max_tokens": 128}},
    "acceptance": [
        {
            "drafter": name,
            "temperature": t,
            "domain": domain,
            "mean_acceptance_length": m + t,
            "low": m - 0.1,
            "high": 3,
        }
        for name, m in (("own", 2.25), ("other", 1.5))
        for t in (0.0, 1.0)
        for domain in ("math", "macro")
    ],
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "own"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {
        "fc.weight": np.ones((4, 8), dtype=np.int8),
        "fc.weight.scale": np.ones(4, dtype=np.float32),
        "norm.weight": np.ones(4, dtype=np.float32),
        "draft_token_ids": np.arange(5, dtype=np.int32),
    }
    save_file(tensors, path / "model.safetensors")
    lines = [f"{update},1.0,{2 - update / 1000},{1 + update / 1000},0.6,0.5" for update in range(100, 2001, 100)]
    head = "update,seconds,loss,mean_acceptance_length,acceptance_1,acceptance_2"
    (path / "learning_curve.csv").write_text("\n".join([head, *lines]) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return path


def test_parameters_are_counted_without_scales_and_ids(folder):
    assert num_parameters(folder) == 36


def test_the_card_has_what_the_files_have(folder):
    main(["model-card", str(folder), "--data", "Ten tokens.", "--evaluation", str(folder.parent / "summary.json")])
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\nbase_model: tiny\n")
    for line in (
        *("# own, a drafter for tiny", "Ten tokens.", "| layers | 2 |", "| target layers read | 1, 2 |"),
        *("| updates of the schedule | 2,000 |", "| seed | 0 |", "| 100 | 1.900 | 1.10 |", "| 2,000 | 0.000 | 3.00 |"),
        *("by position at the end: 0.60 0.50.", "on 72 prompts of at most 128", "| temperature | math | macro |"),
        "| 0 | 2.25 [2.15, 3.00] | 2.25 [2.15, 3.00] |",
        "| 1 | 3.25 [2.15, 3.00] | 3.25 [2.15, 3.00] |",
    ):
        assert line in text, line
    # Rank 0 has no sequential head, and eight rows of the curve are enough.
    assert "sequential head" not in text
    assert text.count(".") and sum(line.count("|") == 4 and line[2].isdigit() for line in text.splitlines()) == 10


@pytest.mark.parametrize("broken", ["config", "weights", "curve", "summary", "name", "damaged"])
def test_what_is_missing_is_named(folder, broken):
    summary = folder.parent / "summary.json"
    if broken == "config":
        (folder / "config.json").write_text("{}")
    elif broken == "weights":
        (folder / "model.safetensors").unlink()
    elif broken == "curve":
        (folder / "learning_curve.csv").unlink()
    elif broken == "summary":
        summary.unlink()
    elif broken == "name":
        summary.write_text(json.dumps({**SUMMARY, "acceptance": []}))
    else:
        (folder / "model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError) as caught:
        write_model_card(folder, "Text.", summary)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    assert not (folder / "README.md").exists()
