import numpy as np
import pyarrow as pa
import pytest
from toy import toy_cost, toy_trace

from dspark_sim.analysis.fidelity import ROUND_COLUMNS, compare, rounds_equal
from dspark_sim.analysis.metrics import summary
from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed
from dspark_sim.simulate import simulate
from dspark_sim.trace import SCHEMAS, Trace
from dspark_sim.workload import ClosedLoop

COST = toy_cost()


def run(verify_len: int = 4, users: int = 2, cost: CostModel = COST, prompts: int = 5, seed: int = 0) -> Trace:
    return simulate(toy_trace(prompts, 20, seed=seed), Fixed(verify_len), ClosedLoop(users), cost, num_requests=10)


def scaled(factor: float) -> CostModel:
    def slower(curve: Curve) -> Curve:
        levels = tuple(factor * level for level in curve.levels)
        return Curve(curve.knots, levels, tuple((name, factor * value) for name, value in curve.linear))

    names = ("verify", "draft", "prefill", "host", "prefill_host")
    return CostModel(**{name: slower(getattr(COST, name)) for name in names})


def edited(trace: Trace, table: str, row: int, column: str, change: int) -> Trace:
    rows = trace.tables[table].to_pylist()
    rows[row][column] += change
    tables = {**trace.tables, table: pa.Table.from_pylist(rows, schema=SCHEMAS[table])}
    return Trace(tables, trace.clock, trace.config, trace.provenance)


def test_a_run_equals_itself() -> None:
    trace = run()
    verdict = rounds_equal(trace, run())
    assert verdict and str(verdict) == f"all {len(trace.drafts)} rounds of 10 requests are equal"
    frame = compare(trace, run(), run())
    assert (frame["error"].fillna(0) == 0).all() and (frame["repeat_error"].fillna(0) == 0).all()


def test_times_and_batching_play_no_part_in_rounds() -> None:
    """Under a fixed policy a request's rounds do not depend on who else runs, nor on the clock."""
    assert rounds_equal(run(users=1), run(users=6, cost=scaled(3.0)))


@pytest.mark.parametrize("column", ROUND_COLUMNS)
@pytest.mark.parametrize("row", [0, 7, -1])
def test_a_planted_difference_is_found_and_named(column: str, row: int) -> None:
    live = run()
    planted = edited(live, "drafts", row, column, 1)
    drafts = live.drafts.iloc[row]
    request_id = int(drafts["request_id"])
    earlier = live.drafts[(live.drafts["request_id"] == request_id) & (live.drafts["step"] < drafts["step"])]
    verdict = rounds_equal(live, planted)
    assert not verdict
    where = f"request {request_id} (prompt toy-{request_id % 5}), round {len(earlier) + 1}: "
    assert verdict.message == f"{where}{column} is {drafts[column]} live and {drafts[column] + 1} simulated"


def test_a_missing_round_is_named_by_the_side_that_has_it() -> None:
    live = run()
    last = live.drafts["step"].idxmax()
    kept = live.tables["drafts"].filter(pa.array(np.arange(len(live.drafts)) != last))
    shorter = Trace({**live.tables, "drafts": kept}, "virtual")
    assert "only the live run has it, the simulated run had ended" in rounds_equal(live, shorter).message
    assert "only the simulated run has it, the live run had ended" in rounds_equal(shorter, live).message


def test_another_policy_has_other_rounds() -> None:
    verdict = rounds_equal(run(4), run(2))
    assert not verdict and "draft_len is" in verdict.message


def test_errors_are_relative_to_live_with_a_sign() -> None:
    frame = compare(run(), run(cost=scaled(1.1)), run(cost=scaled(0.8))).set_index("metric")
    for metric in ("tpot_mean", "ttft_p90", "e2e_latency_p99", "icl_p50", "makespan_seconds"):
        assert frame.loc[metric, "error"] == pytest.approx(0.1)
        assert frame.loc[metric, "repeat_error"] == pytest.approx(-0.2)
    for metric in ("output_throughput", "user_tokens_per_second"):
        assert frame.loc[metric, "error"] == pytest.approx(1 / 1.1 - 1)
    for metric in ("rounds", "num_output_tokens", "mean_acceptance_length", "verification_budget"):
        assert frame.loc[metric, "error"] == 0.0
    assert frame["live"].to_dict() == pytest.approx(summary(run()).to_dict(), nan_ok=True)


def test_without_a_repeat_the_noise_floor_is_unknown() -> None:
    frame = compare(run(), run())
    assert list(frame.columns) == ["metric", "live", "simulated", "error", "repeat_error"]
    assert frame["repeat_error"].isna().all()


def test_other_prompts_are_refused() -> None:
    live, other = run(), run(prompts=6)
    for check in (compare, rounds_equal):
        with pytest.raises(UserError, match="prompt toy-4 was served 2 times in one run and 1 times in the other"):
            check(live, other)
    with pytest.raises(UserError, match="was served"):
        compare(live, run(), other)
    fewer = simulate(toy_trace(5, 20), Fixed(4), ClosedLoop(2), COST, num_requests=9)
    with pytest.raises(UserError, match="prompt toy-4 was served 2 times in one run and 1 times in the other"):
        compare(live, fewer)


def test_the_same_prompts_under_other_numbers_are_refused() -> None:
    live = run()
    rows = live.tables["requests"].to_pylist()
    rows[0]["prompt_id"], rows[1]["prompt_id"] = rows[1]["prompt_id"], rows[0]["prompt_id"]
    swapped = Trace({**live.tables, "requests": pa.Table.from_pylist(rows, schema=SCHEMAS["requests"])}, "virtual")
    with pytest.raises(UserError, match="request 0 is prompt toy-0 in the live run and toy-1 in the simulated one"):
        rounds_equal(live, swapped)
