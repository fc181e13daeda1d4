"""Laws of the live engine with the embedded model: lossless, replayable, exact in its token counts."""

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.analysis.decisions import check_decisions, cost_of  # noqa: E402
from dspark_sim.analysis.fidelity import rounds_equal  # noqa: E402
from dspark_sim.cost import CostModel, Curve  # noqa: E402
from dspark_sim.engine.executor import TorchExecutor  # noqa: E402
from dspark_sim.loop import DecodeLoop  # noqa: E402
from dspark_sim.policy import Fixed, PrefixScheduler  # noqa: E402
from dspark_sim.request import Request  # noqa: E402
from dspark_sim.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from dspark_sim.simulate.run import simulate  # noqa: E402
from dspark_sim.workload import ClosedLoop, bundled_prompts  # noqa: E402

pytestmark = pytest.mark.model

PROMPTS = bundled_prompts(per_domain=2)
COST = Curve((1.0, 16.0, 64.0), (0.06, 0.08, 0.14))


def _policies(engine):
    prefix = PrefixScheduler(CostModel(verify=COST, provenance=engine.hardware))
    return {
        "none": ("none", Fixed(0)),
        "ngram": ("ngram", Fixed(5)),
        "dspark": ("dspark", Fixed(7)),
        "prefix": ("dspark", prefix),
        "dflash": ("dflash", Fixed(7)),
    }


@pytest.fixture(scope="module")
def engines(engine):
    """Every drafter on the same target."""
    return {"dspark": engine, **{name: engine.with_drafter(name) for name in ("none", "ngram", "dflash")}}


def _generate(reference, engine, prompts, max_tokens):
    """Greedy outputs by transformers' `generate`, one prompt at a time."""
    outputs = {}
    for prompt in prompts:
        ids = torch.tensor([engine.target.encode(prompt.turns[0])])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        outputs[prompt.prompt_id] = out[0, ids.shape[1] :].tolist()
    return outputs


def _outputs(trace):
    return {row["prompt_id"]: row["output_tokens"] for row in trace.tables["requests"].to_pylist()}


def _record(engine, policy, num_users, prompts=PROMPTS, **options):
    return engine.record(prompts, policy, ClosedLoop(num_users), progress=False, **options)


@pytest.fixture(scope="module")
def expected(reference, engine):
    return _generate(reference, engine, PROMPTS, 24)


@pytest.fixture(scope="module")
def live(engine):
    """A run of all six prompts at once with whole blocks, and its dense anchors."""
    trace = _record(engine, Fixed(7), 6, max_tokens=24)
    return trace, engine.anchors(trace, progress=False)


@pytest.mark.parametrize("num_users", [1, 6])
@pytest.mark.parametrize("name", ["none", "ngram", "dspark", "prefix"])
def test_greedy_output_is_that_of_transformers(engines, expected, name, num_users):
    drafter, policy = _policies(engines["dspark"])[name]
    trace = _record(engines[drafter], policy, num_users, max_tokens=24)
    assert _outputs(trace) == expected
    assert len(trace.steps) > 0
    if name in ("dspark", "prefix"):
        assert trace.drafts["num_accepted"].sum() > 0
    for _, row in trace.requests.iterrows():
        rounds = trace.drafts[trace.drafts["request_id"] == row["request_id"]]
        assert 1 + rounds["num_emitted"].sum() == row["output_len"] == len(row["output_tokens"])


@pytest.fixture(scope="module")
def all_expected(reference, engine):
    return _generate(reference, engine, bundled_prompts(), 32)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_users", [1, 16])
@pytest.mark.parametrize("name", ["none", "ngram", "dspark", "prefix", "dflash"])
def test_greedy_output_of_all_bundled_prompts(engines, all_expected, name, num_users):
    drafter, policy = _policies(engines["dspark"])[name]
    trace = _record(engines[drafter], policy, num_users, bundled_prompts(), max_tokens=32)
    assert _outputs(trace) == all_expected


