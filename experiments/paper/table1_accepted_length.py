"""Table 1: accepted length (tokens per round, bonus included) by drafter and domain at T = 1, γ = 7.

Every drafter drafts behind the same outputs of one target, so gains are paired by prompt. Accepted length is counted
as DeepSpec does: a round that the length limit cuts does not count.
"""

from pathlib import Path

import pandas as pd

from dspark_sim.analysis.blocks import Blocks, prompt_counts, walk
from dspark_sim.analysis.evaluation import acceptance_table
from dspark_sim.analysis.paper_plots import STYLES, caption, draw_ours, panels
from dspark_sim.paper_figures import PaperFigure, Scale, compared, script_main
from dspark_sim.paper_recordings import recordings, setting
from dspark_sim.reference import printed_gains, table1

DRAFTERS = ("eagle3", "dflash", "dspark", "dspark-rnn")
TARGETS = {"qwen3-4b": ("Qwen3-4B", "o"), "qwen3-8b": ("Qwen3-8B", "s"), "qwen3-14b": ("Qwen3-14B", "^")}
TARGETS["gemma4-12b"] = ("Gemma4-12B", "D")


def make(scale: Scale, out: Path) -> PaperFigure:
    traces = recordings(out, DRAFTERS, scale)
    counts = {name: prompt_counts(blocks, walk(blocks)) for name, blocks in _blocks(traces).items()}
    ours, paper = acceptance_table(counts), table1()
    about = setting(traces["dspark"], "eagle3, dflash, dspark, dspark-rnn")
    rows = []
    for (drafter, domain), row in ours.groupby(["drafter", "domain"], sort=False):
        cell, published = row.iloc[0], paper[(paper["target"] == "qwen3-4b") & (paper["drafter"] == drafter)]
        value = None if published.empty else float(published[domain].iloc[0])
        name = f"{STYLES[drafter][2]}, {domain}"
        rows.append(
            compared(name, cell["accept_len"], value, "tokens", (cell["accept_len_low"], cell["accept_len_high"]))
        )
    macro = ours[ours["domain"] == "macro"].set_index("drafter")
    for drafter in ("eagle3", "dflash", "dspark-rnn"):
        value, *ends = (100 * macro.loc[drafter, f"dspark_accept_len_gain{end}"] for end in ("", "_low", "_high"))
        gain = paper[(paper["target"] == "qwen3-4b") & (paper["drafter"] == drafter)]["dspark_gain"]
        published = None if gain.empty else 100 * float(gain.iloc[0])
        rows.append(compared(f"gain of DSpark over {STYLES[drafter][2]}, macro", value, published, "%", ends))
    return PaperFigure(
        name="table1_accepted_length",
        title="Table 1: accepted length",
        figure=draw(ours, paper, f"{about}. Bars: 95 % by bootstrap over prompts. The paper's: γ = 7, T = 1."),
        table=ours,
        comparison=pd.DataFrame(rows),
        setting=f"{about}. The paper's column is Qwen3-4B, the smallest of its targets",
        differs=differs(macro),
    )


def draw(ours, paper, note):
    domains = list(dict.fromkeys(ours["domain"]))
    figure, axes = panels(len(domains), width=2.7, height=4.2, sharey=True)
    for axis, domain in zip(axes, domains, strict=True):
        for x, drafter in enumerate(DRAFTERS):
            row = ours[(ours["drafter"] == drafter) & (ours["domain"] == domain)]
            draw_ours(axis, drafter, [x], row["accept_len"], row["accept_len_low"], row["accept_len_high"])
            for number, (target, (_, marker)) in enumerate(TARGETS.items()):
                value = paper[(paper["target"] == target) & (paper["drafter"] == drafter)][domain]
                place = [x + 0.12 * (number + 1)] * len(value)
                style = {"linestyle": "none", "markersize": 5, "markerfacecolor": "white", "alpha": 0.7}
                axis.plot(place, value, marker=marker, color=STYLES[drafter][0], **style)
        axis.set_title(domain, fontsize=10)
        axis.set_xticks(range(len(DRAFTERS)), ["Eagle3", "DFlash", "DSpark", "DSpark\nRNN"], fontsize=8)
        axis.set_xlim(-0.4, len(DRAFTERS) - 0.3)
        axis.set_ylim(bottom=1)
    axes[0].set_ylabel("accepted length (tokens per round)")
    ink = {"color": "#333333", "linestyle": "none", "markersize": 5}
    handles = [axes[0].plot([], [], marker="o", **ink)[0]]
    handles += [
        axes[0].plot([], [], marker=marker, markerfacecolor="white", **ink)[0] for _, marker in TARGETS.values()
    ]
    names = ["ours", *(f"the paper's {label}" for label, _ in TARGETS.values())]
    figure.legend(handles, names, loc="upper center", ncols=5, frameon=False, fontsize=9)
    return caption(figure, note)


def differs(macro: pd.DataFrame) -> str:
    gains = {name: 100 * macro.loc[name, "dspark_accept_len_gain"] for name in ("dflash", "eagle3")}
    printed = {name: f"{100 * low:.0f} to {100 * high:.0f} %" for name, (low, high) in printed_gains().items()}
    return (
        f"Ours are shorter throughout (macro {macro.loc['dspark', 'accept_len']:.2f} tokens for DSpark), for the "
        "target has 135 M parameters and the drafters 4 to 11 M, trained on 10 million tokens. DSpark's gain over "
        f"DFlash is {gains['dflash']:+.1f} % (the paper's Qwen3 targets: {printed['dflash']}), over Eagle3 "
        f"{gains['eagle3']:+.1f} % ({printed['eagle3']}): Eagle3 runs a whole layer for each draft, which is one of 30 "
        "in our target and so a strong drafter, and our DSpark has three layers where the paper's has five."
    )


def _blocks(traces):
    return {name: Blocks.from_trace(trace) for name, trace in traces.items()}


if __name__ == "__main__":
    script_main(make)
