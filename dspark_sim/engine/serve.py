"""The live engine's front door: load a target and a drafter, record runs, dense anchors and cost profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_sim import cost as cost_model
from dspark_sim.cost import CostModel
from dspark_sim.engine.anchors import greedy_anchors
from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.block_model import load_drafter
from dspark_sim.engine.drafters.ngram import NgramDrafter
from dspark_sim.engine.executor import TorchExecutor
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.live import serve
from dspark_sim.engine.models import EMBEDDED, Target, load_target
from dspark_sim.engine.sampling import SamplingParams
from dspark_sim.engine.verify import Mode
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop
from dspark_sim.policy import Controller, FloatArray, Information, IntArray, LoadView, SpeculationPolicy, parameters
from dspark_sim.provenance import processor, provenance
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.trace import Trace, TraceRecorder
from dspark_sim.workload import ClosedLoop, Prompt, Workload, repeat

BUNDLED_DRAFTERS = ("dspark", "dflash")


@dataclass(eq=False)
class Engine:
    """A target with a drafter, ready to record.

    Use `Engine.load`; `with_drafter` shares the target and its KV cache.
    """

    target: Target
    drafter: Drafter | None
    drafter_name: str
    num_threads: int
    max_num_seqs: int
    max_model_len: int
    cache: SlotCache

    @staticmethod
    def load(
        target: str = EMBEDDED,
        drafter: str = "dspark",
        *,
        dtype: str = "float32",
        device: str = "auto",
        num_threads: int | None = None,
        max_num_seqs: int = 16,
        max_model_len: int = 1024,
    ) -> Engine:
        """Load a target and a drafter.

        Parameters
        ----------
        target
            See `models.load_target`.
        drafter
            ``none``, ``ngram``, ``dspark``, ``dflash`` (bundled for the embedded target) or a drafter's folder.
        dtype, device
            Of the target; float32 keeps greedy output identical under every batch shape.
        num_threads
            Of torch on a CPU; ``None`` keeps torch's own choice.
        max_num_seqs, max_model_len
            Slots of the KV cache and their length in tokens.

        Raises
        ------
        UserError
            If target or drafter cannot be had, or do not fit each other.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        loaded = load_target(target, dtype=dtype, device=device)
        config = loaded.config
        limit = int(getattr(config, "max_position_embeddings", max_model_len))
        if max_model_len > limit:
            raise UserError(f"max_model_len is {max_model_len} and {target} holds {limit} positions; lower it")
        cache = SlotCache(
            config.num_hidden_layers,
            max_num_seqs,
            config.num_key_value_heads,
            max_model_len,
            loaded.head_dim,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        engine = Engine(loaded, None, "none", torch.get_num_threads(), max_num_seqs, max_model_len, cache)
        return engine.with_drafter(drafter)

    def with_drafter(self, drafter: str) -> Engine:
        """The same target with another drafter.

        Raises
        ------
        UserError
            If there is no such drafter or it was made for another target.
        """
        return Engine(
            self.target,
            self._make_drafter(drafter),
            Path(drafter).name,
            self.num_threads,
            self.max_num_seqs,
            self.max_model_len,
            self.cache,
        )

    def _make_drafter(self, name: str) -> Drafter | None:
        if name == "none":
            return None
        if name == "ngram":
            return NgramDrafter()
        folder = Path(__file__).parent.parent / "drafters" / name if name in BUNDLED_DRAFTERS else Path(name)
        if name not in BUNDLED_DRAFTERS and not folder.is_dir():
            raise UserError(
                f"no drafter {name!r}; choose none, ngram, {', '.join(BUNDLED_DRAFTERS)}, or give a drafter's folder"
            )
        network = load_drafter(folder, self.target)
        if name in BUNDLED_DRAFTERS and self.target.name != network.config.target:
            raise UserError(
                f"the bundled drafter {name} was trained for {network.config.target}, not {self.target.name}; "
                "use none or ngram, or train one with `dspark-sim train`"
            )
        return RaggedBlockDrafter(name, network, self.max_num_seqs, self.max_model_len)

    @property
    def block_size(self) -> int:
        """Most tokens the drafter proposes; 0 without one."""
        return self.drafter.block_size if self.drafter is not None else 0

    @property
    def has_confidence(self) -> bool:
        """Whether the drafter estimates acceptance."""
        return self.drafter is not None and self.drafter.has_confidence

    @property
    def hardware(self) -> dict[str, Any]:
        """What a cost table depends on: device, model, dtype and thread count."""
        cuda = self.target.device.type == "cuda"
        name = torch.cuda.get_device_name(self.target.device) if cuda else processor()
        return {
            "device": name,
            "model": self.target.name,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "num_threads": self.num_threads,
        }

    def record(
        self,
        prompts: Sequence[Prompt],
        policy: SpeculationPolicy,
        workload: Workload,
        *,
        max_tokens: int = 64,
        mode: Mode = "greedy",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        cost: CostModel | None = None,
        num_requests: int | None = None,
        recording: bool = True,
        progress: bool = True,
    ) -> Trace:
        """Serve the prompts live and return the trace, without anchors.

        Parameters
        ----------
        prompts
            At least one.
        policy, workload
            As in the simulator.
        max_tokens
            Most output tokens per request.
        mode, temperature, top_k, top_p, seed
            Acceptance and sampling.
        cost
            If given, predictions are recorded beside the measured seconds.
        num_requests
            Requests to send; prompts are repeated in order. ``None`` sends each once.
        recording
            ``False`` keeps no step and draft rows (to measure what recording costs).
        progress
            Show a bar.

        Raises
        ------
        UserError
            If there is no prompt, a prompt does not fit, or policy, drafter and mode do not go together.
        """
        if not prompts:
            raise UserError("zero prompts; give at least one")
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; give at least 1")
        wanted = policy.start().draft_len(LoadView(0, 1, 0, 0, self.block_size))
        if wanted > self.block_size:
            raise UserError(
                f"policy {policy.label()} drafts {wanted} tokens and drafter {self.drafter_name} at most "
                f"{self.block_size}; lower verify_len or choose another drafter"
            )
        table = getattr(policy, "cost", None)
        if isinstance(table, CostModel):
            table.require_hardware(self.hardware)
        encoded = {prompt.prompt_id: self.target.encode(prompt.turns[0]) for prompt in prompts}
        requests = [
            Request(number, prompt.prompt_id, prompt.domain, len(encoded[prompt.prompt_id]), max_tokens)
            for number, prompt in enumerate(repeat(prompts, len(prompts) if num_requests is None else num_requests))
        ]
        params = SamplingParams(temperature, top_k, top_p, seed)
        executor = TorchExecutor(self.target, self.drafter, encoded, self.cache, mode, params)
        scheduler = Scheduler(self._scheduler_config(workload), self.block_size)
        recorder = TraceRecorder("wall")
        loop = DecodeLoop(executor, scheduler, policy, recorder, cost)
        if not recording:
            loop.recorder = None
        for request in requests:
            scheduler.check(request)
        serve(loop, requests, workload, progress=progress)
        config = {
            "target": self.target.name,
            "drafter": self.drafter_name,
            "block_size": self.block_size,
            "has_confidence": self.has_confidence,
            "mode": mode,
            "sampling": asdict(params),
            "policy": policy.label(),
            "policy_parameters": parameters(policy),
            "workload": {"kind": type(workload).__name__, **asdict(workload)},
            "scheduler": asdict(scheduler.config),
            "max_tokens": max_tokens,
            "prompts": {request.prompt_id: encoded[request.prompt_id] for request in requests},
        }
        return recorder.trace(config, provenance(seed=seed, **self.hardware), executor.outputs)

    def anchors(self, trace: Trace, *, progress: bool = True) -> Trace:
        """The trace with dense anchors of this engine's drafter over its recorded greedy outputs.

        The outputs may have been recorded under any drafter or none; greedy output is the same.

        Raises
        ------
        UserError
            If the outputs are not greedy outputs of this target, or there is no drafter.
        """
        if self.drafter is None:
            raise UserError("drafter none proposes nothing; choose a drafter for dense anchors")
        if trace.config.get("mode") != "greedy" or trace.config.get("target") != self.target.name:
            raise UserError(
                f"dense anchors need greedy outputs of {self.target.name}; this trace has mode "
                f"{trace.config.get('mode')} and target {trace.config.get('target')}"
            )
        prompts = trace.config["prompts"]
        recorded = [
            (row["request_id"], prompts[row["prompt_id"]], row["output_tokens"])
            for row in trace.tables["requests"].to_pylist()
        ]
        anchors = greedy_anchors(self.target, self.drafter, recorded, progress=progress)
        return trace.with_anchors(
            anchors, drafter=self.drafter_name, block_size=self.block_size, has_confidence=self.has_confidence
        )

    def profile(
        self,
        prompts: Sequence[Prompt],
        *,
        concurrency: Sequence[int] = (1, 4, 16),
        max_tokens: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> CostModel:
        """Measure what iterations cost, at many batch sizes, and fit a cost model.

        Each concurrency is run as a closed loop with as many requests as users, at least 4, under a policy that
        varies draft and verify lengths at random, so that batch sizes from R to R·(1+γ) are met.
        """
        policy = Explore(self.block_size, seed)
        # The first passes pay for lazy initialisation; they are not the steady cost.
        self.record(prompts[:2], policy, ClosedLoop(min(2, self.max_num_seqs)), max_tokens=8, progress=False)
        traces = [
            self.record(
                prompts,
                policy,
                ClosedLoop(users),
                max_tokens=max_tokens,
                num_requests=max(users, 4),
                progress=progress,
            )
            for users in concurrency
        ]
        return cost_model.fit([trace.steps for trace in traces], {**self.hardware, "drafter": self.drafter_name})

    def _scheduler_config(self, workload: Workload) -> SchedulerConfig:
        users = workload.num_users if isinstance(workload, ClosedLoop) else self.max_num_seqs
        if users > self.max_num_seqs:
            raise UserError(
                f"{users} users need {users} KV slots and the engine has {self.max_num_seqs}; raise max_num_seqs"
            )
        page_size = 16
        return SchedulerConfig(
            max_num_seqs=users,
            num_pages=self.max_num_seqs * -(-self.max_model_len // page_size),
            page_size=page_size,
            max_model_len=self.max_model_len,
        )


@dataclass(frozen=True)
class Explore:
    """A policy for profiling: draft and verify lengths drawn at random each round.

    Parameters
    ----------
    block_size
        Most tokens to draft.
    seed
        Of the draws.
    """

    block_size: int
    seed: int = 0
    information: Information = "history"
    needs_confidence: bool = False

    def start(self) -> Controller:
        """A fresh generator."""
        return _ExploreController(self.block_size, np.random.default_rng(self.seed))

    def label(self) -> str:
        """Name in tables."""
        return "explore"


@dataclass
class _ExploreController:
    block_size: int
    rng: np.random.Generator

    def draft_len(self, load: LoadView) -> int:
        if self.block_size == 0 or self.rng.random() < 0.2:
            return 0
        return self.block_size if self.rng.random() < 0.6 else int(self.rng.integers(1, self.block_size + 1))

    def verify_lens(self, load: LoadView, survival: FloatArray) -> IntArray:
        num_requests, width = survival.shape
        level = int(self.rng.integers(0, width + 1))
        jitter = self.rng.integers(-1, 2, num_requests)
        return np.asarray(np.clip(level + jitter, 0, width), dtype=np.int64)

    def observe(self, load: LoadView, verify_lens: IntArray, num_accepted: IntArray) -> None:
        pass
