"""What was recorded: a drafted block at every position of every prompt's output.

Anchor i of an output is its token i. The block that starts there proposes output tokens i+1, i+2, ...; it is row i of
the output's arrays, for i = 0 .. output_len-2. Decoding without loss gives the same output whatever the schedule, so a
replay may start a block at any anchor, accept the shorter of what it verifies and what was accepted of the full block,
and go on from there. At temperature 0 a prompt has one output; above, every request has its own.

Lengths and counts are in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dspark_sim.anchor_arrays import integers, lengths, padded
from dspark_sim.errors import UserError
from dspark_sim.loop import Mode
from dspark_sim.request import FinishReason
from dspark_sim.simulate.tree_replay import RecordedTree, read_tree, replayed_tree
from dspark_sim.trace import Trace
from dspark_sim.tree_shapes import Chain, TreeShape

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]

# Purpose of random numbers.
_BOOTSTRAP = 4


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """One prompt's recorded output.

    Parameters
    ----------
    prompt_id, domain
        Name and kind of the prompt.
    prompt_len, max_tokens, output_len
        Tokens of the prompt, most output tokens when it was recorded, and output tokens it gave.
    finish_reason
        ``"stop"`` if the last output token ends the sequence, ``"length"`` if `max_tokens` cut it.
    first_row
        Row of anchor 0 in the arrays of `RecordedAnchors`.
    """

    prompt_id: str
    domain: str
    prompt_len: int
    max_tokens: int
    output_len: int
    finish_reason: FinishReason
    first_row: int

    @property
    def rows(self) -> slice:
        """The prompt's rows, anchor 0 first: one fewer than output tokens."""
        return slice(self.first_row, self.first_row + self.output_len - 1)