def test_replay_of_the_same_policy_has_the_same_rounds(engine, live):
    trace, anchored = live
    cost = CostModel(verify=COST, provenance=engine.hardware)
    verdict = rounds_equal(trace, simulate(anchored, Fixed(7), ClosedLoop(6), cost))
    assert verdict, verdict.message


@pytest.mark.parametrize("verify_len", [0, 3])
def test_replay_at_another_length_equals_a_second_live_run(engine, live, verify_len):
    _, anchored = live
    again = _record(engine, Fixed(verify_len), 2, max_tokens=24)
    cost = CostModel(verify=COST, provenance=engine.hardware)
    verdict = rounds_equal(again, simulate(anchored, Fixed(verify_len), ClosedLoop(3), cost))
    assert verdict, verdict.message


def test_a_live_trace_explains_itself(engine):
    """Choices made again from the trace, with the cost table that it carries."""
    _, policy = _policies(engine)["prefix"]
    trace = _record(engine, policy, 3, max_tokens=8)
    assert cost_of(trace) == policy.cost and check_decisions(trace)
    assert cost_of(_record(engine, Fixed(2), 3, PROMPTS[:1], max_tokens=2)) is None


@pytest.mark.parametrize("name", ["ngram", "dflash"])
def test_anchors_of_another_drafter_replay_its_live_run(engines, live, name):
    anchored = engines[name].anchors(live[0], progress=False)
    again = _record(engines[name], Fixed(5), 3, max_tokens=24)
    verdict = rounds_equal(again, simulate(anchored, Fixed(5), ClosedLoop(6), CostModel(verify=COST)))
    assert verdict, verdict.message


def test_linear_layers_see_exactly_the_batch_tokens(engine):
    rows = []
    hook = engine.target.layers[0].mlp.down_proj.register_forward_hook(
        lambda _module, inputs, _output: rows.append(inputs[0].shape[:-1].numel())
    )
    try:
        trace = _record(engine, _policies(engine)["prefix"][1], 4, max_tokens=16)
    finally:
        hook.remove()
    assert rows == trace.steps["batch_tokens"].tolist() == trace.steps["padded_tokens"].tolist()
    verified = trace.drafts.groupby("step")["verify_len"].agg(lambda lens: (1 + lens).sum())
    decode = trace.steps[trace.steps["num_prefill_tokens"] == 0].set_index("step")["batch_tokens"]
    assert verified.to_dict() == decode.to_dict()
    assert trace.drafts["verify_len"].nunique() > 1


def test_output_stops_at_the_end_token(engine, expected, monkeypatch):
    # A token that greedy output does hold is declared to be the end token.
    ends = frozenset([next(iter(expected.values()))[10]])
    monkeypatch.setattr(type(engine.target), "eos_token_ids", property(lambda self: ends))
    trace = _record(engine, Fixed(7), 6, max_tokens=24)
    stopped = 0
    for row in trace.tables["requests"].to_pylist():
        whole = expected[row["prompt_id"]]
        at = next((i for i, token in enumerate(whole) if token in ends), None)
        tokens = whole if at is None else whole[: at + 1]
        assert row["output_tokens"] == tokens
        assert row["output_len"] == len(tokens)
        assert row["finish_reason"] == ("length" if at is None else "stop")
        rounds = trace.drafts[trace.drafts["request_id"] == row["request_id"]]
        assert 1 + rounds["num_emitted"].sum() == len(tokens)
        stopped += at is not None
    assert stopped > 0
    assert (trace.drafts["num_accepted"] <= trace.drafts["num_emitted"]).all()
    verdict = rounds_equal(
        trace, simulate(engine.anchors(trace, progress=False), Fixed(7), ClosedLoop(2), CostModel(verify=COST))
    )
    assert verdict, verdict.message


