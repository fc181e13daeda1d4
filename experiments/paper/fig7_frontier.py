"""Figure 7: throughput against speed per user, on our engine, beside the paper's two targets.

One point a concurrency, of the runs of Figure 8 (`dspark_sim.paper_load`). The paper's anchors are speeds of MTP-1;
ours are the same shares of the speed that a lone user has under MTP-1.
"""

from pathlib import Path

import pandas as pd

from dspark_sim.analysis.paper_plots import STYLES, caption, draw_ours, panels
from dspark_sim.paper_figures import PaperFigure, Scale, compared, script_main
from dspark_sim.paper_load import DRAFTERS, by_interpolation, load_curves, published_load
from dspark_sim.production_plots import TARGETS, key
from dspark_sim.reference import curve, load


def make(scale: Scale, out: Path) -> PaperFigure:
    table, about, device = load_curves(out, scale)
    comparison = compare(table)
    return PaperFigure(
        name="fig7_frontier",
        title="Figure 7: throughput against speed per user",
        figure=draw(table, f"{about}. Simulated; intervals: 95 % by bootstrap over prompts."),
        table=table,
        comparison=comparison,
        setting=f"{about}. The paper's are production servers, per GPU, γ = 5",
        differs=differs(comparison, table, device),
    )


def draw(table, note):
    figure, axes = panels(3, width=4.2, height=4.4)
    for served in DRAFTERS:
        mine = table[table["served"] == served]
        y = mine["output_throughput"]
        draw_ours(
            *(axes[0], served, mine["user_tokens_per_second"], y),
            mine["output_throughput_low"],
            mine["output_throughput_high"],
        )
    axes[0].set_ylabel("throughput (tokens/s)")
    for axis, target in zip(axes[1:], TARGETS, strict=True):
        for served, drafter in (("mtp1", "mtp-1"), ("dspark", "dspark-5")):
            line = curve("fig7_frontier", target_model=target, drafter=drafter)
            style = {"color": STYLES[served][0], "linestyle": "--", "linewidth": 1.8}
            axis.plot(line["tps_tok_s_user"], line["throughput_tok_s_gpu"], **style)
        axis.set_ylabel("throughput (tokens/s/GPU)")
    for axis, title in zip(axes, ("ours", *TARGETS.values()), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("speed per user (tokens/s)")
        axis.set_ylim(bottom=0)
    return caption(key(figure, axes[0], "ours", "the paper's (fitted lines)"), note)


def compare(table):
    rows, single = [], table[table["served"] == "mtp1"]["user_tokens_per_second"].max()
    for label in load("fig7_annotations").itertuples():
        paper = published_load(label.target_model)
        lone = paper[paper["served"] == "mtp1"]["user_tokens_per_second"].max()
        share = label.mtp_tps_tok_s_user / lone
        if share > 0.95:
            # A lone user's speed: nothing to divide by.
            continue
        kind = "throughput at that speed" if label.gain_kind.startswith("throughput") else "speed at that throughput"
        name = f"{kind}, MTP-1 at {100 * share:.0f} % of its lone speed, {TARGETS[label.target_model]}"
        rows.append(
            compared(f"DSpark: {name}", gain(table, share * single, label.gain_kind), label.gain_pct_printed, "%")
        )
        rows.append(compared(f"whole blocks: {name}", gain(table, share * single, label.gain_kind, "fixed"), None, "%"))
    return pd.DataFrame(rows)


def gain(table, speed, kind, served="dspark"):
    """Percent more than MTP-1 at the point where MTP-1 gives each user `speed` tokens per second."""
    mtp, ours = (table[table["served"] == name] for name in ("mtp1", served))
    across = "user_tokens_per_second"
    rate = by_interpolation(speed, mtp, across, "output_throughput")
    if kind == "throughput_at_matched_tps":
        return 100 * (by_interpolation(speed, ours, across, "output_throughput") / rate - 1)
    return 100 * (by_interpolation(rate, ours, "output_throughput", across) / speed - 1)


def differs(comparison: pd.DataFrame, table: pd.DataFrame, device: str) -> str:
    ours = comparison[comparison["quantity"].str.startswith("DSpark: speed")].dropna(subset="ours")
    said = " and ".join(f"{row.ours:+.0f} % (paper {row.paper:+.0f} %)" for row in ours.itertuples())
    left = 100 * table["mtp1_speed_share"].min()
    return (
        f"At matched throughput DSpark gives each user {said}, in the order of the anchors compared; ours is a 135M "
        f"target with a small drafter on {device}, where MTP-1's users keep {left:.0f} % of a lone user's speed at the "
        "largest load. The paper's anchor at MTP-1's full speed, with its +661 %, is left out, because a ratio to a "
        "server of one user says little."
    )


if __name__ == "__main__":
    script_main(make)
