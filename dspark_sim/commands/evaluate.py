"""The command that evaluates drafters: evaluate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Evaluate:
    """Compare drafters: acceptance by domain, by position and by confidence threshold, and speed live.

    Metrics mean what they mean in DeepSpec. Every drafter is judged on the same outputs of the target, and DSpark's
    gain over each is paired by prompt. With all bundled prompts some 25 minutes on 2 cores; --quick takes fewer.
    """

    out: Path = Path("runs/evaluation")
    """Folder for tables (Parquet), summary and figure."""
    drafters: tuple[str, ...] | None = None
    """Names or folders; default: the bundled ones that fit the target, and ngram."""
    prompts: Path | None = None
    """JSON Lines file with `turns`, and `domain` if there are several; default: the bundled prompts."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy, others by rejection sampling; speed is measured at the first."""
    per_domain: int | None = None
    """Most prompts of each domain; default: all, with --quick 6."""
    max_tokens: int | None = None
    """Most output tokens per prompt; default: 128, with --quick 32."""
    num_pairs: int | None = None
    """Plain and speculative runs to time per drafter; default: 3, with --quick 2; 0 times none."""
    quick: bool = False
    """A smaller run, under 3 minutes."""
    target: str | None = None
    """As for `record`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the target's weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    num_threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""
    seed: int = 0
    """Of sampling."""
    json: Path | None = None
    """Also write rows as JSON here: a drafter, domain and temperature each."""

    def run(self) -> None:
        """Run it."""
        from dspark_sim.evaluate import FULL, QUICK, run_evaluation
        from dspark_sim.workload import bundled_prompts, read_prompts

        asked = {name: getattr(self, name) for name in ("per_domain", "max_tokens", "num_pairs")}
        scale = replace(
            QUICK if self.quick else FULL, **{name: value for name, value in asked.items() if value is not None}
        )
        run_evaluation(
            bundled_prompts() if self.prompts is None else read_prompts(self.prompts),
            self.out,
            drafters=self.drafters,
            temperatures=self.temperatures,
            scale=scale,
            target=self.target,
            device=self.device,
            dtype=self.dtype,
            num_threads=self.num_threads,
            seed=self.seed,
            json_path=self.json,
        )
