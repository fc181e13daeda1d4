"""Figure 8: throughput and verification budget against concurrency, on our engine, beside the paper's two targets.

MTP-1, DSpark under Algorithm 1, and DSpark's whole block always, replayed in a closed loop from one recording with
step seconds profiled here (`dspark_sim.paper_load`). Servers are compared where MTP-1's speed per user has fallen to
the same share of a lone user's.
"""

from pathlib import Path

import pandas as pd

from dspark_sim.analysis.paper_plots import STYLES, caption, draw_ours
from dspark_sim.paper_figures import PaperFigure, Scale, compared, script_main
from dspark_sim.paper_load import DRAFTERS, by_interpolation, load_curves, published_load
from dspark_sim.production_plots import TARGETS, key

SHARES = (0.9, 0.75, 0.6)
PANELS = (
    ("output_throughput", "throughput (tokens/s{})"),
    ("verification_budget", "verification budget (tokens)"),
)


def make(scale: Scale, out: Path) -> PaperFigure:
    table, about, device = load_curves(out, scale)
    paper = {target: published_load(target) for target in TARGETS}
    return PaperFigure(
        name="fig8_load",
        title="Figure 8: throughput and verification budget against load",
        figure=draw(table, paper, f"{about}. Simulated; intervals: 95 % by bootstrap over prompts."),
        table=table,
        comparison=compare(table, paper),
        setting=f"{about}. The paper's are production servers, per GPU, γ = 5",
        differs=differs(table, paper, device),
    )


def draw(table, paper, note):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.2))
    for row, (name, label) in zip(axes, PANELS, strict=True):
        for served in DRAFTERS:
            mine = table[table["served"] == served]
            draw_ours(
                *(row[0], served, mine["concurrency_requests"], mine[name]), mine[f"{name}_low"], mine[f"{name}_high"]
            )
        row[0].set_ylabel(label.format(""))
        for axis, target in zip(row[1:], TARGETS, strict=True):
            for served in ("mtp1", "dspark"):
                line = paper[target][paper[target]["served"] == served]
                style = {"color": STYLES[served][0], "linestyle": "--", "linewidth": 1.8}
                axis.plot(line["concurrency_requests"], line[name], **style)
            axis.set_ylabel(label.format("/GPU"))
        for axis, title in zip(row, ("ours", *TARGETS.values()), strict=True):
            axis.set_title(title if name == "output_throughput" else "", fontsize=10)
            axis.set_xlabel("concurrency (requests)" if axis is row[0] else "concurrency (requests per GPU)")
            axis.set_xlim(left=0)
            axis.set_ylim(*((0, None) if name == "output_throughput" else (0.8, 8.3 if axis is row[0] else 6.3)))
            axis.grid(alpha=0.3)
    return caption(key(figure, axes[0][0], "ours", "the paper's (fitted lines)"), note)


def compare(table, paper):
    rows = []
    for share in SHARES:
        for target, title in TARGETS.items():
            at = f"where MTP-1 has {100 * share:.0f} % of its lone speed, {title}"
            ours, theirs = over_mtp(table, share), over_mtp(paper[target], share)
            rows.append(compared(f"DSpark over MTP-1, {at}", ours, theirs, "%"))
            budgets = [budget(frame, share) for frame in (table, paper[target])]
            rows.append(compared(f"budget less 1 over γ, {at}", budgets[0] / 7, budgets[1] / 5, "fraction"))
        rows.append(
            compared(f"whole blocks over MTP-1, at {100 * share:.0f} %", over_mtp(table, share, "fixed"), None, "%")
        )
    last = table.loc[table.groupby("served")["concurrency_requests"].idxmax()].set_index("served")
    users = int(last["concurrency_requests"].max())
    for served, label in (("dspark", "DSpark"), ("fixed", "whole blocks")):
        gain = 100 * (last.loc[served, "output_throughput"] / last.loc["mtp1", "output_throughput"] - 1)
        rows.append(compared(f"{label} over MTP-1 at {users} users", gain, None, "%"))
    return pd.DataFrame(rows)


def over_mtp(frame, share, served="dspark"):
    """Throughput over MTP-1's at the same load, in percent more."""
    rates = [
        by_interpolation(share, frame[frame["served"] == name], "mtp1_speed_share", "output_throughput")
        for name in (served, "mtp1")
    ]
    return 100 * (rates[0] / rates[1] - 1)


def budget(frame, share):
    return by_interpolation(share, frame[frame["served"] == "dspark"], "mtp1_speed_share", "verification_budget") - 1


def differs(table, paper, device):
    said = [f"ours from {story(table)}", *(f"{title} from {story(paper[target])}" for target, title in TARGETS.items())]
    last = table[table["concurrency_requests"] == table["concurrency_requests"].max()].set_index("served")
    lost = 100 * (last.loc["fixed", "output_throughput"] / last.loc["mtp1", "output_throughput"] - 1)
    users, left = last.loc["mtp1", "concurrency_requests"], 100 * last.loc["mtp1", "mtp1_speed_share"]
    small = "our small drafter is accepted less often, so less of its blocks is worth verifying at any load"
    why = (
        f"Our server ({device}) is full at {users} users, where MTP-1 keeps {left:.0f} % of a lone user's speed, and "
        f"{small}."
        if left < 50
        else f"Our server ({device}) is not full at {users} users, where MTP-1 keeps {left:.0f} % of a lone user's "
        f"speed: a pass of so small a target takes nearly the same time for few and for many tokens, budgets follow "
        f"the noise of its measurement, and {small}."
    )
    return (
        f"The scheduler's budget and its throughput over MTP-1's go, {', '.join(said)}; whole blocks of ours end at "
        f"{lost:+.0f} %. {why}"
    )


def story(frame):
    dspark, mtp = (frame[frame["served"] == name].set_index("concurrency_requests") for name in ("dspark", "mtp1"))
    gain = 100 * (dspark["output_throughput"] / mtp["output_throughput"] - 1)
    known = pd.DataFrame({"gain": gain, "budget": dspark["verification_budget"]}).dropna()
    ends = [
        f"{row.budget:.1f} tokens and {row.gain:+.0f} % at {row.Index:.0f}" for row in known.iloc[[0, -1]].itertuples()
    ]
    return " to ".join(ends)


if __name__ == "__main__":
    script_main(make)
