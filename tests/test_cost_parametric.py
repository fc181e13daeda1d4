"""Coefficients: a known law is recovered, and what cannot be told apart is said."""

import numpy as np
import pandas as pd
import pytest

from dspark_sim.cost_parametric import coefficient_rows, fit_parametric
from dspark_sim.cost_parts import Parametric
from dspark_sim.errors import UserError

LAWS = {
    "verify": Parametric(8e-3, 2e-4, 1e-4, 1e-7),
    "draft": Parametric(1e-3, 5e-5, 2e-5, 1e-8, 1e-4),
    "head": Parametric(2e-4, 0.0, 1e-5, 0.0, 3e-4),
    "host": Parametric(5e-4, 2e-5),
    "prefill": Parametric(6e-3, 0.0, 5e-5),
}


def steps(num_steps: int = 800, noise: float = 0.0, seed: int = 0, draft_len: int | None = None) -> pd.DataFrame:
    """A profile under `LAWS`; with `draft_len` every draft has that length and is verified whole."""
    rng = np.random.default_rng(seed)
    running = rng.integers(1, 17, num_steps)
    lens = rng.integers(0, 6, num_steps) if draft_len is None else np.full(num_steps, draft_len)
    verified = (lens * running * (rng.random(num_steps) if draft_len is None else 1.0)).astype(int)
    context = running * rng.integers(50, 800, num_steps)
    luck = np.exp(noise * rng.normal(size=(5, num_steps)))
    features = {"num_requests": running, "context_tokens": context}
    drafts = {**features, "draft_len": lens, "draft_tokens": lens * running}
    prompts = np.where(np.arange(num_steps) % 5 == 0, rng.integers(10, 400, num_steps), 0)
    decode = prompts == 0
    frame = {
        "verify_seconds": LAWS["verify"].seconds(running + verified, **features) * luck[0] * decode,
        "draft_seconds": LAWS["draft"].seconds(running, **drafts) * luck[1] * (decode & (lens > 0)),
        "head_seconds": LAWS["head"].seconds(running, **drafts) * luck[2] * (decode & (lens > 0)),
        "host_seconds": np.where(decode, LAWS["host"].seconds(running) * luck[3], 2e-3),
        "prefill_seconds": LAWS["prefill"].seconds(prompts) * luck[4] * ~decode,
        "policy_seconds": np.zeros(num_steps),
        "accept_seconds": np.zeros(num_steps),
        "num_running": running,
        "draft_len": np.where(decode, lens, 0),
        "batch_tokens": np.where(decode, running + verified, prompts),
        "context_tokens": context,
        "num_prefill_tokens": prompts,
    }
    return pd.DataFrame(frame)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.05, 0.25)])
def test_coefficients_are_recovered(noise: float, tolerance: float) -> None:
    fitted = fit_parametric(steps(noise=noise), {"device": "toy"})
    assert fitted.provenance["not_identified"] == {}
    for name, law in LAWS.items():
        part = getattr(fitted, name)
        assert isinstance(part, Parametric)
        for field, truth in vars(law).items():
            # A coefficient that is small beside the part's seconds is known only as well as those are.
            scale = {"per_context_token": 1e-7, "per_request": 2e-4, "per_token": 1e-4}.get(field, 1e-3)
            assert getattr(part, field) == pytest.approx(truth, rel=tolerance, abs=tolerance * scale), (name, field)
        # The extremes are not left out, and a left-out size is missed by little more than its own noise.
        assert fitted.provenance[f"{name}_leave_one_out_error"] < max(noise, 1e-6)
    assert fitted.prefill_host_seconds(3) == pytest.approx(2e-3)
    assert fitted.residuals[-1] < 1 + 5 * max(noise, 1e-6)


@pytest.mark.parametrize("draft_len", [0, 3])
def test_what_moves_together_is_said_and_the_sum_is_right(draft_len: int) -> None:
    """Every request has the same number of tokens, so no profile can part per request from per token."""
    fitted = fit_parametric(steps(draft_len=draft_len))
    lost = fitted.provenance["not_identified"]
    assert lost["verify"] == ["per_request"]
    assert ("draft" in lost) == (draft_len > 0)
    if draft_len:
        assert lost["draft"] == ["per_position", "per_request"]
    for running in (1, 5, 16):
        batch = running * (1 + draft_len)
        truth = LAWS["verify"].scalar(batch, 300 * running, running, 0)
        assert fitted.step_seconds(batch, 300 * running, running) == pytest.approx(truth, rel=1e-3)
        if draft_len:
            drafted = sum(LAWS[part].scalar(running, 300 * running, running, draft_len) for part in ("draft", "head"))
            assert fitted.draft_seconds(running, draft_len, 300 * running) == pytest.approx(drafted, rel=1e-3)
    rows = {row["part"]: row for row in coefficient_rows(fitted)}
    assert rows["verify"]["not_identified"] == "per_request" and rows["host"]["not_identified"] == "-"


def test_what_a_pass_takes_longer_behind_a_draft_is_the_drafts_cost() -> None:
    frame = steps()
    slower = frame.assign(verify_seconds=frame["verify_seconds"] + 0.003 * (frame["draft_len"] > 0))
    plain, fitted = fit_parametric(frame), fit_parametric(slower)
    assert fitted.step_seconds(20, 900, 5) == pytest.approx(plain.step_seconds(20, 900, 5), rel=1e-6)
    assert fitted.draft_seconds(5, 3, 900) == pytest.approx(plain.draft_seconds(5, 3, 900) + 0.003, rel=1e-6)


def test_leave_one_out_shows_that_a_staircase_is_no_line() -> None:
    frame = steps()
    cliff = frame.assign(verify_seconds=np.where(frame["batch_tokens"] > 24, 0.1, 0.01))
    assert fit_parametric(cliff).provenance["verify_leave_one_out_error"] > 0.2


def test_a_profile_without_rounds_is_refused_and_one_round_is_enough() -> None:
    frame = steps(20)
    with pytest.raises(UserError, match="no decode round"):
        fit_parametric(frame[frame["num_prefill_tokens"] > 0])
    one = frame[frame["num_prefill_tokens"] == 0].iloc[[0]]
    fitted = fit_parametric([one])
    row = one.iloc[0]
    assert fitted.step_seconds(int(row["batch_tokens"]), 0, 1) == pytest.approx(row["verify_seconds"])
    assert fitted.provenance["verify_leave_one_out_error"] is None