@dataclass(frozen=True, eq=False)
class RecordedAnchors:
    """Dense anchors of a recorded trace, all prompts in one set of arrays of T rows.

    Parameters
    ----------
    prompts
        The recorded outputs by key; ``anchors.num_accepted[anchors.prompts[key].rows]`` is one output's. The key is
        the `prompt_id` at temperature 0, and ``prompt_id#request_id`` above.
    request_prompts
        Key of every recorded request, in order of `request_id`.
    num_accepted
        [T], drafts of the full block that the target accepts.
    draft_len
        [T], drafts proposed; below γ where the drafter found fewer.
    draft_tokens
        [T, γ], token ids, -1 past `draft_len`.
    confidence
        [T, γ], estimated P(accept k | all before k accepted), NaN where there is none.
    has_confidence
        Whether the drafter estimates confidences.
    mode
        Acceptance mode of the recording.
    accept_prob, draft_prob
        [T, γ], true conditional acceptance and the drafter's probability of its tokens; ``None`` if not recorded.
    ranks
        [T, γ], rank of the output's token among the candidates at each depth along the output, or ``None``.
    num_ranked
        Candidates that `ranks` tells apart; ``None`` is all of them.
    tree
        The trees to replay; ``None`` replays chains, whose drafts the arrays above are.
    source
        Where the anchors come from, for the trace of a run; ``None`` is a recording.
    derived
        Tables made of these arrays by `block_tables`, kept for the next run.
    """

    prompts: Mapping[str, RecordedPrompt]
    request_prompts: tuple[str, ...]
    num_accepted: IntArray
    draft_len: IntArray
    draft_tokens: TokenArray
    confidence: FloatArray
    has_confidence: bool
    mode: Mode = "greedy"
    accept_prob: FloatArray | None = None
    draft_prob: FloatArray | None = None
    ranks: IntArray | None = None
    num_ranked: int | None = None
    tree: RecordedTree | None = None
    source: Mapping[str, Any] | None = None
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def acceptance_source(self) -> dict[str, Any]:
        """Kind and parameters of where the anchors come from, JSON types only; the block size as it was recorded."""
        if self.source is not None:
            return dict(self.source)
        return {"kind": "recorded_anchors", "num_prompts": len(self.prompts), "block_size": self.block_size}

    def bootstrap(self, num_requests: int, seed: int = 0) -> RecordedAnchors:
        """Requests drawn with replacement: outputs whole, the confidence of every row together with its outcome.

        Request i draws by (seed, i), whatever `num_requests` is.

        Raises
        ------
        UserError
            If no request is asked for.
        """
        if num_requests < 1:
            raise UserError(f"num_requests is {num_requests}; draw at least 1 request")
        pool = self.request_prompts
        drawn = (np.random.default_rng((seed, _BOOTSTRAP)).random(num_requests) * len(pool)).astype(np.int64)
        return replace(
            self,
            request_prompts=tuple(pool[i] for i in drawn.tolist()),
            source={**self.acceptance_source, "bootstrap": {"num_requests": num_requests, "seed": seed}},
        )

    @property
    def block_size(self) -> int:
        """Most tokens per block (γ), the depth of any tree."""
        return int(self.draft_tokens.shape[1])

    @property
    def round_size(self) -> int:
        """Most tokens drafted per round: the nodes of a tree, or the block of a chain."""
        return self.block_size if self.tree is None else self.tree.num_nodes

    @property
    def estimates(self) -> bool:
        """Whether there are estimates for a policy to go by: survivals of nodes, or confidences of a chain."""
        return self.has_confidence if self.tree is None else self.tree.has_survival

    def accepted(self, rows: IntArray, verify_lens: IntArray) -> IntArray:
        """Drafts accepted [R] of the first `verify_lens` ones [R] at anchors [R]."""
        if self.tree is not None:
            return self.tree.accepted(rows, verify_lens)
        return np.minimum(verify_lens, self.num_accepted.take(rows))

    def with_tree(self, shape: TreeShape | None) -> RecordedAnchors:
        """The same anchors with trees of another shape; ``None`` keeps what was recorded.

        A chain can be replayed from any recording, a tree of fixed shape from any with ranks along the output, and a
        tree that the drafter's probabilities choose from one of the same rule and at least its budget. Only a tree
        whose nodes were all recorded has survivals; with others go policies that do not look at them.

        Raises
        ------
        UserError
            If the recording does not hold that tree.
        """
        if shape is None:
            return self
        fitted = shape.fitted(self.block_size)
        if isinstance(fitted, Chain):
            chains = replace(self, tree=None)
            return chains if fitted.num_nodes == self.block_size else chains.restricted(fitted.num_nodes)
        return replace(self, tree=replayed_tree(fitted, self.tree, self.ranks, self.num_ranked, self.mode))

    def restricted(self, block_size: int) -> RecordedAnchors:
        """The same anchors with every block cut to its first `block_size` tokens.

        Raises
        ------
        UserError
            If `block_size` is negative or above the recorded one.
        """
        if block_size == self.block_size:
            return self
        if self.tree is not None:
            raise UserError(
                f"block_size is {block_size} and the recording's drafts are trees of shape {self.tree.shape.label()}; "
                "leave block_size out and give a tree, such as chain"
            )
        if not 0 <= block_size <= self.block_size:
            raise UserError(
                f"block_size is {block_size} but the anchors were recorded with {self.block_size}; "
                f"give 0 to {self.block_size}, or record again with a larger block"
            )
        return replace(
            self,
            num_accepted=np.minimum(self.num_accepted, block_size),
            draft_len=np.minimum(self.draft_len, block_size),
            draft_tokens=self.draft_tokens[:, :block_size],
            confidence=self.confidence[:, :block_size],
            accept_prob=None if self.accept_prob is None else self.accept_prob[:, :block_size],
            draft_prob=None if self.draft_prob is None else self.draft_prob[:, :block_size],
            ranks=None if self.ranks is None else self.ranks[:, :block_size],
        )

    @staticmethod
    def from_trace(trace: Trace) -> RecordedAnchors:
        """Anchors of the tables `requests` and `anchors`.

        Of several requests with the same prompt at temperature 0 the first one with anchors is kept: their outputs
        are identical.

        Raises
        ------
        UserError
            If the trace has no anchors, or those of an output are missing, incomplete or contradict it.
        """
        mode: Mode = trace.config.get("mode", "greedy")
        table = trace.tables["anchors"]
        columns = ["request_id", "prompt_id", "domain", "prompt_len", "max_tokens", "output_len", "finish_reason"]
        requests = trace.tables["requests"].select(columns).sort_by("request_id").to_pylist()
        if not requests:
            raise UserError("the trace has no finished request; record at least one")
        if table.num_rows == 0 and any(request["output_len"] > 1 for request in requests):
            raise UserError("the trace has no anchors; record it with the dense pass, or give the recorded live trace")
        owner, position = integers(table, "request_id"), integers(table, "position")
        order = np.lexsort((position, owner))
        owner, position = owner[order], position[order]
        keys = [row["prompt_id"] if mode == "greedy" else f"{row['prompt_id']}#{row['request_id']}" for row in requests]
        prompts: dict[str, RecordedPrompt] = {}
        kept: list[IntArray] = [np.zeros(0, dtype=np.int64)]
        num_rows = 0
        for request, name in zip(requests, keys, strict=True):
            request_id = request["request_id"]
            first, last = np.searchsorted(owner, (request_id, request_id + 1)).tolist()
            if name in prompts or (last == first and request["output_len"] > 1):
                continue
            prompt = RecordedPrompt(**{key: request[key] for key in columns[1:]}, first_row=num_rows)
            expected = prompt.prompt_len + np.arange(prompt.output_len - 1)
            if not np.array_equal(position[first:last], expected):
                raise UserError(
                    f"request {request_id} (prompt {name}) has {last - first} anchors and its output needs one at "
                    f"each of {expected.size} positions from {prompt.prompt_len}; record it again"
                )
            prompts[name] = prompt
            kept.append(order[first:last])
            num_rows += expected.size
        missing = [name for name in keys if name not in prompts]
        if missing:
            raise UserError(f"prompt {missing[0]} has no anchors; record it again with the dense pass")
        return _assemble(trace, table.take(pa.array(np.concatenate(kept))), prompts, tuple(keys), mode)


