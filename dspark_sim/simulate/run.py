"""One simulated run: recorded anchors, a policy, a workload and a cost model in; a trace out.

The loop, the scheduler and the policy are the live engine's own objects. Only the executor differs, and the seconds
that an iteration takes are waited for in simulated time instead of being spent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle, islice
from typing import Any, Literal

import simpy
from tqdm import tqdm

from dspark_sim.cost import CostModel
from dspark_sim.cost_noise import Noisy
from dspark_sim.errors import UserError
from dspark_sim.mixes import DomainMix, assign_prompts
from dspark_sim.policy import SpeculationPolicy, parameters
from dspark_sim.policy_ranked import LaggedPrefixScheduler
from dspark_sim.provenance import provenance
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.simulate.acceptance import RecordedAnchors
from dspark_sim.simulate.array_loop import ArrayLoop
from dspark_sim.simulate.array_recorder import ArrayRecorder, Detail, trace_of
from dspark_sim.simulate.block_tables import BlockTables
from dspark_sim.simulate.kernels import Kernels, compiled_kernels, has_numba
from dspark_sim.simulate.processes import LeastOutstandingTokens, RoundRobin, Server, source, user
from dspark_sim.simulate.synthetic import SyntheticAcceptance
from dspark_sim.simulate.synthetic_anchors import as_anchors
from dspark_sim.trace import Trace
from dspark_sim.tree_shapes import TreeShape
from dspark_sim.workload import ClosedLoop, Workload

RouterName = Literal["round_robin", "least_outstanding_tokens"]
Backend = Literal["auto", "arrays", "compiled"]
# Loading the compiled kernels takes as long as some hundreds of requests.
_WORTH_COMPILING = 500
_NOISE_STRIDE = 1_000_003


def simulate(
    recorded: Trace | RecordedAnchors | SyntheticAcceptance,
    policy: SpeculationPolicy,
    workload: Workload,
    cost: CostModel,
    *,
    num_requests: int | None = None,
    block_size: int | None = None,
    tree: TreeShape | None = None,
    scheduler: SchedulerConfig | None = None,
    allow_biased: bool = False,
    noise_seed: int | None = None,
    mix: DomainMix | None = None,
    num_replicas: int = 1,
    router: RouterName = "round_robin",
    load_lag: int = 0,
    detail: Detail = "rounds",
    backend: Backend = "auto",
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
        Most drafted tokens per round of chains; ``None`` keeps the recorded size.
    tree
        Shape of the drafts, of the recorded kind or narrower (`RecordedAnchors.with_tree`); ``None`` keeps what was
        recorded.
    scheduler
        The server's limits. By default as many requests run at once as a closed loop has users (an open loop: the
        default of `SchedulerConfig`), and the KV cache holds all of them.
    allow_biased
        Run a policy that would bias the live output, as a negative control; the trace is labelled.
    noise_seed
        Let iterations scatter as the profiled ones did, by residuals drawn under this seed; ``None`` gives each its
        mean seconds.
    mix
        Shares of domains, which may drift; ``None`` takes the recorded requests in their order.
    num_replicas
        Servers behind a router, each with these limits and its own policy.
    router
        ``round_robin``, or ``least_outstanding_tokens``: the server that owes the fewest tokens.
    load_lag
        Iterations by which the load that the policy sees is old.
    detail
        What the trace holds: ``rounds`` everything, ``steps`` no table `drafts`, ``requests`` only requests. Long runs
        need less memory with less.
    backend
        How decode rounds are played: ``arrays`` by numpy, ``compiled`` by machine code (the package numba), with the
        same result to the bit. ``auto`` compiles if numba is installed and the run is long enough to gain by it.
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
        If numba is asked for and missing, there is nothing to replay, the block size is above the recorded one, the
        policy needs confidences that
        were not recorded, or no request fits the server (one among others is refused: its `finish_reason` says so).
    """
    whole = as_anchors(recorded, num_requests, seed)
    anchors = whole.with_tree(tree)
    anchors = anchors if block_size is None else anchors.restricted(block_size)
    if num_replicas < 1:
        raise UserError(f"num_replicas is {num_replicas}; give at least 1")
    workload = workload.reseeded(seed)
    requests = _requests(anchors, len(anchors.request_prompts) if num_requests is None else num_requests, workload, mix)
    limits = scheduler or _ample(requests, workload, anchors.round_size)
    recorders = [ArrayRecorder(detail) for _ in range(num_replicas)]
    tables = BlockTables.of(anchors, policy)
    kernels = _kernels(backend, len(requests))
    loops = [
        ArrayLoop(
            anchors,
            cost if noise_seed is None else Noisy(cost, noise_seed + number * _NOISE_STRIDE),
            limits,
            policy,
            recorder,
            allow_biased=allow_biased,
            load_lag=load_lag,
            tables=tables,
            kernels=kernels,
        )
        for number, recorder in enumerate(recorders)
    ]
    with tqdm(total=len(requests), desc=policy.label(), unit="req", disable=not progress) as bar:
        _run(loops, router, requests, workload, bar)
    if all(request.finish_reason == "refused" for request in requests):
        # The plain scheduler says why, in one sentence.
        Scheduler(replace(limits, enable_chunked_prefill=False), anchors.round_size).check(requests[0])
    config = {
        "source": "simulate",
        "mode": anchors.mode,
        "biased": loops[0].biased,
        # Under rejection sampling a lagged budget sees drafts that a recording can only draw anew.
        "approximate": anchors.mode == "rejection" and _is_lagged(policy),
        "policy": policy.label(),
        "policy_parameters": parameters(policy),
        "workload": workload.describe(),
        "mix": None if mix is None else mix.describe(),
        "num_requests": len(requests),
        "block_size": anchors.block_size,
        "tree": "chain" if anchors.tree is None else anchors.tree.shape.label(),
        "has_confidence": anchors.estimates,
        "scheduler": asdict(limits),
        "num_replicas": num_replicas,
        "router": router,
        "load_lag": load_lag,
        "num_iterations": sum(loop.num_steps for loop in loops),
        "acceptance_source": whole.acceptance_source,
        "cost": cost.to_json(),
        "noise_seed": noise_seed,
        "seed": seed,
    }
    # As it will be read back: lists, not tuples.
    config = json.loads(json.dumps(config))
    noisy = noise_seed is not None
    return trace_of(recorders, anchors, policy, cost, limits.num_pages, config, provenance(seed=seed), noisy=noisy)


