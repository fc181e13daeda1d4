"""The command calibrate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import tyro
from scipy.special import expit, logit

from dspark_sim.analysis.calibration_metrics import Scores, reliability, score
from dspark_sim.analysis.stats import Interval
from dspark_sim.analysis.tables import aligned, write_rows
from dspark_sim.errors import UserError
from dspark_sim.options import NetworkOptions, PromptOptions
from dspark_sim.trace import Trace
from dspark_sim.training.calibration import (
    FloatArray,
    Outcomes,
    calibrated,
    fit_constants,
    fit_temperatures,
    halves,
    survival,
)

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine


@dataclass(frozen=True)
class Calibrate:
    """Fit temperatures that turn a drafter's confidences into probabilities, and judge them on other prompts.

    Decodes the prompts greedily and drafts a block at every position of the outputs, or takes a recording in any mode.
    One half of the prompts is fitted to and the other judged. Temperatures come in sequence, each for the least
    calibration error of the product of confidences so far.
    """

    out: Path = Path("runs/temperatures.json")
    """File for the temperatures; named temperatures.json in a drafter's folder it is used by default."""
    sglang: Path | None = None
    """Also write them in SGLang's form here, for --speculative-dspark-confidence-sts-path."""
    figure: Path | None = None
    """Also write a reliability diagram here, as PNG, PDF and CSV."""
    trace: Path | None = None
    """A recording with anchors and confidences, instead of decoding now."""
    margin: bool = True
    """Judge a logistic function of the gap between the two largest logits, too; makes one more pass of the drafter."""
    model: tyro.conf.OmitArgPrefixes[NetworkOptions] = field(default_factory=NetworkOptions)
    confidence: Literal["head", "top1"] = "head"
    """What to calibrate when decoding.
    head: the drafter's confidence head.
    top1: the probability of the drafter's likeliest token."""
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions(per_domain=None)
    concurrency: int = 4
    """Requests decoded at once; changes only how long it takes."""
    max_tokens: int = 64
    """Most output tokens per prompt."""
    seed: int = 0
    """Of the split into halves."""
    json: Path | None = None
    """Also write the scores as JSON rows here."""

    def run(self) -> None:
        """Run it."""
        trace, engine = self._recording()
        outcomes = Outcomes.of_trace(trace)
        domains = dict(zip(trace.requests["prompt_id"], trace.requests["domain"], strict=True))
        fit, held = halves(outcomes, domains, self.seed)
        temperatures = fit_temperatures(fit)
        forecasts = {
            "raw": survival(held.confidence),
            "STS": survival(calibrated(held.confidence, temperatures)),
            "constant": np.broadcast_to(fit_constants(fit), held.confidence.shape),
        }
        if self.margin:
            forecasts["margin"] = _margin_survival(trace, self._margin_engine(engine, trace), fit, held)
        scores = score(forecasts, held)
        self._print(scores, temperatures, fit, held)
        self._write(scores, temperatures, trace, fit, held)
        if self.figure is not None:
            self._draw(self.figure, scores, forecasts, trace, held)

    def _recording(self) -> tuple[Trace, Engine | None]:
        if self.trace is not None:
            return Trace.read(self.trace), None
        from dspark_sim.engine.drafters.choose import Confidence
        from dspark_sim.policy import Fixed
        from dspark_sim.workload import ClosedLoop

        prompts, workload = self.prompts.load(), ClosedLoop(self.concurrency)
        engine = self.model.engine(self.concurrency, Confidence(self.confidence))
        if not engine.has_confidence:
            remedy = (
                "add --confidence top1" if self.model.drafter not in ("none", "ngram") else "choose another drafter"
            )
            raise UserError(f"drafter {engine.drafter_name} has no confidence head; {remedy}")
        return engine.anchors(engine.record(prompts, Fixed(0), workload, max_tokens=self.max_tokens)), engine

    def _margin_engine(self, engine: Engine | None, trace: Trace) -> Engine:
        from dspark_sim.engine.margin import MARGIN

        if engine is not None:
            return engine.with_drafter(self.model.drafter, MARGIN)
        judge, drafter = self.model.engine(self.concurrency, MARGIN), trace.config.get("drafter")
        if judge.drafter_name != drafter:
            raise UserError(
                f"the trace has drafter {drafter} and this one is {judge.drafter_name}; give the same --drafter, or "
                "--no-margin"
            )
        return judge

    def _print(self, scores: Scores, temperatures: FloatArray, fit: Outcomes, held: Outcomes) -> None:
        print(aligned(position_table(scores, temperatures), None, {"position": "", "n": "d"}))
        print("\nMean over positions, with 95 % intervals by bootstrap over prompts (which lifts an ECE a little)")
        print(aligned(mean_table(scores)))
        sizes = [len(set(half.prompts.tolist())) for half in (fit, held)]
        floor = float(scores.table.loc[scores.table["method"] == "STS", "ece_floor"].iloc[-1])
        print(
            f"\nFitted to {sizes[0]} prompts ({len(fit.prompts)} blocks), judged on {sizes[1]} others "
            f"({len(held.prompts)} blocks). Exact probabilities would have a mean ECE of {floor:.4f} or "
            "more on so few."
        )
        others = [method for method in dict.fromkeys(scores.table["method"]) if method != "STS"]
        changes = [f"less {other} {_text(scores.difference('STS', other), signed=True)}" for other in others]
        print(f"ECE of STS {', '.join(changes)}.")
        if scores.mean("STS").estimate >= scores.mean("raw").estimate:
            print("STS did not lower the ECE of these prompts; fit it to more of them before you use the file.")

    def _write(self, scores: Scores, temperatures: FloatArray, trace: Trace, fit: Outcomes, held: Outcomes) -> None:
        from dspark_sim.engine.drafters.choose import Confidence
        from dspark_sim.engine.temperatures import TemperatureFile

        table = scores.table[scores.table["position"] != "mean"]
        source: dict[str, Any] = dict(trace.config.get("confidence") or {})
        source["temperatures"] = tuple(map(float, temperatures))
        methods = list(dict.fromkeys(scores.table["method"]))
        origin = "bundled prompts" if self.prompts.prompts is None else str(self.prompts.prompts)
        file = TemperatureFile(
            Confidence(**source),
            drafter=str(trace.config.get("drafter", "")),
            target=str(trace.config.get("target", "")),
            dataset=origin if self.trace is None else f"trace {self.trace}",
            num_samples=len(fit.prompts),
            ece_before=tuple(table[table["method"] == "raw"]["ece"].tolist()),
            ece_after=tuple(table[table["method"] == "STS"]["ece"].tolist()),
            notes={
                "ece_is_of": f"{len(held.prompts)} blocks of other prompts than those fitted to",
                "mean_ece": {method: scores.mean(method).estimate for method in methods},
                "mode": trace.config.get("mode"),
                "sampling": trace.config.get("sampling"),
                "num_prompts_fitted": len(set(fit.prompts.tolist())),
                "num_prompts_judged": len(set(held.prompts.tolist())),
                "split_seed": self.seed,
            },
        )
        file.write(self.out)
        written = [str(self.out)]
        if self.sglang is not None:
            file.write_sglang(self.sglang)
            written.append(str(self.sglang))
        if self.json is not None:
            write_rows(scores.table, self.json)
        print(f"Wrote {' and '.join(written)}.")

    def _draw(self, path: Path, scores: Scores, forecasts: dict[str, FloatArray], trace: Trace, held: Outcomes) -> None:
        from dspark_sim.analysis.plots import save
        from dspark_sim.analysis.reliability import reliability_diagram

        shown = ("raw", "STS")
        parts = [
            reliability(
                forecasts[method][held.judged[:, slot], slot], held.survived[held.judged[:, slot], slot]
            ).assign(method=method, position=slot + 1)
            for method in shown
            for slot in range(held.block_size)
        ]
        bins = pd.concat(parts, ignore_index=True)
        target, drafter, mode = (trace.config.get(name) for name in ("target", "drafter", "mode"))
        note = (
            f"Target {target}, drafter {drafter}, mode {mode}; {len(set(held.prompts.tolist()))} prompts, others than "
            "those fitted to. n: blocks judged; a marker's area: blocks in the bin."
        )
        errors = {method: scores.mean(method).estimate for method in shown}
        print(f"Drew {save(reliability_diagram(bins, errors, note), bins, path)[0]}.")


