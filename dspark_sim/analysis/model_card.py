"""A model card beside a drafter's weights: what it is, how it was trained, and what an evaluation found.

Everything but the sentence about the data comes from files: the drafter's ``config.json``, the shapes of its tensors,
its ``learning_curve.csv``, and the ``summary.json`` of `dspark-sim evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from dspark_sim.analysis.learning import read_learning_curves
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file

_RECIPE = {
    "updates_done": "updates",
    "num_updates": "updates of the schedule",
    "restarted_at": "optimiser's state lost after update",
    "sequences_per_update": "sequences per update",
    "anchors_per_sequence": "anchors per sequence",
    "max_len": "longest sequence (tokens)",
    "muon_lr": "peak rate of Muon (matrices)",
    "adam_lr": "peak rate of AdamW (the rest)",
    "warmup": "fraction of warm-up, then cosine",
    "dtype": "type of products",
    "seed": "seed",
    "seconds": "seconds",
}
_SHAPE = {
    "kind": "kind",
    "block_size": "block size γ",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "width of the MLP",
    "target_layer_ids": "target layers read",
    "markov_rank": "rank of the sequential head",
    "markov_head_type": "sequential head",
    "draft_vocab_size": "draft vocabulary (tokens)",
}
_TEXT = {
    "BlockDrafter": "drafts a block in parallel from hidden states of the target",
    "ChainDrafter": "drafts token after token with one layer of its own",
}
_CURVE_ROWS = 8


def write_model_card(
    folder: Path | str, data: str, evaluation: Path | str | None = None, licence: str = "apache-2.0"
) -> Path:
    """Write ``README.md`` into a drafter's folder.

    Parameters
    ----------
    folder
        Of the drafter.
    data
        A sentence on what it was trained on.
    evaluation
        ``summary.json`` of an evaluation with this drafter.
    licence
        Identifier.

    Raises
    ------
    UserError
        If a file is missing or not what it should be, or the evaluation does not have the drafter.
    """
    folder = Path(folder)
    config = _json(folder / "config.json", "a drafter trained by `dspark-sim train`")
    training = config.get("training") or {}
    if "architecture" not in config or not training:
        raise UserError(f"{folder} is not a drafter trained by `dspark-sim train`; give the folder of one")
    name = folder.resolve().name
    parts = [
        f"---\nlicense: {licence}\nbase_model: {config['target']}\ntags: [speculative-decoding, dspark-sim]\n---\n",
        f"# {name}, a drafter for {config['target']}\n",
        f"It {_TEXT[config['architecture']]}. {_size(folder)} Embedding and head are the target's. "
        f"`dspark-sim` takes it as `--drafter`, with this folder or, where it is bundled, the name {name}.\n",
        _pairs("Shape", _shown(config), _SHAPE),
        f"## Data\n\n{data}\n",
        _pairs("Training", training, _RECIPE),
        _curve(folder),
    ]
    if evaluation is not None:
        parts.append(_evaluation(name, _json(Path(evaluation), "the summary of `dspark-sim evaluate`")))
    with whole_file(folder / "README.md") as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")
    return folder / "README.md"


def num_parameters(folder: Path | str) -> int:
    """Trained numbers of a drafter: entries of its tensors but the scales of stored integers and the list of ids.

    Raises
    ------
    UserError
        If the weights are missing or damaged.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no weights at {path}; give a drafter's folder")
    try:
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if not name.endswith(".scale") and name != "draft_token_ids"]  # noqa: SIM118
            return int(sum(np.prod(file.get_slice(name).get_shape()) for name in names))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train or download it again") from error


def _shown(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The shape without what the drafter does not have."""
    headless = not config.get("markov_rank")
    return {name: value for name, value in config.items() if not (headless and name.startswith("markov"))}


def _size(folder: Path) -> str:
    millions = num_parameters(folder) / 1e6
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    return f"{millions:.2f} million parameters, {megabytes:.1f} MB as stored."


def _pairs(title: str, values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    rows = [f"| {label} | {_cell(values[name])} |" for name, label in names.items() if values.get(name) is not None]
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *rows, ""])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _curve(folder: Path) -> str:
    frame = read_learning_curves([folder])
    # Evenly spread rows, the last among them.
    chosen = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(_CURVE_ROWS, len(frame))).round().astype(int))]
    rows = [f"| {row.update:,} | {row.loss:.3f} | {row.mean_acceptance_length:.2f} |" for row in chosen.itertuples()]
    places = frame.filter(regex=r"^acceptance_\d+$").iloc[-1].dropna()
    positions = " ".join(f"{value:.2f}" for value in places)
    head = "Mean acceptance length at temperature 0 on held-out text (all rows: learning_curve.csv).\n"
    table = ["| updates | training loss | acceptance length |", "| ---: | ---: | ---: |", *rows]
    last = f"\nConditional acceptance by position at the end: {positions}.\n"
    return "\n".join(["## Learning curve\n", head, *table, last])


def _evaluation(name: str, summary: Mapping[str, Any]) -> str:
    found = pd.DataFrame(summary.get("acceptance", []))
    own = found[found["drafter"] == name] if "drafter" in found else found
    if own.empty:
        raise UserError(f"the evaluation has no drafter {name}; evaluate it first")
    settings = summary["config"]
    lines = []
    for temperature, rows in own.groupby("temperature", sort=True):
        cells = [f"{row.mean_acceptance_length:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in rows.itertuples()]
        lines.append(f"| {temperature:g} | " + " | ".join(cells) + " |")
    domains = list(dict.fromkeys(own["domain"]))
    note = (
        f"Mean acceptance length, bonus token included, of whole blocks on {settings['num_prompts']} prompts of at "
        f"most {settings['scale']['max_tokens']} output tokens; 95 % bootstrap intervals over prompts.\n"
    )
    table = [f"| temperature | {' | '.join(domains)} |", "| --- |" + " --- |" * len(domains), *lines, ""]
    return "\n".join(["## Evaluation\n", note, *table])


def _json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no {path.name} at {path}; give {what}")
    with explain_os_errors(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); give {what}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is no JSON object; give {what}")
    return document
