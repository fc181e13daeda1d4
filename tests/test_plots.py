from itertools import pairwise
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("agg")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dspark_sim.analysis import plots
from dspark_sim.errors import UserError

NOTE = "Target toy (float32), drafter toy (γ = 5), T = 0, a processor with a rather long name @ 2.60GHz, 2 threads."
POLICIES = ("none", "ngram fixed-8", "dspark fixed-7", "dspark prefix")


def demo_frame() -> pd.DataFrame:
    rows = []
    for place, policy in enumerate(POLICIES, 1):
        for users in (1, 4, 16):
            throughput, speed, budget = 10.0 * place * users**0.5, 20.0 * place / users, 1.0 + place
            rows.append(
                {
                    "policy": policy,
                    "concurrency": users,
                    "live_output_throughput": throughput,
                    "simulated_output_throughput": 0.97 * throughput,
                    "live_user_tokens_per_second": speed,
                    "simulated_user_tokens_per_second": 0.96 * speed,
                    "verification_budget": budget,
                    "simulated_verification_budget": budget,
                }
            )
    return pd.DataFrame(rows)


def block_frame() -> pd.DataFrame:
    rows = [
        {"users": users, "block_size": size, "speed": size + users, "speed_low": size, "speed_high": 3 * users + size}
        for users in (1, 4)
        for size in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def blocks(frame: pd.DataFrame) -> Figure:
    labels = {"block_size": "block size γ (drafted tokens)", "users": "users:"}
    return plots.lines_with_intervals(frame, "block_size", [("speed", "tokens per second")], "users", labels, NOTE)


FIGURES = {
    "throughput_and_budget": lambda: plots.throughput_and_budget(demo_frame(), NOTE),
    "frontier": lambda: plots.frontier(demo_frame(), NOTE),
    "lines_with_intervals": lambda: blocks(block_frame()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_label_and_starts_at_zero(name: str) -> None:
    for axis in FIGURES[name]().axes:
        assert axis.get_xlabel() and axis.get_ylabel()
        assert axis.get_ylim()[0] == 0


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_runs_off_the_paper_or_over_something_else(name: str) -> None:
    """Caption, legend and axes with their labels lie inside the figure and do not overlap."""
    figure = FIGURES[name]()
    figure.canvas.draw()
    paper = figure.bbox
    parts = [*figure.texts, *figure.legends]
    boxes = [part.get_window_extent() for part in parts] + [axis.get_tightbbox() for axis in figure.axes]
    for box in boxes:
        assert box is not None
        assert box.x0 >= paper.x0 - 1 and box.x1 <= paper.x1 + 1
        assert box.y0 >= paper.y0 - 1 and box.y1 <= paper.y1 + 1
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    caption = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert NOTE in caption


def test_tick_labels_do_not_overlap() -> None:
    figure = FIGURES["throughput_and_budget"]()
    figure.canvas.draw()
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4", "16"]
        assert not any(left.overlaps(right) for left, right in pairwise(boxes))


def test_the_lines_are_the_frame() -> None:
    """A figure computes nothing: what it shows are the columns, one colour a policy."""
    frame = demo_frame()
    throughput, budget = plots.throughput_and_budget(frame).axes
    for axis, column in ((throughput, "output_throughput"), (budget, "verification_budget")):
        live, simulated = axis.lines[::2], axis.lines[1::2]
        assert len(live) == len(simulated) == len(POLICIES)
        for policy, solid, dashed in zip(POLICIES, live, simulated, strict=True):
            rows = frame[frame["policy"] == policy]
            name = column if column == "verification_budget" else f"live_{column}"
            assert list(solid.get_ydata()) == rows[name].tolist()
            assert list(dashed.get_ydata()) == rows[f"simulated_{column}"].tolist()
            assert list(solid.get_xdata()) == [1, 4, 16]
            assert solid.get_color() == dashed.get_color()
            assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert [text.get_text() for text in throughput.figure.legends[0].texts] == list(POLICIES)


def test_interval_bars_span_low_to_high() -> None:
    (axis,) = blocks(block_frame()).axes
    for bars, (_, rows) in zip(axis.containers, block_frame().groupby("users"), strict=True):
        ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
        assert ends == rows[["speed_low", "speed_high"]].astype(float).to_numpy().tolist()


def test_colours_differ_in_lightness_or_hue() -> None:
    colours = [to_rgb(colour) for colour in plots.PALETTE]
    assert len(set(colours)) == len(set(plots.MARKERS)) == len(colours)


def test_save_writes_figure_and_data(tmp_path: Path) -> None:
    paths = plots.save(FIGURES["frontier"](), demo_frame(), tmp_path / "deep" / "frontier")
    assert [path.name for path in paths] == ["frontier.png", "frontier.pdf", "frontier.csv"]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[1].read_bytes().startswith(b"%PDF")
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), demo_frame())


def test_save_where_nothing_can_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        plots.save(FIGURES["frontier"](), demo_frame(), tmp_path / "file" / "frontier")
