"""How often the drafter's candidates are right, by depth and rank: what `Sequoia` trees are made from."""

from __future__ import annotations

import numpy as np

from dspark_sim.anchor_arrays import padded
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace
from dspark_sim.tree import NOWHERE
from dspark_sim.tree_sequoia import Acceptance


def rates_by_rank(trace: Trace, num_candidates: int = 8, *, by_depth: bool = True) -> Acceptance:
    """Share of places in which the candidate of each rank was the output's token.

    A place at depth k + 1 counts if the output's tokens above it were all among the first `num_candidates`: behind a
    token that no tree holds no child is asked for.

    Parameters
    ----------
    trace
        A recording with ranks along the output.
    num_candidates
        Ranks told apart.
    by_depth
        A row of rates for every depth; otherwise one for all depths together.

    Returns
    -------
    tuple
        Rates by depth and rank, as `tree_shapes.Sequoia` takes them.

    Raises
    ------
    UserError
        If there are no ranks, or no candidate is asked for.
    """
    if num_candidates < 1:
        raise UserError(f"num_candidates is {num_candidates}; give 1 or more")
    table = trace.tables["anchors"]
    if not table.num_rows or table["target_rank"].null_count == table.num_rows:
        raise UserError(
            "the trace has no ranks along its outputs; record it with the dense pass and a drafter that ranks tokens"
        )
    gamma = int(trace.config["block_size"])
    ranks = padded(table, "target_rank", gamma, np.int64(NOWHERE))
    # Nothing was asked behind the end of an output.
    last = trace.requests.set_index("request_id")[["prompt_len", "output_len"]].sum(axis=1) - 1
    room = last.loc[table["request_id"].to_numpy()].to_numpy() - table["position"].to_numpy()
    held = ranks < num_candidates
    reached = np.cumprod(np.concatenate((np.ones((len(ranks), 1), dtype=bool), held[:, :-1]), axis=1), axis=1) > 0
    reached &= np.arange(gamma) < room[:, None]
    hits = np.stack([(reached & (ranks == rank)).sum(axis=0) for rank in range(num_candidates)], axis=1)
    places = reached.sum(axis=0)
    if not by_depth:
        hits, places = hits.sum(axis=0, keepdims=True), places.sum(keepdims=True)
    deep = int(np.flatnonzero(places)[-1]) + 1
    return tuple(tuple((row / count).tolist()) for row, count in zip(hits[:deep], places[:deep], strict=True))
