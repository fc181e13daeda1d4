from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from toy import toy_cost

from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop, DraftBatch, Prefilled, Verification, survival_of
from dspark_sim.policy import Fixed, Information, LoadView, PrefixScheduler, Signal, SpeculationPolicy
from dspark_sim.policy_ranked import GlobalArgmax, Oracle, Tetris
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.trace import TraceRecorder


@dataclass
class ScriptedExecutor:
    """Accepts everything, on a clock that advances with each call as a real one would."""

    block_size: int = 4
    has_confidence: bool = True
    mode: str = "greedy"
    tree: None = None
    with_draft_prob: bool = False
    now: float = 100.0
    calls: list[str] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def overhead_seconds(self, num_requests: int) -> float:
        return 0.0

    def prefill(self, requests: Sequence[Request]) -> Prefilled:
        self.calls.append("prefill")
        self.now += 0.5
        return Prefilled(np.zeros(len(requests), dtype=bool), {"prefill": 0.5})

    def draft(self, requests: Sequence[Request], draft_len: int) -> DraftBatch:
        self.calls.append(f"draft {draft_len}")
        self.now += 0.1
        lens = np.array([min(draft_len, request.remaining - 1) for request in requests])
        confidence = np.full((len(requests), draft_len), 0.5)
        prob = np.full(confidence.shape, 0.25) if self.with_draft_prob else None
        return DraftBatch(lens, confidence, {"draft": 0.1}, draft_prob=prob)

    def verify(self, requests: Sequence[Request], drafts: DraftBatch, verify_lens: np.ndarray) -> Verification:
        self.calls.append("verify")
        assert (verify_lens <= drafts.draft_lens).all()
        self.now += 0.2
        return Verification(verify_lens, verify_lens + 1, np.zeros(len(requests), dtype=bool), {"verify": 0.2}, 64)

    def release(self, request: Request) -> None:
        self.released.append(request.request_id)


@dataclass
class SpyPolicy:
    """Asks for more than it may get, and remembers what it saw."""

    ask: int = 99
    survivals: list[np.ndarray] = field(default_factory=list)
    information: Information = "history"
    signal: Signal = "confidence"
    needs_confidence: bool = False
    seen: list[tuple[LoadView, list[int], list[int]]] = field(default_factory=list)

    def start(self) -> "SpyPolicy":
        return self

    def label(self) -> str:
        return "spy"

    def draft_len(self, load: LoadView) -> int:
        return self.ask

    def verify_lens(self, load: LoadView, survival: np.ndarray) -> np.ndarray:
        self.survivals.append(survival)
        return np.full(survival.shape[0], 99)

    def observe(self, load: LoadView, verify_lens: np.ndarray, num_accepted: np.ndarray) -> None:
        self.seen.append((load, verify_lens.tolist(), num_accepted.tolist()))


def drive(policy: SpyPolicy | Fixed, max_tokens: Sequence[int], **limits: int) -> tuple[DecodeLoop, ScriptedExecutor]:
    executor = ScriptedExecutor()
    config = SchedulerConfig(**limits)
    loop = DecodeLoop(executor, Scheduler(config, executor.block_size), policy, TraceRecorder("wall"))
    for request_id, tokens in enumerate(max_tokens):
        loop.submit(Request(request_id, "p", "toy", 6, tokens))
    now = 0.0
    while loop.has_work:
        now += loop.step(now)
    return loop, executor


def test_spans_and_host_fill_the_step() -> None:
    loop, _ = drive(Fixed(2), [7, 9])
    assert loop.recorder is not None
    steps = loop.recorder.trace().steps
    spans = ["prefill", "draft", "head", "policy", "verify", "accept", "host"]
    assert steps[[f"{span}_seconds" for span in spans]].sum(axis=1).to_numpy() == pytest.approx(steps["step_seconds"])
    assert (steps["host_seconds"] > 0).all()
    assert steps["start"].to_numpy()[1:] == pytest.approx(steps["step_seconds"].cumsum().to_numpy()[:-1])
    assert steps["prefill_seconds"].tolist()[0] == 0.5
    assert (steps["padded_tokens"][1:] == 64).all()


def test_policy_is_clamped_to_the_block_and_to_the_draft() -> None:
    policy = SpyPolicy()
    _, executor = drive(policy, [8])
    assert executor.calls == ["prefill", "draft 4", "verify", "draft 4", "verify"]
    # 1 token from the prefill, 4 + 1, and then room for one draft and its bonus.
    assert [verify_lens for _, verify_lens, _ in policy.seen] == [[4], [1]]
    assert [load.context_tokens for load, _, _ in policy.seen] == [6, 11]
    assert [load.step for load, _, _ in policy.seen] == [1, 2]


def test_no_draft_is_plain_decoding() -> None:
    policy = SpyPolicy(ask=0)
    loop, executor = drive(policy, [4, 4])
    assert executor.calls == ["prefill", "verify", "verify", "verify"]
    assert loop.recorder is not None
    trace = loop.recorder.trace()
    assert trace.drafts["num_emitted"].tolist() == [1] * 6
    assert trace.drafts["draft_len"].tolist() == [0] * 6
    assert trace.steps["batch_tokens"].tolist() == [12, 2, 2, 2]


