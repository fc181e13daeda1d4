"""Figure 3: accepted length against drafter depth, γ = 7: DSpark with 1 to 5 layers, DFlash with 5, T = 1.

The drafters were trained for this figure with `train_depth_and_length.py` (23 minutes on 2 H100, synthesis and
evaluation included); their rounds per prompt are kept in `data`, so the scales smoke and laptop need no GPU. Scale gpu
trains them anew: about an hour on one H100, by estimate.
"""

from pathlib import Path

import pandas as pd
from depth_and_length import Study, interval, study, table

from dspark_sim.analysis.paper_plots import caption, draw_ours, draw_paper, legend, panels
from dspark_sim.paper_figures import PaperFigure, Scale, compared, script_main
from dspark_sim.reference import load
from dspark_sim.workload import DOMAINS

GAMMA = 7
DEPTHS = (1, 2, 3, 4, 5)
DFLASH = ("dflash", 5, GAMMA)


def make(scale: Scale, out: Path) -> PaperFigure:
    measured = study(scale, out)
    lengths = {temperature: measured.lengths(temperature) for temperature in (1.0, 0.0)}
    ours = table(lengths, [*(("dspark-markov", depth, GAMMA) for depth in DEPTHS), DFLASH])
    paper = published()
    about = f"{measured.about}; γ = {GAMMA}, T = 1"
    return PaperFigure(
        name="fig3_drafter_depth",
        title="Figure 3: accepted length by drafter depth",
        figure=draw(ours, relative(lengths[1.0]), paper, about),
        table=ours,
        comparison=compare(measured, ours, paper),
        setting=f"{about} (T = 0 in the table). The paper's target is Qwen3-4B; a domain is the mean of its benchmarks",
        differs=differs(ours, paper),
    )


def published() -> pd.DataFrame:
    """The paper's means of each domain's benchmarks, and of the domains."""
    names = ["drafter", "drafter_layers", "domain"]
    means = load("fig3_drafter_depth").groupby(names)["accepted_length_tokens"].mean().unstack("domain")
    means["macro"] = means[list(DOMAINS)].mean(axis=1)
    return means


def relative(lengths):
    """Length over that of five layers, mean of the domains, by depth: percent with its interval."""
    deepest, rows = lengths["dspark-markov", 5, GAMMA]["macro"], []
    for key in (*(("dspark-markov", depth, GAMMA) for depth in DEPTHS), DFLASH):
        gain = interval(lengths[key]["macro"].gain_over(deepest))
        rows.append((*key[:2], *(100 * (1 + value) for value in (gain.estimate, gain.low, gain.high))))
    return pd.DataFrame(rows, columns=["drafter", "drafter_layers", "percent", "low", "high"])


def draw(ours, shares, paper, about):
    figure, axes = panels(4, width=3.1, height=4.0)
    shift = {"dspark-markov": 0.0, "dflash": 0.22}
    ours = ours[ours["temperature"] == 1.0]
    for axis, domain in zip(axes, DOMAINS, strict=False):
        for drafter in ("dspark-markov", "dflash"):
            rows = ours[(ours["drafter"] == drafter) & (ours["domain"] == domain)]
            x = rows["drafter_layers"] + shift[drafter]
            draw_ours(axis, drafter, x, rows["accepted_length_tokens"], rows["low"], rows["high"])
        for drafter, name in (("dspark-markov", "dspark"), ("dflash", "dflash")):
            values = paper.loc[name][domain]
            draw_paper(axis, drafter, values.index + shift[drafter], values)
        axis.set(title=domain, ylim=(1, 6.2), xlabel="layers of the drafter")
    axes[0].set_ylabel("accepted length (tokens per round)")
    for drafter, name in (("dspark-markov", "dspark"), ("dflash", "dflash")):
        rows, values = shares[shares["drafter"] == drafter], paper.loc[name]["macro"]
        draw_ours(axes[3], drafter, rows["drafter_layers"] + shift[drafter], rows["percent"], rows["low"], rows["high"])
        draw_paper(axes[3], drafter, values.index + shift[drafter], 100 * values / paper.loc[("dspark", 5), "macro"])
    axes[3].set(title="mean of the domains", ylim=(70, 103), xlabel="layers of the drafter")
    axes[3].set_ylabel("% of DSpark's with 5 layers")
    for axis in axes:
        axis.set(xticks=DEPTHS, xlim=(0.8, 5.4))
        axis.title.set_fontsize(10)
    legend(figure, axes[0])
    note = "Bars: 95 % by bootstrap over prompts. The paper's: Qwen3-4B, γ = 7, T = 1; layers 1, 2 and 5."
    return caption(figure, f"{about}.\n{note}")


def compare(measured: Study, ours, paper):
    rows = []
    for domain in (*DOMAINS, "macro"):
        for _, row in ours[(ours["temperature"] == 1.0) & (ours["domain"] == domain)].iterrows():
            name = "dflash" if row["drafter"] == "dflash" else "dspark"
            key = (name, row["drafter_layers"])
            value = float(paper.loc[key, domain]) if key in paper.index else None
            label = f"{'DFlash' if name == 'dflash' else 'DSpark'}, layers: {row['drafter_layers']}, {domain}"
            rows.append(compared(label, row["accepted_length_tokens"], value, "tokens", (row["low"], row["high"])))
    for temperature in (1.0, 0.0):
        lengths = measured.lengths(temperature)
        for depth in DEPTHS:
            gain = interval(lengths["dspark-markov", depth, GAMMA]["macro"].gain_over(lengths[DFLASH]["macro"]))
            value = None
            if temperature == 1.0 and ("dspark", depth) in paper.index:
                value = 100 * (paper.loc[("dspark", depth), "macro"] / paper.loc[("dflash", 5), "macro"] - 1)
            label = f"DSpark (layers: {depth}) over DFlash (5), macro, T = {temperature:g}"
            rows.append(compared(label, 100 * gain.estimate, value, "%", (100 * gain.low, 100 * gain.high)))
    return pd.DataFrame(rows)


def differs(ours, paper):
    rows = ours[(ours["temperature"] == 1.0) & (ours["domain"] == "macro")].set_index(["drafter", "drafter_layers"])
    length, theirs = rows["accepted_length_tokens"], paper["macro"]
    two, five, flash = length["dspark-markov", 2], length["dspark-markov", 5], length["dflash", 5]
    drop, published_drop = 100 * (1 - two / five), 100 * (1 - theirs["dspark", 2] / theirs["dspark", 5])
    order = "longer" if two > flash else "no longer"
    return (
        "The order is the paper's: in the mean of the domains length rises with every layer, two layers lose "
        f"{drop:.0f} % of five (the paper's {published_drop:.0f} %), and DSpark with two layers is {order} than DFlash "
        f"with five ({two:.2f} and {flash:.2f} tokens). Ours are shorter and flatter throughout: another, small target "
        "whose answers at T = 1 are hard to foresee, and drafters that were trained for minutes."
    )


if __name__ == "__main__":
    script_main(make)
