"""Appendix A: an exact enumeration of what a scheduler that looks at drafted tokens does to the output.

Two tokens A and B, target p(A) = .7, drafter q(A) = .5, γ = 2. The second draft looks good behind A and bad behind B,
and verifying one draft alone does not pay: the global argmax then verifies exactly the drafts that begin with A, and A
comes out too often. Algorithm 1 decides on each draft before it knows the token and leaves the law as it is.
"""

from pathlib import Path

import pandas as pd

from dspark_sim.analysis.paper_plots import caption, panels
from dspark_sim.exactness.enumeration import output_law
from dspark_sim.exactness.laws import LOOK_AHEAD, AppendixA
from dspark_sim.paper_figures import PaperFigure, Scale, compared, script_main
from dspark_sim.policy import Fixed, PrefixScheduler
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler

TARGET = 0.7
POLICIES = {
    "global argmax (looks ahead)": GlobalArgmax(LOOK_AHEAD),
    "Algorithm 1 (prefix)": PrefixScheduler(LOOK_AHEAD),
    "Algorithm 1, lagged by 2": LaggedPrefixScheduler(LOOK_AHEAD, 2),
    "confidence threshold .5": ConfidenceThreshold(0.5),
    "all drafts (fixed 2)": Fixed(2),
}
PUBLISHED = {"global argmax (looks ahead)": 0.85, "Algorithm 1 (prefix)": 0.70}


def make(scale: Scale, out: Path) -> PaperFigure:
    rows = []
    for name, policy in POLICIES.items():
        law = output_law(AppendixA(), policy, "rejection", num_tokens=3)
        chance = sum(weight for (path,), weight in law.items() if path[0] == 0)
        rows.append({"policy": name, "probability_of_a": chance, "bias": chance - TARGET})
    table = pd.DataFrame(rows).round(12)
    comparison = [
        compared(f"P(first token is A), {row.policy}", row.probability_of_a, PUBLISHED.get(row.policy), "probability")
        for row in table.itertuples()
    ]
    about = "A toy target and drafter over two tokens, rejection sampling, 3 output tokens; exact, so no intervals"
    return PaperFigure(
        name="appendix_a",
        title="Appendix A: a look-ahead scheduler biases the output",
        figure=draw(table, f"{about}. Open circles: the paper's."),
        table=table,
        comparison=pd.DataFrame(comparison),
        setting=f"{about}; every scale and machine gives the same",
        differs=(
            "Nothing differs: the enumeration multiplies the engine's own acceptance rule along every branch and gives "
            "the paper's .85 for the global argmax and .70, the target's own, for Algorithm 1. The other policies are "
            "not in the paper; they decide before they know the token, or look at nothing, and give .70 too."
        ),
    )


def draw(table, note):
    figure, (axis,) = panels(1, width=6.6, height=3.6)
    places = range(len(table))[::-1]
    biased = table["bias"].abs() > 1e-9
    for rows, color, label in ((biased, "#D55E00", "ours, biased"), (~biased, "#0072B2", "ours, the target's law")):
        chances = table["probability_of_a"].where(rows, 0.0)
        axis.barh(places, chances, color=color, height=0.6, label=label)
    axis.axvline(TARGET, color="#333333", linewidth=1.0, linestyle="--", label="the target's p(A)")
    published = [
        (place, PUBLISHED[name]) for place, name in zip(places, table["policy"], strict=True) if name in PUBLISHED
    ]
    style = {"linestyle": "none", "marker": "o", "markersize": 8, "markerfacecolor": "none", "color": "#333333"}
    axis.plot([value for _, value in published], [place for place, _ in published], label="the paper's", **style)
    for place, value in zip(places, table["probability_of_a"], strict=True):
        axis.text(value + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
    axis.set_axisbelow(True)
    axis.set_yticks(places, table["policy"])
    axis.set(xlim=(0, 1), xlabel="probability that the first token is A")
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False, fontsize=9)
    return caption(figure, note)


if __name__ == "__main__":
    script_main(make)
