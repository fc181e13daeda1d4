"""The live engine's front door: load a target and a drafter, record runs, dense anchors and cost profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dspark_sim import cost as cost_model
from dspark_sim.cost import CostModel
from dspark_sim.engine.anchors import dense_anchors, num_ranked
from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.chain import RaggedChainDrafter
from dspark_sim.engine.drafters.choose import Confidence, DraftRule
from dspark_sim.engine.drafters.diagnosis import warn_if_rejected
from dspark_sim.engine.drafters.named import named_drafter
from dspark_sim.engine.executor import TorchExecutor
from dspark_sim.engine.explore import Explore
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.live import serve
from dspark_sim.engine.models import EMBEDDED, Target, load_target
from dspark_sim.engine.recorded import recorded_outputs
from dspark_sim.engine.sampling import SamplingParams
from dspark_sim.engine.tree_round import fit_tree, usual_label
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop, Mode
from dspark_sim.policy import LoadView, SpeculationPolicy, parameters
from dspark_sim.provenance import processor, provenance
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.trace import Trace, TraceRecorder
from dspark_sim.tree_shapes import Chain, TreeShape, parse_tree
from dspark_sim.workload import ClosedLoop, Prompt, Workload, repeat


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
        confidence: Confidence | None = None,
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
        confidence
            Where confidence estimates come from; ``None`` means the drafter's own head, if it has one, at the
            temperatures in its folder, if there are any (see `temperatures.default_confidence`).

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
        cache = loaded.new_cache(max_num_seqs, max_model_len)
        engine = Engine(loaded, None, "none", torch.get_num_threads(), max_num_seqs, max_model_len, cache)
        return engine.with_drafter(drafter, confidence)

    def with_drafter(self, drafter: str, confidence: Confidence | None = None) -> Engine:
        """The same target with another drafter, or the same with another source of confidence.

        Raises
        ------
        UserError
            If there is no such drafter or it was made for another target.
        """
        return Engine(
            self.target,
            named_drafter(drafter, self.target, self.max_num_seqs, self.max_model_len, confidence),
            Path(drafter).name,
            self.num_threads,
            self.max_num_seqs,
            self.max_model_len,
            self.cache,
        )

    @property
    def block_size(self) -> int:
        """Most tokens the drafter proposes; 0 without one."""
        return self.drafter.block_size if self.drafter is not None else 0

    @property
    def has_confidence(self) -> bool:
        """Whether the drafter estimates acceptance."""
        return self.drafter is not None and self.drafter.has_confidence

    def fit_tree(self, tree: TreeShape | str | None) -> TreeShape | None:
        """A shape or its text as this engine drafts it; ``None`` for chains of the drafter's whole block.

        Raises
        ------
        UserError
            If the text names no shape, or the drafter cannot make it.
        """
        if tree is None or tree == Chain() or (isinstance(tree, str) and tree.strip() == "chain"):
            return None
        shape = fit_tree(parse_tree(tree) if isinstance(tree, str) else tree, self.drafter, self.drafter_name)
        return None if shape == Chain(self.block_size) else shape

    def num_drafts(self, tree: TreeShape | str | None) -> int:
        """Most tokens drafted per round: the drafter's γ, or the nodes of a tree."""
        shape = self.fit_tree(tree)
        return self.block_size if shape is None else shape.num_nodes

    def _confidence_source(self) -> dict[str, Any] | None:
        drafter = self.drafter
        return (
            asdict(drafter.confidence)
            if self.has_confidence and isinstance(drafter, RaggedBlockDrafter | RaggedChainDrafter)
            else None
        )

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
        allow_biased: bool = False,
        force_cost: bool = False,
        recording: bool = True,
        progress: bool = True,
        tree: TreeShape | str | None = None,
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
        allow_biased
            Run a policy that looks at sampled tokens under a mode whose output it biases, as a negative control; the
            trace is labelled.
        force_cost
            Run a policy whose cost table is of other hardware or another model; a warning and the trace say so.
        recording
            ``False`` keeps no step and draft rows (to measure what recording costs).
        progress
            Show a bar.
        tree
            Shape of the drafts, or its text such as ``"best-first:32"``; ``None`` drafts chains. What a policy calls
            drafted tokens are then nodes, and a request's KV reserve has room for all of them.

        Raises
        ------
        UserError
            If there is no prompt, a prompt does not fit, or policy, drafter, tree and mode do not go together.
        """
        if not prompts:
            raise UserError("zero prompts; give at least one")
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; give at least 1")
        shape, limit = self.fit_tree(tree), self.num_drafts(tree)
        wanted = policy.start().draft_len(LoadView(0, 1, 0, 0, limit))
        if wanted > limit:
            if shape is not None:
                raise UserError(
                    f"policy {policy.label()} drafts {wanted} nodes and tree {usual_label(shape, self.block_size)} has "
                    f"{limit}, which is what the KV cache reserves; lower verify_len or give the tree more nodes"
                )
            raise UserError(
                f"policy {policy.label()} drafts {wanted} tokens and drafter {self.drafter_name} at most "
                f"{limit}; lower verify_len or choose another drafter"
            )
        table = getattr(policy, "cost", None)
        forced = None
        if isinstance(table, CostModel):
            forced = table.require_hardware(self.hardware, force=force_cost).provenance.get("forced")
        encoded = {prompt.prompt_id: self.target.encode(prompt.turns[0]) for prompt in prompts}
        requests = [
            Request(number, prompt.prompt_id, prompt.domain, len(encoded[prompt.prompt_id]), max_tokens)
            for number, prompt in enumerate(repeat(prompts, len(prompts) if num_requests is None else num_requests))
        ]
        params = SamplingParams(temperature, top_k, top_p, seed)
        with_prob = policy.signal == "draft_prob"
        executor = TorchExecutor(
            self.target, self.drafter, encoded, self.cache, mode, params, with_draft_prob=with_prob, tree=shape
        )
        scheduler = Scheduler(self._scheduler_config(workload), limit)
        recorder = TraceRecorder("wall")
        loop = DecodeLoop(executor, scheduler, policy, recorder, cost, allow_biased=allow_biased)
        if not recording:
            loop.recorder = None
        for request in requests:
            scheduler.check(request)
        serve(loop, requests, workload, progress=progress)
        config = {
            "target": self.target.name,
            "drafter": self.drafter_name,
            "block_size": self.block_size,
            "tree": usual_label(shape, self.block_size),
            "has_confidence": self.has_confidence,
            "confidence": self._confidence_source(),
            "mode": mode,
            "sampling": asdict(params),
            "biased": loop.biased,
            "policy": policy.label(),
            "policy_parameters": parameters(policy),
            "cost": table.to_json() if isinstance(table, CostModel) else None,
            "cost_forced": forced,
            "workload": workload.describe(),
            "scheduler": asdict(scheduler.config),
            "max_tokens": max_tokens,
            "prompts": {request.prompt_id: encoded[request.prompt_id] for request in requests},
        }
        trace = recorder.trace(config, provenance(seed=seed, **self.hardware), executor.outputs)
        warn_if_rejected(self.drafter, self.drafter_name, trace)
        return trace

    def anchors(self, trace: Trace, *, progress: bool = True, tree: TreeShape | str | None = None) -> Trace:
        """The trace with dense anchors of this engine's drafter over its recorded outputs.

        The outputs may have been recorded under any drafter or none, and with any tree: what the target says does not
        depend on it. `tree` is the shape whose nodes the anchors have; ``None`` is what the run drafted.

        Raises
        ------
        UserError
            If the outputs are not unbiased outputs of this target, or the mode, drafter or tree has no dense pass.
        """
        if self.drafter is None:
            raise UserError("drafter none proposes nothing; choose a drafter for dense anchors")
        if trace.config.get("target") != self.target.name or "mode" not in trace.config:
            raise UserError(
                f"dense anchors need outputs of {self.target.name}; this trace has target {trace.config.get('target')}"
            )
        if trace.config.get("biased"):
            raise UserError("this trace is a biased negative control; its outputs are not the target's, record again")
        rule = DraftRule(trace.config["mode"], SamplingParams(**trace.config["sampling"]), with_prob=True)
        shape = self.fit_tree(trace.config.get("tree") if tree is None else tree)
        recorded = recorded_outputs(trace, self.drafter_name)
        anchors = dense_anchors(self.target, self.drafter, recorded, rule, shape, progress=progress)
        return trace.with_anchors(
            anchors,
            drafter=self.drafter_name,
            block_size=self.block_size,
            tree=usual_label(shape, self.block_size),
            num_candidates=num_ranked(self.drafter),
            has_confidence=self.has_confidence,
            confidence=self._confidence_source(),
        )

    def profile(
        self,
        prompts: Sequence[Prompt],
        *,
        concurrency: Sequence[int] = (1, 4, 16),
        max_tokens: int = 32,
        seed: int = 0,
        progress: bool = True,
        tree: TreeShape | str | None = None,
    ) -> CostModel:
        """Measure what iterations cost, at many batch sizes, and fit a cost model.

        Each concurrency is one `profile_pass` with as many requests as users, at least 4. With a `tree` its building is
        part of the draft's cost.
        """
        self.warm_up(prompts, seed=seed, tree=tree)
        options: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "progress": progress, "tree": tree}
        return self.fit_cost(
            [self.profile_pass(prompts, users, num_requests=max(users, 4), **options) for users in concurrency]
        )

    def warm_up(self, prompts: Sequence[Prompt], *, seed: int = 0, tree: TreeShape | str | None = None) -> None:
        """Decode a few tokens: the first passes pay for lazy initialisation and are not the steady cost."""
        users = min(2, self.max_num_seqs)
        self.profile_pass(prompts[:2], users, max_tokens=8, num_requests=min(2, len(prompts)), seed=seed, tree=tree)

    def profile_pass(
        self,
        prompts: Sequence[Prompt],
        num_users: int,
        *,
        max_tokens: int,
        num_requests: int,
        seed: int = 0,
        progress: bool = False,
        tree: TreeShape | str | None = None,
    ) -> Trace:
        """A closed loop whose draft and verify lengths vary at random, from nothing to whole drafts."""
        return self.record(
            prompts,
            Explore(self.num_drafts(tree), seed),
            ClosedLoop(num_users),
            max_tokens=max_tokens,
            num_requests=num_requests,
            progress=progress,
            tree=tree,
        )

    def fit_cost(self, own: Sequence[Trace], others: Sequence[Trace] = ()) -> CostModel:
        """Fit a cost model from profile passes.

        Parameters
        ----------
        own
            Passes of this engine.
        others
            Passes of the same target under other drafters; the target's own cost is fitted to them too.
        """
        return cost_model.fit(
            [trace.steps for trace in own],
            {**self.hardware, "drafter": self.drafter_name},
            [trace.steps for trace in others],
        )

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
