"""Trees: does a wider draft pay, at equal verified tokens and with its build time charged?

One live run (T = 0) gives the outputs; dense passes over them say where the output's tokens stand in trees of every
kind: the chain, best-first on the block's factorised marginals (DDTree), best-first with the sequential head asked
anew below every node (`markov`), Sequoia's best static tree for the measured acceptance by rank, and full trees of a
fixed width. What an iteration costs is profiled live for each kind, since drafting a tree is part of it; the target's
pass is fitted to all of them. Every kind, budget and load is then replayed, and each is compared with the chain of at
most as many verified tokens, on the same prompts. A few runs live show whether the rounds and the seconds are right.

    python experiments/tree_width.py --scale smoke
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from tqdm import tqdm

from dspark_sim import CostModel, Engine, Fixed, Trace, record
from dspark_sim import cost as cost_model
from dspark_sim.analysis import plots
from dspark_sim.analysis.fidelity import rounds_equal
from dspark_sim.analysis.metrics import per_request, summary
from dspark_sim.analysis.stats import paired_difference, run_intervals
from dspark_sim.analysis.tables import aligned
from dspark_sim.analysis.tree_rates import rates_by_rank
from dspark_sim.errors import UserError
from dspark_sim.policy import PrefixScheduler, SpeculationPolicy
from dspark_sim.simulate import RecordedAnchors
from dspark_sim.simulate.run import simulate
from dspark_sim.tree_shapes import BestFirst, FixedWidth, Sequoia, TreeShape
from dspark_sim.workload import ClosedLoop, bundled_prompts

KINDS = ("chain", "factorised", "markov", "sequoia", "width")
WIDTHS = ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2))


@dataclass(frozen=True)
class Scale:
    per_domain: int
    max_tokens: int
    profile_tokens: int
    profiled: tuple[int, ...]
    passes: int
    concurrency: tuple[int, ...]
    budgets: tuple[int, ...]
    shown: tuple[int, ...]


SCALES = {
    "smoke": Scale(1, 10, 5, (1, 4), 1, (1, 4), (2, 7, 12), (1, 4)),
    "laptop": Scale(
        12, 64, 12, (1, 2, 4, 8, 16, 32), 4, (1, 2, 4, 8, 16, 32), (1, 2, 3, 5, 7, 10, 15, 22, 32), (1, 4, 16)
    ),
}


def main(
    scale: Literal["smoke", "laptop"] = "laptop",
    drafter: str = "dspark",
    out: Path = Path("runs/tree_width"),
) -> None:
    """Sweep kind of tree, node budget and load; writes tree_width.csv, .png, .pdf and the frontier.

    Parameters
    ----------
    scale
        smoke: a minute, to see that it runs. laptop: a quarter of an hour on two cores, nothing else running.
    drafter
        A block drafter.
    out
        Folder of the results; recordings, cost tables and live runs in it are used again.
    """
    size = SCALES[scale]
    most = max(size.budgets)
    # Room for the profile's users with a whole tree each; simulated loads may be larger.
    engine = Engine.load(drafter=drafter, max_num_seqs=max(size.profiled), max_model_len=1024)
    recordings = recorded(engine, size, most, out)
    costs = profiled(engine, size, most, out)
    rates = rates_by_rank(recordings["chain"])
    frame = swept(size, recordings, costs, rates, engine.block_size)
    note = (
        f"Target {engine.target.name}, drafter {engine.drafter_name}, T = 0, {3 * size.per_domain} prompts, "
        f"{size.max_tokens} output tokens at most; {engine.hardware['device']}, "
        f"{engine.hardware['num_threads']} threads, float32."
    )
    written = [
        *plots.save(heat_maps(frame, note), frame, out / "tree_width"),
        *plots.save(frontier(frame, size, note), frame, out / "tree_frontier"),
    ]
    print(equal_budgets(frame, size))
    kept = out / "tree_live.csv"
    live = live_check(engine, size, recordings, costs, rates, kept)
    live.to_csv(kept, index=False)
    print(aligned(live, {name: name for name in live}))
    print("\n".join(f"wrote {path}" for path in written))


def best_first(kind: str, budget: int) -> BestFirst:
    return BestFirst(budget, conditional="markov" if kind == "markov" else "factorised")


def shapes(size: Scale, rates: Any, gamma: int) -> list[tuple[str, int | TreeShape]]:
    """Kinds and shapes, chains first; a number is a chain's length."""
    chains = sorted({min(budget, gamma) for budget in size.budgets} | {gamma})
    trees: list[tuple[str, int | TreeShape]] = [("chain", length) for length in chains]
    for budget in size.budgets:
        trees += [("factorised", best_first("factorised", budget)), ("markov", best_first("markov", budget))]
        trees.append(("sequoia", Sequoia(budget, rates).fitted(gamma)))
    widths = [FixedWidth(*one) for one in WIDTHS if one[1] <= gamma]
    trees += [("width", shape) for shape in widths if shape.num_nodes <= max(size.budgets)]
    return trees


