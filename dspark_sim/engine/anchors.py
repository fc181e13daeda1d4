"""Dense anchors: a block drafted at every position of recorded outputs, off the clock.

Greedy decoding is lossless, so the output does not depend on where blocks start; with a block at every position, any
policy and any smaller block size replays exactly. Teacher-forced and batched: one target pass per recorded
sequence, all its blocks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tqdm import tqdm

from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.dense import dense_hidden, dense_target
from dspark_sim.engine.drafters.heads import greedy, run_head
from dspark_sim.engine.drafters.ngram import NgramDrafter
from dspark_sim.engine.models import Target
from dspark_sim.errors import UserError
from dspark_sim.trace import SCHEMAS, list_column

_ANCHORS_PER_PASS = 64


@dataclass(slots=True)
class DenseBlocks:
    """Blocks at the anchors of one output: tokens [M, γ], lens [M], confidence [M, γ] or ``None``, rank or ``None``."""

    tokens: npt.NDArray[np.int64]
    lens: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32] | None = None
    target_rank: npt.NDArray[np.int64] | None = None


def greedy_anchors(
    target: Target,
    drafter: Drafter,
    recorded: Sequence[tuple[int, list[int], list[int]]],
    *,
    progress: bool = False,
) -> pa.Table:
    """Table `anchors` of greedy outputs.

    Parameters
    ----------
    target, drafter
        As they recorded the outputs.
    recorded
        (request_id, prompt tokens, output tokens) of every request.
    progress
        Show a bar.

    Returns
    -------
    table
        A row per output position but the last; `num_accepted` counts matching drafts of a whole block, cut at the
        output's end.
    """
    gamma = drafter.block_size
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("request_id", "position", "num_accepted")}
    parts: list[tuple[DenseBlocks, npt.NDArray[np.bool_]]] = []
    for request_id, prompt, output in tqdm(recorded, unit="request", desc="anchors", disable=not progress, leave=False):
        num_anchors = len(output) - 1
        if num_anchors < 1:
            continue
        tokens = np.array(prompt + output)
        anchors = len(prompt) + np.arange(num_anchors)
        blocks = _blocks(target, drafter, tokens, anchors)
        truth = np.concatenate((tokens, np.full(gamma, -1)))[anchors[:, None] + 1 + np.arange(gamma)]
        matches = (blocks.tokens == truth) & (np.arange(gamma) < blocks.lens[:, None])
        columns["request_id"].append(np.full(num_anchors, request_id))
        columns["position"].append(anchors)
        columns["num_accepted"].append(np.cumprod(matches, axis=1).sum(axis=1))
        parts.append((blocks, matches))
    if not parts:
        return SCHEMAS["anchors"].empty_table()
    return _table(columns, parts, gamma)


def _table(
    columns: dict[str, list[np.ndarray]], parts: list[tuple[DenseBlocks, npt.NDArray[np.bool_]]], gamma: int
) -> pa.Table:
    lens = np.concatenate([blocks.lens for blocks, _ in parts])
    kept = np.arange(gamma) < lens[:, None]
    tokens = np.concatenate([blocks.tokens for blocks, _ in parts])[kept]
    matches = np.concatenate([matched for _, matched in parts])[kept]
    confidence = [blocks.confidence for blocks, _ in parts if blocks.confidence is not None]
    ranks = [blocks.target_rank for blocks, _ in parts if blocks.target_rank is not None]
    schema = SCHEMAS["anchors"]
    nothing = pa.nulls(len(lens), schema.field("node_rank").type)
    data = {
        **{name: pa.array(np.concatenate(arrays)) for name, arrays in columns.items()},
        "draft_tokens": list_column(tokens, lens, pa.int32()),
        "confidence": list_column(np.concatenate(confidence)[kept], lens, pa.float32())
        if confidence
        else pa.nulls(len(lens), schema.field("confidence").type),
        # At temperature 0 a draft is accepted with probability 0 or 1.
        "accept_prob": list_column(matches.astype(np.float32), lens, pa.float32()),
        "target_rank": list_column(np.concatenate(ranks)[kept], lens, pa.int32()) if ranks else nothing,
        "node_rank": nothing,
    }
    return pa.table([data[name] for name in schema.names], schema=schema)


def _blocks(
    target: Target, drafter: Drafter, tokens: npt.NDArray[np.int64], anchors: npt.NDArray[np.int64]
) -> DenseBlocks:
    if isinstance(drafter, NgramDrafter):
        return _ngram_blocks(drafter, tokens, anchors)
    if isinstance(drafter, RaggedBlockDrafter):
        return _network_blocks(target, drafter, tokens, anchors)
    raise UserError(f"drafter {drafter.name} has no dense pass; record it live instead")


def _ngram_blocks(drafter: NgramDrafter, tokens: npt.NDArray[np.int64], anchors: npt.NDArray[np.int64]) -> DenseBlocks:
    proposals = np.zeros((len(anchors), drafter.block_size), dtype=np.int64)
    lens = np.zeros(len(anchors), dtype=np.int64)
    for row, anchor in enumerate(anchors.tolist()):
        found = drafter.propose(tokens[: anchor + 1], drafter.block_size)
        proposals[row, : len(found)] = found
        lens[row] = len(found)
    return DenseBlocks(proposals, lens)


@torch.inference_mode()
def _network_blocks(
    target: Target, drafter: RaggedBlockDrafter, tokens: npt.NDArray[np.int64], anchors: npt.NDArray[np.int64]
) -> DenseBlocks:
    network = drafter.network
    sequence = torch.from_numpy(tokens).to(target.device)[None]
    _, features = dense_target(target, sequence, drafter.feature_layers)
    drafted, confidences, ranks = [], [], []
    for low in range(0, len(anchors), _ANCHORS_PER_PASS):
        places = torch.from_numpy(anchors[low : low + _ANCHORS_PER_PASS]).to(target.device)
        hidden = dense_hidden(network, sequence, features, places[None])[0]
        out = run_head(network, hidden, sequence[0, places], greedy)
        drafted.append(out.tokens.cpu().numpy())
        if out.confidence is not None:
            confidences.append(out.confidence.cpu().numpy())
        ranks.append(_target_rank(drafter, hidden, sequence[0], places))
    return DenseBlocks(
        np.concatenate(drafted),
        np.full(len(anchors), drafter.block_size, dtype=np.int64),
        np.concatenate(confidences) if confidences else None,
        np.concatenate(ranks),
    )


def _target_rank(
    drafter: RaggedBlockDrafter, hidden: torch.Tensor, sequence: torch.Tensor, places: torch.Tensor
) -> npt.NDArray[np.int64]:
    """Rank of the output's token among the candidates at each depth, along the output's own path, [M, γ].

    Tokens outside the draft vocabulary, and depths past the output's end, rank behind every candidate.
    """
    network = drafter.network
    worst = network.config.head_size
    padded = torch.nn.functional.pad(sequence, (0, drafter.block_size), value=-1)
    path = places[:, None] + torch.arange(drafter.block_size, device=places.device)
    embedding = network.previous_embedding(padded[path].clamp(min=0))
    logits = network.markov_logits(network.base_logits(hidden), embedding)
    truth = padded[path + 1]
    index = network.target_to_draft[truth.clamp(min=0)].masked_fill(truth < 0, worst)
    score = logits.gather(-1, index.clamp(max=worst - 1)[..., None])
    rank = (logits > score).sum(dim=-1).masked_fill(index == worst, worst)
    ranks: npt.NDArray[np.int64] = rank.cpu().numpy()
    return ranks
