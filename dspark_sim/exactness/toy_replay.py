"""Laws of streams and of dense anchors on the toy, where thousands of requests cost seconds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.analysis.fidelity import RoundsVerdict, rounds_equal
from dspark_sim.cost import CostModel, Curve
from dspark_sim.engine.anchors import dense_anchors, num_ranked
from dspark_sim.engine.conditional import Known
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.explore import Explore
from dspark_sim.engine.recorded import RecordedOutput
from dspark_sim.engine.sampling import SamplingParams, probabilities
from dspark_sim.exactness.statistical import GTest, g_test
from dspark_sim.exactness.toy import BLOCK_SIZE, PROMPT, Toy, one_thread
from dspark_sim.loop import DecodeLoop, Mode
from dspark_sim.policy import Fixed, SpeculationPolicy
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.executor import ReplayExecutor
from dspark_sim.trace import Trace, TraceRecorder
from dspark_sim.tree_shapes import TreeShape

COST = CostModel(verify=Curve((1.0, 64.0, 256.0), (1.0, 2.0, 6.0)))


def record(
    toy: Toy, policy: SpeculationPolicy, mode: Mode, params: SamplingParams, num_requests: int, num_tokens: int
) -> Trace:
    """A live run of the toy as a trace, with dense anchors."""
    executor = toy.executor(mode, params)
    recorder = TraceRecorder("wall")
    toy.decode(
        policy,
        mode,
        params,
        num_requests=num_requests,
        num_tokens=num_tokens,
        executor=executor,
        recorder=recorder,
    )
    shape = executor.tree
    config = {
        **{"mode": mode, "block_size": BLOCK_SIZE, "has_confidence": True},
        "tree": None if shape is None else shape.label(),
    }
    return recorder.trace(config, {}, executor.outputs)


@one_thread()
def anchored(toy: Toy, trace: Trace, mode: Mode, params: SamplingParams, *, keep_rounds: bool = True) -> Trace:
    """The trace with dense anchors; without `keep_rounds` nothing of the live rounds enters them."""
    assert toy.drafter is not None
    rounds: dict[int, dict[int, Known]] = {}
    if mode == "rejection" and keep_rounds:
        for row in trace.tables["drafts"].to_pylist():
            known = Known.of_round(row["draft_tokens"] or [], row["verify_len"], row["num_accepted"])
            rounds.setdefault(row["request_id"], {})[row["position"]] = known
    outputs = [
        RecordedOutput(row["request_id"], PROMPT, row["output_tokens"], rounds.get(row["request_id"], {}))
        for row in trace.tables["requests"].to_pylist()
    ]
    rule = DraftRule(mode, params, True)
    anchors = dense_anchors(toy.target, toy.drafter, outputs, rule, toy.tree)
    return trace.with_anchors(anchors, num_candidates=num_ranked(toy.drafter))


def replay(trace: Trace, policy: SpeculationPolicy, tree: TreeShape | None = None) -> Trace:
    """All requests at once, as the toy's loop is fed, in the toy's batch; `tree` is a shape other than the recorded."""
    anchors = RecordedAnchors.from_trace(trace)
    executor = ReplayExecutor(anchors if tree is None else anchors.with_tree(tree), COST)
    config = SchedulerConfig(max_num_seqs=64, num_pages=1024, page_size=4, max_model_len=64)
    recorder = TraceRecorder("virtual")
    loop = DecodeLoop(executor, Scheduler(config, executor.block_size), policy, recorder)
    for row in trace.tables["requests"].to_pylist():
        loop.submit(Request(row["request_id"], "toy", "toy", len(PROMPT), row["max_tokens"]))
    now = 0.0
    while loop.has_work:
        now += loop.step(now)
    return recorder.trace()


def identity(
    toy: Toy, policy: SpeculationPolicy, mode: Mode, params: SamplingParams, num_requests: int
) -> RoundsVerdict:
    """A live run against the replay of its own anchors."""
    live = record(toy, policy, mode, params, num_requests, 14)
    return rounds_equal(live, replay(anchored(toy, live, mode, params), policy))


def counterfactual_difference(
    toy: Toy, recorded: SpeculationPolicy, policy: SpeculationPolicy, params: SamplingParams, num_requests: int
) -> tuple[float, float]:
    """Accepted drafts per round in ``rejection`` mode: live less replayed from another run, and its standard error."""
    recording = anchored(toy, record(toy, recorded, "rejection", params, num_requests, 14), "rejection", params)
    other = SamplingParams(params.temperature, params.top_k, params.top_p, params.seed + 1)
    means = []
    for trace in (record(toy, policy, "rejection", other, num_requests, 14), replay(recording, policy)):
        rounds = trace.drafts.groupby("request_id").size().to_numpy(dtype=np.float64)
        means.append((rounds.mean(), rounds.var(ddof=1) / rounds.size))
    return means[0][0] - means[1][0], float(np.sqrt(means[0][1] + means[1][1]))


def block_law(toy: Toy, params: SamplingParams, num_requests: int) -> GTest:
    """Blocks of the dense pass at the first anchor against the drafter's own joint law.

    Drawn given the output, they must follow the drafter's law when the output is averaged out.
    """
    plain = record(toy, Fixed(0), "rejection", params, num_requests, BLOCK_SIZE + 2)
    dense = anchored(toy, plain, "rejection", params, keep_rounds=False).anchors
    first = dense[dense["position"] == len(PROMPT)]
    starts = np.array([tokens[0] for tokens in plain.requests["output_tokens"]])
    commonest = int(np.bincount(starts).argmax())
    blocks = np.stack(first["draft_tokens"].to_list())[starts == commonest]
    with torch.inference_mode():
        return g_test(blocks, _drafter_law(toy, commonest, params))


def first_slot_laws(toy: Toy, params: SamplingParams) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Laws of target and drafter of the token behind the prompt and each first token, [V, V] both."""
    size = toy.target.config.vocab_size
    joint = toy.law(params, 2).reshape(size, size)
    with torch.inference_mode():
        drafter = [_drafter_law(toy, anchor, params).reshape(size, -1).sum(axis=1) for anchor in range(size)]
    return joint / joint.sum(axis=1, keepdims=True), np.stack(drafter)


