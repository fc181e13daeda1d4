from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import constant_cost, toy_cost, toy_trace

from dspark_sim.analysis.metrics import (
    conditional_acceptance,
    inter_chunk,
    inter_token_seconds,
    per_request,
    summary,
)
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler
from dspark_sim.simulate import simulate
from dspark_sim.trace import SCHEMAS, SPANS, Trace
from dspark_sim.workload import ClosedLoop, Poisson

COST = toy_cost()


def by_hand() -> Trace:
    """Two requests, three rounds, every number written out.

    Request 0 prefills over [0, 1], decodes at [1, 2] (2 of 3 drafts, 3 tokens) and [4, 6] (0 of 3, 1 token): 5
    tokens in all. Request 1 prefills over [2, 4] and decodes at [4, 6] (1 of 1 verified of 3, 2 tokens).
    """
    rows = {
        "requests": [
            {"request_id": 0, "prompt_id": "a", "domain": "x", "arrival": 0.0, "prompt_len": 4, "max_tokens": 5}
            | {"output_len": 5, "first_token": 1.0, "finish": 6.0, "finish_reason": "length", "num_preemptions": 0},
            {"request_id": 1, "prompt_id": "b", "domain": "y", "arrival": 0.5, "prompt_len": 7, "max_tokens": 5}
            | {"output_len": 3, "first_token": 4.0, "finish": 6.0, "finish_reason": "stop", "num_preemptions": 0},
        ],
        "steps": [
            {"step": step, "start": start, "step_seconds": seconds, "replica": 0}
            for step, (start, seconds) in enumerate([(0.0, 1.0), (1.0, 1.0), (2.0, 2.0), (4.0, 2.0)])
        ],
        "drafts": [
            dict(
                zip(
                    ("step", "request_id", "position", "draft_len", "verify_len", "num_accepted", "num_emitted"),
                    values,
                    strict=True,
                )
            )
            for values in [(1, 0, 4, 3, 3, 2, 3), (3, 0, 7, 3, 3, 0, 1), (3, 1, 7, 3, 1, 1, 2)]
        ],
    }
    tables = {name: pa.Table.from_pylist(rows.get(name, []), schema=schema) for name, schema in SCHEMAS.items()}
    return Trace(tables, "wall")


def test_definitions_by_hand() -> None:
    values = summary(by_hand())
    expected: dict[str, Any] = {
        "num_requests": 2,
        "num_output_tokens": 8,
        "rounds": 3,
        "makespan_seconds": 6.0,
        "output_throughput": 8 / 6,
        "mean_acceptance_length": (3 + 1 + 2) / 3,
        "draft_acceptance_rate": 3 / 9,
        "verification_budget": (4 + 4 + 2) / 3,
        "ttft_mean": (1.0 + 3.5) / 2,
        "tpot_mean": (5 / 4 + 2 / 2) / 2,
        "user_tokens_per_second": (4 / 5 + 2 / 2) / 2,
        "e2e_latency_mean": (6.0 + 5.5) / 2,
        # Request 0 waits 1 s, then 4 s (request 1's prefill counts); request 1 waits 2 s.
        "icl_mean": (1.0 + 4.0 + 2.0) / 3,
        "itl_mean": (1.0 + 0 + 0 + 4.0 + 2.0 + 0) / 6,
    }
    assert values[list(expected)].to_dict() == pytest.approx(expected)


def test_per_request_by_hand() -> None:
    frame = per_request(by_hand()).set_index("request_id")
    assert frame["rounds"].tolist() == [2, 1]
    assert frame["num_drafted"].tolist() == [6, 3]
    assert frame["num_verified"].tolist() == [6, 1]
    assert frame["num_accepted"].tolist() == [2, 1]
    assert frame["ttft"].tolist() == [1.0, 3.5]


def test_conditional_acceptance_by_hand() -> None:
    frame = conditional_acceptance(by_hand())
    assert frame["num_reached"].tolist() == [3, 1, 1]  # Position 2 of the third round was not verified.
    assert frame["num_accepted"].tolist() == [2, 1, 0]
    assert frame["conditional_acceptance"].tolist() == [2 / 3, 1.0, 0.0]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 6), st.booleans())
