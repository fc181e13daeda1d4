"""The paper's production result (its Figures 7 and 8) predicted from its baseline: the simulated servers.

`production_inputs` says what goes in. Requests of one GPU are served in a closed loop by the simulator, under the
baseline's drafter and under DSpark's, by policies that are the engine's own. Prompts are read elsewhere (prefill takes
no time here), every output has the same length, and a user asks again at once, so concurrency is constant.

Throughput is tokens per second and GPU, concurrency is requests per GPU, budgets count the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import LaggedPrefixScheduler
from dspark_sim.production_inputs import BLOCK_SIZE, RANGES, Priors, Range, costs, laws, published_baseline
from dspark_sim.production_scores import curve_errors, gains
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.run import simulate
from dspark_sim.simulate.synthetic import SyntheticAcceptance
from dspark_sim.simulate.synthetic_anchors import synthetic_anchors
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop

FloatArray = npt.NDArray[np.float64]
Served = Literal["mtp-1", "fixed-5", "prefix", "lagged-2"]
"""What is served: the baseline, all five drafts always, Algorithm 1, and its form with a lag of two rounds."""
SERVED: tuple[Served, ...] = get_args(Served)
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 210, 260)

# Purpose of random numbers.
_RESIDUAL = 0x9E51
# Decode rounds that are not measured.
_WARM_UP = 4
_GOLDEN = (5**0.5 - 1) / 2


def dspark_requests(priors: Priors, num_requests: int, seed: int = 0) -> RecordedAnchors:
    """Requests whose blocks follow `laws`, domains spread evenly over the list."""
    shares = np.asarray(priors.domain_shares)
    shares = shares[shares > 0] / shares.sum()
    by_domain = laws(priors)
    # Multiples of the golden ratio: every stretch of the list has all but exactly the shares.
    place = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(num_requests) * _GOLDEN) % 1.0, side="right")
    domains = [list(by_domain)[index] for index in place.tolist()]
    anchors = synthetic_anchors(
        by_domain, num_requests, domains=domains, prompt_len=1, output_len=priors.output_len, seed=seed
    )
    return anchors.restricted(BLOCK_SIZE)


def mtp_requests(priors: Priors, num_requests: int, seed: int = 0) -> RecordedAnchors:
    """Requests whose one draft a round is accepted with the prior's probability."""
    law = SyntheticAcceptance((priors.mtp_acceptance,), confidence=None)
    return synthetic_anchors(law, num_requests, prompt_len=1, output_len=priors.output_len, seed=seed)


def policy_of(served: Served, cost: CostModel, priors: Priors) -> SpeculationPolicy:
    """The policy that a name of `Served` stands for; `cost` is what rounds take.

    Raises
    ------
    UserError
        If there is no such name.
    """
    if priors.priced == "target":
        cost = replace(cost, draft=Curve(), host=Curve())
    policies: dict[Served, SpeculationPolicy] = {
        "mtp-1": Fixed(1),
        "fixed-5": Fixed(BLOCK_SIZE),
        "prefix": PrefixScheduler(cost),
        "lagged-2": LaggedPrefixScheduler(cost, lag=2),
    }
    if served not in policies:
        raise UserError(f"no policy {served!r} is predicted; choose from {', '.join(SERVED)}")
    return policies[served]


def predict(
    target_model: str,
    priors: Priors | None = None,
    concurrency: Iterable[int] = CONCURRENCY,
    served: Iterable[Served] = SERVED,
    *,
    num_requests: int = 1000,
    seed: int = 0,
    requests: dict[Any, RecordedAnchors] | None = None,
    on_point: Callable[[], Any] | None = None,
) -> pd.DataFrame:
    """Simulate a target in a closed loop at every concurrency.

    Parameters
    ----------
    target_model
        ``deepseek-v4-flash`` or ``deepseek-v4-pro``.
    priors
        ``None`` takes the central ones.
    concurrency
        Requests of one GPU.
    served
        Policies.
    num_requests
        Of a run, beside those that fill the server; the fewer, the noisier.
    seed
        Of the requests' luck. Policies meet the same.
    requests
        Those of earlier calls with the same size and seed, kept here for the next call whose priors leave acceptance
        as it was.
    on_point
        Called after each run, to move a progress bar.

    Returns
    -------
    DataFrame
        A row per policy and concurrency: ``target_model, served, concurrency_requests, throughput_tok_s_gpu,
        tps_tok_s_user, verification_budget_tokens, acceptance_length_tokens, round_seconds``.

    Raises
    ------
    UserError
        If the target or a policy is unknown, or the run too short to be measured.
    """
    priors = priors or Priors()
    users, names = list(concurrency), list(served)
    seconds = costs(published_baseline(target_model, priors.baseline), priors)
    total = num_requests + max(users)
    made = {} if requests is None else requests
    rows = []
    for name in names:
        drafter: Literal["mtp", "dspark"] = "mtp" if name == "mtp-1" else "dspark"
        drawn = (drafter, total, seed, *_of_acceptance(priors))
        if drawn not in made:
            made[drawn] = (mtp_requests if drafter == "mtp" else dspark_requests)(priors, total, seed)
        for num_users in users:
            anchors = under_way(made[drawn], num_users, num_users + num_requests, seed)
            cost = seconds[drafter]
            trace = simulate(anchors, policy_of(name, cost, priors), ClosedLoop(num_users), cost)
            rows.append(
                {"target_model": target_model, "served": name, "concurrency_requests": num_users, **_steady(trace)}
            )
            if on_point is not None:
                on_point()
    return pd.DataFrame(rows)


