"""Live trees: the target's own output whatever the tree, and recordings of them that replay to the round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.analysis.fidelity import rounds_equal  # noqa: E402
from dspark_sim.engine.drafters import SequenceState  # noqa: E402
from dspark_sim.engine.drafters.block import RaggedBlockDrafter  # noqa: E402
from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.chain import RaggedChainDrafter  # noqa: E402
from dspark_sim.engine.drafters.chain_model import ChainDrafter, ChainDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.choose import Confidence, DraftRule  # noqa: E402
from dspark_sim.engine.explore import Explore  # noqa: E402
from dspark_sim.engine.sampling import SamplingParams  # noqa: E402
from dspark_sim.engine.timing import SpanTimer  # noqa: E402
from dspark_sim.engine.tree_round import fit_tree  # noqa: E402
from dspark_sim.exactness import toy_replay  # noqa: E402
from dspark_sim.exactness.statistical import g_test  # noqa: E402
from dspark_sim.exactness.toy import BLOCK_SIZE, PROMPT, Toy  # noqa: E402
from dspark_sim.policy import Fixed, PrefixScheduler  # noqa: E402
from dspark_sim.policy_ranked import LaggedPrefixScheduler  # noqa: E402
from dspark_sim.trace import Trace  # noqa: E402
from dspark_sim.tree_shapes import parse_tree  # noqa: E402

VOCABULARY = 12
DRAFTERS = ["vanilla", "rnn", "none", "eagle3", "mtp"]
SHAPES = ["width:2,3", "width:3,2", "best-first:9", "markov:9,4", "dynamic:3,3,8", "sequoia:7"]
MODES = ["greedy", "coupled", "target_match"]


def toy(drafter: str = "vanilla", tree: str | None = None, draft_vocab_size: int = 0, **options: Any) -> Toy:
    """The toy over a dozen tokens with a drafter of some kind, sure enough of itself to be right now and then."""
    made = Toy.make(VOCABULARY, **options)
    assert isinstance(made.drafter, RaggedBlockDrafter)
    config = made.drafter.network.config
    ids = torch.arange(0, VOCABULARY, 2)[:draft_vocab_size] if draft_vocab_size else None
    torch.manual_seed(3)
    if drafter in ("eagle3", "mtp"):
        layers = (-1, 0) if drafter == "eagle3" else (made.target.config.num_hidden_layers - 1,)
        shape = ("toy", drafter, config.hidden_size, VOCABULARY, BLOCK_SIZE, layers, 4, 2, 6, 16, 1e-5)
        chain = ChainDrafter(ChainDrafterConfig(*shape, draft_vocab_size=draft_vocab_size), ids)
        network = _random(chain).attach(made.target).eval().requires_grad_(False)
        made.drafter = RaggedChainDrafter(drafter, network, made.max_num_seqs, 64)
    else:
        changes: dict[str, Any] = {"markov_head_type": drafter, "draft_vocab_size": draft_vocab_size}
        if drafter == "none":
            changes |= {"markov_head_type": "vanilla", "markov_rank": 0, "enable_confidence_head": False}
        block = BlockDrafter(BlockDrafterConfig(**{**vars(config), **changes}), ids)
        network = _random(block).attach(made.target).eval().requires_grad_(False)
        made.drafter = RaggedBlockDrafter(drafter, network, made.max_num_seqs, 64)
    made.tree = None if tree is None else fit_tree(parse_tree(tree), made.drafter, drafter)
    return made


def _random(network: Any) -> Any:
    for parameter in network.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return network


def params(mode: str, seed: int = 4) -> SamplingParams:
    return SamplingParams(0.0 if mode == "greedy" else 0.8, seed=seed)


# Every shape and every drafter once or twice; all pairs are among the slow tests.
PAIRS = [
    ("vanilla", "best-first:9", "coupled"),
    ("vanilla", "markov:9,4", "target_match"),
    ("vanilla", "width:3,2", "greedy"),
    ("rnn", "width:2,3", "coupled"),
    ("rnn", "markov:9,4", "coupled"),
    ("none", "best-first:9", "target_match"),
    ("eagle3", "dynamic:3,3,8", "coupled"),
    ("eagle3", "best-first:9", "greedy"),
    ("mtp", "sequoia:7", "coupled"),
]


def pairs() -> list[Any]:
    every = [
        (drafter, shape, mode)
        for drafter in DRAFTERS
        for shape in SHAPES
        for mode in MODES
        if (drafter, shape) != ("none", "markov:9,4")
    ]
    return [*PAIRS, *(pytest.param(*one, marks=pytest.mark.slow) for one in every if one not in PAIRS)]


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    """Plain decoding, one request at a time."""
    return {
        mode: toy().decode(Fixed(0), mode, params(mode), num_requests=10, num_tokens=16, max_num_seqs=1)
        for mode in MODES
    }


@pytest.mark.parametrize("drafter, shape, mode", pairs())
def test_the_output_is_that_of_plain_decoding(
    drafter: str, shape: str, mode: Any, plain: dict[str, np.ndarray]
) -> None:
    made = toy(drafter, shape)
    assert made.tree is not None
    num = made.tree.num_nodes
    # Whole trees in a cache that has pages for the prompts and the reserve of their trees alone, so that requests are
    # preempted; and budgets that differ from request to request and round to round, in a batch that changes.
    few = 10 * -(-(len(PROMPT) + 1 + num) // 4)
    runs = [live(made, Fixed(num), mode, 10, num_pages=few), live(made, Explore(num, 1), mode, 10, max_num_seqs=4)]
    for trace in runs:
        assert (np.array(trace.requests["output_tokens"].to_list()) == plain[mode]).all()
    assert runs[0].requests["num_preemptions"].sum() > 0
    assert sum(trace.drafts["num_accepted"].sum() for trace in runs) > 0


def live(
    made: Toy, policy: Any, mode: Any, num_requests: int, seed: int = 4, num_tokens: int = 16, **options: Any
) -> Trace:
    from dspark_sim.trace import TraceRecorder

    executor, recorder = made.executor(mode, params(mode, seed)), TraceRecorder("wall")
    options = {"executor": executor, "recorder": recorder, **options}
    made.decode(policy, mode, params(mode, seed), num_requests=num_requests, num_tokens=num_tokens, **options)
    label = None if executor.tree is None else executor.tree.label()
    config = {"mode": mode, "block_size": BLOCK_SIZE, "tree": label, "has_confidence": made.drafter.has_confidence}
    return recorder.trace(config, {}, executor.outputs)


def paths(trace: Trace) -> list[tuple[int, ...]]:
    rounds = trace.drafts.sort_values(["request_id", "position"])
    return [tuple(path[:count]) for path, count in zip(rounds["accepted_path"], rounds["num_accepted"], strict=True)]


def same(ours: Trace, theirs: Trace, *, with_paths: bool = True) -> None:
    verdict = rounds_equal(ours, theirs)
    assert verdict, str(verdict)
    assert not with_paths or paths(ours) == paths(theirs)


def branched(trace: Trace) -> bool:
    """Whether a node was accepted that a chain would not have had."""
    return any(path and path != tuple(range(len(path))) for path in paths(trace))


@pytest.mark.parametrize("drafter, shape, mode", pairs())
def test_a_recording_replays_as_it_was_and_at_other_policies(drafter: str, shape: str, mode: Any) -> None:
    made = toy(drafter, shape)
    assert made.tree is not None
    num = made.tree.num_nodes
    recorded = live(made, Fixed(num), mode, 20, num_tokens=14)
    # In mode greedy all requests are the one prompt, whose few rounds may be those of a chain.
    assert mode == "greedy" or branched(recorded)
    anchored = toy_replay.anchored(made, recorded, mode, params(mode))
    same(recorded, toy_replay.replay(anchored, Fixed(num)))
    for policy in (Fixed(num // 2), PrefixScheduler(toy_replay.COST)):
        same(live(made, policy, mode, 20, num_tokens=14), toy_replay.replay(anchored, policy))


def test_a_lagged_policy_of_nodes_replays() -> None:
    made, policy = toy("vanilla", "best-first:9"), LaggedPrefixScheduler(toy_replay.COST, lag=1)
    recorded = live(made, Fixed(9), "coupled", 20)
    anchored = toy_replay.anchored(made, recorded, "coupled", params("coupled"))
    same(live(made, policy, "coupled", 20), toy_replay.replay(anchored, policy))


OTHERS = [
    ("vanilla", "width:3,3", "width:2,2"),
    ("eagle3", "width:3,3", "sequoia:9"),
    ("none", "best-first:20", "best-first:6"),
    ("rnn", "markov:20", "markov:6"),
    ("eagle3", "dynamic:3,3,20", "dynamic:3,3,6"),
    ("vanilla", "best-first:12", "chain"),
    # A chain's recording has ranks along the output, which is all that a fixed shape asks for.
    ("vanilla", "chain", "width:3,2"),
]


@pytest.mark.parametrize(
    "mode", ["coupled", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("greedy", "target_match"))]
)
@pytest.mark.parametrize("drafter, wide, narrow", OTHERS)
def test_a_recording_replays_another_width_and_budget(drafter: str, wide: str, narrow: str, mode: Any) -> None:
    made = toy(drafter, wide)
    assert made.drafter is not None
    num = made.executor(mode, params(mode)).block_size
    anchored = toy_replay.anchored(made, live(made, Fixed(num), mode, 20, num_tokens=14), mode, params(mode))
    other = toy(drafter, narrow)
    num = other.executor(mode, params(mode)).block_size
    shape = parse_tree(narrow).fitted(BLOCK_SIZE)
    policies = [Fixed(num)]
    if "chain" not in (wide, narrow) and not narrow.startswith("sequoia"):
        # All nodes of the narrow tree are among the recorded ones, and so are their survivals.
        policies.append(PrefixScheduler(toy_replay.COST))
    for policy in policies:
        # Another number of running requests, except for a policy that looks at it.
        limits = {"max_num_seqs": 7} if isinstance(policy, Fixed) else {}
        again = live(other, policy, mode, 20, num_tokens=14, **limits)
        same(again, toy_replay.replay(anchored, policy, shape), with_paths=narrow != "chain")


def test_a_draft_vocabulary_bounds_the_candidates() -> None:
    for drafter, shape in (("vanilla", "best-first:12"), ("eagle3", "width:3,2")):
        made = toy(drafter, shape, draft_vocab_size=5)
        assert made.tree is not None
        num = made.tree.num_nodes
        recorded = live(made, Fixed(num), "coupled", 20)
        drafted = np.concatenate(recorded.drafts["draft_tokens"].to_list())
        assert set(drafted.tolist()) <= {0, 2, 4, 6, 8}
        anchored = toy_replay.anchored(made, recorded, "coupled", params("coupled"))
        same(recorded, toy_replay.replay(anchored, Fixed(num)))


@pytest.mark.parametrize("mode", ["greedy", "coupled", "target_match"])
@pytest.mark.parametrize("drafter", ["vanilla", "rnn", "eagle3", "none"])
def test_a_tree_of_width_one_is_the_chain(drafter: str, mode: Any) -> None:
    """By the code of trees, too: the same tokens, and the product of the confidences as survival."""
    made, timer = toy(drafter), SpanTimer(torch.device("cpu"))
    assert isinstance(made.drafter, RaggedBlockDrafter | RaggedChainDrafter)
    made.drafter.confidence = Confidence(
        "head" if drafter in ("vanilla", "rnn") else "top1", temperatures=(1.0, 2.0, 0.5)
    )
    states = some_states(made)
    rule, limits = DraftRule(mode, params(mode)), np.array([9, 2, 9])
    chain = made.drafter.draft(states, BLOCK_SIZE, limits, rule, timer)
    for text in ("width:1,3", "best-first:3,1", "markov:3,1" if drafter != "none" else "dynamic:1,3,3", "width:3,3"):
        tree = made.drafter.draft_trees(states, parse_tree(text).fitted(3), 39, limits, rule, timer)
        assert tree.trees is not None and chain.confidence is not None
        for row in range(3):
            # The path of first candidates.
            nodes = [-1]
            while len(nodes) <= BLOCK_SIZE:
                last = (tree.trees.parents[row] == nodes[-1]) & (tree.trees.ranks[row] == 0)
                nodes.append(int(last.argmax()))
            assert tree.trees.tokens[row, nodes[1:]].tolist() == chain.tokens[row].tolist()
            if text != "width:3,3":
                expected = np.cumprod(chain.confidence[row])
                np.testing.assert_allclose(tree.trees.survival[row, :3], expected, rtol=1e-6)
        if text != "width:3,3":
            assert tree.lens.tolist() == chain.lens.tolist()


def test_a_shape_that_does_not_branch_is_the_chain_path() -> None:
    made = toy("vanilla")
    expected = live(made, Fixed(3), "coupled", 12)
    for text in ("chain", "width:1,3", "best-first:3,1", "sequoia:3@0.7"):
        again = live(toy("vanilla", text), Fixed(3), "coupled", 12)
        for name in ("requests", "drafts"):
            columns = [c for c in expected.tables[name].column_names if c not in ("first_token", "finish")]
            assert again.tables[name].select(columns).equals(expected.tables[name].select(columns))
        assert again.config == expected.config
    shorter = live(toy("vanilla", "chain:2"), Fixed(2), "coupled", 12)
    same(shorter, live(made, Fixed(2), "coupled", 12), with_paths=False)


@pytest.mark.parametrize("shape, mode", [("width:3,3", "greedy"), ("best-first:12", "coupled")])
def test_nothing_comes_behind_an_end_token_in_a_tree(shape: str, mode: Any) -> None:
    made = toy("vanilla", shape)
    assert made.tree is not None
    whole = toy().decode(Fixed(0), mode, params(mode), num_requests=16, num_tokens=16)
    # A token that most outputs hold somewhere behind their beginning.
    end = int(np.bincount(whole[:, 3:].ravel()).argmax())
    made.target.model.generation_config.eos_token_id = end
    num, inside = made.tree.num_nodes, 0
    recorded = live_ending(made, Fixed(num), mode)
    for row, tokens in enumerate(recorded.requests.sort_values("request_id")["output_tokens"]):
        found = np.flatnonzero(whole[row] == end)
        expected = whole[row] if not found.size else whole[row][: found[0] + 1]
        assert tokens.tolist() == expected.tolist()
        rounds = recorded.drafts[recorded.drafts["request_id"] == row]
        assert 1 + rounds["num_emitted"].sum() == len(tokens)
        if len(rounds) and found.size:
            inside += int(rounds.iloc[-1]["num_accepted"] == rounds.iloc[-1]["num_emitted"])
    assert inside > 0, "no end token was accepted as a node"
    anchored = toy_replay.anchored(made, recorded, mode, params(mode))
    same(recorded, toy_replay.replay(anchored, Fixed(num)), with_paths=False)


def live_ending(made: Toy, policy: Any, mode: Any) -> Trace:
    """As `live`, for outputs of unequal lengths."""
    from dspark_sim.trace import TraceRecorder

    executor, recorder = made.executor(mode, params(mode)), TraceRecorder("wall")
    try:
        made.decode(policy, mode, params(mode), num_requests=16, num_tokens=16, executor=executor, recorder=recorder)
    except ValueError as error:  # the outputs do not make a rectangle, which is all that decode's result is for
        assert "inhomogeneous" in str(error)
    label = None if executor.tree is None else executor.tree.label()
    config = {"mode": mode, "block_size": BLOCK_SIZE, "tree": label, "has_confidence": True}
    return recorder.trace(config, {}, executor.outputs)


@pytest.mark.parametrize(
    "shape, policy", [("width:2,2", "prefix"), ("sequoia:6@0.5/0.3/0.1", "whole"), ("width:3,1", "whole")]
)
def test_children_drawn_without_replacement_keep_the_law(shape: str, policy: str) -> None:
    made = Toy.make(sharpness=1.0, max_num_seqs=512)
    made.tree = fit_tree(parse_tree(shape), made.drafter, "toy")
    assert made.tree is not None
    soft = SamplingParams(0.9, top_p=0.95, seed=11)
    chosen = Fixed(made.tree.num_nodes) if policy == "whole" else PrefixScheduler(toy_replay.COST)
    outputs = made.decode(chosen, "rejection", soft, num_requests=4000, num_tokens=4)
    result = g_test(outputs, made.law(soft, 4))
    assert result.p_value > 1e-3, result


def some_states(made: Toy) -> list[SequenceState]:
    """Three requests whose features the drafter has, none of them of a run."""
    assert made.drafter is not None
    rng = np.random.default_rng(0)
    states = [SequenceState(number, 3, rng.integers(0, VOCABULARY, 6 + number).tolist(), number) for number in range(3)]
    lens = np.array([state.position for state in states])
    features = rng.normal(size=(int(lens.sum()), 24 * len(made.drafter.feature_layers)))
    made.drafter.observe(np.arange(3), np.zeros(3, dtype=np.int64), lens, torch.from_numpy(features).float())
    return states


@pytest.mark.parametrize("drafter", ["vanilla", "eagle3"])
def test_the_survival_of_a_drawn_node_does_not_look_at_it(drafter: str) -> None:
    """With other draws a node has another survival only where the token of its parent is another."""
    made, timer, shape = toy(drafter), SpanTimer(torch.device("cpu")), parse_tree("width:2,2")
    states, differ = some_states(made), 0
    by_parent: dict[tuple[int, int, int], float] = {}
    for seed in range(40):
        rule = DraftRule("rejection", params("rejection", seed))
        trees = made.drafter.draft_trees(states, shape, 6, np.full(3, 9), rule, timer).trees  # type: ignore[union-attr]
        for row in range(3):
            for node in range(6):
                parent = int(trees.parents[row, node])
                above = -1 if parent < 0 else int(trees.tokens[row, parent])
                given = trees.survival[row, node] / (1.0 if parent < 0 else trees.survival[row, parent])
                known = by_parent.setdefault((row, int(trees.ranks[row, node]), above), given)
                assert given == pytest.approx(known, rel=1e-5)
        first = trees.tokens[:, [0, 1]]
        assert (first[:, 0] != first[:, 1]).all()
        differ += int((trees.tokens[:, [2, 3]] != trees.tokens[:, [4, 5]]).any())
    assert differ > 0 and len(by_parent) > 20


@pytest.mark.parametrize("text", ["markov:6", "markov:20,12", "dynamic:4,3,9"])
@pytest.mark.parametrize("drafter", ["vanilla", "rnn"])
def test_nodes_that_are_not_asked_would_not_have_entered(
    drafter: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark_sim.engine.drafters import grow

    made, shape, rule = toy(drafter), parse_tree(text).fitted(BLOCK_SIZE), DraftRule("coupled", params("coupled"))
    states = some_states(made)

    def trees(slack: float) -> Any:
        monkeypatch.setattr(grow, "_SLACK", slack)
        timer = SpanTimer(torch.device("cpu"))
        return made.drafter.draft_trees(states, shape, 20, np.full(3, 9), rule, timer).trees  # type: ignore[union-attr]

    some, every = trees(1e-6), trees(1e9)
    for name in ("num_nodes", "parents", "ranks", "tokens", "survival"):
        assert np.array_equal(getattr(some, name), getattr(every, name))


def test_a_rejection_run_depends_on_the_seed_and_not_on_the_batch() -> None:
    made = toy("vanilla", "width:2,3")
    runs = [
        live(made, Fixed(14), "rejection", 10, seed=seed, max_num_seqs=seqs).requests["output_tokens"].to_list()
        for seed, seqs in ((1, 10), (1, 3), (2, 10))
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


def test_rows_that_the_target_sees_are_the_verified_nodes() -> None:
    made = toy("vanilla", "best-first:9")
    rows: list[int] = []
    hook = made.target.layers[0].mlp.down_proj.register_forward_hook(
        lambda _module, inputs, _output: rows.append(inputs[0].shape[:-1].numel())
    )
    try:
        trace = live(made, Explore(9, 0), "greedy", 10)
    finally:
        hook.remove()
    assert rows == trace.steps["batch_tokens"].tolist() == trace.steps["padded_tokens"].tolist()
    assert (trace.steps["head_seconds"] > 0).any()
    drafts = trace.drafts
    assert (drafts["num_accepted"] <= drafts["verify_len"]).all() and (
        drafts["verify_len"] <= drafts["draft_len"]
    ).all()
    for parents, survival, length in zip(drafts["parents"], drafts["confidence"], drafts["draft_len"], strict=True):
        assert len(parents) == len(survival) == length
        assert (parents < np.arange(length)).all() and (np.diff(survival) <= 0).all()
