"""Where confidences come from: read before the token, fitted to recorded margins, usable without a head."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit as sigma

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.choose import Confidence  # noqa: E402
from dspark_sim.engine.drafters.heads import run_head  # noqa: E402
from dspark_sim.engine.drafters.walk import BlockWalk  # noqa: E402
from dspark_sim.engine.margin import MARGIN, fit_margin, read_margin, score_margin, write_margin  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.policy import Fixed  # noqa: E402
from dspark_sim.policy_ranked import ConfidenceThreshold  # noqa: E402
from dspark_sim.trace import SCHEMAS, Trace  # noqa: E402
from dspark_sim.workload import ClosedLoop, bundled_prompts  # noqa: E402

GAMMA, LENGTH = 5, 40


def margin_trace(num_requests=40, intercept=-1.5, slope=0.8, seed=0, margins=None, confidence=True):
    """Anchors whose drafts are accepted with probability σ(intercept + slope · margin), given all before them.

    Slots that met no output token carry margins that would spoil a fit which used them.
    """
    rng = np.random.default_rng(seed)
    requests, anchors = [], []
    for request_id in range(num_requests):
        requests.append(
            {
                **{"request_id": request_id, "prompt_id": f"toy-{request_id}", "domain": "toy", "arrival": 0.0},
                **{"prompt_len": 7, "max_tokens": LENGTH, "output_len": LENGTH, "num_preemptions": 0},
                **{"first_token": 0.0, "finish": 1.0, "finish_reason": "length", "output_tokens": [1] * LENGTH},
            }
        )
        for i in range(LENGTH - 1):
            margin = rng.exponential(3.0, GAMMA) if margins is None else np.full(GAMMA, margins)
            room = min(GAMMA, LENGTH - 1 - i)
            hits = rng.random(room) < sigma(intercept + slope * margin[:room])
            num_accepted = int(np.argmin(hits)) if not hits.all() else room
            margin[num_accepted + 1 :] = 12.0 * rng.random()
            margin[room:] = 12.0 * rng.random()
            anchors.append(
                {
                    **{"request_id": request_id, "position": 7 + i, "draft_tokens": [1] * GAMMA},
                    "confidence": sigma(margin).tolist() if confidence else None,
                    "num_accepted": num_accepted,
                }
            )
    tables = {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    tables["requests"] = pa.Table.from_pylist(requests, schema=SCHEMAS["requests"])
    tables["anchors"] = pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"])
    return Trace(tables, "wall", {"block_size": GAMMA, "has_confidence": confidence, "mode": "greedy"})


# ---- the fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("intercept", "slope"), [(-1.5, 0.8), (0.3, 0.25), (1.0, -0.2)])
def test_the_fit_recovers_a_known_law(intercept, slope):
    fitted = [fit_margin(margin_trace(60, intercept, slope, seed)) for seed in range(6)]
    found = np.array([(one.intercept, one.slope) for one in fitted])
    assert all(one.kind == "margin" for one in fitted)
    # Six recordings: the truth within four standard errors of their mean, and these are small.
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - (intercept, slope)) < 4 * error).all()
    assert (error < 0.05).all()


def test_the_fit_maximises_the_likelihood_of_the_slots_that_met_an_output_token():
    """Slot by slot, as a loop; then no step in any direction is better."""
    trace = margin_trace(8, seed=3)
    margins, labels = [], []
    for anchor in trace.tables["anchors"].to_pylist():
        for slot, confidence in enumerate(anchor["confidence"]):
            if slot <= anchor["num_accepted"] and anchor["position"] + 1 + slot < 7 + LENGTH:
                confidence = min(confidence, 1 - 2**-25)
                margins.append(np.log(confidence / (1 - confidence)))
                labels.append(slot < anchor["num_accepted"])
    margins, labels = np.array(margins), np.array(labels)

    def likelihood(intercept, slope):
        p = sigma(intercept + slope * margins)
        return np.log(np.where(labels, p, 1 - p)).sum()

    fitted = fit_margin(trace)
    best = likelihood(fitted.intercept, fitted.slope)
    for step in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        assert likelihood(fitted.intercept + 1e-3 * step[0], fitted.slope + 1e-3 * step[1]) < best
    scores = score_margin(trace)
    assert scores.num_observations == len(labels) and scores.acceptance == pytest.approx(labels.mean())
    pairs = margins[labels][:, None] - margins[~labels]
    assert scores.auc == pytest.approx(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    assert scores.brier == pytest.approx(
        np.mean((sigma(fitted.intercept + fitted.slope * margins) - labels) ** 2), rel=0.02
    )
    assert scores.brier < scores.brier_constant == pytest.approx(labels.mean() * (1 - labels.mean()), rel=0.02)


def test_huge_margins_are_clipped_and_do_not_upset_the_fit():
    trace = margin_trace(30, seed=1)
    frame = trace.tables["anchors"].to_pandas()
    frame["confidence"] = [np.where(row > 0.9, 1.0, row) for row in frame["confidence"]]
    fitted = fit_margin(trace.with_anchors(pa.Table.from_pandas(frame, schema=SCHEMAS["anchors"])))
    assert 0 < fitted.slope < 1 and np.isfinite(fitted.intercept)


def test_traces_without_what_a_fit_needs_are_one_sentence():
    def refused(trace, said, call=fit_margin):
        with pytest.raises(UserError) as caught:
            call(trace)
        assert said in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    trace = margin_trace(4)
    empty = trace.with_anchors(SCHEMAS["anchors"].empty_table())
    assert "fit-margin" in refused(empty, "the trace has no anchors")
    assert "fit-margin" in refused(margin_trace(4, confidence=False), "anchors have no confidences")
    frame = trace.tables["anchors"].to_pandas()
    frame["confidence"] = [row - 0.3 for row in frame["confidence"]]
    head = trace.with_anchors(pa.Table.from_pandas(frame, schema=SCHEMAS["anchors"]))
    assert "Confidence('margin', 0.0, 1.0)" in refused(head, "which is no margin's")
    frame["confidence"] = [row * np.nan for row in frame["confidence"]]
    unknown = trace.with_anchors(pa.Table.from_pandas(frame, schema=SCHEMAS["anchors"]))
    refused(unknown, "which is no margin's")
    refused(margin_trace(4, intercept=1e3), "drafts were accepted")
    refused(margin_trace(4, intercept=-1e3), "drafts was accepted")
    refused(margin_trace(4, margins=2.0), "every margin is 2")
    refused(margin_trace(4, intercept=-3e3, slope=1e3), "infinitely steep")
    refused(margin_trace(1), "record two prompts", score_margin)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_two_numbers_exactly(tmp_path: Path):
    path = tmp_path / "deep" / "margin.json"
    confidence = Confidence("margin", -1.25, 1 / 3)
    write_margin(confidence, path, target="tiny", drafter="dflash")
    assert json.loads(path.read_text()) == {
        **{"intercept": -1.25, "slope": 1 / 3, "target": "tiny", "drafter": "dflash"},
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["margin.json"]
    assert (
        read_margin(path) == read_margin(path, drafter="dflash") == read_margin(path, drafter="x/dflash") == confidence
    )
    with pytest.raises(
        UserError, match=r"fitted to drafter dflash and this one is dspark; .*fit-margin --drafter dspark"
    ):
        read_margin(path, drafter="dspark")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"intercept": 1}',
        '{"intercept": "a", "slope": 1}',
        '{"intercept": NaN, "slope": 1}',
        "\xff",
    ],
)
def test_another_file_is_one_sentence(tmp_path: Path, text: str):
    path = tmp_path / "margin.json"
    with pytest.raises(UserError, match=r"no margin file at .*fit-margin"):
        read_margin(path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"margin\.json is not a margin file \(.*fit-margin") as caught:
        read_margin(path)
    assert "\n" not in str(caught.value)


# ---- before the token -----------------------------------------------------------------------------------------------

VOCABULARY, HIDDEN = 30, 8


def tiny_drafter(markov_rank: int) -> BlockDrafter:
    config = BlockDrafterConfig(
        **{"target": "tiny", "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "block_size": 4},
        **{"target_layer_ids": (0,), "mask_token_id": VOCABULARY - 1, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 8},
        **{"rms_norm_eps": 1e-5, "markov_rank": markov_rank, "enable_confidence_head": markov_rank > 0},
    )
    torch.manual_seed(0)
    drafter = BlockDrafter(config).eval().requires_grad_(False)
    # What `attach` borrows from a target and the head needs.
    drafter._head_weight = torch.randn(VOCABULARY, HIDDEN)
    drafter._target = SimpleNamespace(cap_logits=lambda logits: logits)
    return drafter


def heads_up_to(drafter, confidence, hidden, tokens):
    """Confidences of blocks whose tokens are forced."""

    def forced(slot, logits):
        return tokens[:, slot], None

    anchors = torch.zeros(len(tokens), dtype=torch.long)
    walk = BlockWalk(drafter, hidden)
    return run_head(drafter, walk, anchors, hidden.shape[1], forced, confidence).confidence


@pytest.mark.parametrize("markov_rank", [0, 5])
@pytest.mark.parametrize("kind", ["head", "top1", "margin"])
def test_confidence_is_fixed_before_its_token(kind, markov_rank):
    drafter = tiny_drafter(markov_rank)
    confidence = Confidence(kind, 0.2, 0.7)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 4, HIDDEN, generator=rng)
    tokens = torch.randint(0, VOCABULARY, (6, 4), generator=rng)
    before = heads_up_to(drafter, confidence, hidden, tokens)
    if kind == "head" and markov_rank == 0:
        assert before is None
        return
    assert before.shape == (6, 4) and ((before > 0) & (before < 1)).all()
    for slot in range(4):
        changed = tokens.clone()
        changed[:, slot] = (tokens[:, slot] + 1 + slot) % VOCABULARY
        after = heads_up_to(drafter, confidence, hidden, changed)
        assert torch.equal(after[:, : slot + 1], before[:, : slot + 1])
        # The token does count for the next slot where there is a sequential head: the test could fail.
        if slot < 3:
            assert torch.equal(after[:, slot + 1], before[:, slot + 1]) == (markov_rank == 0)


def test_top1_and_margin_are_what_they_say():
    drafter = tiny_drafter(0)
    hidden = torch.randn(5, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
    tokens = torch.zeros(5, 4, dtype=torch.long)
    logits = np.sort(drafter.base_logits(hidden).double().numpy(), axis=-1)
    margin = logits[..., -1] - logits[..., -2]
    top1 = np.exp(logits[..., -1]) / np.exp(logits).sum(axis=-1)
    for confidence, expected in (
        (Confidence("top1"), top1),
        (MARGIN, sigma(margin)),
        (Confidence("margin", -1.0, 0.4), sigma(-1.0 + 0.4 * margin)),
    ):
        np.testing.assert_allclose(heads_up_to(drafter, confidence, hidden, tokens).numpy(), expected, rtol=1e-5)


# ---- live -----------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("drafter", ["dspark", "dflash"])
def test_a_drafter_without_a_head_gets_prefix_policies_by_top1(engine, drafter):
    prompts = bundled_prompts(per_domain=1)[:2]

    def run(engine, policy):
        trace = engine.record(prompts, policy, ClosedLoop(2), max_tokens=12, progress=False)
        return trace, [row["output_tokens"] for row in trace.tables["requests"].to_pylist()]

    judged = engine.with_drafter(drafter, Confidence("top1"))
    assert judged.has_confidence
    trace, outputs = run(judged, ConfidenceThreshold(0.5))
    assert outputs == run(engine.with_drafter("none"), Fixed(0))[1]
    drafts = trace.drafts
    for row in drafts.itertuples():
        assert ((row.confidence > 0) & (row.confidence <= 1)).all()
        below = np.flatnonzero(row.confidence < 0.5)
        assert row.verify_len == (below[0] if below.size else row.draft_len)
    assert 0 < drafts["verify_len"].sum() < drafts["draft_len"].sum() and trace.config["has_confidence"]


@pytest.mark.model
def test_margins_of_a_live_drafter_can_be_fitted_and_used(engine, tmp_path: Path):
    prompts = bundled_prompts(per_domain=1)
    recorder = engine.with_drafter("dflash", MARGIN)
    trace = recorder.anchors(
        recorder.record(prompts, Fixed(0), ClosedLoop(3), max_tokens=24, progress=False), progress=False
    )
    fitted, scores = fit_margin(trace), score_margin(trace)
    assert fitted.slope > 0 and scores.auc > 0.6 and scores.num_observations > 60
    write_margin(fitted, tmp_path / "margin.json", drafter="dflash")
    used = engine.with_drafter("dflash", read_margin(tmp_path / "margin.json", drafter="dflash"))
    again = used.anchors(trace, progress=False)
    values = np.stack(trace.anchors["confidence"]).astype(float)
    margins = np.log(values / (1 - values))
    expected = sigma(fitted.intercept + fitted.slope * margins)
    np.testing.assert_allclose(np.stack(again.anchors["confidence"]), expected, atol=1e-4)
