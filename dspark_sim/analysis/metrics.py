"""What a trace says: speed as the server and as its users see it, and how well the drafts did.

Every function takes a `Trace` and does not know whether its clock was real. All times are seconds, all speeds
output tokens per second. Only finished requests count.

Latency of a request with n output tokens (`arrival`, `first_token` and `finish` are instants on the run's clock):

* ``ttft`` = first_token - arrival;
* ``e2e_latency`` = finish - arrival;
* ``tpot`` = (e2e_latency - ttft) / (n - 1), undefined (NaN) for n = 1;
* ``icl``, one value per decode round: time since the request's previous tokens became visible (inter-chunk);
* ``itl``, one value per token after the first: the tokens of one round appear together, so the first of them
  waited for the whole round and the others 0 seconds. Under speculation its percentiles are zeros and steps; read
  ``icl`` beside it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.errors import UserError
from dspark_sim.trace import Trace
from dspark_sim.tree_shapes import recorded_shape

FloatArray = npt.NDArray[np.float64]
_COUNTS = {"draft_len": "num_drafted", "verify_len": "num_verified", "num_accepted": "num_accepted"}


def finished(trace: Trace) -> pd.DataFrame:
    """The rows of `requests` that got their whole answer; not those that gave up or were refused or cut off."""
    return trace.requests[trace.requests["finish_reason"].isin(("stop", "length"))]


def per_request(trace: Trace) -> pd.DataFrame:
    """One row per finished request, ordered by `request_id`.

    Parameters
    ----------
    trace
        A live or simulated run.

    Returns
    -------
    DataFrame
        ``request_id, prompt_id, domain, arrival, prompt_len, output_len, ttft, tpot, e2e_latency`` (seconds),
        ``user_tokens_per_second`` = 1/tpot, and over the request's decode rounds ``rounds, num_drafted,
        num_verified, num_accepted``.

    Raises
    ------
    UserError
        If the trace has no finished request.
    """
    requests = finished(trace)
    if requests.empty:
        raise UserError("the trace has no finished request to measure; record or simulate at least one")
    frame = requests[["request_id", "prompt_id", "domain", "arrival", "prompt_len", "output_len"]].copy()
    frame["ttft"] = requests["first_token"] - requests["arrival"]
    frame["e2e_latency"] = requests["finish"] - requests["arrival"]
    gaps = (requests["output_len"] - 1).where(requests["output_len"] > 1)
    frame["tpot"] = (frame["e2e_latency"] - frame["ttft"]) / gaps
    frame["user_tokens_per_second"] = 1.0 / frame["tpot"]
    rounds = trace.drafts.groupby("request_id")
    counts = rounds[list(_COUNTS)].sum().rename(columns=_COUNTS)
    counts.insert(0, "rounds", rounds.size())
    frame = frame.merge(counts, on="request_id", how="left").sort_values("request_id", ignore_index=True)
    return frame.fillna(dict.fromkeys(counts.columns, 0)).astype(dict.fromkeys(counts.columns, "int64"))


def summary(trace: Trace) -> pd.Series:
    """The run in one column of numbers.

    Parameters
    ----------
    trace
        A live or simulated run.

    Returns
    -------
    Series
        Indexed by metric:

        * ``num_requests, num_output_tokens, rounds`` (a round is one request in one decode iteration);
        * ``makespan_seconds``: first arrival to last finish;
        * ``output_throughput`` = output tokens / makespan, which includes the start and the end of the run, when
          the batch is not full;
        * ``user_tokens_per_second`` = mean over requests of 1/tpot;
        * ``mean_acceptance_length`` = Σ(num_accepted + 1) / rounds, the bonus token included, 1 without drafts;
        * ``draft_acceptance_rate`` = Σ num_accepted / Σ draft_len, NaN without drafts;
        * ``verification_budget`` = mean of 1 + verify_len over requests and rounds;
        * ``ttft, tpot, itl, icl, e2e_latency``, each with ``_mean, _p50, _p90, _p99``, in seconds.

    Raises
    ------
    UserError
        If the trace has no finished request.
    """
    requests = per_request(trace)
    makespan = float(finished(trace)["finish"].max() - finished(trace)["arrival"].min())
    tokens, rounds = int(requests["output_len"].sum()), int(requests["rounds"].sum())
    drafted, accepted = int(requests["num_drafted"].sum()), int(requests["num_accepted"].sum())
    values: dict[str, float] = {
        "num_requests": len(requests),
        "num_output_tokens": tokens,
        "rounds": rounds,
        "makespan_seconds": makespan,
        "output_throughput": _ratio(tokens, makespan),
        "user_tokens_per_second": float(requests["user_tokens_per_second"].mean()),
        "mean_acceptance_length": _ratio(accepted + rounds, rounds),
        "draft_acceptance_rate": _ratio(accepted, drafted),
        "verification_budget": _ratio(int(requests["num_verified"].sum()) + rounds, rounds),
    }
    chunks = inter_chunk(trace)
    samples = {
        "ttft": requests["ttft"].to_numpy(dtype=np.float64),
        "tpot": requests["tpot"].dropna().to_numpy(dtype=np.float64),
        "itl": inter_token_seconds(chunks),
        "icl": chunks["icl"].to_numpy(dtype=np.float64),
        "e2e_latency": requests["e2e_latency"].to_numpy(dtype=np.float64),
    }
    for name, sample in samples.items():
        values[f"{name}_mean"] = float(sample.mean()) if sample.size else np.nan
        for percent in (50, 90, 99):
            values[f"{name}_p{percent}"] = float(np.percentile(sample, percent)) if sample.size else np.nan
    return pd.Series(values, dtype=np.float64, name="value")


def inter_chunk(trace: Trace) -> pd.DataFrame:
    """Time between the instants at which a request's tokens become visible.

    Returns
    -------
    DataFrame
        One row per finished request and decode round that emitted a token: ``request_id, step, num_emitted`` and
        ``icl`` (seconds since the request's previous tokens). Prefills and other requests' work in between count,
        because the user waits for them too.
    """
    steps = trace.steps
    visible = pd.Series((steps["start"] + steps["step_seconds"]).to_numpy(), index=steps["step"].to_numpy())
    rounds = trace.drafts.loc[trace.drafts["num_emitted"] > 0, ["request_id", "step", "num_emitted"]]
    rounds = rounds.merge(finished(trace)[["request_id", "first_token"]], on="request_id")
    rounds = rounds.sort_values(["request_id", "step"], ignore_index=True)
    end = rounds["step"].map(visible)
    previous = end.groupby(rounds["request_id"]).shift().fillna(rounds["first_token"])
    return rounds[["request_id", "step", "num_emitted"]].assign(icl=end - previous)


def inter_token_seconds(chunks: pd.DataFrame) -> FloatArray:
    """The ``itl`` of every token after a request's first, from `inter_chunk`'s rows."""
    emitted = chunks["num_emitted"].to_numpy(dtype=np.int64)
    seconds = np.zeros(int(emitted.sum()))
    seconds[np.cumsum(emitted) - emitted] = chunks["icl"].to_numpy(dtype=np.float64)
    return seconds


def conditional_acceptance(trace: Trace, source: Literal["drafts", "anchors"] = "drafts") -> pd.DataFrame:
    """Acceptance at each draft position, given that every position before it was accepted.

    Parameters
    ----------
    trace
        A run.
    source
        ``"drafts"`` uses the rounds that happened, up to the position verified; where a policy stopped early
        because it expected a rejection, that is biased upwards. ``"anchors"`` uses the dense pass, which is not.

    Returns
    -------
    DataFrame
        Indexed by ``position`` (1 is the first drafted token): ``num_reached``, ``num_accepted`` and their ratio
        ``conditional_acceptance``. Positions never reached are left out.

    Raises
    ------
    UserError
        If anchors are asked for and the trace has none, or the rounds are of trees: how deep those that were verified
        reach is not in them. Anchors have the chain of the likeliest candidates.
    """
    if source == "drafts" and (shape := recorded_shape(trace.config)) is not None:
        raise UserError(
            f"the rounds are of trees of shape {shape.label()}, and how deep their verified nodes reach is not in "
            "them; use source='anchors'"
        )
    if source == "anchors":
        if trace.anchors.empty:
            raise UserError("the trace has no anchors; make the dense pass, or use source='drafts'")
        lens = trace.anchors["draft_tokens"].map(len).to_numpy(dtype=np.int64)
        accepted = trace.anchors["num_accepted"].to_numpy(dtype=np.int64)
    else:
        lens = trace.drafts["verify_len"].to_numpy(dtype=np.int64)
        accepted = trace.drafts["num_accepted"].to_numpy(dtype=np.int64)
    depth = np.arange(int(lens.max()) if lens.size else 0)
    reached = ((lens[:, None] > depth) & (accepted[:, None] >= depth)).sum(axis=0)
    passed = (accepted[:, None] > depth).sum(axis=0)
    index = pd.Index(depth + 1, name="position")
    frame = pd.DataFrame({"num_reached": reached, "num_accepted": passed}, index=index)
    frame = frame[frame["num_reached"] > 0]
    return frame.assign(conditional_acceptance=frame["num_accepted"] / frame["num_reached"])


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