def _drafter_law(toy: Toy, anchor: int, params: SamplingParams) -> npt.NDArray[np.float64]:
    """Exact joint law of a block behind the prompt and one token, flat [V ** γ]."""
    from dspark_sim.engine.drafters.dense import dense_target, dense_walks

    assert isinstance(toy.drafter, RaggedBlockDrafter)
    network = toy.drafter.network
    tokens = torch.tensor([[*PROMPT, anchor]])
    _, features = dense_target(toy.target, tokens, toy.drafter.feature_layers)
    place = torch.tensor([len(PROMPT)])
    joint = np.ones(1)
    for slot in range(BLOCK_SIZE):
        # A row for every beginning of a block, walked from the anchor on.
        paths = torch.cartesian_prod(torch.tensor([anchor]), *[torch.arange(4)] * slot).view(4**slot, slot + 1)
        said = dense_walks(network, tokens[0], features[0], place.expand(len(paths)))().along(paths)
        joint = (joint[:, None] * probabilities(said.logits[:, -1], params).double().numpy()).ravel()
    law: npt.NDArray[np.float64] = joint / joint.sum()
    return law


def invariance(mode: Mode, params: SamplingParams, num_requests: int, num_tokens: int = 16) -> tuple[int, int]:
    """Streams equal to plain decoding's under other schedules, batches, preemption, a restart; (equal, compared)."""
    toy = Toy.make()
    plain = toy.decode(Fixed(0), mode, params, num_requests=num_requests, num_tokens=num_tokens, max_num_seqs=1)
    others = [
        toy.decode(Explore(BLOCK_SIZE, 1), mode, params, num_requests=num_requests, num_tokens=num_tokens),
        toy.decode(
            Explore(BLOCK_SIZE, 2), mode, params, num_requests=num_requests, num_tokens=num_tokens, max_num_seqs=7
        ),
        # Pages for the prompts and little more: requests are preempted and recomputed.
        toy.decode(Fixed(BLOCK_SIZE), mode, params, num_requests=num_requests, num_tokens=num_tokens, num_pages=24),
        # A new process would build everything anew.
        Toy.make().decode(Fixed(BLOCK_SIZE), mode, params, num_requests=num_requests, num_tokens=num_tokens),
    ]
    equal = sum(int((plain == other).all(axis=1).sum()) for other in others)
    return equal, num_requests * len(others)
