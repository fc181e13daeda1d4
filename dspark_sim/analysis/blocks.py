"""Dense anchors of a recording as arrays, and the rounds that a live run makes of them.

A live run starts a block at the output's first token, accepts n drafts, and goes on n + 1 tokens later. Walking the
anchors in this way gives its rounds; exactly at temperature 0, and with the same law under rejection sampling. All
lengths are in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.anchor_arrays import integers, lengths, padded
from dspark_sim.errors import UserError
from dspark_sim.loop import DraftBatch, survival_of
from dspark_sim.policy import LoadView
from dspark_sim.policy_ranked import ConfidenceThreshold
from dspark_sim.trace import Trace

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Dense anchors of N requests as arrays of M rows: request after request, position after position.

    Parameters
    ----------
    requests
        [N], in order of `request_id`: ``prompt_id, domain, max_tokens, output_len, first_row``.
    request, place
        [M], the row of `requests`, and the anchor's index in the output.
    draft_len, num_accepted
        [M], drafts proposed, and how many of them the target accepts of a whole block.
    confidence
        [M, γ], NaN where there is none.
    has_confidence
        Whether the drafter estimates acceptance.
    """

    requests: pd.DataFrame
    request: IntArray
    place: IntArray
    draft_len: IntArray
    num_accepted: IntArray
    confidence: FloatArray
    has_confidence: bool

    @property
    def block_size(self) -> int:
        """Most drafts per block (γ)."""
        return int(self.confidence.shape[1])

    @property
    def room(self) -> IntArray:
        """Output tokens behind each anchor, [M]; a slot past them has nothing to be compared with."""
        behind: IntArray = self.requests["output_len"].to_numpy(dtype=np.int64)[self.request] - 1 - self.place
        return behind

    @property
    def is_whole(self) -> npt.NDArray[np.bool_]:
        """Whether a round from the anchor has room for a whole block and a bonus below the length limit, [M]."""
        limit = self.requests["max_tokens"].to_numpy(dtype=np.int64)[self.request]
        return np.asarray(self.place + self.block_size + 2 <= limit)

    @staticmethod
    def from_trace(trace: Trace) -> Blocks:
        """The anchors of a recording.

        Raises
        ------
        UserError
            If there is no request, or an output lacks anchors.
        """
        columns = ["request_id", "prompt_id", "domain", "prompt_len", "max_tokens", "output_len"]
        requests = trace.requests[columns].sort_values("request_id", ignore_index=True)
        if requests.empty:
            raise UserError("the trace has no finished request; record at least one")
        table = trace.tables["anchors"].sort_by([("request_id", "ascending"), ("position", "ascending")])
        num_anchors = (requests["output_len"] - 1).clip(lower=0).to_numpy(dtype=np.int64)
        first_row = np.cumsum(num_anchors) - num_anchors
        request = np.repeat(np.arange(len(requests)), num_anchors)
        place = np.arange(request.size) - first_row[request]
        owner, position = (table[name].to_numpy() for name in ("request_id", "position"))
        expected = requests["prompt_len"].to_numpy()[request] + place
        if not (
            np.array_equal(owner, requests["request_id"].to_numpy()[request]) and np.array_equal(position, expected)
        ):
            raise UserError(
                f"the trace has {table.num_rows} anchors and its outputs need {request.size}, one at every token but "
                "the last; make the dense pass anew"
            )
        draft_len = lengths(table, "draft_tokens")
        gamma = max(int(draft_len.max(initial=0)), int(trace.config.get("block_size") or 0))
        confidence = np.full((request.size, gamma), np.nan)
        has_confidence = bool(trace.config.get("has_confidence")) and table["confidence"].null_count == 0
        if has_confidence:
            confidence = padded(table, "confidence", gamma, np.nan)
        return Blocks(
            requests=requests.assign(first_row=first_row),
            request=request,
            place=place,
            draft_len=draft_len,
            num_accepted=integers(table, "num_accepted"),
            confidence=confidence,
            has_confidence=has_confidence,
        )

    def threshold_lens(self, threshold: float) -> IntArray:
        """Drafts that `ConfidenceThreshold` verifies at each anchor, [M].

        Raises
        ------
        UserError
            If there are no confidences, or the threshold is not between 0 and 1.
        """
        if not self.has_confidence:
            raise UserError(
                "a threshold needs confidence estimates and this drafter gives none; choose another drafter"
            )
        survival = survival_of(DraftBatch(self.draft_len, self.confidence))
        load = LoadView(0, len(survival), 0, 0, self.block_size)
        return ConfidenceThreshold(threshold).start().verify_lens(load, survival)


def walk(blocks: Blocks, verify_lens: IntArray | None = None, max_tokens: int | None = None) -> pd.DataFrame:
    """The rounds of a live run.

    Parameters
    ----------
    blocks
        Dense anchors.
    verify_lens
        [M], drafts verified at each anchor; ``None`` verifies whole blocks.
    max_tokens
        Most output tokens per request, where that is less than recorded.

    Returns
    -------
    DataFrame
        A row per round: ``request`` (row of ``blocks.requests``), ``row`` (of the anchor), ``verify_len,
        num_accepted, num_emitted``. As live, a round never drafts more than the remaining length less 1.
    """
    lens = blocks.draft_len if verify_lens is None else np.minimum(verify_lens, blocks.draft_len)
    allowed, accepted = lens.tolist(), blocks.num_accepted.tolist()
    rounds: list[tuple[int, int, int, int, int]] = []
    columns = ("first_row", "output_len", "max_tokens")
    for number, (first, length, limit) in enumerate(zip(*(blocks.requests[name] for name in columns), strict=True)):
        limit = limit if max_tokens is None else min(limit, max_tokens)
        last, place = min(length, limit) - 1, 0
        while place < last:
            row = first + place
            verify_len = min(allowed[row], limit - place - 2)
            num_accepted = min(verify_len, accepted[row])
            num_emitted = min(num_accepted + 1, last - place)
            rounds.append((number, row, verify_len, num_accepted, num_emitted))
            place += num_emitted
    names = ["request", "row", "verify_len", "num_accepted", "num_emitted"]
    return pd.DataFrame(np.array(rounds, dtype=np.int64).reshape(-1, 5), columns=names)


def prompt_counts(blocks: Blocks, rounds: pd.DataFrame) -> pd.DataFrame:
    """Sums over each prompt's rounds.

    Returns
    -------
    DataFrame
        Indexed by ``domain, prompt_id``, sorted: ``rounds, num_verified, num_accepted, num_tokens`` (accepted + 1) of
        all rounds, and ``whole_rounds, whole_proposed, whole_emitted`` of those that the length limit cannot cut.
    """
    whole = blocks.is_whole[rounds["row"]]
    # Only an accepted end-of-sequence token leaves no bonus; what was proposed behind it does not count.
    ended = rounds["num_emitted"] <= rounds["num_accepted"]
    sums = pd.DataFrame(
        {
            "rounds": 1,
            "num_verified": rounds["verify_len"],
            "num_accepted": rounds["num_accepted"],
            "num_tokens": rounds["num_accepted"] + 1,
            "whole_rounds": whole.astype(np.int64),
            "whole_proposed": rounds["num_accepted"].where(ended, rounds["verify_len"]) * whole,
            "whole_emitted": rounds["num_emitted"] * whole,
        }
    )
    sums = sums.groupby(rounds["request"]).sum().reindex(range(len(blocks.requests)), fill_value=0)
    return sums.groupby([blocks.requests["domain"], blocks.requests["prompt_id"]]).sum()