def swept(
    size: Scale, recordings: dict[str, Trace], costs: dict[str, CostModel], rates: Any, gamma: int
) -> pd.DataFrame:
    """Every kind, budget and load replayed: its measures, and its throughput over two chains'."""
    anchors = {kind: RecordedAnchors.from_trace(trace) for kind, trace in recordings.items()}
    grid = [(kind, shape, users) for users in size.concurrency for kind, shape in shapes(size, rates, gamma)]
    runs: dict[tuple[str, str, int, int], tuple[pd.DataFrame, pd.Series]] = {}
    for kind, shape, users in tqdm(grid, desc="simulate", unit="run"):
        budget = shape if isinstance(shape, int) else shape.num_nodes
        tree = None if isinstance(shape, int) else shape
        run = replay(anchors.get(kind, anchors["chain"]), Fixed(budget), costs[kind], users, tree)
        runs[kind, label(shape), budget, users] = per_request(run), decode_seconds(run)
    for kind in anchors:
        for users in size.concurrency:
            tree = None if kind == "chain" else best_first(kind, max(size.budgets))
            run = replay(anchors[kind], PrefixScheduler(costs[kind]), costs[kind], users, tree)
            runs[kind, "scheduled", -1, users] = per_request(run), decode_seconds(run)
    chains = {(at[2], at[3]): own for at, (own, _) in runs.items() if at[0] == "chain" and at[2] > 0}
    speeds = {at: run_intervals(own).loc["output_throughput", "estimate"] for at, own in chains.items()}
    rows = []
    for (kind, shape, budget, users), (own, seconds) in runs.items():
        lengths = [length for length, at in chains if at == users]
        equal = max(length for length in lengths if budget < 0 or length <= budget)
        best = max(lengths, key=lambda length, at=users: speeds[length, at])
        rows.append(row(kind, shape, budget, users, own, seconds, chains[equal, users], chains[best, users]))
    return pd.DataFrame(rows)


def label(shape: int | TreeShape) -> str:
    """Without the rates of Sequoia's trees, which are those of the recording."""
    return f"chain:{shape}" if isinstance(shape, int) else shape.label().partition("@")[0]


def recorded(engine: Engine, size: Scale, most: int, out: Path) -> dict[str, Trace]:
    """Anchors of the chain and of both best-first kinds, over the same outputs."""
    folder = out / "recordings"
    found = {kind: folder / kind for kind in ("chain", "factorised", "markov")}
    if not (found["chain"] / "requests.parquet").exists():
        users = max(size.profiled)
        record(
            engine=engine, concurrency=users, per_domain=size.per_domain, max_tokens=size.max_tokens, out=found["chain"]
        )
    base = Trace.read(found["chain"])
    for kind in ("factorised", "markov"):
        if not (found[kind] / "requests.parquet").exists():
            engine.anchors(base, tree=best_first(kind, most)).write(found[kind])
    return {kind: Trace.read(path) for kind, path in found.items()}


def profiled(engine: Engine, size: Scale, most: int, out: Path) -> dict[str, CostModel]:
    """Cost tables of every kind: its own drafting, and the target's pass fitted to the passes of all."""
    paths = {kind: out / "costs" / f"{kind}.json" for kind in KINDS}
    if all(path.exists() for path in paths.values()):
        return {kind: CostModel.read(path) for kind, path in paths.items()}
    prompts = list(bundled_prompts(per_domain=2))
    trees = {
        **{"chain": None, "factorised": best_first("factorised", most), "markov": best_first("markov", most)},
        **{"sequoia": Sequoia(most), "width": FixedWidth(2, 4 if most >= 30 else 2)},
    }
    for tree in trees.values():
        engine.warm_up(prompts, tree=tree)
    steps: dict[str, list[pd.DataFrame]] = {kind: [] for kind in KINDS}
    passes = [(kind, users, seed) for seed in range(size.passes) for users in size.profiled for kind in KINDS]
    for kind, users, seed in tqdm(passes, desc="profile", unit="pass"):
        options: dict[str, Any] = {"max_tokens": size.profile_tokens, "num_requests": max(users, 4), "seed": seed}
        trace = engine.profile_pass(prompts, users, tree=trees[kind], **options)
        steps[kind].append(trace.steps)
    costs = {}
    for kind, path in paths.items():
        others = [table for other in KINDS if other != kind for table in steps[other]]
        costs[kind] = cost_model.fit(steps[kind], {**engine.hardware, "drafter": f"dspark {kind}"}, others)
        path.parent.mkdir(parents=True, exist_ok=True)
        costs[kind].write(path)
    return costs


