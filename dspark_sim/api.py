"""Record, profile, simulate, compare: the four calls of a notebook.

>>> from dspark_sim import Fixed, compare, profile, record, simulate
>>> trace = record(policy=Fixed(7), concurrency=4)           # a live run with dense anchors
>>> cost = profile()                                         # what iterations cost here
>>> twin = simulate(trace, policy=Fixed(7), cost=cost, concurrency=4)
>>> compare(trace, twin)                                     # live, simulated, error
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dspark_sim.analysis import fidelity
from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed, LoadView, SpeculationPolicy
from dspark_sim.trace import Trace, refuse_foreign
from dspark_sim.tree_shapes import Chain, TreeShape, parse_tree, recorded_shape
from dspark_sim.workload import ClosedLoop, Prompt, Workload, bundled_prompts

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine
    from dspark_sim.simulate.acceptance import RecordedAnchors
    from dspark_sim.simulate.synthetic import SyntheticAcceptance


def record(
    prompts: Sequence[Prompt] | None = None,
    *,
    target: str | None = None,
    drafter: str = "dspark",
    policy: SpeculationPolicy | None = None,
    concurrency: int = 4,
    workload: Workload | None = None,
    max_tokens: int = 64,
    per_domain: int | None = 4,
    mode: Mode = "greedy",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    allow_biased: bool = False,
    force_cost: bool = False,
    anchors: bool = True,
    cost: CostModel | None = None,
    out: Path | str | None = None,
    engine: Engine | None = None,
    progress: bool = True,
    tree: TreeShape | str | None = None,
) -> Trace:
    """Serve prompts live, and draft a block at every position of the outputs.

    Parameters
    ----------
    prompts
        ``None`` takes `per_domain` bundled prompts of each domain.
    target, drafter, dtype, device
        See `Engine.load`; ignored where `engine` is given.
    policy
        ``None`` verifies every whole block, or every node of a tree.
    concurrency
        Users of a closed loop; `workload` overrides it.
    max_tokens, mode, temperature, top_k, top_p, seed, cost, allow_biased, force_cost
        See `Engine.record`.
    anchors
        Whether to make the dense pass (with a drafter, and not after mode block, trees under rejection or a biased
        run).
    out
        Folder to write the trace to.
    engine
        A loaded engine, to save loading one.
    progress
        Show bars.
    tree
        Shape of the drafts, or its text such as ``"best-first:32"``; ``None`` drafts chains.

    Raises
    ------
    UserError
        As `Engine.load` and `Engine.record`.
    """
    if out is not None:
        refuse_foreign(Path(out))
    engine = engine or _load(target, drafter, dtype, device, _users(workload, concurrency))
    trace = engine.record(
        list(bundled_prompts(per_domain=per_domain) if prompts is None else prompts),
        policy or Fixed(engine.num_drafts(tree)),
        workload or ClosedLoop(concurrency),
        max_tokens=max_tokens,
        mode=mode,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cost=cost,
        allow_biased=allow_biased,
        force_cost=force_cost,
        progress=progress,
        tree=tree,
    )
    replayable = mode != "block" and (mode != "rejection" or trace.config["tree"] is None)
    if anchors and replayable and not trace.config["biased"] and engine.drafter is not None:
        trace = engine.anchors(trace, progress=progress)
    if out is not None:
        trace.write(out)
    return trace


def profile(
    prompts: Sequence[Prompt] | None = None,
    *,
    target: str | None = None,
    drafter: str = "dspark",
    concurrency: Sequence[int] = (1, 4, 16),
    max_tokens: int = 32,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    engine: Engine | None = None,
    progress: bool = True,
    tree: TreeShape | str | None = None,
) -> CostModel:
    """Measure and fit what iterations cost on this machine; see `Engine.profile`."""
    engine = engine or _load(target, drafter, dtype, device, max(concurrency))
    chosen = list(bundled_prompts() if prompts is None else prompts)
    options: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "progress": progress, "tree": tree}
    return engine.profile(chosen, concurrency=concurrency, **options)


def simulate(
    trace: Trace | RecordedAnchors | SyntheticAcceptance,
    *,
    policy: SpeculationPolicy,
    cost: CostModel,
    concurrency: int = 4,
    workload: Workload | None = None,
    block_size: int | None = None,
    tree: TreeShape | str | None = None,
    **options: Any,
) -> Trace:
    """Replay a recording's anchors under another policy, block size or load.

    Parameters
    ----------
    trace
        A recording with dense anchors, such anchors, or a synthetic law (which needs `num_requests`).
    policy, cost
        What to run and what iterations cost.
    concurrency
        Users of a closed loop; `workload` overrides it.
    block_size
        At most the recorded one; ``None`` keeps it.
    tree
        Shape of the drafts, or its text such as ``"width:2,3"``; ``None`` keeps what was recorded.
    options
        As of `dspark_sim.simulate.run.simulate`: ``num_requests, scheduler, allow_biased, noise_seed, mix,
        num_replicas, router, load_lag, detail, seed, progress``.

    Raises
    ------
    UserError
        If the trace has no anchors, or the block size or what the policy drafts is larger than recorded.
    """
    from dspark_sim.simulate.run import simulate as run

    shape = parse_tree(tree) if isinstance(tree, str) else tree
    limit = most_drafted(trace, block_size, shape)
    if limit is not None:
        wanted = policy.start().draft_len(LoadView(0, 1, 0, 0, limit))
        if wanted > limit:
            raise UserError(
                f"policy {policy.label()} drafts {wanted} tokens and blocks have at most {limit}; lower verify_len, or "
                "replay a recording with larger blocks"
            )
    return run(trace, policy, workload or ClosedLoop(concurrency), cost, block_size=block_size, tree=shape, **options)


def most_drafted(
    trace: Trace | RecordedAnchors | SyntheticAcceptance,
    block_size: int | None = None,
    tree: TreeShape | str | None = None,
) -> int | None:
    """Most tokens that a replay drafts per round: its block size, or the nodes of its trees.

    Parameters
    ----------
    trace, block_size, tree
        As for `simulate`.

    Returns
    -------
    int or None
        ``None`` if the trace does not say how large its blocks are.

    Raises
    ------
    UserError
        If the tree is no shape or deeper than the recorded block.
    """
    recorded = trace.config.get("block_size") if isinstance(trace, Trace) else trace.block_size
    limit = recorded if block_size is None else block_size
    if tree is None:
        replayed = getattr(trace, "tree", None)
        tree = recorded_shape(trace.config) if isinstance(trace, Trace) else getattr(replayed, "shape", None)
    shape = parse_tree(tree) if isinstance(tree, str) else tree
    if limit is None or shape is None or (isinstance(shape, Chain) and shape.depth is None):
        return None if limit is None else int(limit)
    return shape.fitted(int(limit)).num_nodes


def compare(live: Trace, simulated: Trace, repeat: Trace | None = None) -> pd.DataFrame:
    """Metric by metric: live, simulated, error, and the error of a second live run; see `fidelity.compare`."""
    return fidelity.compare(live, simulated, repeat)


def _users(workload: Workload | None, concurrency: int) -> int:
    if workload is None:
        return concurrency
    return workload.num_users if isinstance(workload, ClosedLoop) else 16


def _load(target: str | None, drafter: str, dtype: str, device: str, max_num_seqs: int) -> Engine:
    from dspark_sim.engine.serve import Engine

    options: dict[str, Any] = {} if target is None else {"target": target}
    return Engine.load(drafter=drafter, dtype=dtype, device=device, max_num_seqs=max_num_seqs, **options)
