"""A synthetic law fitted to the dense anchors of a recorded drafter.

Every number has its own estimator:

* **Conditional acceptance** per position: survivors of all anchors that went on. A position past the end of the output
  or of the draft is no trial.
* **Confidences**: logistic regression of the outcome on logit confidence, per position and over its trials. With
  outcome logit = α + β · logit c, the law has scale 1/β and shift -α/β, and no noise: a drafter that knows p but
  misjudges it. Noise and spread cannot be told apart by outcomes; a noisy drafter is fitted by one that has the same
  confidences and the same reliability. Where β is not two standard errors above 0, the confidence says nothing: scale
  0, and its spread is noise.
* **anchor_sd, position_sd**: covariance within requests of α + β · logit c across positions, by moments: off the
  diagonal anchor_sd², on it anchor_sd² + position_sd². Without confidences, 0: outcomes do not show them.
* **difficulty_sd**: maximum likelihood over requests, each request's effect integrated out, on the anchors that a run
  of whole blocks visits. Neighbouring anchors draft the same tokens; taken all as independent they would pass for a
  larger spread. The standard error is from the curvature of the log likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, logsumexp

from dspark_sim.errors import UserError
from dspark_sim.simulate.acceptance import FloatArray, IntArray, RecordedAnchors
from dspark_sim.simulate.synthetic import ConfidenceLaw, SyntheticAcceptance
from dspark_sim.trace import Trace

_LARGEST_SD = 4.0
# Confidences are float32 where they are recorded.
_LEAST = 1e-6


@dataclass(frozen=True)
class SyntheticFit:
    """A fitted law and how well it is known.

    Parameters
    ----------
    law
        The law.
    difficulty_sd_se
        Standard error of its difficulty_sd; not a number where the likelihood does not curve.
    positions
        A row per position: ``position, num_trials, conditional_acceptance, conditional_acceptance_se`` (requests as
        clusters), and with confidences ``intercept, intercept_se, slope, slope_se`` of the logistic regression.
    num_requests, num_anchors
        What it was fitted to.
    recorded_acceptance_length
        Tokens per round of a run of whole blocks over the recording, far from outputs' ends; compare with
        ``law.mean_acceptance_length()``.
    """

    law: SyntheticAcceptance
    difficulty_sd_se: float
    positions: pd.DataFrame
    num_requests: int
    num_anchors: int
    recorded_acceptance_length: float


@dataclass(frozen=True)
class _Blocks:
    """Anchors of requests: accepted drafts [T], most that could be [T], owner [T], logit confidence [T, γ], visited."""

    num_accepted: IntArray
    limit: IntArray
    owner: IntArray
    signal: FloatArray | None
    visited: npt.NDArray[np.bool_]
    num_requests: int


def fit_synthetic(recorded: Trace | RecordedAnchors, *, domain: str | None = None) -> SyntheticFit:
    """Fit a law to a recording.

    Parameters
    ----------
    recorded
        A trace with dense anchors, or its anchors.
    domain
        Only this domain's requests; ``None`` takes all.

    Raises
    ------
    UserError
        If there are no anchors, or none in the domain.
    """
    anchors = RecordedAnchors.from_trace(recorded) if isinstance(recorded, Trace) else recorded
    blocks = _gather(anchors, domain)
    gamma = anchors.block_size
    frame = _conditional(blocks, gamma)
    law = SyntheticAcceptance(
        conditional_acceptance=tuple(frame["conditional_acceptance"]),
        confidence=None,
        mode=anchors.mode,
        domain=domain or "synthetic",
    )
    if blocks.signal is not None:
        frame, law = _with_confidence(blocks, blocks.signal, frame, law)
    counts = _outcomes(blocks, gamma)

    def log_likelihood(sd: float) -> float:
        return _log_likelihood(replace(law, difficulty_sd=abs(sd)), *counts)

    sd, error = _maximum(log_likelihood)
    whole = blocks.visited & (blocks.limit == gamma)
    return SyntheticFit(
        law=replace(law, difficulty_sd=sd),
        difficulty_sd_se=error,
        positions=frame,
        num_requests=blocks.num_requests,
        num_anchors=blocks.owner.size,
        recorded_acceptance_length=float(1.0 + blocks.num_accepted[whole].mean()) if whole.any() else float("nan"),
    )


def fit_by_domain(recorded: Trace | RecordedAnchors) -> dict[str, SyntheticFit]:
    """A law for every domain of a recording, by name.

    Raises
    ------
    UserError
        If a domain has no anchors.
    """
    anchors = RecordedAnchors.from_trace(recorded) if isinstance(recorded, Trace) else recorded
    domains = sorted({prompt.domain for prompt in anchors.prompts.values()})
    return {domain: fit_synthetic(anchors, domain=domain) for domain in domains}


def _gather(anchors: RecordedAnchors, domain: str | None) -> _Blocks:
    prompts = [prompt for prompt in anchors.prompts.values() if domain is None or prompt.domain == domain]
    if not prompts:
        known = ", ".join(sorted({prompt.domain for prompt in anchors.prompts.values()}))
        raise UserError(f"no recorded request is of domain {domain}; choose one of {known}")
    prompts = [prompt for prompt in prompts if prompt.output_len > 1]
    if not prompts or anchors.block_size == 0:
        raise UserError("the recording has no drafted block to fit a law to; record longer outputs, with a drafter")
    rows = np.concatenate([np.arange(prompt.rows.start, prompt.rows.stop) for prompt in prompts])
    lens = np.array([prompt.output_len - 1 for prompt in prompts])
    room = np.concatenate([np.arange(n, 0, -1) for n in lens.tolist()])
    num_accepted = anchors.num_accepted[rows]
    visited = np.zeros(rows.size, dtype=np.bool_)
    for first, n in zip((np.cumsum(lens) - lens).tolist(), lens.tolist(), strict=True):
        place = 0
        while place < n:
            visited[first + place] = True
            place += int(num_accepted[first + place]) + 1
    limit = np.minimum(anchors.draft_len[rows], room)
    signal = None
    if anchors.has_confidence:
        signal = logit(np.clip(anchors.confidence[rows], _LEAST, 1.0 - _LEAST))
    return _Blocks(num_accepted, limit, np.repeat(np.arange(lens.size), lens), signal, visited, lens.size)


def _conditional(blocks: _Blocks, gamma: int) -> pd.DataFrame:
    rows = []
    estimate = 0.5
    for k in range(1, gamma + 1):
        trial = (blocks.limit >= k) & (blocks.num_accepted >= k - 1)
        happened = blocks.num_accepted[trial] >= k
        error = float("nan")
        # Nobody got there: the best guess is what held before.
        if happened.size:
            estimate = min(max(float(happened.mean()), 0.5 / happened.size), 1.0 - 0.5 / happened.size)
            estimate = min(max(estimate, _LEAST), 1.0 - _LEAST)
            excess = np.bincount(blocks.owner[trial], weights=happened - estimate, minlength=blocks.num_requests)
            error = float(np.sqrt((excess**2).sum()) / happened.size)
        rows.append((k, int(trial.sum()), estimate, error))
    names = ["position", "num_trials", "conditional_acceptance", "conditional_acceptance_se"]
    return pd.DataFrame(rows, columns=names)


def _with_confidence(
    blocks: _Blocks, signal: FloatArray, frame: pd.DataFrame, law: SyntheticAcceptance
) -> tuple[pd.DataFrame, SyntheticAcceptance]:
    gamma = law.block_size
    fits = np.full((gamma, 4), np.nan)
    scale, shift, noise = np.zeros(gamma), np.zeros(gamma), np.zeros(gamma)
    implied = np.full(signal.shape, np.nan)
    for k in range(gamma):
        trial = (blocks.limit > k) & (blocks.num_accepted >= k)
        fits[k] = _logistic(signal[trial, k], blocks.num_accepted[trial] > k)
        alpha, _, beta, error = fits[k]
        if beta > 2.0 * error:
            scale[k], shift[k] = 1.0 / beta, -alpha / beta
            implied[:, k] = alpha + beta * signal[:, k]
        else:
            seen = signal[np.isfinite(signal[:, k]), k]
            if seen.size:
                shift[k], noise[k] = seen.mean(), seen.std()
    frame = frame.assign(intercept=fits[:, 0], intercept_se=fits[:, 1], slope=fits[:, 2], slope_se=fits[:, 3])
    shared, own = _spreads(implied, blocks.owner, blocks.num_requests)
    confidence = ConfidenceLaw(tuple(scale.tolist()), tuple(shift.tolist()), tuple(noise.tolist()))
    return frame, replace(law, confidence=confidence, anchor_sd=shared, position_sd=own)


def _spreads(implied: FloatArray, owner: IntArray, num_requests: int) -> tuple[float, float]:
    """anchor_sd and position_sd from implied logits [T, γ], NaN where a block does not reach or nothing is implied."""
    known = np.isfinite(implied)
    values = np.where(known, implied, 0.0)
    centred = np.empty_like(values)
    for k in range(values.shape[1]):
        count = np.bincount(owner, weights=known[:, k], minlength=num_requests)
        mean = np.bincount(owner, weights=values[:, k], minlength=num_requests) / np.maximum(count, 1.0)
        centred[:, k] = np.where(known[:, k], values[:, k] - mean[owner], 0.0)
    # A request's mean takes one degree of freedom.
    pairs = (known.T.astype(np.float64) @ known) * max(1.0 - num_requests / owner.size, _LEAST)
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = np.where(pairs > 1, centred.T @ centred / pairs, np.nan)
    on = np.diag(covariance)
    off = covariance[~np.eye(on.size, dtype=np.bool_)]
    total = float(np.nanmean(on)) if np.isfinite(on).any() else 0.0
    shared = float(np.clip(np.nanmean(off), 0.0, total)) if np.isfinite(off).any() else 0.0
    return min(shared**0.5, _LARGEST_SD), min(max(total - shared, 0.0) ** 0.5, _LARGEST_SD)


def _logistic(x: FloatArray, happened: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Intercept, its error, slope and its error of a logistic regression; NaN where there is nothing to regress."""
    usable = np.isfinite(x)
    x, y = x[usable], happened[usable].astype(np.float64)
    if x.size < 3 or y.min() == y.max() or np.ptp(x) < 1e-9:
        return (np.nan,) * 4
    centre, spread = x.mean(), x.std()
    design = np.column_stack((np.ones(x.size), (x - centre) / spread))
    # A weak ridge keeps separable data finite.
    ridge = 1e-6 * np.eye(2)
    beta = np.zeros(2)
    for _ in range(100):
        chance = expit(design @ beta)
        information = design.T @ (design * (chance * (1.0 - chance))[:, None]) + ridge
        step = np.linalg.solve(information, design.T @ (y - chance) - ridge @ beta)
        beta = beta + np.clip(step, -3.0, 3.0)
        if np.abs(step).max() < 1e-10:
            break
    covariance = np.linalg.inv(information)
    back = np.array([[1.0, -centre / spread], [0.0, 1.0 / spread]])
    alpha, slope = back @ beta
    errors = np.sqrt(np.diag(back @ covariance @ back.T))
    return float(alpha), float(errors[0]), float(slope), float(errors[1])


