"""Learning curves: rows in, one line a run, and refusals in one sentence."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("seaborn")

from dspark_sim.analysis.learning import learning_curve_figure, read_learning_curves, save_learning_curves
from dspark_sim.cli import main
from dspark_sim.errors import UserError

HEADER = "update,seconds,loss,mean_acceptance_length"


@pytest.fixture
def runs(tmp_path):
    for name, more, values in (("new", ",acceptance_1,acceptance_2", ",0.7,nan"), ("old", "", "")):
        (tmp_path / name).mkdir()
        rows = [f"{update},1.5,{3 / update},{1 + update / 10}{values}" for update in (1, 2, 3)]
        (tmp_path / name / "learning_curve.csv").write_text("\n".join([HEADER + more, *rows]) + "\n")
    return [tmp_path / "new", tmp_path / "old"]


def test_a_figure_has_a_line_for_each_run(runs):
    figure = learning_curve_figure(runs)
    loss, length, places = figure.axes
    assert [line.get_label() for line in loss.lines] == ["new", "old"]
    assert list(length.lines[1].get_xdata()) == [1, 2, 3]
    assert list(length.lines[1].get_ydata()) == [1.1, 1.2, 1.3]
    # Positions that were never reached are left out, and so are runs without any.
    assert [list(line.get_xdata()) for line in places.lines] == [[1], []]


def test_runs_of_the_same_name_keep_their_paths(runs, tmp_path):
    other = tmp_path / "elsewhere" / "new"
    other.mkdir(parents=True)
    (other / "learning_curve.csv").write_text((runs[0] / "learning_curve.csv").read_text())
    names = read_learning_curves([runs[0], other])["run"].unique()
    assert list(names) == [str(runs[0] / "learning_curve.csv"), str(other / "learning_curve.csv")]


def test_what_is_no_curve_is_refused_in_one_sentence(runs, tmp_path):
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bare.csv").write_text(HEADER + "\n")
    (tmp_path / "empty.csv").write_text("")
    cases = [
        ([tmp_path / "missing"], "no learning curve"),
        ([tmp_path / "wrong.csv"], "no column update"),
        ([tmp_path / "bare.csv"], "no rows"),
        ([tmp_path / "empty.csv"], "not a learning curve"),
        ([runs[0], runs[0]], "twice"),
        ([], "zero runs"),
    ]
    for paths, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read_learning_curves(paths)
        assert "\n" not in str(caught.value)
    for name in ("curve", "curve.xyz"):
        with pytest.raises(UserError, match=r"choose \.png"):
            save_learning_curves(runs, tmp_path / name)


def test_the_command_draws(runs, tmp_path, capsys):
    out = tmp_path / "figures" / "curves.svg"
    main(["learning-curves", *map(str, runs), "--out", str(out)])
    assert out.read_text().startswith("<?xml")
    assert str(out) in capsys.readouterr().out
