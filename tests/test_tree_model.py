"""Live trees with the embedded model and its drafters: plain decoding's output, and exact replay."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.analysis.fidelity import rounds_equal  # noqa: E402
from dspark_sim.cost import CostModel, Curve  # noqa: E402
from dspark_sim.engine.bench import tree_build_share, tree_over_chain  # noqa: E402
from dspark_sim.engine.serve import Engine  # noqa: E402
from dspark_sim.policy import Fixed, PrefixScheduler  # noqa: E402
from dspark_sim.simulate.run import simulate  # noqa: E402
from dspark_sim.trace import Trace  # noqa: E402
from dspark_sim.tree_shapes import parse_tree  # noqa: E402
from dspark_sim.workload import ClosedLoop, bundled_prompts  # noqa: E402

pytestmark = pytest.mark.model

PROMPTS = bundled_prompts(per_domain=1)[:2]
COST = Curve((1.0, 16.0, 64.0), (0.06, 0.08, 0.14))


def _record(engine: Engine, tree: str | None, policy: object, users: int = 2) -> Trace:
    return engine.record(PROMPTS, policy, ClosedLoop(users), max_tokens=16, progress=False, tree=tree)  # type: ignore[arg-type]


def _outputs(trace: Trace) -> list[list[int]]:
    return [row["output_tokens"] for row in trace.tables["requests"].to_pylist()]


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[list[int]]:
    return _outputs(_record(engine, None, Fixed(0)))


@pytest.mark.parametrize("tree, narrow", [("best-first:24", "best-first:7"), ("markov:24", "markov:7")])
def test_greedy_trees_keep_the_output_and_replay(
    engine: Engine, plain: list[list[int]], tree: str, narrow: str
) -> None:
    cost = CostModel(verify=COST, provenance=engine.hardware)
    prefix = PrefixScheduler(cost)
    live = _record(engine, tree, Fixed(24))
    anchored = engine.anchors(live, progress=False)
    again, policed = _record(engine, narrow, Fixed(5), users=1), _record(engine, tree, prefix)
    for trace, policy, shape, users in (
        (live, Fixed(24), None, 2),
        (again, Fixed(5), narrow, 2),
        (policed, prefix, None, 2),
    ):
        assert _outputs(trace) == plain
        replayed = simulate(
            anchored, policy, ClosedLoop(users), cost, tree=None if shape is None else parse_tree(shape)
        )
        verdict = rounds_equal(trace, replayed)
        assert verdict, verdict.message
    accepted = [list(path) for path in live.drafts["accepted_path"]]
    assert any(path != list(range(len(path))) for path in accepted)
    # A tree of so many nodes holds the chain, and accepts no less of it from any anchor.
    chain = anchored.anchors["num_accepted"]
    in_tree = anchored.anchors["node_rank"].map(lambda places: int((places < 24).sum()))
    assert (in_tree >= chain.clip(upper=3)).all() and in_tree.mean() > chain.mean()


def test_an_autoregressive_drafter_branches(engine: Engine, plain: list[list[int]]) -> None:
    eagle = engine.with_drafter("eagle3")
    live = _record(eagle, "dynamic:4,4,12", Fixed(12))
    assert _outputs(live) == plain
    replayed = simulate(eagle.anchors(live, progress=False), Fixed(12), ClosedLoop(2), CostModel(verify=COST))
    verdict = rounds_equal(live, replayed)
    assert verdict, verdict.message


def test_coupled_trees_replay(engine: Engine) -> None:
    options = {"max_tokens": 12, "mode": "coupled", "temperature": 0.8, "seed": 5, "progress": False}
    plain = engine.record(PROMPTS, Fixed(0), ClosedLoop(2), **options)  # type: ignore[arg-type]
    live = engine.record(PROMPTS, Fixed(14), ClosedLoop(2), tree="width:2,3", **options)  # type: ignore[arg-type]
    assert _outputs(live) == _outputs(plain)
    anchored = engine.anchors(live, progress=False)
    again = engine.record(PROMPTS, Fixed(4), ClosedLoop(1), tree="width:4,1", **options)  # type: ignore[arg-type]
    for trace, policy, shape in ((live, Fixed(14), None), (again, Fixed(4), "width:4,1")):
        replayed = simulate(
            anchored, policy, ClosedLoop(2), CostModel(verify=COST), tree=None if shape is None else parse_tree(shape)
        )
        verdict = rounds_equal(trace, replayed)
        assert verdict, verdict.message


def test_a_profile_of_trees_measures_their_batches_and_their_drafting(engine: Engine) -> None:
    trace = engine.profile_pass(PROMPTS, 2, max_tokens=16, num_requests=2, tree="best-first:9")
    assert trace.config["tree"] == "best-first:9"
    assert 7 < trace.drafts["verify_len"].max() <= 9
    cost = engine.profile(PROMPTS, concurrency=(2,), max_tokens=16, progress=False, tree="best-first:9")
    assert cost.largest_batch > 2 * (1 + engine.block_size)
    assert cost.draft.seconds(2.0, num_requests=2.0, context_tokens=50.0, draft_len=9.0, draft_tokens=18.0) > 0


def test_benchmarks_compare_equal_rounds_and_charge_the_build(engine: Engine) -> None:
    (row,) = tree_over_chain(engine, PROMPTS, max_tokens=8, repeats=1, users=(2,))
    assert row["same_rounds"] and row["ratio_low"] == row["ratio"] == row["ratio_high"] > 0
    rows = tree_build_share(engine, PROMPTS, nodes=9, users=2, max_tokens=24)
    assert [row["tree"].partition(":")[0] for row in rows] == ["best-first", "markov", "sequoia", "dynamic"]
    for row in rows:
        assert row["head_and_build_ms"] + row["backbone_ms"] < row["step_ms"]
        assert 0 < row["head_and_build_share"] < 1 and 2 < row["batch_tokens"] <= 2 * (1 + 9)