def replay(
    anchors: RecordedAnchors, policy: SpeculationPolicy, cost: CostModel, users: int, tree: TreeShape | None
) -> Trace:
    """One simulated run: every prompt equally often, at least four requests per user."""
    prompts = len(anchors.request_prompts)
    num = prompts * -(-4 * users // prompts)
    return simulate(anchors, policy, ClosedLoop(users), cost, num_requests=num, tree=tree)


def row(
    kind: str, shape: str, budget: int, users: int, own: pd.DataFrame, seconds: pd.Series, equal: pd.DataFrame,
    best: pd.DataFrame,
) -> dict[str, Any]:  # fmt: skip
    """Measures of a run with intervals, and its throughput over two chains', paired by prompt."""
    metrics = run_intervals(own)
    gains: dict[str, float] = {}
    for name, chain in {"gain": equal, "over_best": best}.items():
        gain = paired_difference(chain, own, "output_len", "e2e_latency", relative=True)
        gains |= {name: gain.estimate, f"{name}_low": gain.low, f"{name}_high": gain.high}
    ends = {"estimate": "", "low": "_low", "high": "_high"}
    return {
        **{"kind": kind, "shape": shape, "budget": budget, "concurrency": users},
        **{"step_seconds": seconds.sum(), "draft_share": seconds["draft"] / seconds.sum()},
        **{f"{name}{ends[end]}": value for name, found in metrics.iterrows() for end, value in found.items()},
        **gains,
    }


def equal_budgets(frame: pd.DataFrame, size: Scale) -> str:
    """The table of every kind at equal verified tokens, and each kind's best budget, at a few loads."""
    lines = []
    for users in size.shown:
        at = frame[frame["concurrency"] == users]
        chosen = [at[at["budget"] == budget] for budget in size.budgets if budget >= 5]
        best = at[at["budget"] >= 0].sort_values("output_throughput").groupby("kind").tail(1)
        table = pd.concat([*chosen, best.assign(shape=best["shape"] + " (best)"), at[at["budget"] < 0]])
        table = table.assign(
            budget=["-" if budget < 0 else str(budget) for budget in table["budget"]],
            gain=[_span(one, "gain", 100, "+.1f") for one in table.to_dict("records")],
            over_best=[_span(one, "over_best", 100, "+.1f") for one in table.to_dict("records")],
            length=[_span(one, "mean_acceptance_length", 1, ".2f") for one in table.to_dict("records")],
            throughput=[_span(one, "output_throughput", 1, ".1f") for one in table.to_dict("records")],
        )
        columns = {"kind": "kind", "shape": "shape", "budget": "nodes", "length": "acceptance length"}
        columns |= {"step_seconds": "step (s)", "draft_share": "draft share", "throughput": "tokens/s"}
        lines += [f"{users} user{'s' * (users > 1)}; tokens/s over those of chains, %"]
        lines += [
            aligned(table, {**columns, "gain": "of at most as many tokens", "over_best": "of the best length"}),
            "",
        ]
    return "\n".join(lines)


def _span(one: dict[str, Any], name: str, factor: float, form: str) -> str:
    value, low, high = (one[key] * factor for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def live_check(
    engine: Engine, size: Scale, recordings: dict[str, Trace], costs: dict[str, CostModel], rates: Any, kept: Path
) -> pd.DataFrame:
    """A few of the replayed runs again, live: whether the rounds are the same, and the tokens per second of both."""
    if kept.exists():
        return pd.read_csv(kept)
    rows = []
    prompts = list(bundled_prompts(per_domain=size.per_domain))
    budget = min(15, max(size.budgets))
    trees = {"chain": None, "factorised": best_first("factorised", budget), "markov": best_first("markov", budget)}
    trees["sequoia"] = Sequoia(budget, rates).fitted(engine.block_size)
    cells = [(users, kind) for users in size.shown if users <= engine.max_num_seqs for kind in trees]
    for users, kind in tqdm(cells, desc="live", unit="run"):
        tree = trees[kind]
        policy = Fixed(engine.block_size if tree is None else tree.num_nodes)
        some = prompts[: max(12, 2 * users)]
        live = engine.record(some, policy, ClosedLoop(users), max_tokens=size.max_tokens, tree=tree, progress=False)
        anchors = RecordedAnchors.from_trace(recordings.get(kind, recordings["chain"]))
        twin = simulate(anchors, policy, ClosedLoop(users), costs[kind], num_requests=len(some), tree=tree)
        verdict, values = rounds_equal(live, twin), summary(live)
        simulated = summary(twin)["output_throughput"]
        rows.append(
            {"kind": f"{kind}, {policy.verify_len} nodes", "users": users, "rounds equal": bool(verdict)}
            | {"live tokens/s": values["output_throughput"], "simulated": simulated}
            | {"error": f"{simulated / values['output_throughput'] - 1:+.1%}"}
            | {"live step (ms)": 1e3 * decode_seconds(live).sum(), "simulated step": 1e3 * decode_seconds(twin).sum()}
            | {
                "live draft (ms)": 1e3 * decode_seconds(live)["draft"],
                "simulated draft": 1e3 * decode_seconds(twin)["draft"],
            }
            | {"acceptance length": values["mean_acceptance_length"]}
        )
    return pd.DataFrame(rows)


def decode_seconds(run: Trace) -> pd.Series:
    """Mean seconds of drafting and of the rest in iterations without prompts."""
    decode = run.steps[run.steps["num_prefill_tokens"] == 0]
    draft = decode["draft_seconds"] + decode["head_seconds"]
    return pd.Series({"draft": draft.mean(), "rest": (decode["step_seconds"] - draft).mean()})


def heat_maps(frame: pd.DataFrame, note: str) -> plt.Figure:
    """Gain over the chain by node budget and load, one panel a kind."""
    kinds = [kind for kind in KINDS if kind not in ("chain", "width")]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 4.4), sharey=True, layout="constrained")
    limit = 100 * frame.loc[frame["kind"].isin(kinds) & (frame["budget"] > 0), "gain"].abs().max()
    for axis, kind in zip(axes, kinds, strict=True):
        own = frame[(frame["kind"] == kind) & (frame["budget"] > 0)]
        table = 100 * own.pivot_table(index="budget", columns="concurrency", values="gain")
        clear = own.assign(clear=(own["gain_low"] > 0) | (own["gain_high"] < 0))
        marks = clear.pivot_table(index="budget", columns="concurrency", values="clear", aggfunc="first")
        texts = table.round(0).astype(int).astype(str) + np.where(marks.astype(bool), "*", "")
        sns.heatmap(
            table, ax=axis, annot=texts, fmt="", center=0, vmin=-limit, vmax=limit, cmap="RdBu", annot_kws={"size": 8},
            cbar=axis is axes[-1], cbar_kws={"label": "tokens/s over the chain's (%)"},
        )  # fmt: skip
        axis.set(
            title=kind, xlabel="concurrent users", ylabel="node budget (verified nodes)" if axis is axes[0] else ""
        )
        axis.invert_yaxis()
    text = f"{note} Simulated.\n* the 95 % interval over prompts is on one side of 0. The chain has at most 7 tokens."
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8)
    return figure


