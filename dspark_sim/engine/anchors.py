"""Dense anchors: a block drafted at every position of recorded outputs, off the clock.

Decoding is lossless, so the output does not depend on where blocks start; with a block at every position, any policy
and any smaller block size can be replayed. Teacher-forced and batched: one target pass per recorded sequence, all
its blocks together.

* ``greedy``, ``coupled``, ``target_match``: the output is a function of the keys, and so is every block. A draft is
  accepted iff it is the output's token. Replay is exact.
* ``rejection``: given the output's token y and an accepted prefix, the draft was accepted with probability
  min(1, q(y)/p(y)); if not, it follows the normalised (q - p)₊ and later drafts follow the drafter from there. One
  keyed draw per anchor has the joint law of live rounds. Where the live run itself drafted, what it verified is kept.
* ``block`` is refused: what it accepts of a prefix depends on how much was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tqdm import tqdm

from dspark_sim.engine.conditional import Known, conditional_blocks
from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.drafters.dense import dense_hidden, dense_target
from dspark_sim.engine.drafters.heads import run_head
from dspark_sim.engine.drafters.ngram import NgramDrafter
from dspark_sim.engine.models import Target
from dspark_sim.engine.sampling import probabilities
from dspark_sim.errors import UserError
from dspark_sim.trace import SCHEMAS, list_column

_ANCHORS_PER_PASS = 64
IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class DenseBlocks:
    """Blocks at M anchors of one output.

    Parameters
    ----------
    tokens, lens
        [M, γ] and [M].
    num_accepted
        [M], of the whole block.
    accept_prob
        [M, γ], P(accept k | output and drafter before k), on the output's path.
    confidence, draft_prob, target_rank
        [M, γ] each, or ``None``.
    """

    tokens: IntArray
    lens: IntArray
    num_accepted: IntArray
    accept_prob: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float32] | None = None
    draft_prob: npt.NDArray[np.float64] | None = None
    target_rank: IntArray | None = None


@dataclass(slots=True)
class RecordedOutput:
    """One request's tokens, and the rounds that the live run made of it by the position of their anchors."""

    request_id: int
    prompt: list[int]
    output: list[int]
    rounds: dict[int, Known]


def dense_anchors(
    target: Target,
    drafter: Drafter,
    recorded: Sequence[RecordedOutput],
    rule: DraftRule,
    *,
    progress: bool = False,
) -> pa.Table:
    """Table `anchors` of recorded outputs.

    Parameters
    ----------
    target, drafter
        As they recorded the outputs.
    recorded
        Every request.
    rule
        The run's acceptance mode and sampling.
    progress
        Show a bar.

    Returns
    -------
    table
        A row per output position but the last; `num_accepted` counts accepted drafts of a whole block, cut at the
        output's end.

    Raises
    ------
    UserError
        If the mode or the drafter has no dense pass.
    """
    if rule.mode == "block":
        raise UserError(
            "block verification cannot be replayed from anchors: what it accepts depends on how much is verified; "
            "record with mode rejection, which has the same output law"
        )
    columns: dict[str, list[np.ndarray]] = {"request_id": [], "position": []}
    parts: list[DenseBlocks] = []
    for request in tqdm(recorded, unit="request", desc="anchors", disable=not progress, leave=False):
        num_anchors = len(request.output) - 1
        if num_anchors < 1:
            continue
        anchors = len(request.prompt) + np.arange(num_anchors)
        parts.append(_blocks(target, drafter, request, anchors, rule))
        columns["request_id"].append(np.full(num_anchors, request.request_id))
        columns["position"].append(anchors)
    if not parts:
        return SCHEMAS["anchors"].empty_table()
    return _table(columns, parts, drafter.block_size)


def _table(columns: dict[str, list[np.ndarray]], parts: list[DenseBlocks], gamma: int) -> pa.Table:
    lens = np.concatenate([blocks.lens for blocks in parts])
    kept = np.arange(gamma) < lens[:, None]
    schema = SCHEMAS["anchors"]

    def lists(name: str) -> pa.Array:
        arrays = [getattr(blocks, name) for blocks in parts]
        field = schema.field(name).type
        if any(array is None for array in arrays):
            return pa.nulls(len(lens), field)
        return list_column(
            np.concatenate(arrays)[kept].astype(field.value_type.to_pandas_dtype()), lens, field.value_type
        )

    data = {
        **{name: pa.array(np.concatenate(arrays)) for name, arrays in columns.items()},
        "num_accepted": pa.array(np.concatenate([blocks.num_accepted for blocks in parts])),
        "draft_tokens": list_column(
            np.concatenate([blocks.tokens for blocks in parts])[kept].astype(np.int32), lens, pa.int32()
        ),
        **{name: lists(name) for name in ("confidence", "accept_prob", "draft_prob", "target_rank")},
        "node_rank": pa.nulls(len(lens), schema.field("node_rank").type),
    }
    return pa.table([data[name] for name in schema.names], schema=schema)


def _blocks(
    target: Target, drafter: Drafter, request: RecordedOutput, anchors: IntArray, rule: DraftRule
) -> DenseBlocks:
    tokens = np.array(request.prompt + request.output)
    if isinstance(drafter, NgramDrafter):
        return _ngram_blocks(target, drafter, request, tokens, anchors, rule)
    if isinstance(drafter, RaggedBlockDrafter):
        return _network_blocks(target, drafter, request, tokens, anchors, rule)
    raise UserError(f"drafter {drafter.name} has no dense pass; record it live instead")


