"""A trace in vLLM's forms: the result file of ``vllm bench serve``, and its per-request speculation fields.

**Result file** (`bench_serve`): the names and units that ``vllm bench serve --save-result --save-detailed`` writes
(``vllm/benchmarks/serve.py``: `benchmark`, `calculate_metrics`, `calculate_spec_decode_stats`), so that its plots and
comparisons read it. ``itls`` is as vLLM measures it, from one streamed chunk to the next, which here is ``icl``; its
length plus one is the number of chunks, not of tokens. ``ttft``, ``tpot`` and ``e2el`` are `metrics`' ttft, tpot and
e2e_latency; standard deviations are those of the population, as numpy's default. The spec-decode fields count what
vLLM counts: drafts that the target was given, in rounds with at least one; ``acceptance_rate`` is in per cent, and a
position's rate is over all such rounds.

**Per request** (`per_request_metrics`): the ``metrics`` object of vLLM's responses under
``--enable-per-request-metrics`` and ``--per-request-spec-decode-metrics detailed`` (its docs/features:
per_request_metrics.md and speculative_decoding/acceptance_metrics.md; pull requests 46768 and 48915): there
``time_to_first_token_ms`` and ``tokens_per_second`` start when the request is scheduled, after ``queue_time_ms``, and
``mean_itl_ms`` is per token, i.e. tpot. Rounds in which no draft was verified are left out, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from dspark_sim.analysis.metrics import finished, inter_chunk, per_request
from dspark_sim.analysis.slo import Objectives
from dspark_sim.analysis.window import whole
from dspark_sim.trace import Trace

PERCENTILES = (50, 90, 95, 99)


def bench_serve(trace: Trace, objectives: Objectives | None = None, *, detailed: bool = True) -> dict[str, Any]:
    """The result of ``vllm bench serve`` that this run would have given.

    Parameters
    ----------
    trace
        A live or simulated run.
    objectives
        For ``request_goodput``; ``None`` writes null, as vLLM without ``--goodput``.
    detailed
        Keep the lists with an entry per request (vLLM's ``--save-detailed``).

    Returns
    -------
    dict
        JSON types. ``start_times`` are the arrivals, seconds from the start of the run. ``generated_texts`` are empty:
        a trace holds token ids.

    Raises
    ------
    UserError
        If the trace has no finished request.
    """
    requests, seconds = per_request(trace), whole(trace).seconds
    chunks = inter_chunk(trace)
    gaps = {request_id: part["icl"].tolist() for request_id, part in chunks.groupby("request_id")}
    itls = [gaps.get(request_id, []) for request_id in requests["request_id"]]
    num_input, num_output = int(requests["prompt_len"].sum()), int(requests["output_len"].sum())
    peak_tokens, peak_requests = _peaks(trace, requests, chunks)
    result: dict[str, Any] = {
        **_setup(trace, len(trace.requests)),
        "duration": seconds,
        "completed": len(requests),
        "failed": len(trace.requests) - len(requests),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(requests) / seconds,
        "request_goodput": None if objectives is None else int(objectives.met(requests)["all"].sum()) / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
    }
    if detailed:
        result |= {
            "input_lens": requests["prompt_len"].tolist(),
            "output_lens": requests["output_len"].tolist(),
            "ttfts": requests["ttft"].tolist(),
            "itls": itls,
            "start_times": requests["arrival"].tolist(),
            "generated_texts": [""] * len(requests),
            "errors": [""] * len(requests),
        }
    result |= {"max_output_tokens_per_s": peak_tokens, "max_concurrent_requests": peak_requests}
    result |= _spec_decode(trace)
    for name, values in (
        ("ttft", requests["ttft"]),
        ("tpot", requests["tpot"].dropna()),
        ("itl", chunks["icl"]),
        ("e2el", requests["e2e_latency"]),
    ):
        result |= _statistics(name, values.to_numpy(dtype=np.float64))
    return result


def per_request_metrics(trace: Trace) -> Iterator[dict[str, Any]]:
    """Each finished request as the parts of a vLLM response that measure it, by `request_id`.

    Yields
    ------
    dict
        ``id, prompt_id, domain, usage`` and ``metrics``, JSON types; ``metrics.speculative_decoding`` is null in a run
        without drafts.

    Raises
    ------
    UserError
        If the trace has no finished request.
    """
    requests = per_request(trace)
    scheduled = scheduled_instants(trace).reindex(requests["request_id"]).to_numpy()
    first_token = finished(trace).set_index("request_id")["first_token"].reindex(requests["request_id"]).to_numpy()
    rounds = {request_id: part for request_id, part in trace.drafts.groupby("request_id")}
    limit = _num_spec_tokens(trace)
    rows: list[dict[str, Any]] = requests.to_dict("records")  # type: ignore[assignment]
    for row, start, first in zip(rows, scheduled, first_token, strict=True):
        generation = float(row["e2e_latency"] - row["ttft"])
        seconds = generation + float(first - start)
        yield {
            "id": f"request-{row['request_id']}",
            "prompt_id": row["prompt_id"],
            "domain": row["domain"],
            "usage": {
                "prompt_tokens": int(row["prompt_len"]),
                "completion_tokens": int(row["output_len"]),
                "total_tokens": int(row["prompt_len"] + row["output_len"]),
            },
            "metrics": {
                "time_to_first_token_ms": 1e3 * float(first - start),
                "generation_time_ms": 1e3 * generation,
                "queue_time_ms": 1e3 * float(start - row["arrival"]),
                "mean_itl_ms": None if row["output_len"] < 2 else 1e3 * float(row["tpot"]),
                "tokens_per_second": int(row["output_len"]) / seconds if seconds > 0 else None,
                "speculative_decoding": _speculation(rounds.get(row["request_id"]), limit),
            },
        }


def scheduled_instants(trace: Trace) -> pd.Series[Any]:
    """When each finished request was first given to the engine, by `request_id`, in seconds.

    The column ``scheduled`` of `requests` where there is one; else the start of the iteration that ended with its
    first token, which is right where a prompt is prefilled in one iteration.
    """
    requests = finished(trace).set_index("request_id")
    if "scheduled" in requests:
        known: pd.Series[Any] = requests["scheduled"]
        return known
    steps = trace.steps.sort_values("start")
    if steps.empty:
        return requests["arrival"]
    # The iteration that runs just before the first token appears.
    place = np.searchsorted(steps["start"].to_numpy(), requests["first_token"].to_numpy(), side="left") - 1
    starts = pd.Series(steps["start"].to_numpy()[np.maximum(place, 0)], index=requests.index)
    return starts.clip(lower=requests["arrival"], upper=requests["first_token"])


def _setup(trace: Trace, num_prompts: int) -> dict[str, Any]:
    config = trace.config
    workload = config.get("workload", {})
    rate = workload.get("rate")
    # vLLM's burstiness is the shape of gamma gaps, 1 / cv².
    burstiness = 1.0 / float(workload["cv"]) ** 2 if workload.get("kind") == "Gamma" else 1.0
    target = str(config.get("target", "unknown"))
    return {
        "endpoint_type": "dspark_sim",
        "backend": "dspark_sim",
        "label": f"{config.get('policy', 'unknown')} ({'simulated' if trace.clock == 'virtual' else 'live'})",
        "model_id": target,
        "tokenizer_id": target,
        "num_prompts": num_prompts,
        "request_rate": "inf" if rate is None else rate,
        "burstiness": burstiness,
        "max_concurrency": workload.get("num_users"),
    }


def _statistics(name: str, values: np.ndarray[Any, Any]) -> dict[str, float]:
    values = values if values.size else np.zeros(1)
    row = {
        f"mean_{name}_ms": 1e3 * float(values.mean()),
        f"median_{name}_ms": 1e3 * float(np.median(values)),
        f"std_{name}_ms": 1e3 * float(values.std()),
    }
    return row | {f"p{percent}_{name}_ms": 1e3 * float(np.percentile(values, percent)) for percent in PERCENTILES}


def _peaks(trace: Trace, requests: pd.DataFrame, chunks: pd.DataFrame) -> tuple[float, int]:
    """Most chunks in one second, and most requests seen in one: vLLM takes a chunk for a token here."""
    origin = float(requests["arrival"].min())
    ends = (trace.steps["start"] + trace.steps["step_seconds"]).set_axis(trace.steps["step"])
    visible = np.concatenate((requests["arrival"] + requests["ttft"], chunks["step"].map(ends)))
    per_second = np.bincount((visible - origin).astype(np.int64))
    first = (requests["arrival"] - origin).astype("int64").to_numpy()
    last = (requests["arrival"] + requests["e2e_latency"] - origin).astype("int64").to_numpy()
    change = np.zeros(int(last.max()) + 2, dtype=np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    return float(per_second.max()), int(np.cumsum(change).max())


def _spec_decode(trace: Trace) -> dict[str, Any]:
    rounds = trace.drafts[trace.drafts["verify_len"] > 0]
    if rounds.empty:
        return {}
    num_rounds, drafted = len(rounds), int(rounds["verify_len"].sum())
    counts = rounds["num_accepted"].to_numpy(dtype=np.int64)
    depth = np.arange(_num_spec_tokens(trace))
    return {
        "spec_decode_acceptance_rate": 100.0 * int(counts.sum()) / drafted,
        "spec_decode_acceptance_length": 1.0 + int(counts.sum()) / num_rounds,
        "spec_decode_num_drafts": num_rounds,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": int(counts.sum()),
        "spec_decode_per_position_acceptance_rates": [float((counts > k).mean()) for k in depth],
    }


def _num_spec_tokens(trace: Trace) -> int:
    longest = int(trace.drafts["draft_len"].max()) if len(trace.drafts) else 0
    return max(int(trace.config.get("block_size") or 0), longest)


def _speculation(rounds: pd.DataFrame | None, limit: int) -> dict[str, Any] | None:
    if limit == 0:
        return None
    accepted = drafted = np.zeros(0, dtype=np.int64)
    if rounds is not None:
        rounds = rounds[rounds["verify_len"] > 0].sort_values("step")
        accepted, drafted = (rounds[name].to_numpy(dtype=np.int64) for name in ("num_accepted", "verify_len"))
    num_steps, num_accepted, num_drafted = accepted.size, int(accepted.sum()), int(drafted.sum())
    return {
        "mean_acceptance_length": 1.0 + num_accepted / num_steps if num_steps else None,
        "draft_acceptance_rate": num_accepted / num_drafted if num_drafted else None,
        "acceptance_histogram": np.bincount(accepted, minlength=limit + 1).tolist(),
        "acceptance_histogram_by_draft_length": {
            str(length): np.bincount(accepted[drafted == length], minlength=length + 1).tolist()
            for length in np.unique(drafted).tolist()
        },
        "num_spec_steps": num_steps,
        "num_accepted_draft_tokens": num_accepted,
        "num_draft_tokens": num_drafted,
        "num_spec_tokens": limit,
        "per_step_accepted": accepted.tolist(),
        "per_step_drafted": drafted.tolist(),
    }
