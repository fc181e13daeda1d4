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
from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.chain import RaggedChainDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.drafters.dense import dense_target, dense_walks
from dspark_sim.engine.drafters.heads import run_head
from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.drafters.ngram import NgramDrafter
from dspark_sim.engine.models import Target
from dspark_sim.engine.sampling import probabilities
from dspark_sim.errors import UserError
from dspark_sim.trace import SCHEMAS, list_column

_ANCHORS_PER_PASS = 64
_TOKENS_PER_PASS = 1024
_LOGITS_PER_PASS = 2**24
IntArray = npt.NDArray[np.int64]


_OF_TREES = ("node_rank", "node_survival", "first_at_depth")


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

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_anchors(self) -> int:
        """Positions of the output but the last."""
        return len(self.output) - 1

    @property
    def anchors(self) -> IntArray:
        """Their positions."""
        return len(self.prompt) + np.arange(self.num_anchors)


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
    usable = [request for request in recorded if len(request.output) > 1]
    if not usable:
        return SCHEMAS["anchors"].empty_table()
    found: dict[int, DenseBlocks] = {}
    with tqdm(total=len(usable), unit="request", desc="anchors", disable=not progress, leave=False) as bar:
        for group in _groups(usable):
            for request, blocks in zip(group, _group_blocks(target, drafter, group, rule), strict=True):
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
        **{name: pa.nulls(len(lens), schema.field(name).type) for name in _OF_TREES},
    }
    return pa.table([data[name] for name in schema.names], schema=schema)


@torch.inference_mode()
def _group_blocks(
    target: Target, drafter: Drafter, group: Sequence[RecordedOutput], rule: DraftRule
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
            yield _network_blocks(drafter, request, state, rule, target.device)
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
        rank = _target_rank(network, path)
        parts.append(DenseBlocks(drafts, lens, num_accepted, accept_prob, confidence, draft_prob, rank))
    return DenseBlocks(*(_joined([getattr(part, name) for part in parts]) for name in DenseBlocks.__slots__))


def _joined(arrays: list[npt.NDArray | None]) -> Any:
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if known else None


def _target_rank(network: DraftNetwork, path: OutputPath) -> IntArray:
    """Rank of the output's token among the candidates at each depth, along the output's own path, [M, γ].

    Tokens outside the draft vocabulary, and depths past the output's end, rank behind every candidate.
    """
    worst = network.config.head_size
    index = network.target_to_draft[path.truth.clamp(min=0)].masked_fill(path.truth < 0, worst)
    score = path.said.logits.gather(-1, index.clamp(max=worst - 1)[..., None])
    rank = (path.said.logits > score).float().sum(dim=-1).long()  # exact, and ten times faster than a sum of booleans
    ranks: IntArray = rank.masked_fill(index == worst, worst).cpu().numpy()
    return ranks