def test_every_request_is_released_and_finished_once() -> None:
    loop, executor = drive(Fixed(4), [1, 5, 12, 3])
    assert sorted(executor.released) == [0, 1, 2, 3]
    assert sorted(request.request_id for request in loop.finished) == [0, 1, 2, 3]
    assert all(request.num_generated == request.max_tokens for request in loop.finished)


def test_preempted_requests_are_released_and_lose_no_token() -> None:
    loop, executor = drive(Fixed(0), [16, 16], num_pages=8, page_size=4)
    assert [request.num_preemptions for request in sorted(loop.finished, key=lambda request: request.request_id)] == [
        0,
        1,
    ]
    assert sorted(executor.released) == [0, 1, 1]
    assert all(request.num_generated == 16 for request in loop.finished)
    assert loop.recorder is not None
    emitted = loop.recorder.trace().drafts.groupby("request_id")["num_emitted"].sum()
    assert emitted.tolist() == [15, 15]


# ---- what a policy may look at --------------------------------------------------------------------------------------

COST = toy_cost()


def server(policy: SpeculationPolicy, executor: ScriptedExecutor, allow_biased: bool = False) -> DecodeLoop:
    return DecodeLoop(executor, Scheduler(SchedulerConfig(), 4), policy, allow_biased=allow_biased)


@pytest.mark.parametrize("mode", ["rejection", "block"])
@pytest.mark.parametrize("policy", [GlobalArgmax(COST), Tetris(8), SpyPolicy(information="sampled_token")])
def test_a_policy_that_would_bias_the_output_is_refused(policy: SpeculationPolicy, mode: str) -> None:
    executor = ScriptedExecutor(mode=mode)
    with pytest.raises(UserError) as caught:
        server(policy, executor)
    assert str(caught.value) == (
        f"policy {policy.label()} looks at sampled tokens, which biases the output under mode {mode}; "
        "use greedy, coupled or target_match, or --allow-biased for a negative control"
    )
    assert server(policy, executor, allow_biased=True).biased is True


@pytest.mark.parametrize("mode", ["greedy", "coupled", "target_match"])
def test_a_policy_may_look_where_the_target_chooses_its_own_tokens(mode: str) -> None:
    for allow_biased in (False, True):
        assert server(GlobalArgmax(COST), ScriptedExecutor(mode=mode), allow_biased).biased is False


@pytest.mark.parametrize("policy", [Fixed(2), PrefixScheduler(COST), Oracle(COST)])
def test_what_biases_nothing_runs_under_rejection(policy: SpeculationPolicy) -> None:
    for allow_biased in (False, True):
        assert server(policy, ScriptedExecutor(mode="rejection"), allow_biased).biased is False


def test_an_allowed_bias_runs() -> None:
    executor = ScriptedExecutor(mode="rejection", with_draft_prob=True)
    loop = server(Tetris(3), executor, allow_biased=True)
    for request_id in range(2):
        loop.submit(Request(request_id, "p", "toy", 6, 9))
    while loop.has_work:
        loop.step(0.0)
    assert [request.num_generated for request in loop.finished] == [9, 9]
    assert executor.calls[:3] == ["prefill", "draft 4", "verify"]


def test_confidences_that_nobody_estimates_are_refused() -> None:
    with pytest.raises(UserError, match="policy prefix needs confidence estimates and this drafter gives none; use a"):
        server(PrefixScheduler(COST), ScriptedExecutor(has_confidence=False))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Tetris(8), "the policy needs draft_prob, which this run does not have; choose another policy"),
        (
            Oracle(COST),
            "the policy needs accept_prob, which this run does not have; only a simulation of a recording knows it",
        ),
    ],
)
def test_a_signal_that_the_executor_does_not_give_is_one_sentence(policy: SpeculationPolicy, said: str) -> None:
    loop = server(policy, ScriptedExecutor())
    loop.submit(Request(0, "p", "toy", 6, 9))
    loop.step(0.0)
    with pytest.raises(UserError) as caught:
        loop.step(0.0)
    assert str(caught.value) == said


def test_survival_is_of_the_signal_that_the_policy_names() -> None:
    batch = DraftBatch(
        np.array([3, 1]),
        np.full((2, 3), 0.5),
        draft_prob=np.full((2, 3), 0.8),
        accept_prob=np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
    )
    assert survival_of(batch).tolist() == [[0.5, 0.25, 0.125], [0.5, 0.0, 0.0]]
    assert survival_of(batch, "draft_prob") == pytest.approx(np.array([[0.8, 0.64, 0.512], [0.8, 0.0, 0.0]]))
    assert survival_of(batch, "accept_prob").tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    policy = SpyPolicy(signal="draft_prob")
    loop = server(policy, ScriptedExecutor(with_draft_prob=True))
    loop.submit(Request(0, "p", "toy", 6, 9))
    loop.step(0.0)
    loop.step(0.0)
    assert policy.survivals[0].tolist() == [[0.25, 0.0625, 0.015625, 0.00390625]]


def test_a_round_without_drafts_needs_no_signal() -> None:
    loop = server(SpyPolicy(ask=0, signal="accept_prob"), ScriptedExecutor())
    loop.submit(Request(0, "p", "toy", 6, 2))
    while loop.has_work:
        loop.step(0.0)
    assert loop.finished[0].num_generated == 2


def test_policies_are_told_who_is_running() -> None:
    policy = SpyPolicy()
    drive(policy, [3, 8])
    assert [load.request_ids for load, _, _ in policy.seen] == [(0, 1), (1,)]