def position_table(scores: Scores, temperatures: FloatArray) -> pd.DataFrame:
    """One row a position and one of means: T, n, observed survival, ECE and Brier score of each method, AUC.

    Parameters
    ----------
    scores
        With methods ``raw`` and ``STS``.
    temperatures
        [γ].
    """
    by = {str(method): part.reset_index(drop=True) for method, part in scores.table.groupby("method", sort=False)}
    raw, fitted = by["raw"], by["STS"]
    return pd.DataFrame(
        {
            "position": raw["position"],
            "n": raw["num_blocks"],
            "survival": raw["survival"],
            "T": [*temperatures, float("nan")],
            **{f"ECE {method}": part["ece"] for method, part in by.items()},
            "ECE floor": fitted["ece_floor"],
            "AUC": raw["auc"],
            "AUC STS": fitted["auc"],
            "Brier raw": raw["brier"],
            "Brier STS": fitted["brier"],
        }
    )


def mean_table(scores: Scores) -> pd.DataFrame:
    """One row a method: ECE, Brier score and AUC, means over positions with their intervals, as text."""
    methods = list(dict.fromkeys(scores.table["method"]))
    columns = {"ECE": "ece", "Brier": "brier", "AUC": "auc"}
    rows = [{name: _text(scores.mean(method, metric)) for name, metric in columns.items()} for method in methods]
    return pd.DataFrame(rows).assign(method=methods)[["method", *columns]]


def _text(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{interval.estimate:{sign}.4f} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"


def _margin_survival(trace: Trace, engine: Engine, fit: Outcomes, held: Outcomes) -> FloatArray:
    """Survival by the logistic function of margins, fitted to the same prompts, [M, γ] of the held-out ones."""
    from dspark_sim.engine.margin import fit_margin

    recorded = engine.anchors(trace)
    outcomes = Outcomes.of_trace(recorded)
    judged = outcomes.of(held.prompts)
    if not np.array_equal(judged.num_accepted, held.num_accepted):
        raise UserError("the trace's anchors are not those of this drafter; give the same --drafter, or --no-margin")
    chosen = np.isin(outcomes.prompts, fit.prompts)
    fitted = fit_margin(recorded.with_anchors(recorded.tables["anchors"].filter(chosen)))
    # Large margins round to 1 in float32.
    margin = logit(np.minimum(judged.confidence, 1.0 - 2.0**-25))
    return survival(expit(fitted.intercept + fitted.slope * margin))
