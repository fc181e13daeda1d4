"""How well a drafter drafts, from dense anchors: acceptance lengths, by position, by threshold, with intervals.

Acceptance lengths come from the rounds of `blocks.walk`, which are a live run's. All lengths are in tokens.

Two conventions, both kept:

* ``mean_acceptance_length`` is `metrics.summary`'s: Σ(num_accepted + 1) / rounds over all rounds. The length limit
  cuts the last round, which lowers it by about one part in the number of output tokens.
* ``accept_len``, ``verify_rate`` and ``accept_rate`` are DeepSpec's (`deepspec/eval/base_evaluator.py`). There the
  last round may run past the limit, so nothing is cut. Here the same is had from rounds whose whole block and bonus
  fit: those of a DeepSpec run with max_tokens - γ - 1 new tokens, whether or not the output ended before.
  ``accept_len`` = Σ emitted / rounds; an accepted end-of-sequence token has no bonus behind it.
  ``verify_rate`` = Σ emitted / (Σ proposed + rounds), that is emitted tokens over tokens that the target judged;
  proposals end at an accepted end-of-sequence token. ``accept_rate`` at k (DeepSpec numbers k from 0, here from 1) =
  rounds that accepted at least k drafts over rounds that proposed so many. DeepSpec counts slots behind the end of
  an output as rejected where the round did not reach the end; here they are left out. The prefill's token is in none.

Intervals are by bootstrap over prompts within each domain; ``macro`` is the mean of the domains. There is none where
more resamples than the interval leaves out have no value, nor with one prompt in a domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from dspark_sim.analysis.blocks import Blocks, prompt_counts, walk
from dspark_sim.analysis.stats import Bootstrap
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace
from dspark_sim.workload import DOMAINS

FloatArray = npt.NDArray[np.float64]
MACRO = "macro"
REFERENCE = "dspark"
ROW = (
    *("target", "drafter", "domain", "temperature", "mean_acceptance_length", "low", "high"),
    *("dspark_gain", "dspark_gain_low", "dspark_gain_high"),
)
"""Columns of the rows for programs (`--json`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """K ratios and their resamples: [K] and [B, K]; resamples are NaN where a domain has fewer than two prompts."""

    estimate: FloatArray
    draws: FloatArray

    def gain_over(self, other: Resampled) -> Resampled:
        """Relative gain over another drafter on the same resampled prompts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return Resampled(self.estimate / other.estimate - 1.0, self.draws / other.draws - 1.0)


def domain_ratios(
    numerator: FloatArray, denominator: FloatArray, index: pd.MultiIndex, bootstrap: Bootstrap
) -> dict[str, Resampled]:
    """Σ numerator / Σ denominator by domain, and the mean of the domains as ``macro``.

    Parameters
    ----------
    numerator, denominator
        [P] or [P, K], a row per prompt.
    index
        [P], ``domain, prompt_id``; the same index draws the same prompts.
    bootstrap
        How to resample; every domain is resampled by itself.

    Raises
    ------
    UserError
        If there is no prompt, or a domain is named macro.
    """
    domains = index.get_level_values(0)
    present = [name for name in DOMAINS if name in domains] + sorted(set(domains) - set(DOMAINS))
    if not present:
        raise UserError("zero prompts to evaluate; give at least one")
    if MACRO in present:
        raise UserError("a prompt has domain macro, which is the name of the domains' mean; rename it")
    ratios: dict[str, Resampled] = {}
    for number, name in enumerate(present):
        chosen = np.asarray(domains == name)
        above, below = (np.asarray(part[chosen], dtype=np.float64) for part in (numerator, denominator))
        above, below = above.reshape(len(above), -1), below.reshape(len(below), -1)
        weights = replace(bootstrap, seed=bootstrap.seed + 1000003 * number).weights(len(above))
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = (weights @ above) / (weights @ below) if len(above) > 1 else np.full((1, above.shape[1]), np.nan)
            ratios[name] = Resampled(above.sum(axis=0) / below.sum(axis=0), draws)
    num_draws = max(len(part.draws) for part in ratios.values())
    ratios[MACRO] = Resampled(
        np.mean([part.estimate for part in ratios.values()], axis=0),
        np.mean([np.broadcast_to(part.draws, (num_draws, part.draws.shape[1])) for part in ratios.values()], axis=0),
    )
    return ratios


def acceptance_table(counts: Mapping[str, pd.DataFrame], bootstrap: Bootstrap | None = None) -> pd.DataFrame:
    """Acceptance lengths of drafters on the same outputs, and DSpark's gain over each.

    Parameters
    ----------
    counts
        Of `prompt_counts`, by drafter. Gains are NaN without a drafter ``dspark``.
    bootstrap
        How to resample.

    Returns
    -------
    DataFrame
        A row per drafter and domain, macro last: ``drafter, domain, mean_acceptance_length, low, high, dspark_gain,
        dspark_gain_low, dspark_gain_high, accept_len, accept_len_low, accept_len_high, dspark_accept_len_gain`` (with
        ``_low, _high``), ``verify_rate, draft_acceptance_rate, num_prompts, rounds``. Gains are the length of dspark
        over the row's less 1, prompts paired.

    Raises
    ------
    UserError
        If two drafters were not evaluated on the same prompts.
    """
    bootstrap = bootstrap or Bootstrap()
    pairs = {
        "mean_acceptance_length": ("num_tokens", "rounds"),
        "accept_len": ("whole_emitted", "whole_rounds"),
        "verify_rate": ("whole_emitted", "whole_judged"),
        "draft_acceptance_rate": ("num_accepted", "num_verified"),
    }
    ratios: dict[str, dict[str, dict[str, Resampled]]] = {}
    for drafter, sums in counts.items():
        strange = next(iter(counts.values())).index.symmetric_difference(sums.index)
        if len(strange):
            raise UserError(f"prompt {strange[0][1]} was not evaluated with every drafter; evaluate all on the same")
        sums = sums.assign(whole_judged=sums["whole_proposed"] + sums["whole_rounds"])
        assert isinstance(sums.index, pd.MultiIndex)
        ratios[drafter] = {
            name: domain_ratios(sums[above].to_numpy(), sums[below].to_numpy(), sums.index, bootstrap)
            for name, (above, below) in pairs.items()
        }
    rows = []
    for drafter, sums in counts.items():
        for domain in ratios[drafter]["accept_len"]:
            found = {name: ratios[drafter][name][domain] for name in pairs}
            length = found["mean_acceptance_length"]
            row: dict[str, object] = {"drafter": drafter, "domain": domain}
            row |= _cells("mean_acceptance_length", length, bootstrap, ends=("low", "high"))
            reference = ratios.get(REFERENCE, {})
            row |= _cells("dspark_gain", _gain(reference, "mean_acceptance_length", domain, length), bootstrap)
            row |= _cells("accept_len", found["accept_len"], bootstrap)
            whole_gain = _gain(reference, "accept_len", domain, found["accept_len"])
            row |= _cells("dspark_accept_len_gain", whole_gain, bootstrap)
            row |= {name: float(found[name].estimate[0]) for name in ("verify_rate", "draft_acceptance_rate")}
            own = sums if domain == MACRO else sums.loc[[domain]]
            rows.append({**row, "num_prompts": len(own), "rounds": int(own["rounds"].sum())})
    return pd.DataFrame(rows)


def position_table(
    blocks: Blocks, source: Literal["anchors", "rounds"] = "anchors", bootstrap: Bootstrap | None = None
) -> pd.DataFrame:
    """Acceptance by position in the block, of drafts that stand beside an output token.

    Parameters
    ----------
    blocks
        Dense anchors.
    source
        ``anchors``: every position of the outputs. ``rounds``: the rounds of a live run with whole blocks, as
        DeepSpec counts; its anchors follow a rejection or a whole block, so they are not like the rest.
    bootstrap
        How to resample.

    Returns
    -------
    DataFrame
        A row per domain and position (1 is the first draft): ``domain, source, position, num_drafted, num_reached,
        num_accepted``, ``conditional_acceptance`` (accepted over reached: all drafts before it accepted) and
        ``accept_rate`` (accepted over drafted), both with ``_low`` and ``_high``.
    """
    bootstrap = bootstrap or Bootstrap()
    rows = np.arange(blocks.place.size)
    if source == "rounds":
        visited = walk(blocks)["row"].to_numpy()
        rows = visited[blocks.is_whole[visited]]
    depth = np.arange(blocks.block_size)
    drafted = depth < np.minimum(blocks.draft_len, blocks.room)[rows, None]
    accepted = blocks.num_accepted[rows, None]
    flags = np.stack([drafted, drafted & (accepted >= depth), drafted & (accepted > depth)])
    requests = blocks.requests
    keys = [requests["domain"], requests["prompt_id"]]
    index = requests.groupby(keys).size().index
    assert isinstance(index, pd.MultiIndex)
    place = index.get_indexer(pd.MultiIndex.from_arrays(keys))[blocks.request[rows]]
    sums = np.zeros((3, len(index), blocks.block_size))
    for part, flag in zip(sums, flags, strict=True):
        np.add.at(part, place, flag)
    conditional = domain_ratios(sums[2], sums[1], index, bootstrap)
    unconditional = domain_ratios(sums[2], sums[0], index, bootstrap)
    found = []
    for domain in conditional:
        own = np.ones(len(index), dtype=bool) if domain == MACRO else index.get_level_values(0) == domain
        totals = sums[:, own].sum(axis=1).astype(np.int64)
        found += [
            {
                **{"domain": domain, "source": source, "position": k + 1},
                **dict(zip(("num_drafted", "num_reached", "num_accepted"), totals[:, k].tolist(), strict=True)),
                **_cells("conditional_acceptance", conditional[domain], bootstrap, k),
                **_cells("accept_rate", unconditional[domain], bootstrap, k),
            }
            for k in range(blocks.block_size)
        ]
    return pd.DataFrame(found)


def threshold_table(blocks: Blocks, thresholds: tuple[float, ...], bootstrap: Bootstrap | None = None) -> pd.DataFrame:
    """The paper's Figure 5: a draft is verified up to its first confidence below a threshold.

    Returns
    -------
    DataFrame
        A row per threshold and domain: ``threshold, domain, mean_acceptance_length, low, high, accept_len,
        accept_len_low, accept_len_high, verify_rate, draft_acceptance_rate, mean_verify_len`` (drafts per round). The
        paper's acceptance rate is ``verify_rate``. Empty for a drafter without confidences.
    """
    bootstrap = bootstrap or Bootstrap()
    tables = []
    for threshold in thresholds if blocks.has_confidence else ():
        sums = prompt_counts(blocks, walk(blocks, blocks.threshold_lens(threshold)))
        assert isinstance(sums.index, pd.MultiIndex)
        lens = domain_ratios(sums["num_verified"].to_numpy(), sums["rounds"].to_numpy(), sums.index, bootstrap)
        table = acceptance_table({"": sums}, bootstrap).drop(columns="drafter")
        table = table.loc[:, ~table.columns.str.startswith("dspark_")]
        table["mean_verify_len"] = [float(lens[domain].estimate[0]) for domain in table["domain"]]
        table.insert(0, "threshold", threshold)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def speed_row(plain: Trace, speculative: Trace) -> dict[str, float]:
    """What drafting costs and brings, from a plain and a speculative run of the same prompts, one after the other.

    Returns
    -------
    dict
        ``plain_tokens_per_second, speculative_tokens_per_second`` (output tokens of decode steps over their seconds,
        without prefills), their ratio ``speedup``, ``draft_seconds`` (draft and head, mean of steps that draft),
        ``target_seconds`` (target pass of plain decoding, mean) and their ratio ``draft_cost``.
    """

    def decode(trace: Trace) -> tuple[pd.DataFrame, float]:
        steps = trace.steps[trace.steps["num_prefill_tokens"] == 0]
        return steps, float((trace.requests["output_len"] - 1).sum()) / float(steps["step_seconds"].sum())

    (plain_steps, plain_speed), (steps, speed) = decode(plain), decode(speculative)
    drafting = steps[steps["draft_len"] > 0]
    draft_seconds = float((drafting["draft_seconds"] + drafting["head_seconds"]).mean())
    target_seconds = float(plain_steps["verify_seconds"].mean())
    return {
        "plain_tokens_per_second": plain_speed,
        "speculative_tokens_per_second": speed,
        "speedup": speed / plain_speed,
        "draft_seconds": draft_seconds,
        "target_seconds": target_seconds,
        "draft_cost": draft_seconds / target_seconds,
    }


def _gain(reference: Mapping[str, Mapping[str, Resampled]], name: str, domain: str, other: Resampled) -> Resampled:
    if not reference:
        return Resampled(np.full(1, np.nan), np.full((1, 1), np.nan))
    return reference[name][domain].gain_over(other)


def _cells(
    name: str, ratio: Resampled, bootstrap: Bootstrap, k: int = 0, ends: tuple[str, str] | None = None
) -> dict[str, float]:
    draws = ratio.draws[:, k]
    # Resamples without a value are those where the position was reached least; the rest would not be fair.
    if np.isfinite(draws).mean() < bootstrap.level:
        draws = draws[:0]
    interval = bootstrap.interval(float(ratio.estimate[k]), draws)
    low, high = ends or (f"{name}_low", f"{name}_high")
    return {name: interval.estimate, low: interval.low, high: interval.high}