def test_one_token_needs_no_decode_round(engine, expected):
    trace = _record(engine, Fixed(7), 3, max_tokens=1)
    assert _outputs(trace) == {prompt_id: tokens[:1] for prompt_id, tokens in expected.items()}
    assert len(trace.drafts) == 0
    assert set(trace.requests["finish_reason"]) == {"length"}


def test_preemption_does_not_change_the_output(engine, expected):
    prompts = {prompt.prompt_id: engine.target.encode(prompt.turns[0]) for prompt in PROMPTS}
    requests = [Request(number, name, "any", len(tokens), 24) for number, (name, tokens) in enumerate(prompts.items())]
    reserve = 1 + engine.block_size
    # Room for every prompt, and for no growth.
    pages = sum(-(-(request.prompt_len + reserve) // 8) for request in requests)
    config = SchedulerConfig(max_num_seqs=6, num_pages=pages, page_size=8, max_model_len=engine.max_model_len)
    executor = TorchExecutor(engine.target, engine.drafter, prompts, engine.cache)
    loop = DecodeLoop(executor, Scheduler(config, engine.block_size), Fixed(7))
    for request in requests:
        loop.submit(request)
    start = time.perf_counter()
    while loop.has_work:
        loop.step(time.perf_counter() - start)
    assert sum(request.num_preemptions for request in requests) > 0
    assert {request.prompt_id: executor.outputs[request.request_id] for request in requests} == expected


def _sampled(engine, num_users, seed, **options):
    trace = _record(
        engine, Fixed(4), num_users, PROMPTS[:4], max_tokens=16, mode="rejection", temperature=1.0, seed=seed, **options
    )
    return _outputs(trace), trace


@pytest.mark.parametrize("name", ["dspark", "ngram"])
def test_sampled_output_depends_on_the_seed_and_not_on_the_batch(engines, name):
    first, trace = _sampled(engines[name], 4, 3)
    assert _sampled(engines[name], 4, 3)[0] == first
    assert _sampled(engines[name], 1, 3)[0] == first
    assert _sampled(engines[name], 4, 4)[0] != first
    assert (trace.drafts["num_accepted"] <= trace.drafts["verify_len"]).all()


def test_sampling_from_the_single_best_token_is_greedy(engine, expected):
    outputs, _ = _sampled(engine, 4, 0, top_k=1)
    assert outputs == {prompt.prompt_id: expected[prompt.prompt_id][:16] for prompt in PROMPTS[:4]}


def test_the_first_sampled_token_has_the_law_of_the_target(engine):
    # One prompt, many requests: only the first token, which prefill draws.
    from scipy import stats

    prompt = PROMPTS[0]
    trace = _record(
        engine, Fixed(0), 16, [prompt], max_tokens=1, num_requests=320, mode="rejection", temperature=1.0, seed=1
    )
    ids = torch.tensor([engine.target.encode(prompt.turns[0])])
    with torch.no_grad():
        law = engine.target.model(input_ids=ids, use_cache=False).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount([tokens[0] for tokens in trace.requests["output_tokens"]], minlength=law.size)
    likely = 320 * law >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = 320 * np.append(law[likely], law[~likely].sum())
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("name", ["dspark", "ngram"])
@pytest.mark.parametrize("mode", ["rejection", "coupled", "target_match"])
def test_sampled_runs_replay_with_their_rounds(engines, name, mode):
    chosen = engines[name]
    trace = _record(chosen, Fixed(5), 2, PROMPTS[:2], max_tokens=12, mode=mode, temperature=0.8, seed=2)
    anchored = chosen.anchors(trace, progress=False)
    probs = np.concatenate(anchored.anchors["accept_prob"].to_list())
    assert ((probs >= 0) & (probs <= 1 + 1e-6)).all()
    verdict = rounds_equal(trace, simulate(anchored, Fixed(5), ClosedLoop(2), CostModel(verify=COST)))
    assert verdict, verdict.message
