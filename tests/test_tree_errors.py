"""Trees that cannot be are refused in one sentence that names the remedy."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.engine.drafters import Drafter  # noqa: E402
from dspark_sim.engine.drafters.ngram import NgramDrafter  # noqa: E402
from dspark_sim.engine.serve import Engine  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.exactness.toy import Toy  # noqa: E402
from dspark_sim.policy import Fixed  # noqa: E402
from dspark_sim.policy_ranked import ConfidenceThreshold  # noqa: E402
from dspark_sim.trace import Trace  # noqa: E402
from dspark_sim.tree_shapes import BestFirst, FixedWidth, Sequoia  # noqa: E402
from dspark_sim.workload import ClosedLoop, Prompt  # noqa: E402

PROMPT = Prompt("p", "any", ("1 2 3",))


class _Tokenizer:
    chat_template, eos_token_id = None, None

    def __call__(self, text: str) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return an_engine(Toy.make().drafter)


def an_engine(drafter: Drafter | None, name: str = "toy") -> Engine:
    toy = Toy.make()
    toy.target.tokenizer = _Tokenizer()
    return Engine(toy.target, drafter, name, 1, 4, 64, toy.cache)


def record(engine: Engine, tree: Any, policy: Any = None, **options: Any) -> Trace:
    policy = policy or Fixed(2)
    return engine.record([PROMPT], policy, ClosedLoop(1), max_tokens=6, progress=False, tree=tree, **options)


def refused(action: Any, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "tree, words",
    [
        ("width:0,2", ("width", "0", "1 or more")),
        ("best-first:0", ("node_budget", "0")),
        ("width:2", ("width:2", "width:WIDTH,DEPTH")),
        ("oak", ("oak", "best-first:BUDGET")),
        ("width:2,4", ("4 deep", "3")),
        ("width:9,1", ("9 candidates", "4 tokens", "width")),
        ("width:9,9", ("nodes", "1024")),
    ],
)
def test_shapes_that_the_drafter_cannot_make(engine: Engine, tree: str, words: tuple[str, ...]) -> None:
    refused(lambda: record(engine, tree), *words)


def test_a_budget_above_the_reserve(engine: Engine) -> None:
    refused(lambda: record(engine, BestFirst(8), Fixed(9)), "fixed-9", "9 nodes", "8", "reserves")
    # All 40 nodes are reserved: 3 + 6 + 40 places do not fit into 40.
    small = Engine(engine.target, engine.drafter, "toy", 1, 4, 40, engine.cache)
    refused(lambda: record(small, BestFirst(40)), "49 positions", "40", "max_tokens")


@pytest.mark.parametrize("drafter, name", [(NgramDrafter(), "ngram"), (None, "none")])
def test_a_drafter_that_cannot_branch(drafter: Drafter | None, name: str) -> None:
    refused(lambda: record(an_engine(drafter, name), FixedWidth(2, 2)), "width:2,2", name)


def test_a_chain_is_no_tree_that_branches() -> None:
    trace = record(an_engine(NgramDrafter(), "ngram"), "width:1,3")
    assert trace.config["tree"] == "chain:3"


def test_a_sequential_head_that_is_not_there() -> None:
    from test_tree_engine import toy

    headless = an_engine(toy("none").drafter, "dflash")
    refused(lambda: record(headless, "markov:8"), "markov:8", "sequential head", "best-first:8")


def test_modes_and_policies_that_trees_do_not_go_with(engine: Engine) -> None:
    warm: dict[str, Any] = {"temperature": 1.0}
    refused(lambda: record(engine, "best-first:8", mode="rejection", **warm), "best-first:8", "bias", "width")
    refused(lambda: record(engine, "width:2,2", mode="block", **warm), "block", "width:2,2")
    refused(lambda: record(engine, "width:2,2", ConfidenceThreshold(0.5)), "threshold", "width:2,2", "prefix")


def test_trees_under_rejection_have_no_dense_pass(engine: Engine) -> None:
    trace = record(engine, "width:2,2", mode="rejection", temperature=1.0)
    refused(lambda: engine.anchors(trace, progress=False), "width:2,2", "rejection", "coupled")
    assert trace.config["tree"] == "width:2,2"
    # The outputs are the target's all the same, and chains can be drafted along them.
    chains = engine.anchors(trace, progress=False, tree="chain")
    assert chains.config["tree"] is None and len(chains.anchors) == 5


def test_texts_and_shapes_are_the_same_in_a_trace(engine: Engine) -> None:
    for tree, label in (
        (Sequoia(6), "sequoia:6"),
        (BestFirst(8), "best-first:8"),
        (BestFirst(8, depth=2), "best-first:8,8,2"),
        ("chain", None),
        ("chain:3", None),
        ("width:1,2", "chain:2"),
        (None, None),
    ):
        trace = record(engine, tree)
        assert trace.config["tree"] == label
        anchored = engine.anchors(trace, progress=False)
        assert anchored.config["tree"] == label and anchored.config["num_candidates"] == 4
