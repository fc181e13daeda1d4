"""Dense anchors: a block drafted at every position of recorded outputs, off the clock.

Decoding is lossless, so the output does not depend on where blocks start; with a block at every position, any policy
and any smaller block size can be replayed. Teacher-forced and batched: one target pass over a group of recorded
sequences of like length, then all blocks of a sequence together.

* ``greedy``, ``coupled``, ``target_match``: the output is a function of the keys, and so is every block. A draft is
  accepted iff it is the output's token. Replay is exact.
* ``rejection``: given the output's token y and an accepted prefix, the draft was accepted with probability
  min(1, q(y)/p(y)); if not, it follows the normalised (q - p)₊ and later drafts follow the drafter from there. One
  keyed draw per anchor has the joint law of live rounds. Where the live run itself drafted, what it verified is kept.
* ``block`` is refused: what it accepts of a prefix depends on how much was verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tqdm import tqdm

from dspark_sim.engine.conditional import Known, OutputPath, conditional_blocks
from dspark_sim.engine.dense_trees import dense_trees, target_rank
from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.candidates import CandidateRule
from dspark_sim.engine.drafters.chain import RaggedChainDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.drafters.dense import dense_target, dense_walks
from dspark_sim.engine.drafters.heads import run_head
from dspark_sim.engine.drafters.ngram import NgramDrafter
from dspark_sim.engine.models import Target
from dspark_sim.engine.recorded import RecordedOutput
from dspark_sim.engine.sampling import probabilities
from dspark_sim.errors import UserError
from dspark_sim.trace import SCHEMAS, list_column
from dspark_sim.tree_shapes import TreeShape

_ANCHORS_PER_PASS = 64
_TOKENS_PER_PASS = 1024
_LOGITS_PER_PASS = 2**24
_OF_TREES = ("node_rank", "node_survival", "first_at_depth")
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
    node_rank, num_nodes, node_survival, first_at_depth
        As in `DenseTrees`, or ``None`` where only chains are drafted.
    """

    tokens: IntArray
    lens: IntArray
    num_accepted: IntArray
    accept_prob: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float32] | None = None
    draft_prob: npt.NDArray[np.float64] | None = None
    target_rank: IntArray | None = None
    node_rank: IntArray | None = None
    num_nodes: IntArray | None = None
    node_survival: npt.NDArray[np.float64] | None = None
    first_at_depth: IntArray | None = None


