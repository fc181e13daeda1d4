"""The fidelity study on "live" runs of known costs, which the simulator makes: without torch.

What is live here is a toy recording's replay with seconds that nobody but the test knows: true costs, a factor that
changes from run to run (drift) and noise on every iteration. So errors, rankings and causes are known beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.stats import kendalltau
from toy import toy_cost, toy_trace

from dspark_sim.analysis import fidelity_report, fidelity_scores
from dspark_sim.analysis.fidelity_scores import METRICS, SPLITS, error_table, kendall_tau, ranking_table
from dspark_sim.cost import CostModel
from dspark_sim.engine.explore import Explore
from dspark_sim.errors import UserError
from dspark_sim.fidelity_grid import SCALES, FidelityScale, Study, open_loop, study_policies
from dspark_sim.fidelity_splits import CellRuns, busy_seconds, own_seconds, price_error
from dspark_sim.fidelity_study import Results, analyse, is_shared, run_fidelity
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import LaggedPrefixScheduler
from dspark_sim.scheduler import SchedulerConfig
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.run import simulate
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop, Poisson, Workload

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine

HARDWARE = {"device": "toy processor", "model": "toy", "dtype": "float32", "num_threads": 1}
SMALL = FidelityScale(((4, 12),), max_tokens=16, profile_tokens=16)
FEW = FidelityScale(((1, 3), (2, 6)), max_tokens=16, profile_tokens=16, all_policies=False)
NUM_PROMPTS = 12
OUTPUT_LEN = 16


class TrueCost(CostModel):
    """Toy costs times a factor and noise, other than what a table of them says."""

    def __init__(self, factor: float, noise: float, seed: int) -> None:
        super().__init__(**{name: getattr(toy_cost(), name) for name in ("verify", "draft", "prefill", "host")})
        object.__setattr__(self, "_state", (factor, noise, np.random.default_rng(seed)))

    def _times(self, seconds: float) -> float:
        factor, noise, rng = vars(self)["_state"]
        return float(seconds * factor * np.exp(noise * rng.standard_normal()))

    def step_seconds(self, batch_tokens: Any, context_tokens: int, num_requests: int) -> Any:
        return self._times(super().step_seconds(batch_tokens, context_tokens, num_requests))

    def draft_seconds(self, num_requests: int, draft_len: int, context_tokens: int) -> float:
        return self._times(super().draft_seconds(num_requests, draft_len, context_tokens))

    def prefill_seconds(self, num_tokens: int) -> float:
        return self._times(super().prefill_seconds(num_tokens))

    def host_seconds(self, num_requests: int) -> float:
        return self._times(super().host_seconds(num_requests))


class ToyEngine:
    """What the study asks of an engine. `factors` are taken in turn, one a run."""

    def __init__(self, noise: float = 0.0, factors: Sequence[float] = (1.0,), stop_after: int | None = None) -> None:
        self.recording = toy_trace(NUM_PROMPTS, OUTPUT_LEN, 5, acceptance=0.8)
        self.recorded = RecordedAnchors.from_trace(self.recording)
        self.noise, self.factors, self.stop_after = noise, factors, stop_after
        self.hardware = dict(HARDWARE)
        self.drafter_name, self.block_size, self.has_confidence = "toy", 5, True
        self.num_runs = 0

    def with_drafter(self, name: str) -> ToyEngine:
        assert name == "none"
        return self

    def warm_up(self, prompts: Sequence[object]) -> None:
        pass

    def anchors(self, trace: Trace, *, progress: bool) -> Trace:
        return self.recording

    def record(
        self,
        prompts: Sequence[object],
        policy: SpeculationPolicy,
        workload: Workload,
        *,
        max_tokens: int,
        num_requests: int | None = None,
        progress: bool = False,
    ) -> Trace:
        if self.num_runs == self.stop_after:
            raise KeyboardInterrupt
        cost = TrueCost(self.factors[self.num_runs % len(self.factors)], self.noise, self.num_runs)
        self.num_runs += 1
        users = workload.num_users if isinstance(workload, ClosedLoop) else 8
        trace = simulate(
            self.recorded,
            policy,
            workload,
            cost,
            num_requests=num_requests,
            scheduler=SchedulerConfig(max_num_seqs=users),
        )
        return Trace(trace.tables, "wall", trace.config, {**trace.provenance, **self.hardware})

    def profile_pass(self, prompts: Sequence[object], users: int, *, max_tokens: int, num_requests: int, seed: int):
        return self.record(
            prompts, Explore(5, seed), ClosedLoop(users), max_tokens=max_tokens, num_requests=num_requests
        )


def study(out: Path, engine: ToyEngine, scale: FidelityScale = SMALL, **options: Any) -> Results:
    return run_fidelity(out, scale=scale, engine=engine, progress=False, **options)  # type: ignore[arg-type]


def analysed(out: Path, engine: ToyEngine, scale: FidelityScale = SMALL) -> Results:
    """A study without its report."""
    grid = Study(out, scale)
    grid.open({})
    grid.record(engine, progress=False)  # type: ignore[arg-type]
    return analyse(grid.runs(), grid.passes(), grid.anchors, HARDWARE)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All policies at one concurrency, with 5 % noise on every iteration."""
    return analysed(tmp_path_factory.mktemp("noisy") / "study", ToyEngine(noise=0.05))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A study with its report."""
    out = tmp_path_factory.mktemp("reported") / "study"
    return out, study(out, ToyEngine(noise=0.05), FEW, json_path=out / "rows.json")


# ---- identity -------------------------------------------------------------------------------------------------------


def test_every_replay_with_its_own_seconds_has_the_same_rounds(noisy: Results) -> None:
    """Closed and Poisson, load-aware policies too: noise decides who is in a batch, and the replay follows it."""
    identity = noisy.identity
    assert len(identity) == 7 * 2 * 2
    assert identity["rounds_equal"].all() and identity["batches_equal"].all()
    assert set(identity["policy"]) == {"none", "fixed-2", "fixed-4", "fixed-5", "threshold-0.5", "prefix", "lagged-2"}


def test_without_own_seconds_load_aware_rounds_in_an_open_loop_differ(noisy: Results) -> None:
    """The test above would notice: the same replays at fitted seconds are not all equal."""
    cells = noisy.errors.drop_duplicates(["split", "policy", "concurrency", "arrivals"])
    assert cells.loc[cells["clock_free"], "rounds_equal"].all()
    clocked = cells[~cells["clock_free"]]
    assert set(clocked["policy"]) == {"prefix", "lagged-2"} and set(clocked["arrivals"]) == {"poisson"}
    assert not clocked["rounds_equal"].all()
    exact = noisy.errors[noisy.errors["metric"].isin(fidelity_scores.EXACT_METRICS)]
    assert (exact.loc[exact["clock_free"], "error"] == 0.0).all()
    assert exact.loc[~exact["clock_free"], "within"].isna().all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [PrefixScheduler, LaggedPrefixScheduler])
def test_own_seconds_count_waiting_and_host_gaps(seed: int, kind: Any) -> None:
    """A live server that starts late: gaps after iterations and after waking up, as a real one has."""
    engine = ToyEngine(noise=0.3)
    engine.num_runs = seed
    workload = Poisson(8.0, seed)
    live = engine.record([], kind(toy_cost()), workload, max_tokens=16, num_requests=30)
    seconds = own_seconds(live)
    steps = live.steps
    assert seconds.sum() == pytest.approx(
        steps["start"].iloc[-1] + steps["step_seconds"].iloc[-1] - live.requests["arrival"].min()
    )
    waited = seconds > steps["step_seconds"] + 1e-9
    assert waited.any() and not waited.all()
    busy = busy_seconds(live)
    assert busy[waited.to_numpy()] == pytest.approx(steps.loc[waited, "step_seconds"].to_numpy())


def test_host_gaps_between_iterations_are_busy() -> None:
    live = ToyEngine().record([], Fixed(3), ClosedLoop(2), max_tokens=16, num_requests=6)
    steps = live.steps.assign(start=live.steps["start"] * 1.5)
    stretched = Trace({**live.tables}, "wall", live.config)
    stretched.__dict__["steps"] = steps
    stretched.__dict__["requests"] = live.requests.assign(finish=live.requests["finish"] * 1.5)
    assert busy_seconds(stretched)[:-1] == pytest.approx(1.5 * live.steps["step_seconds"].to_numpy()[:-1])


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_known_costs_are_found_again(tmp_path: Path) -> None:
    """Without noise every split prices every cell but those that lie beyond what it saw."""
    results = analysed(tmp_path / "study", ToyEngine(), FEW)
    errors = results.errors
    assert (errors["repeat_error"].fillna(0.0).abs() < 1e-12).all()
    same = errors[errors["split"] == "same policy"]
    assert same["error"].abs().max() < 0.01 and same["within"].fillna(True).all()
    profile = errors[(errors["split"] == "profile") & (errors["metric"] == "output_throughput")]
    assert profile["error"].abs().median() < 0.02
    ranking = results.ranking[results.ranking["split"] == "same policy"]
    assert ranking["regret"].max() == 0.0 and (ranking["tau"] == 1.0).all()
    assert len(ranking) == 4 and (ranking["num_pairs"] == 1).all()


def test_a_slower_second_repeat_is_the_error_it_should_be(tmp_path: Path) -> None:
    """Costs fitted on first repeats, and second ones 10 % slower: 1/1.1 - 1, and it lies inside the noise floor."""
    scale = FidelityScale(((2, 8),), max_tokens=16, profile_tokens=16, all_policies=False)
    # Preliminary pass, recording; then four runs and a pass, twice.
    factors = [1.0, 1.0, *[1.0] * 5, *[1.1] * 5]
    errors = analysed(tmp_path / "study", ToyEngine(factors=factors), scale).errors
    closed = errors[(errors["split"] == "same policy") & (errors["arrivals"] == "closed")].set_index(
        ["policy", "metric"]
    )
    for metric in ("tpot_mean", "e2e_latency_p50", "icl_mean", "ttft_mean"):
        found = closed.xs(metric, level="metric")
        assert found["error"].to_numpy() == pytest.approx(1 / 1.1 - 1, abs=0.01)
        assert found["repeat_error"].to_numpy() == pytest.approx(0.1)
        assert found["floor"].to_numpy() == pytest.approx(0.1, abs=0.01) and found["within"].all()
        assert found["price_drift"].to_numpy() == pytest.approx(0.1, abs=0.02)
        assert found["price_error"].to_numpy() == pytest.approx(1 / 1.1 - 1, abs=0.01)
    # Held-out policies are judged on the mean of both, whose costs they were fitted on.
    held = errors[(errors["split"] == "held-out policy") & (errors["metric"] == "icl_mean")]
    assert held.loc[held["arrivals"] == "closed", "error"].abs().median() < 0.03


def test_held_out_runs_are_held_out(tmp_path: Path) -> None:
    """One policy's iterations are dearer than anyone's: only the splits that saw them know."""

    class Dear(ToyEngine):
        def record(self, prompts: Any, policy: Any, *rest: Any, **options: Any) -> Trace:
            self.factors = (2.0,) if policy.label() == "prefix" else (1.0,)
            return super().record(prompts, policy, *rest, **options)

    scale = FidelityScale(((4, 8),), max_tokens=16, profile_tokens=16, all_policies=False)
    errors = analysed(tmp_path / "study", Dear(), scale).errors
    tpot = errors[(errors["metric"] == "tpot_mean") & (errors["arrivals"] == "closed")].set_index(["split", "policy"])
    held, same = tpot.loc[("held-out policy", "prefix"), "error"], tpot.loc[("same policy", "prefix"), "error"]
    assert float(held) == pytest.approx(-0.5, abs=0.05) and float(same) > float(held) + 0.05
    # One concurrency: there is none to hold out.
    assert "held-out concurrency" not in set(errors["split"])
    missed = fidelity_scores.misses(errors)
    causes = missed[(missed["split"] == "held-out policy") & (missed["policy"] == "prefix")]["cause"]
    assert len(causes) and causes.str.startswith("price").mean() > 0.5


def test_price_error_prices_the_iterations_that_ran() -> None:
    live = ToyEngine(factors=(1.25,)).record([], Fixed(3), ClosedLoop(4), max_tokens=16, num_requests=12)
    truth = replace(toy_cost(), prefill_host=TrueCost(1.0, 0.0, 0).prefill_host)
    assert price_error(truth, live) == pytest.approx(1 / 1.25 - 1)


def cell(**values: Any) -> dict[str, Any]:
    return {"policy": "a", "concurrency": 1, "arrivals": "closed", **dict.fromkeys(METRICS, 1.0), **values}


def frames(first: float, second: float, simulated: float, **extra: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    live = [cell(repeat=k, clock_free=True, tpot_mean=value) for k, value in ((1, first), (2, second))]
    twins = [cell(split=split, tpot_mean=simulated, **extra) for split in SPLITS]
    return pd.DataFrame(live), pd.DataFrame(twins)


def test_errors_targets_and_limits_by_hand() -> None:
    table = error_table(*frames(1.0, 1.04, 1.06), shared_clock=True)
    rows = table[table["metric"] == "tpot_mean"].set_index("split")
    same, held = rows.loc["same policy"], rows.loc["held-out policy"]
    assert (same["live"], held["live"]) == (1.04, 1.02)
    assert same["error"] == pytest.approx(1.06 / 1.04 - 1) and held["error"] == pytest.approx(1.06 / 1.02 - 1)
    assert same["repeat_error"] == pytest.approx(0.04) == same["floor"]
    assert (same["target"], held["target"]) == (0.02, 0.05)
    assert same["limit"] == pytest.approx(0.06) and same["within"] and held["within"]
    strict = error_table(*frames(1.0, 1.04, 1.08), shared_clock=False)
    rows = strict[strict["metric"] == "tpot_mean"].set_index("split")
    assert rows.loc["same policy", "limit"] == 0.02 and not rows.loc["same policy", "within"]
    assert rows.loc["held-out policy", "within"] == (1.08 / 1.02 - 1 <= 0.05)
    kinds = {"ttft_mean": (0.05, 0.05), "ttft_p99": (0.1, 0.1), "icl_p99": (0.1, 0.1), "icl_p50": (0.02, 0.05)}
    for metric, targets in kinds.items():
        assert (fidelity_scores.target("same policy", metric), fidelity_scores.target("profile", metric)) == targets


def test_the_noise_floor_is_not_below_the_typical_one() -> None:
    live = [
        cell(policy=name, repeat=k, clock_free=True, tpot_mean=value)
        for name, values in {"a": (1.0, 1.0), "b": (1.0, 1.1), "c": (1.0, 1.2)}.items()
        for k, value in enumerate(values, 1)
    ]
    twins = [cell(policy=name, split="profile") for name in "abc"]
    table = error_table(pd.DataFrame(live), pd.DataFrame(twins), shared_clock=True)
    floors = table[table["metric"] == "tpot_mean"].set_index("policy")["floor"]
    assert floors.to_dict() == pytest.approx({"a": 0.1, "b": 0.1, "c": 0.2})


# ---- ranking --------------------------------------------------------------------------------------------------------


def ranked(live: Sequence[float], simulated: Sequence[float], noise: float, arrivals: str = "closed") -> pd.Series:
    metric = fidelity_scores.RANKED_BY[arrivals]
    names = [f"p{k}" for k in range(len(live))]
    runs = [
        cell(policy=name, arrivals=arrivals, repeat=k, clock_free=True, **{metric: value * (1 + noise * (k - 1))})
        for name, value in zip(names, live, strict=True)
        for k in (1, 2)
    ]
    twins = [
        cell(policy=name, arrivals=arrivals, split="profile", **{metric: value})
        for name, value in zip(names, simulated, strict=True)
    ]
    table = error_table(pd.DataFrame(runs), pd.DataFrame(twins), shared_clock=True)
    return ranking_table(table).iloc[0]


def test_ranking_by_hand() -> None:
    # One of six pairs is the wrong way round, and it is p2 with p3, 2 % apart.
    found = ranked((10.0, 20.0, 30.0, 30.6), (10.0, 20.0, 31.0, 30.0), 0.0)
    assert found["tau"] == pytest.approx((5 - 1) / 6) and found["tau_clear"] == found["tau"]
    assert (found["best"], found["choice"]) == ("p3", "p2")
    assert found["regret"] == pytest.approx(1 - 30.0 / 30.6) and found["regret_within"] and not found["tau_within"]
    # With 5 % noise that pair is no evidence.
    noisy = ranked((10.0, 20.0, 30.0, 30.6), (10.0, 20.0, 31.0, 30.0), 0.05)
    assert noisy["tau"] == pytest.approx(4 / 6) and noisy["tau_clear"] == 1.0 and noisy["tau_clear_within"]
    assert (noisy["num_clear_pairs"], noisy["num_pairs"]) == (5, 6)


def test_an_open_loop_is_ranked_by_latency() -> None:
    found = ranked((1.0, 2.0, 3.0), (2.5, 2.0, 3.0), 0.0, "poisson")
    assert (found["best"], found["choice"]) == ("p0", "p1")
    assert found["regret"] == pytest.approx(1.0) and found["tau"] == pytest.approx(1 / 3)


def test_all_within_noise_says_nothing() -> None:
    found = ranked((1.0, 1.01, 1.02), (3.0, 2.0, 1.0), 0.1)
    assert found["tau"] == -1.0 and np.isnan(found["tau_clear"]) and found["num_clear_pairs"] == 0
    assert pd.isna(found["tau_clear_within"])


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for values in (rng.normal(size=(2, 7)), rng.integers(0, 4, (2, 7)).astype(float)):
        assert kendall_tau(*values) == pytest.approx(kendalltau(*values).statistic, nan_ok=True)


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_the_report_and_its_files(reported: tuple[Path, Results]) -> None:
    out, results = reported
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    for part in (
        "# Fidelity",
        "16 of 16",
        "### Held-out concurrency",
        "τ clear",
        "toy processor",
    ):
        assert part in text, part
    table = pq.read_table(out / "report" / "cells.parquet")
    assert table.num_rows == len(results.errors) == 4 * 8 * len(METRICS)
    assert (out / "report" / "cells.parquet").stat().st_size < 300_000
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert {row["split"] for row in summary["summary"]} == set(SPLITS)
    assert all(row["rounds_equal"] for row in summary["identity"])
    rows = json.loads((out / "rows.json").read_text())["rows"]
    wanted = {"split", "policy", "concurrency", "arrivals", "metric", "live", "simulated", "error", "within"}
    assert len(rows) == table.num_rows and wanted <= rows[0].keys()
    for name in ("live_against_simulated", "errors", "throughput"):
        assert (out / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text
    assert sum(path.stat().st_size for path in (out / "report").iterdir()) < 1_500_000


def test_a_finished_study_is_not_run_again(reported: tuple[Path, Results]) -> None:
    out, results = reported
    engine = ToyEngine(stop_after=0)
    again = study(out, engine, FEW)
    assert engine.num_runs == 0
    pd.testing.assert_frame_equal(again.errors, results.errors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[CellRuns]:
    """The runs of a study that was not interrupted."""
    grid = Study(tmp_path_factory.mktemp("whole") / "study", FEW)
    grid.open({})
    grid.record(ToyEngine(noise=0.1), progress=False)  # type: ignore[arg-type]
    return grid.runs()


@pytest.mark.parametrize("stop_after", [0, 2, 3, 9])
def test_an_interrupted_study_goes_on(tmp_path: Path, stop_after: int, whole: list[CellRuns]) -> None:
    """Interrupted in the preliminary profile, before the recording, between runs: only what is missing runs."""
    total = 2 + 1 + 2 * (2 * 4 + 2)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "study", ToyEngine(stop_after=stop_after), FEW)
    assert not list((tmp_path / "study").rglob(".*"))
    second = ToyEngine(noise=0.1)
    # Its noise goes on where the first one's ended.
    second.num_runs = stop_after
    grid = Study(tmp_path / "study", FEW)
    grid.open({"scale": json.loads(json.dumps(asdict(FEW)))})
    assert not grid.is_complete
    grid.record(second, progress=False)  # type: ignore[arg-type]
    assert second.num_runs == total and grid.is_complete
    assert [one.cell for one in grid.runs()] == [one.cell for one in whole]
    if stop_after == 0:
        for mine, theirs in zip(grid.runs(), whole, strict=True):
            pd.testing.assert_frame_equal(mine.second.steps, theirs.second.steps)


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    scale = FidelityScale(((1, 3),), max_tokens=16, profile_tokens=16, all_policies=False)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "study", ToyEngine(stop_after=4), scale)
    files = sorted(path for path in (tmp_path / "study").rglob("*") if path.is_file())
    for key, value in {"device": "another", "model": "larger", "num_threads": 8}.items():
        other = ToyEngine()
        other.hardware[key] = value
        with pytest.raises(UserError, match=f"holds a study with {key} .* and this one has {value}; give another"):
            study(tmp_path / "study", other, scale)
    other = ToyEngine()
    other.block_size = 4
    with pytest.raises(UserError, match="drafter's block_size 5 and this one has 4"):
        study(tmp_path / "study", other, scale)
    with pytest.raises(UserError, match="holds a study with scale"):
        study(tmp_path / "study", ToyEngine(), replace(scale, max_tokens=12))
    assert files == sorted(path for path in (tmp_path / "study").rglob("*") if path.is_file())


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is no fidelity study"):
        study(tmp_path, ToyEngine())
    with pytest.raises(UserError, match="is a file; give a folder"):
        study(tmp_path / "notes.txt", ToyEngine())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plan.json").write_text("{")
    with pytest.raises(UserError, match="is no plan of a fidelity study"):
        study(tmp_path / "broken", ToyEngine())
    without = ToyEngine()
    without.block_size = 0
    with pytest.raises(UserError, match="proposes nothing"):
        study(tmp_path / "plain", without)
    assert not (tmp_path / "plain").exists()


# ---- the grid -------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_designs() -> None:
    table = toy_cost()
    labels = [policy.label() for policy in study_policies(7, True, table)]
    assert labels == ["none", "fixed-2", "fixed-4", "fixed-7", "threshold-0.5", "prefix", "lagged-2"]
    assert [policy.label() for policy in study_policies(4, False, table)] == ["none", "fixed-2", "fixed-4"]
    assert [policy.label() for policy in study_policies(1, False, table)] == ["none", "fixed-1"]
    for name in ("laptop", "gpu"):
        assert [users for users, _ in SCALES[name].num_requests] == [1, 2, 4, 8, 16, 32]
    assert is_shared(HARDWARE) and not is_shared({"device": "NVIDIA H100"})


def test_an_open_loop_asks_for_four_fifths_of_what_plain_decoding_serves() -> None:
    anchors = RecordedAnchors.from_trace(toy_trace(NUM_PROMPTS, OUTPUT_LEN, 5))
    for users in (1, 4, 8):
        found = open_loop(anchors, toy_cost(), users, 20, 0.8)
        served = simulate(anchors, Fixed(0), ClosedLoop(users), toy_cost(), num_requests=12 * users).requests
        if 12 * users >= 20:
            assert found["rate"] == pytest.approx(0.8 * len(served) / served["finish"].max(), rel=0.01)
        first, second = Poisson(**found).arrivals(2)
        assert second - first >= min(0.01, 0.1 / found["rate"])
        # A server with room for N is busy that share of a long run.
        if users == 1:
            long = simulate(
                *(anchors, Fixed(0), Poisson(**found), toy_cost()),
                num_requests=800,
                scheduler=SchedulerConfig(max_num_seqs=1),
            )
            assert long.steps["step_seconds"].sum() / long.requests["finish"].max() == pytest.approx(0.8, abs=0.06)


def test_a_report_without_misses_says_so() -> None:
    live, twins = frames(1.0, 1.0, 1.0, price_error=0.0, price_drift=0.0, extrapolated=False, rounds_equal=True)
    errors = error_table(live, twins, shared_clock=True)
    assert fidelity_scores.misses(errors).empty
    live = live.assign(num_requests=3, makespan_seconds=60.0, host_gap=0.01, mean_running=1.0)
    verdict = {"rounds_equal": False, "batches_equal": True, "num_rounds": 5, "message": "round 3 differs"}
    identity = pd.DataFrame([{**cell(repeat=1), **verdict}])
    about = fidelity_report.About(
        hardware=HARDWARE,
        drafter={"name": "toy", "block_size": 5},
        provenance={},
        scale={"max_tokens": 8, "utilisation": 0.8},
        rates={"1": {"rate": 2.0}},
        shared_clock=True,
        load_average=None,
    )
    text = fidelity_report.markdown(about, errors, identity, ranking_table(errors), live)
    assert f"None: all {errors['within'].count()} figures with a target are within it." in text
    assert "- a, closed loop, concurrency 1, run 1: round 3 differs" in text and "0 of 1" in text
    assert "Fewer than two policies ran." in text


@pytest.mark.model
def test_the_study_on_the_real_model(engine: Engine, tmp_path: Path) -> None:
    """The smallest there is: the rounds of every live run, in closed and open loops, are its replay's."""
    scale = FidelityScale(((2, 2),), max_tokens=4, profile_tokens=3, all_policies=False)
    results = run_fidelity(tmp_path / "study", scale=scale, engine=engine, progress=False)
    assert len(results.identity) == 2 * 2 * 2
    assert results.identity["rounds_equal"].all() and results.identity["batches_equal"].all()
    closed = results.errors[results.errors["clock_free"]]
    assert closed["rounds_equal"].all()
    assert (closed.loc[closed["metric"].isin(fidelity_scores.EXACT_METRICS), "error"] == 0.0).all()
    assert (tmp_path / "study" / "report" / "report.md").is_file()
