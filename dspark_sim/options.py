"""Groups of command-line options that several commands share, and the objects they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dspark_sim.errors import UserError

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine
    from dspark_sim.policy import SpeculationPolicy
    from dspark_sim.workload import Prompt, Workload


@dataclass(frozen=True)
class ModelOptions:
    """Which models, and where they run."""

    target: str = "smollm2-135m-instruct"
    """Target: the embedded smollm2-135m-instruct, a model folder, or a hub name."""
    drafter: str = "dspark"
    """none, ngram, dspark, dflash, or a drafter's folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; float32 keeps greedy output identical under every batch shape."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    num_threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""

    def load(self, max_num_seqs: int) -> Engine:
        """The engine."""
        from dspark_sim.engine.serve import Engine

        return Engine.load(
            self.target,
            self.drafter,
            dtype=self.dtype,
            device=self.device,
            num_threads=self.num_threads,
            max_num_seqs=max_num_seqs,
        )


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts."""

    prompts: Path | None = None
    """JSON Lines file with `turns`; default: the bundled prompts."""
    per_domain: int | None = 8
    """Bundled prompts of each domain (math, code, chat)."""

    def load(self) -> list[Prompt]:
        """The prompts."""
        from dspark_sim.workload import bundled_prompts, read_prompts

        return bundled_prompts(per_domain=self.per_domain) if self.prompts is None else read_prompts(self.prompts)


@dataclass(frozen=True)
class PolicyOptions:
    """How many drafted tokens are verified."""

    policy: Literal["none", "fixed", "prefix"] = "fixed"
    """none: plain decoding; fixed: always --verify-len; prefix: DSpark's Algorithm 1, needs --cost."""
    verify_len: int | None = None
    """For fixed: drafted tokens verified per request; default: the whole block."""
    cost: Path | None = None
    """Cost table made by `dspark-sim profile` on this machine."""

    def load(self, block_size: int) -> SpeculationPolicy:
        """The policy."""
        from dspark_sim.cost import CostModel
        from dspark_sim.policy import Fixed, PrefixScheduler

        if self.policy == "prefix":
            if self.cost is None:
                raise UserError("policy prefix needs a cost table; give --cost, made by `dspark-sim profile`")
            return PrefixScheduler(CostModel.read(self.cost))
        if self.policy == "none":
            return Fixed(0)
        return Fixed(block_size if self.verify_len is None else self.verify_len)


@dataclass(frozen=True)
class LoadOptions:
    """How many users, or how many requests per second."""

    concurrency: int = 4
    """Users of a closed loop: each asks again when answered."""
    rate: float | None = None
    """Open loop instead: Poisson arrivals, requests per second."""
    seed: int = 0
    """Of arrivals and sampling."""

    def load(self) -> Workload:
        """The workload."""
        from dspark_sim.workload import ClosedLoop, Poisson

        return ClosedLoop(self.concurrency) if self.rate is None else Poisson(self.rate, self.seed)