def dense_anchors(
    target: Target,
    drafter: Drafter,
    recorded: Sequence[RecordedOutput],
    rule: DraftRule,
    tree: TreeShape | None = None,
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
    tree
        Shape of the trees to grow beside the chains, fitted to the drafter; ``None`` or a chain grows none.
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
    if tree is not None and tree.num_candidates == 1:
        tree = None
    if tree is not None and rule.mode == "rejection":
        raise UserError(
            f"tree {tree.label()} cannot be replayed from anchors under rejection: which children are accepted depends "
            "on how many are verified; record with mode coupled or target_match, or make the anchors with tree chain"
        )
    usable = [request for request in recorded if len(request.output) > 1]
    if not usable:
        return SCHEMAS["anchors"].empty_table()
    found: dict[int, DenseBlocks] = {}
    with tqdm(total=len(usable), unit="request", desc="anchors", disable=not progress, leave=False) as bar:
        for group in _groups(usable):
            for request, blocks in zip(group, _group_blocks(target, drafter, group, rule, tree), strict=True):
                found[request.request_id] = blocks
            bar.update(len(group))
    columns = {
        "request_id": [np.full(request.num_anchors, request.request_id) for request in usable],
        "position": [request.anchors for request in usable],
    }
    return _table(columns, [found[request.request_id] for request in usable], drafter.block_size)


def _groups(requests: Sequence[RecordedOutput]) -> Iterator[list[RecordedOutput]]:
    """Requests of like length, so many that their padded tokens fit a pass."""
    group: list[RecordedOutput] = []
    for request in sorted(requests, key=lambda request: request.num_tokens):
        if group and (len(group) + 1) * request.num_tokens > _TOKENS_PER_PASS:
            yield group
            group = []
        group.append(request)
    yield group


def _table(columns: dict[str, list[np.ndarray]], parts: list[DenseBlocks], gamma: int) -> pa.Table:
    lens = np.concatenate([blocks.lens for blocks in parts])
    kept = np.arange(gamma) < lens[:, None]
    schema = SCHEMAS["anchors"]

    def lists(name: str) -> pa.Array:
        arrays = [getattr(blocks, name) for blocks in parts]
        field = schema.field(name).type
        if any(array is None for array in arrays):
            return pa.nulls(len(lens), field)
        values, sizes, chosen = np.concatenate(arrays), lens, kept
        if name == "node_survival":
            sizes = np.concatenate([blocks.num_nodes for blocks in parts])
            chosen = np.arange(values.shape[1]) < sizes[:, None]
        return list_column(values[chosen].astype(field.value_type.to_pandas_dtype()), sizes, field.value_type)

    data = {
        **{name: pa.array(np.concatenate(arrays)) for name, arrays in columns.items()},
        "num_accepted": pa.array(np.concatenate([blocks.num_accepted for blocks in parts])),
        "draft_tokens": list_column(
            np.concatenate([blocks.tokens for blocks in parts])[kept].astype(np.int32), lens, pa.int32()
        ),
        **{name: lists(name) for name in ("confidence", "accept_prob", "draft_prob", "target_rank", *_OF_TREES)},
    }
    return pa.table([data[name] for name in schema.names], schema=schema)


@torch.inference_mode()
def _group_blocks(
    target: Target, drafter: Drafter, group: Sequence[RecordedOutput], rule: DraftRule, tree: TreeShape | None
) -> Iterator[DenseBlocks]:
    # Only these modes look at the target's probabilities; the output says the rest.
    judged = rule.mode in ("rejection", "target_match")
    network = isinstance(drafter, RaggedBlockDrafter | RaggedChainDrafter)
    if not network and not isinstance(drafter, NgramDrafter):
        raise UserError(f"drafter {drafter.name} has no dense pass; record it live instead")
    states = [_States(None, None)] * len(group)
    if judged or network:
        states = _target_pass(target, group, drafter.feature_layers, judged)
    for request, state in zip(group, states, strict=True):
        if isinstance(drafter, RaggedBlockDrafter | RaggedChainDrafter):
            yield _network_blocks(drafter, request, state, rule, tree, target.device)
        else:
            assert isinstance(drafter, NgramDrafter)
            yield _ngram_blocks(drafter, request, state, rule)


@dataclass(slots=True)
class _States:
    """Of one request: logits [output, V] at and behind its first anchor's place, and features [tokens, n·d]."""

    logits: torch.Tensor | None
    features: torch.Tensor | None


def _target_pass(target: Target, group: Sequence[RecordedOutput], layers: Sequence[int], judged: bool) -> list[_States]:
    tokens = torch.zeros((len(group), max(request.num_tokens for request in group)), dtype=torch.long)
    for row, request in enumerate(group):
        tokens[row, : request.num_tokens] = torch.tensor(request.prompt + request.output)
    hidden, features = dense_target(target, tokens.to(target.device), layers, with_hidden=judged)
    return [
        _States(
            target.head(hidden[row, len(request.prompt) : request.num_tokens]) if judged else None,
            features[row, : request.num_tokens],
        )
        for row, request in enumerate(group)
    ]


def _truth(tokens: IntArray, anchors: IntArray, gamma: int) -> IntArray:
    """The output's tokens behind each anchor, [M, γ]; -1 past its end."""
    return np.concatenate((tokens, np.full(gamma, -1)))[anchors[:, None] + 1 + np.arange(gamma)]


def _matching(drafts: IntArray, lens: IntArray, truth: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    matches = (drafts == truth) & (np.arange(drafts.shape[1]) < lens[:, None])
    return np.cumprod(matches, axis=1).sum(axis=1), matches


def _ngram_blocks(drafter: NgramDrafter, request: RecordedOutput, state: _States, rule: DraftRule) -> DenseBlocks:
    """Prompt lookup along the output: a draft is a point mass, so it is accepted iff it is the output's token.

    Given the output's token y and the draft d, rejection sampling accepts d with probability p(d), and then y = d;
    a rejected d is replaced by another token. So y tells whether d was accepted, in every mode.
    """
    gamma, anchors = drafter.block_size, request.anchors
    tokens = np.array(request.prompt + request.output)
    proposals = np.zeros((len(anchors), gamma), dtype=np.int64)
    lens = np.zeros(len(anchors), dtype=np.int64)
    for row, anchor in enumerate(anchors.tolist()):
        found = drafter.propose(tokens[: anchor + 1], gamma)
        proposals[row, : len(found)] = found
        lens[row] = len(found)
    num_accepted, matches = _matching(proposals, lens, _truth(tokens, anchors, gamma))
    accept_prob = matches.astype(np.float64)
    if state.logits is not None:
        law = probabilities(state.logits, rule.params)
        rows = np.minimum(np.arange(len(anchors))[:, None] + np.arange(gamma), len(law) - 1)
        index = torch.from_numpy(rows).to(law.device), torch.from_numpy(proposals).to(law.device)
        accept_prob = law[index].double().cpu().numpy()
    return DenseBlocks(proposals, lens, num_accepted, accept_prob, draft_prob=np.ones(proposals.shape))


def _network_blocks(
    drafter: RaggedBlockDrafter | RaggedChainDrafter,
    request: RecordedOutput,
    state: _States,
    rule: DraftRule,
    tree: TreeShape | None,
    device: torch.device,
) -> DenseBlocks:
    network, gamma, anchors = drafter.network, drafter.block_size, request.anchors
    tokens = np.array(request.prompt + request.output)
    sequence = torch.from_numpy(tokens).to(device)
    assert state.features is not None
    truth = _truth(tokens, anchors, gamma)
    # Position a + k judges slot k; positions past the output's end are never looked at.
    law = None if state.logits is None else probabilities(state.logits, rule.params)
    parts: list[DenseBlocks] = []
    size = max(8, min(_ANCHORS_PER_PASS, _LOGITS_PER_PASS // (gamma * network.config.head_size)))
    for low in range(0, len(anchors), size):
        chosen = anchors[low : low + size]
        places = torch.from_numpy(chosen).to(device)
        start = dense_walks(network, sequence, state.features, places)
        wanted = truth[low : low + size]
        path = OutputPath.of(start, sequence[places], torch.from_numpy(wanted).to(device))
        ids = np.full(len(chosen), request.request_id)
        lens = np.full(len(chosen), gamma, dtype=np.int64)
        rows = torch.arange(len(chosen), device=device)[:, None] + torch.arange(gamma, device=device)
        rows = rows.clamp(max=len(request.output) - 1 - low)
        here = None if law is None else law[low : low + size + gamma]
        confidence: Any
        draft_prob: Any
        if rule.mode == "rejection":
            assert here is not None
            known = [request.rounds.get(anchor, Known()) for anchor in chosen.tolist()]
            out = conditional_blocks(
                network,
                drafter.confidence,
                start,
                sequence[places],
                path,
                here,
                rows,
                known,
                rule,
                ids,
                chosen,
            )
            drafts, accept_prob, num_accepted = out.tokens, out.accept_prob, out.num_accepted
            confidence, draft_prob = out.confidence, out.draft_prob
        else:
            choose = rule.choose(ids, chosen, network.draft_token_ids)
            head = run_head(network, start(), sequence[places], gamma, choose, drafter.confidence, with_prob=True)
            drafts = head.tokens.cpu().numpy()
            num_accepted, matches = _matching(drafts, lens, wanted)
            accept_prob = matches.astype(np.float64)
            if here is not None:
                accept_prob = here[rows, head.tokens].double().cpu().numpy()
            confidence = None if head.confidence is None else head.confidence.cpu().numpy()
            draft_prob = None if head.draft_prob is None else head.draft_prob.double().cpu().numpy()
        num = 1 if tree is None else tree.num_candidates
        candidates = CandidateRule(rule, ids, chosen, network.draft_token_ids, num)
        rank = target_rank(network, path, candidates)
        blocks = DenseBlocks(drafts, lens, num_accepted, accept_prob, confidence, draft_prob, rank)
        if tree is not None:
            grown = dense_trees(network, drafter.confidence, start, sequence[places], wanted, tree, candidates)
            blocks.node_rank, blocks.num_nodes = grown.node_rank, grown.num_nodes
            blocks.node_survival, blocks.first_at_depth = grown.node_survival, grown.first_at_depth
        parts.append(blocks)
    return DenseBlocks(*(_joined([getattr(part, name) for part in parts]) for name in DenseBlocks.__slots__))


def _joined(arrays: list[npt.NDArray | None]) -> Any:
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if known else None


def num_ranked(drafter: Drafter) -> int | None:
    """Candidates that `target_rank` tells apart: all that a network knows; ``None`` where nothing is ranked."""
    return drafter.network.config.head_size if isinstance(drafter, RaggedBlockDrafter | RaggedChainDrafter) else None