def frontier(frame: pd.DataFrame, size: Scale, note: str) -> plt.Figure:
    """Acceptance length and tokens per second against verified nodes, at a few loads."""
    users = list(size.shown)
    figure, axes = plt.subplots(1, 1 + len(users), figsize=(4.2 * (1 + len(users)), 4.4), layout="constrained")
    styles = dict(zip(KINDS, zip(plots.PALETTE, plots.MARKERS, strict=False), strict=False))
    panels = [(axes[0], users[0], "mean_acceptance_length", "mean acceptance length (tokens)")]
    panels += [
        (axis, n, "output_throughput", "output tokens per second") for axis, n in zip(axes[1:], users, strict=True)
    ]
    for axis, n, metric, name in panels:
        at = frame[(frame["concurrency"] == n) & (frame["budget"] > 0)]
        for kind, own in at.groupby("kind", sort=False):
            color, marker = styles[kind]
            bars = [own[metric] - own[f"{metric}_low"], own[f"{metric}_high"] - own[metric]]
            axis.errorbar(
                own["budget"], own[metric], yerr=np.clip(bars, 0, None), color=color, marker=marker, markersize=5,
                linestyle="none" if kind == "width" else "-", capsize=2, linewidth=1.3, label=kind,
            )  # fmt: skip
        axis.set(xlabel="verified nodes per request", ylabel=name, ylim=(0, None))
        axis.set_title("any load" if metric == "mean_acceptance_length" else f"{n} user{'s' * (n > 1)}")
        axis.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.supxlabel(f"{note} Simulated; bars: 95 % over prompts.", x=0.01, ha="left", fontsize=8)
    return figure


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"tree_width: {error}")