def _truth(tokens: IntArray, anchors: IntArray, gamma: int) -> IntArray:
    """The output's tokens behind each anchor, [M, γ]; -1 past its end."""
    return np.concatenate((tokens, np.full(gamma, -1)))[anchors[:, None] + 1 + np.arange(gamma)]


def _matching(drafts: IntArray, lens: IntArray, truth: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    matches = (drafts == truth) & (np.arange(drafts.shape[1]) < lens[:, None])
    return np.cumprod(matches, axis=1).sum(axis=1), matches


@torch.inference_mode()
def _ngram_blocks(
    target: Target,
    drafter: NgramDrafter,
    request: RecordedOutput,
    tokens: IntArray,
    anchors: IntArray,
    rule: DraftRule,
) -> DenseBlocks:
    """Prompt lookup along the output: a draft is a point mass, so it is accepted iff it is the output's token.

    Given the output's token y and the draft d, rejection sampling accepts d with probability p(d), and then y = d;
    a rejected d is replaced by another token. So y tells whether d was accepted, in every mode.
    """
    gamma = drafter.block_size
    proposals = np.zeros((len(anchors), gamma), dtype=np.int64)
    lens = np.zeros(len(anchors), dtype=np.int64)
    for row, anchor in enumerate(anchors.tolist()):
        found = drafter.propose(tokens[: anchor + 1], gamma)
        proposals[row, : len(found)] = found
        lens[row] = len(found)
    num_accepted, matches = _matching(proposals, lens, _truth(tokens, anchors, gamma))
    accept_prob = matches.astype(np.float64)
    if rule.mode in ("rejection", "target_match"):
        logits, _ = dense_target(target, torch.from_numpy(tokens).to(target.device)[None], ())
        law = probabilities(logits[0], rule.params)
        rows = np.minimum(anchors[:, None] + np.arange(gamma), len(tokens) - 1)
        index = torch.from_numpy(rows).to(law.device), torch.from_numpy(proposals).to(law.device)
        accept_prob = law[index].double().cpu().numpy()
    return DenseBlocks(proposals, lens, num_accepted, accept_prob, draft_prob=np.ones(proposals.shape))


@torch.inference_mode()
def _network_blocks(
    target: Target,
    drafter: RaggedBlockDrafter,
    request: RecordedOutput,
    tokens: IntArray,
    anchors: IntArray,
    rule: DraftRule,
) -> DenseBlocks:
    network, gamma = drafter.network, drafter.block_size
    sequence = torch.from_numpy(tokens).to(target.device)[None]
    # Only these modes look at the target's probabilities; the output says the rest.
    keep = 0 if rule.mode in ("rejection", "target_match") else 1
    logits, features = dense_target(target, sequence, drafter.feature_layers, logits_to_keep=keep)
    truth = _truth(tokens, anchors, gamma)
    parts: list[DenseBlocks] = []
    for low in range(0, len(anchors), _ANCHORS_PER_PASS):
        chosen = anchors[low : low + _ANCHORS_PER_PASS]
        places = torch.from_numpy(chosen).to(target.device)
        hidden = dense_hidden(network, sequence, features, places[None])[0]
        wanted = truth[low : low + _ANCHORS_PER_PASS]
        lens = np.full(len(chosen), gamma, dtype=np.int64)
        # Row a + k judges slot k; rows past the output's end are never looked at.
        rows = (places[:, None] + torch.arange(gamma, device=places.device)).clamp(max=len(tokens) - 1)
        confidence: Any
        draft_prob: Any
        if rule.mode == "rejection":
            known = [request.rounds.get(anchor, Known()) for anchor in chosen.tolist()]
            ids = np.full(len(chosen), request.request_id)
            out = conditional_blocks(
                drafter, hidden, sequence[0, places], logits[0], rows, wanted, known, rule, ids, chosen
            )
            drafts, accept_prob, num_accepted = out.tokens, out.accept_prob, out.num_accepted
            confidence, draft_prob = out.confidence, out.draft_prob
        else:
            choose = rule.choose(np.full(len(chosen), request.request_id), chosen, network.draft_token_ids)
            head = run_head(network, hidden, sequence[0, places], choose, drafter.confidence, with_prob=True)
            drafts = head.tokens.cpu().numpy()
            num_accepted, matches = _matching(drafts, lens, wanted)
            accept_prob = matches.astype(np.float64)
            if rule.mode == "target_match":
                accept_prob = probabilities(logits[0], rule.params)[rows, head.tokens].double().cpu().numpy()
            confidence = None if head.confidence is None else head.confidence.cpu().numpy()
            draft_prob = None if head.draft_prob is None else head.draft_prob.double().cpu().numpy()
        rank = _target_rank(drafter, hidden, sequence[0], places)
        parts.append(DenseBlocks(drafts, lens, num_accepted, accept_prob, confidence, draft_prob, rank))
    return DenseBlocks(*(_joined([getattr(part, name) for part in parts]) for name in DenseBlocks.__slots__))


def _joined(arrays: list[npt.NDArray | None]) -> Any:
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if known else None


def _target_rank(
    drafter: RaggedBlockDrafter, hidden: torch.Tensor, sequence: torch.Tensor, places: torch.Tensor
) -> IntArray:
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
    ranks: IntArray = rank.cpu().numpy()
    return ranks