def _kernels(backend: Backend, num_requests: int) -> Kernels | None:
    if backend == "compiled" and not has_numba():
        raise UserError(
            "backend is compiled and the package numba is not installed; install dspark-sim[fast], or use arrays"
        )
    worth = num_requests >= _WORTH_COMPILING and has_numba()
    return compiled_kernels() if backend == "compiled" or (backend == "auto" and worth) else None


def _is_lagged(policy: SpeculationPolicy) -> bool:
    return isinstance(getattr(policy, "inner", policy), LaggedPrefixScheduler)


def _run(
    loops: list[ArrayLoop], router: RouterName, requests: list[Request], workload: Workload, bar: tqdm[Any]
) -> None:
    env = simpy.Environment()
    servers = [Server(env, loop, on_finish=lambda request: bar.update()) for loop in loops]
    route = RoundRobin(servers) if router == "round_robin" else LeastOutstandingTokens(servers)
    timeout = workload.timeout_seconds
    if isinstance(workload, ClosedLoop):
        shared: Iterator[Request] = iter(requests)
        think_times = workload.think_times(len(requests)).tolist()
        for _ in range(min(workload.num_users, len(requests))):
            env.process(user(env, route, shared, think_times, timeout))
    else:
        env.process(source(env, route, requests, workload.arrivals(len(requests)).tolist(), timeout))
    env.run()


def _requests(anchors: RecordedAnchors, num_requests: int, workload: Workload, mix: DomainMix | None) -> list[Request]:
    if num_requests < 1:
        raise UserError(f"num_requests is {num_requests}; simulate at least 1 request")
    if mix is None:
        names = islice(cycle(anchors.request_prompts), num_requests)
    else:
        if anchors.mode != "greedy":
            raise UserError(
                f"a mix of domains needs outputs that belong to prompts, and under mode {anchors.mode} every request "
                "has its own; replay a recording at temperature 0"
            )
        keys = list(anchors.prompts)
        arrivals = None if isinstance(workload, ClosedLoop) else workload.arrivals(num_requests)
        domains = [anchors.prompts[key].domain for key in keys]
        places = assign_prompts(mix, num_requests, domains, arrivals=arrivals).tolist()
        names = islice((keys[place] for place in places), None)
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