def sensitivity(
    target_model: str,
    base: Priors | None = None,
    concurrency: Iterable[int] = (1, 4, 16, 64, 128, 210),
    ranges: Sequence[Range] = RANGES,
    *,
    num_requests: int = 300,
    seed: int = 0,
    on_point: Callable[[], Any] | None = None,
) -> pd.DataFrame:
    """Move one prior after another to the ends of its range, all others central, under `LaggedPrefixScheduler`.

    Parameters
    ----------
    base
        Priors to move away from; ``None`` takes the central ones.
    ranges
        Which priors, and how far.
    target_model, concurrency, num_requests, seed, on_point
        As for `predict`; all runs meet the same luck.

    Returns
    -------
    DataFrame
        A row per prior and end, after one for the central values: ``target_model, prior, end, value, source``, the
        errors of `production_scores.curve_errors`, and the mean absolute error of the gains per user, in points.
    """
    base = base or Priors()
    places: list[tuple[str, str, str, str, Priors]] = [("central", "", "", "", base)]
    for one in ranges:
        places.append((one.name, "low", one.low_label, one.source, replace(base, **one.low)))
        places.append((one.name, "high", one.high_label, one.source, replace(base, **one.high)))
    users = list(concurrency)
    known: dict[Priors, dict[str, float]] = {}
    requests: dict[Any, RecordedAnchors] = {}
    rows = []
    for name, end, value, source, priors in places:
        if priors not in known:
            curve = predict(
                target_model,
                priors,
                users,
                ("lagged-2",),
                num_requests=num_requests,
                seed=seed,
                requests=requests,
                on_point=on_point,
            )
            found = gains(curve, target_model, priors.baseline)
            per_user = found.loc[found["gain_kind"] == "tps_at_matched_throughput", "error_points"]
            gain = {"gain_mean_abs_error_points": float(per_user.abs().mean())}
            known[priors] = {**curve_errors(curve, target_model), **gain}
        rows.append(
            {"target_model": target_model, "prior": name, "end": end, "value": value, "source": source, **known[priors]}
        )
    return pd.DataFrame(rows)


def under_way(anchors: RecordedAnchors, num_users: int, num_requests: int, seed: int) -> RecordedAnchors:
    """The first `num_requests` requests, those that fill the server at the start being somewhere on their way.

    What is left of a request met at a random time is uniform over its length, so the run is steady from its start.
    """
    names = anchors.request_prompts[:num_requests]
    left = np.random.default_rng((seed, num_users, _RESIDUAL)).random(num_users)
    prompts = {name: anchors.prompts[name] for name in names}
    for name, part in zip(names[:num_users], left.tolist(), strict=True):
        whole = prompts[name]
        rest = 2 + int(part * (whole.output_len - 1))
        prompts[name] = replace(whole, output_len=rest, max_tokens=rest)
    return replace(anchors, prompts=prompts, request_prompts=names)


def _of_acceptance(priors: Priors) -> tuple[Any, ...]:
    """What the luck of requests depends on."""
    names = ("mtp_acceptance", "domain_shares", "acceptance_shift", "spread", "calibration", "output_len")
    return tuple(getattr(priors, name) for name in names)


def _steady(trace: Trace) -> dict[str, float]:
    """Rates over the decode rounds up to the last arrival, while the server is full, less the first few.

    A lagged policy knows no confidence in its first rounds and verifies everything.
    """
    steps = trace.tables["steps"]
    get = partial(_numbers, steps)
    last = float(np.max(_numbers(trace.tables["requests"], "arrival")))
    full = (get("batch_tokens") > 0) & (get("num_prefill_tokens") == 0) & (get("start") <= last)
    full &= np.cumsum(full) > _WARM_UP
    if not full.any():
        raise UserError(
            "no decode round is left to measure while all users are served; raise num_requests or output_len"
        )
    step, emitted = (_numbers(trace.tables["drafts"], name) for name in ("step", "num_emitted"))
    by_step = np.bincount(step.astype(np.int64), weights=emitted, minlength=steps.num_rows)
    tokens, seconds = float(by_step[full].sum()), float(get("step_seconds")[full].sum())
    rounds, num_steps = float(get("num_running")[full].sum()), int(full.sum())
    return {
        "throughput_tok_s_gpu": tokens / seconds,
        "tps_tok_s_user": tokens / seconds / (rounds / num_steps),
        "verification_budget_tokens": float(get("batch_tokens")[full].sum()) / rounds,
        "acceptance_length_tokens": tokens / rounds,
        "round_seconds": seconds / num_steps,
    }


def _numbers(table: Any, name: str) -> FloatArray:
    return np.asarray(table[name].to_numpy(), dtype=np.float64)
