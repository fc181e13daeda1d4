"""One simulated run: recorded anchors, a policy, a workload and a cost model in; a trace out.

The loop, the scheduler and the policy are the live engine's own objects. Only the executor differs, and the seconds
that an iteration takes are waited for in simulated time instead of being spent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle, islice
from typing import Any

import simpy
from tqdm import tqdm

from dspark_sim.cost import CostModel
from dspark_sim.cost_noise import Noisy
from dspark_sim.errors import UserError
from dspark_sim.loop import DecodeLoop
from dspark_sim.policy import SpeculationPolicy, parameters
from dspark_sim.policy_ranked import LaggedPrefixScheduler
from dspark_sim.provenance import provenance
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.executor import ReplayExecutor
from dspark_sim.simulate.processes import Server, source, user
from dspark_sim.simulate.synthetic import SyntheticAcceptance
from dspark_sim.simulate.synthetic_anchors import as_anchors
from dspark_sim.trace import Trace, TraceRecorder
from dspark_sim.workload import ClosedLoop, Workload


def simulate(
    recorded: Trace | RecordedAnchors | SyntheticAcceptance,
    policy: SpeculationPolicy,
    workload: Workload,
    cost: CostModel,
    *,
    num_requests: int | None = None,
    block_size: int | None = None,
    scheduler: SchedulerConfig | None = None,
    allow_biased: bool = False,
    noise_seed: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trace:
    """Replay a recording under another policy, block size, load or hardware.

    Parameters
    ----------
    recorded
        A trace with anchors, or its anchors (build them once when many runs share them), or a synthetic law, whose
        requests then have 1000 prompt and 250 output tokens (`synthetic_anchors` makes others).
    policy
        Chooses how many drafted tokens are verified.
    workload
        Who asks when.
    cost
        Seconds of every part of an iteration.
    num_requests
        Requests to serve: the recorded ones in their order, repeated from the start when more are asked for;
        ``None`` means every recorded one once. A law needs the number.
    block_size
        Most drafted tokens per round; ``None`` keeps the recorded size.
    scheduler
        The server's limits. By default as many requests run at once as a closed loop has users (an open loop: the
        default of `SchedulerConfig`), and the KV cache holds all of them.
    allow_biased
        Run a policy that would bias the live output, as a negative control; the trace is labelled.
    noise_seed
        Let iterations scatter as the profiled ones did, by residuals drawn under this seed; ``None`` gives each its
        mean seconds.
    seed
        Added to the seed of the workload, which keys arrivals and think times; 0 leaves it. Also the seed of a law's
        luck.
    progress
        Show a bar of finished requests on stderr.

    Returns
    -------
    Trace
        Of clock ``virtual``, with tables `requests`, `steps` and `drafts`; request_id is the place in the list.

    Raises
    ------
    UserError
        If there is nothing to replay, the block size is above the recorded one, the policy needs confidences that
        were not recorded, or a request does not fit the server.
    """
    anchors = as_anchors(recorded, num_requests, seed)
    executor = ReplayExecutor(anchors, cost if noise_seed is None else Noisy(cost, noise_seed), block_size)
    requests = _requests(anchors, len(anchors.request_prompts) if num_requests is None else num_requests)
    limits = scheduler or _ample(requests, workload, executor.block_size)
    recorder = TraceRecorder("virtual")
    loop = DecodeLoop(
        executor, Scheduler(limits, executor.block_size), policy, recorder, cost, allow_biased=allow_biased
    )
    workload = workload.reseeded(seed)
    with tqdm(total=len(requests), desc=policy.label(), unit="req", disable=not progress) as bar:
        _run(loop, requests, workload, bar)
    config = {
        "source": "simulate",
        "mode": anchors.mode,
        "biased": loop.biased,
        # Under rejection sampling a lagged budget sees drafts that a recording can only draw anew.
        "approximate": anchors.mode == "rejection" and _is_lagged(policy),
        "policy": policy.label(),
        "policy_parameters": parameters(policy),
        "workload": workload.describe(),
        "num_requests": len(requests),
        "block_size": executor.block_size,
        "has_confidence": executor.has_confidence,
        "scheduler": asdict(limits),
        "acceptance_source": anchors.acceptance_source,
        "cost": cost.to_json(),
        "noise_seed": noise_seed,
        "seed": seed,
    }
    # As it will be read back: lists, not tuples.
    return recorder.trace(json.loads(json.dumps(config)), provenance(seed=seed))


def _is_lagged(policy: SpeculationPolicy) -> bool:
    return isinstance(getattr(policy, "inner", policy), LaggedPrefixScheduler)


def _run(loop: DecodeLoop, requests: list[Request], workload: Workload, bar: tqdm[Any]) -> None:
    env = simpy.Environment()
    server = Server(env, loop, on_finish=lambda request: bar.update())
    if isinstance(workload, ClosedLoop):
        shared: Iterator[Request] = iter(requests)
        think_times = workload.think_times(len(requests)).tolist()
        for _ in range(min(workload.num_users, len(requests))):
            env.process(user(env, server, shared, think_times))
    else:
        env.process(source(env, server, requests, workload.arrivals(len(requests)).tolist()))
    env.run()


def _requests(anchors: RecordedAnchors, num_requests: int) -> list[Request]:
    if num_requests < 1:
        raise UserError(f"num_requests is {num_requests}; simulate at least 1 request")
    names = islice(cycle(anchors.request_prompts), num_requests)
    prompts = [anchors.prompts[name] for name in names]
    return [
        Request(request_id, prompt.prompt_id, prompt.domain, prompt.prompt_len, prompt.max_tokens)
        for request_id, prompt in enumerate(prompts)
    ]


def _ample(requests: list[Request], workload: Workload, block_size: int) -> SchedulerConfig:
    """Limits under which memory never binds."""
    default = SchedulerConfig()
    longest = max(request.prompt_len + request.max_tokens for request in requests) + block_size + 1
    max_num_seqs = workload.num_users if isinstance(workload, ClosedLoop) else default.max_num_seqs
    pages_each = -(-longest // default.page_size)
    return replace(
        default,
        max_num_seqs=max_num_seqs,
        num_pages=max(default.num_pages, max_num_seqs * pages_each),
        max_model_len=max(default.max_model_len, longest),
    )