def _assemble(
    trace: Trace,
    table: pa.Table,
    prompts: Mapping[str, RecordedPrompt],
    request_prompts: tuple[str, ...],
    mode: Mode,
) -> RecordedAnchors:
    draft_len = lengths(table, "draft_tokens")
    num_accepted = integers(table, "num_accepted")
    # A drafter that finds fewer tokens than it may (prompt lookup) can leave every row short of its block size.
    block_size = max(int(draft_len.max(initial=0)), int(trace.config.get("block_size") or 0))
    draft_tokens: TokenArray = padded(table, "draft_tokens", block_size, np.int32(-1))
    confidence: FloatArray = padded(table, "confidence", block_size, np.nan)
    for prompt in prompts.values():
        limit = np.minimum(draft_len[prompt.rows], np.arange(prompt.output_len - 1, 0, -1))
        excess = np.flatnonzero((num_accepted[prompt.rows] > limit) | (num_accepted[prompt.rows] < 0))
        if excess.size:
            raise UserError(
                f"prompt {prompt.prompt_id} has num_accepted {num_accepted[prompt.rows][excess[0]]} at output token "
                f"{excess[0]}, where at most {limit[excess[0]]} drafts can be accepted; record it again"
            )

    def optional(name: str) -> FloatArray | None:
        if table[name].null_count == table.num_rows:
            return None
        values: FloatArray = padded(table, name, block_size, 0.0)
        return values

    ranks, num_ranked, tree = read_tree(trace.config, table, block_size)
    return RecordedAnchors(
        prompts=prompts,
        request_prompts=request_prompts,
        num_accepted=num_accepted,
        draft_len=draft_len,
        draft_tokens=draft_tokens,
        confidence=confidence,
        has_confidence=bool(trace.config.get("has_confidence", not np.isnan(confidence).all())),
        mode=mode,
        accept_prob=optional("accept_prob"),
        draft_prob=optional("draft_prob"),
        ranks=ranks,
        num_ranked=num_ranked,
        tree=tree,
    )