def test_identities(seed: int, verify_len: int, users: int, open_loop: bool) -> None:
    recorded = toy_trace(5, 16, seed=seed)
    trace = simulate(recorded, Fixed(verify_len), Poisson(20.0) if open_loop else ClosedLoop(users), COST)
    requests, values, chunks = per_request(trace), summary(trace), inter_chunk(trace)
    # Tokens: the first of each request comes from its prefill, all others from rounds.
    assert requests["output_len"].sum() == len(requests) + trace.drafts["num_emitted"].sum()
    assert inter_token_seconds(chunks).size == requests["output_len"].sum() - len(requests)
    # Waiting adds up: ttft and the gaps between chunks are the whole latency.
    gaps = chunks.groupby("request_id")["icl"].sum().reindex(requests["request_id"]).fillna(0.0).to_numpy()
    np.testing.assert_allclose(requests["ttft"] + gaps, requests["e2e_latency"], atol=1e-9)
    assert inter_token_seconds(chunks).sum() == pytest.approx(chunks["icl"].sum())
    # Acceptance lies between one token a round and the whole block.
    if values["rounds"]:
        assert 1 <= values["mean_acceptance_length"] <= values["verification_budget"] <= 1 + verify_len
    # Little's law.
    concurrency = requests["e2e_latency"].sum() / values["makespan_seconds"]
    assert values["output_throughput"] == pytest.approx(
        concurrency * requests["output_len"].sum() / requests["e2e_latency"].sum()
    )


def test_without_drafts_a_round_is_a_token() -> None:
    trace = simulate(toy_trace(3, 12), Fixed(0), ClosedLoop(1), constant_cost(0.5, 2.0))
    values = summary(trace)
    assert values["mean_acceptance_length"] == values["verification_budget"] == 1
    assert np.isnan(values["draft_acceptance_rate"])
    assert values["tpot_mean"] == pytest.approx(0.5)
    assert values["itl_p99"] == pytest.approx(values["icl_p50"]) == pytest.approx(0.5)
    assert values["ttft_mean"] == pytest.approx(2.0)


def test_a_request_of_one_token_has_no_tpot() -> None:
    frame = per_request(simulate(toy_trace(2, 8), Fixed(3), ClosedLoop(1), COST)).set_index("prompt_id")
    assert frame.loc["toy-1", "output_len"] == 1 and frame.loc["toy-1", "rounds"] == 0
    assert np.isnan(frame.loc["toy-1", "tpot"]) and np.isfinite(frame.loc["toy-0", "tpot"])


def test_anchors_give_the_true_conditional_acceptance() -> None:
    chance = (0.9, 0.7, 0.5, 0.3)
    recorded = toy_trace(40, 100, 4, chance, seed=3)
    measured = conditional_acceptance(recorded, "anchors")
    for position, expected in enumerate(chance, 1):
        reached = measured.loc[position, "num_reached"]
        # The last anchors of an output have less than a block left, so positions there end unaccepted: allow 2 %.
        spread = 4 * np.sqrt(expected * (1 - expected) / reached)
        assert measured.loc[position, "conditional_acceptance"] == pytest.approx(expected, abs=spread + 0.02)


def test_scheduled_rounds_overstate_acceptance() -> None:
    """The reason for anchors: verification stops where confidence is low, so what it reaches is not typical."""
    rng = np.random.default_rng(0)
    recorded = toy_trace(30, 60, 5, 0.5, seed=1)
    anchors = recorded.tables["anchors"].to_pylist()
    for row in anchors:  # A drafter that knows: confident exactly where it is right, nearly.
        right = np.arange(len(row["draft_tokens"])) < row["num_accepted"]
        row["confidence"] = np.where(right, 0.95, 0.1) + rng.uniform(-0.04, 0.04, right.size)
    recorded = recorded.with_anchors(pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"]))
    trace = simulate(recorded, PrefixScheduler(COST), ClosedLoop(4), COST)
    scheduled, dense = conditional_acceptance(trace), conditional_acceptance(recorded, "anchors")
    assert scheduled.loc[2, "conditional_acceptance"] > dense.loc[2, "conditional_acceptance"] + 0.1


def test_refusals() -> None:
    empty = Trace({name: schema.empty_table() for name, schema in SCHEMAS.items()}, "virtual")
    with pytest.raises(UserError, match="no finished request"):
        summary(empty)
    with pytest.raises(UserError, match="no anchors"):
        conditional_acceptance(by_hand(), "anchors")


def test_spans_add_up() -> None:
    steps: pd.DataFrame = simulate(toy_trace(), Fixed(3), ClosedLoop(3), COST).steps
    np.testing.assert_allclose(steps[[f"{span}_seconds" for span in SPANS]].sum(axis=1), steps["step_seconds"])