def _outcomes(blocks: _Blocks, gamma: int) -> tuple[FloatArray, FloatArray]:
    """Visited anchors of each request by accepted drafts [P, γ+1]: those that a rejection ended, and all others."""
    rejected, cut = (np.zeros((blocks.num_requests, gamma + 1)) for _ in range(2))
    at_limit = blocks.num_accepted >= blocks.limit
    for counts, chosen in ((rejected, ~at_limit), (cut, at_limit)):
        chosen = chosen & blocks.visited
        np.add.at(counts, (blocks.owner[chosen], blocks.num_accepted[chosen]), 1.0)
    return rejected, cut


def _log_likelihood(law: SyntheticAcceptance, rejected: FloatArray, cut: FloatArray) -> float:
    effects, weights = law.difficulty_nodes
    survival = np.concatenate((np.ones((effects.size, 1)), law.survival(effects), np.zeros((effects.size, 1))), axis=1)
    with np.errstate(divide="ignore"):
        stopped = np.maximum(np.log(survival[:, :-1] - survival[:, 1:]), -700.0)
        reached = np.maximum(np.log(survival[:, :-1]), -700.0)
    per_request = rejected @ stopped.T + cut @ reached.T
    return float(logsumexp(per_request + np.log(weights), axis=1).sum())


def _maximum(log_likelihood: Callable[[float], float]) -> tuple[float, float]:
    """The maximum over 0 to the largest spread, and its standard error from the curvature there."""
    found = minimize_scalar(lambda sd: -log_likelihood(sd), bounds=(0.0, _LARGEST_SD), options={"xatol": 1e-4})
    sd = float(found.x) if -found.fun > log_likelihood(0.0) else 0.0
    step = max(0.02, 0.05 * sd)
    curvature = (log_likelihood(sd + step) - 2.0 * log_likelihood(sd) + log_likelihood(sd - step)) / step**2
    return sd, float(1.0 / np.sqrt(-curvature)) if curvature < 0 else float("nan")
