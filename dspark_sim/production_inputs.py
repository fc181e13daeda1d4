"""What the prediction of the paper's production result is made of: the published baseline, and priors.

Of the production figures (7 and 8) only the MTP-1 throughput of Figure 8 goes in: tokens per second X of one GPU that
serves N requests. In the paper's data X is N times the speed per user, so N is what *one* GPU serves (with
data-parallel attention: one rank of it). MTP-1 verifies 2 tokens per request, so a round takes

    T = N·τ / X    at B = 2N batch tokens,    τ = 1 + acceptance of the MTP draft,

and as N runs from 1 to 350 (V4-Flash; the drawn line goes on beyond the visible axis) or 212 (V4-Pro), B covers 2 to
700 or 2 to 424. DSpark's batches have up to 6N tokens. Beyond the baseline's, the target pass is continued by a
straight line in seconds with the slope of its last tenth: a pass that is bound by arithmetic is linear in B.

The acceptance of DSpark's drafts is that of the paper's offline figures for Qwen3-4B (`simulate.presets`). No number of
a DSpark curve of Figures 7 and 8 goes in, and none of what the text says of them: `tests/test_production.py` changes
all of them and gets the same prediction. Whoever chose the priors had seen the published curves; their central values
were written down, with their sources, before the first simulation, and not changed after.

Times are seconds, throughput is tokens per second and GPU, concurrency is requests per GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from dspark_sim import reference
from dspark_sim.cost import CostModel, Curve
from dspark_sim.errors import UserError
from dspark_sim.simulate.presets import Calibration, preset
from dspark_sim.simulate.synthetic import SyntheticAcceptance
from dspark_sim.workload import DOMAINS

FloatArray = npt.NDArray[np.float64]
BaselineFigure = Literal["figure8", "figure7"]
BLOCK_SIZE = 5
"""γ in production (paper, section 5.1)."""
DRAFT_LAYERS = 3
"""Of DSpark's drafter in production (paper, section 5.1); MTP-1 is one layer of the target's kind."""
NUM_LAYERS: Mapping[str, int] = {"deepseek-v4-flash": 43, "deepseek-v4-pro": 61}
"""Of the targets (their published configurations)."""


@dataclass(frozen=True)
class Priors:
    """What the published baseline does not say. Central values were fixed before anything was simulated.

    `baseline` and `priced` became choices after the first run, which their central values are those of.

    Parameters
    ----------
    mtp_acceptance
        Of the MTP draft. DeepSeek-V3's report (section 5.4.3) gives 0.85 to 0.90 for its MTP module, which V4 keeps;
        on the domains below DSpark's own first position has 0.84, and a single MTP layer should not be better. 0.85 is
        the lower end of the one and agrees with the other.
    domain_shares
        Of requests that are math, code and chat: thirds, as in the paper's macro averages. Its mix of production is
        not published.
    acceptance_shift
        Added on the logit scale to Figure 2's acceptance at every position, for another target than Qwen3-4B.
    spread
        Factor of all spreads of acceptance that Figure 6 implies.
    calibration
        Of confidences: exact after sequential temperature scaling, or as raw as in Figure 6.
    draft_cost
        Factor of the drafters' layers: a drafter of n layers over m tokens takes n / (target's layers) of a target pass
        over m tokens. MTP-1 drafts from N tokens, DSpark from 5N.
    head_seconds
        Of DSpark's sequential head, per position. From Figure 4: 1.06 ms more than DFlash at γ = 7 and batch 128.
    request_share
        Of the growth of step seconds with load, the part that goes with requests (their KV cache) and not with batch
        tokens. The baseline has two tokens for each request and cannot tell them apart; V4's compressed attention
        makes the first small.
    slope_beyond
        Factor of the target pass's slope above the measured batch sizes.
    output_len
        Tokens of every output.
    baseline
        Where the MTP-1 curve is read: Figure 8's line, or Figure 7's, which is another fit to the same telemetry and
        for V4-Pro up to 22 % apart; its N is throughput over speed per user.
    priced
        What the scheduler divides by: the seconds of a whole round, as `PrefixScheduler` does, or those of the target's
        pass alone, as the paper's Algorithm 1 can also be read.

    Raises
    ------
    UserError
        If a value is out of range.
    """

    mtp_acceptance: float = 0.85
    domain_shares: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    acceptance_shift: float = 0.0
    spread: float = 1.0
    calibration: Calibration = "after"
    draft_cost: float = 1.0
    head_seconds: float = 0.15e-3
    request_share: float = 0.0
    slope_beyond: float = 1.0
    output_len: int = 400
    baseline: BaselineFigure = "figure8"
    priced: Literal["round", "target"] = "round"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("mtp_acceptance", 0.01, 0.99),
            ("acceptance_shift", -3.0, 3.0),
            ("spread", 0.0, 3.0),
            ("draft_cost", 0.0, 10.0),
            ("head_seconds", 0.0, 0.1),
            ("request_share", 0.0, 1.0),
            ("slope_beyond", 0.0, 10.0),
            ("output_len", 10, 100_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} is {value}; give {low:g} to {high:g}")
        if min(self.domain_shares) < 0 or sum(self.domain_shares) <= 0:
            raise UserError(
                f"domain_shares are {self.domain_shares}; give shares of math, code and chat, none negative"
            )

    @property
    def mtp_acceptance_length(self) -> float:
        """τ of MTP-1, tokens per round."""
        return 1.0 + self.mtp_acceptance


@dataclass(frozen=True)
class Range:
    """How far a prior may reasonably be off, and why."""

    name: str
    low: Mapping[str, Any]
    high: Mapping[str, Any]
    low_label: str
    high_label: str
    source: str


RANGES: tuple[Range, ...] = (
    Range(
        "MTP-1 acceptance",
        {"mtp_acceptance": 0.70},
        {"mtp_acceptance": 0.90},
        "0.70",
        "0.90",
        "mean first position of Eagle3, one layer too, in Figure 2; the upper end of DeepSeek-V3's report",
    ),
    Range(
        "acceptance of DSpark's drafts",
        {"acceptance_shift": -0.3},
        {"acceptance_shift": 0.3},
        "logit -0.3",
        "logit +0.3",
        "the difference of math and code in Figure 2 is 0.2, of code and chat 0.9",
    ),
    Range(
        "share of chat",
        {"domain_shares": (0.2, 0.2, 0.6)},
        {"domain_shares": (0.41, 0.41, 0.18)},
        "60 %",
        "18 %",
        "twice the central share; the share in the paper's training data (section 4.1)",
    ),
    Range("spread of acceptance", {"spread": 0.7}, {"spread": 1.3}, "× 0.7", "× 1.3", "Figure 6 is Alpaca alone"),
    Range(
        "confidences",
        {"calibration": "before"},
        {},
        "raw",
        "calibrated",
        "Figure 6 before and after sequential temperature scaling",
    ),
    Range(
        "cost of drafter layers",
        {"draft_cost": 2.0},
        {"draft_cost": 0.5},
        "× 2",
        "× 0.5",
        "small passes are launch-bound",
    ),
    Range(
        "sequential head",
        {"head_seconds": 0.3e-3},
        {"head_seconds": 0.0},
        "0.3 ms",
        "0 ms",
        "twice Figure 4's; hidden behind other work",
    ),
    Range(
        "growth with requests, not tokens",
        {"request_share": 0.0},
        {"request_share": 0.5},
        "0 %",
        "50 %",
        "half of the growth is attention over the KV cache",
    ),
    Range(
        "slope beyond the baseline's batches",
        {"slope_beyond": 2.0},
        {"slope_beyond": 0.5},
        "× 2",
        "× 0.5",
        "a pass that becomes bound by arithmetic; one whose experts are all loaded already",
    ),
    Range(
        "baseline's figure",
        {},
        {"baseline": "figure7"},
        "Figure 8",
        "Figure 7",
        "two fits of the paper to one telemetry",
    ),
    Range(
        "what the scheduler prices",
        {},
        {"priced": "target"},
        "round",
        "target pass",
        "two readings of SPS in Algorithm 1",
    ),
)
"""Ranges of the priors, the end that is worse for DSpark first where that is clear."""


@dataclass(frozen=True)
class Baseline:
    """The published MTP-1 throughput of one target.

    Parameters
    ----------
    target_model
        ``deepseek-v4-flash`` or ``deepseek-v4-pro``.
    concurrency, throughput
        Requests of one GPU, rising from 1, and tokens per second of it.
    num_layers
        Of the target.
    """

    target_model: str
    concurrency: tuple[float, ...]
    throughput: tuple[float, ...]
    num_layers: int

    def round_seconds(self, priors: Priors) -> FloatArray:
        """T = N·τ / X at every concurrency."""
        return np.asarray(np.asarray(self.concurrency) * priors.mtp_acceptance_length / np.asarray(self.throughput))


def published_baseline(target_model: str, figure: BaselineFigure = "figure8") -> Baseline:
    """The published MTP-1 throughput of a target, from 1 request on, the drawn line's whole length.

    Raises
    ------
    UserError
        If the figures do not show the target.
    """
    if target_model not in NUM_LAYERS:
        raise UserError(f"Figure 8 has no target {target_model!r}; choose one of {', '.join(NUM_LAYERS)}")
    which = {"target_model": target_model, "drafter": "mtp-1"}
    if figure == "figure8":
        rows = reference.curve("fig8_throughput", **which)
    else:
        rows = reference.curve("fig7_frontier", **which)
        rows["concurrency_requests"] = rows["throughput_tok_s_gpu"] / rows["tps_tok_s_user"]
        rows = rows.sort_values("concurrency_requests")
    rows = rows[rows["concurrency_requests"] >= 1.0]
    users, throughput = rows["concurrency_requests"].tolist(), rows["throughput_tok_s_gpu"].tolist()
    return Baseline(target_model, tuple(users), tuple(throughput), NUM_LAYERS[target_model])


def target_pass(baseline: Baseline, priors: Priors) -> Curve:
    """Seconds of one target pass by batch tokens: the baseline's round less its draft.

    The draft is a share of a pass over half as many tokens, so the two are solved for together.
    """
    knots = 2.0 * np.asarray(baseline.concurrency)
    rounds = baseline.round_seconds(priors)
    share = priors.draft_cost / baseline.num_layers
    levels = rounds
    for _ in range(60):
        levels = rounds - share * np.interp(knots / 2.0, knots, levels)
    tail = knots >= 0.9 * knots[-1]
    slope = np.polyfit(knots[tail], levels[tail], 1)[0] * priors.slope_beyond
    far = 100.0 * knots[-1]
    return Curve((*knots.tolist(), far), (*levels.tolist(), float(levels[-1] + slope * (far - knots[-1]))))


def costs(baseline: Baseline, priors: Priors) -> dict[Literal["mtp", "dspark"], CostModel]:
    """Seconds of a round's parts under either drafter; with MTP-1 they add up to the baseline's round.

    Returns
    -------
    dict
        ``mtp`` drafts 1 token per request, ``dspark`` five; both share target pass and host.
    """
    whole = target_pass(baseline, priors)
    users = baseline.concurrency
    levels = np.asarray(whole.levels)
    growth = priors.request_share * (levels - levels[0])
    verify = replace(whole, levels=tuple((levels - growth).tolist()))
    per_request = Curve(users, tuple(growth[:-1].tolist()))
    share = priors.draft_cost / baseline.num_layers
    mtp = share * whole.level(users)
    block = DRAFT_LAYERS * share * whole.level(BLOCK_SIZE * np.asarray(users)) + BLOCK_SIZE * priors.head_seconds
    source = {"source": f"Figure 8, {baseline.target_model}, MTP-1"}
    return {
        "mtp": CostModel(verify, Curve(users, tuple(mtp.tolist())), host=per_request, provenance=source),
        "dspark": CostModel(verify, Curve(users, tuple(block.tolist())), host=per_request, provenance=source),
    }


def laws(priors: Priors) -> dict[str, SyntheticAcceptance]:
    """Acceptance and confidence of DSpark's drafts by domain: Figures 2 and 6, shifted and spread by the priors."""
    given = zip(DOMAINS, priors.domain_shares, strict=True)
    return {
        domain: _law(domain, priors.calibration, priors.acceptance_shift, priors.spread)
        for domain, share in given
        if share > 0
    }


@lru_cache(maxsize=64)
def _law(domain: str, calibration: Calibration, shift: float, spread: float) -> SyntheticAcceptance:
    # A law keeps the logits that it has solved for.
    law = preset(drafter="dspark", domain=domain, calibration=calibration)
    shifted = expit(logit(law.conditional_acceptance) + shift)
    spreads = {name: spread * getattr(law, name) for name in ("difficulty_sd", "anchor_sd", "position_sd")}
    return replace(law, conditional_acceptance=tuple(shifted.tolist()), **spreads)
