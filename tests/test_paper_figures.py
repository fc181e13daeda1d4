"""Paper figures: files, resuming, report, failing scripts and Ctrl-C, with toy scripts; one real script."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dspark_sim.cli import main
from dspark_sim.errors import UserError
from dspark_sim.paper_figures import COMPARED, PaperFigure, compared, identity, is_complete, read_mark, write
from dspark_sim.paper_report import write_report
from dspark_sim.paper_study import choose, find_scripts

ROOT = Path(__file__).parent.parent
SCRIPT = '''
"""A toy figure."""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from dspark_sim.errors import UserError
from dspark_sim.paper_figures import PaperFigure, compared, script_main


def make(scale, out):
    with (out / "runs.txt").open("a") as file:
        file.write(f"{Path(__file__).stem} {scale}\\n")
    BODY
    figure, axis = plt.subplots()
    axis.plot([1, 2], [3, 4])
    comparison = pd.DataFrame([compared("length", 2.5, 5.57, "tokens", (2.25, 2.75))])
    name = Path(__file__).stem
    table = pd.DataFrame({"x": [1 / 3]})
    return PaperFigure(name, f"Title of {name}", figure, table, comparison, "Target toy", "One. Two.")


if __name__ == "__main__":
    script_main(make)
'''


def script(folder: Path, name: str, body: str = "pass") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(SCRIPT.replace("BODY", body))
    return path


def toy_figure(name: str = "fig9_toy", drawn: bool = False) -> PaperFigure:
    figure = None
    if drawn:
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots()
        axis.plot([1, 2], [3, 4])
    comparison = pd.DataFrame(
        [compared("gain", 12345.678, None, "tokens/s"), compared("length", 2.5, 5.57, "tokens", (2.25, 2.75))]
    )
    return PaperFigure(name, "Figure 9: toys", figure, pd.DataFrame({"x": [1 / 3]}), comparison, "Target toy.", "A. B.")


def run(out: Path, *arguments: str, scripts: Path) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["figures", *arguments, "--scripts", str(scripts), "--out", str(out)])
        raise SystemExit(0)
    return stop.value.code


def runs(out: Path) -> list[str]:
    return (out / "runs.txt").read_text().splitlines()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_complete_only_when_all_its_files_are_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    own = script(tmp_path / "scripts", "fig9_toy")
    paths = write(toy_figure(drawn=True), tmp_path, scale="smoke", seconds=1.5, script=identity(own))
    names = ["fig9_toy.png", "fig9_toy.pdf", "fig9_toy.csv", "fig9_toy_comparison.csv", "fig9_toy.json"]
    assert [path.name for path in paths] == names and all(path.stat().st_size > 20 for path in paths)
    mark = json.loads(paths[-1].read_text())
    assert (mark["scale"], mark["seconds"], mark["setting"]) == ("smoke", 1.5, "Target toy.")
    assert mark["provenance"]["packages"]["pandas"] == pd.__version__
    assert is_complete(own, tmp_path, "smoke") and not is_complete(own, tmp_path, "laptop")
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        assert not is_complete(own, tmp_path, "smoke")
        path.write_bytes(content)
    assert is_complete(own, tmp_path, "smoke")
    # A changed script makes its figure anew.
    own.write_text(own.read_text() + "\n")
    assert not is_complete(own, tmp_path, "smoke")


def test_written_twice_a_figure_has_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = (write(toy_figure(drawn=True), tmp_path / part) for part in ("a", "b"))
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_numbers_survive_the_files(tmp_path: Path) -> None:
    figure = toy_figure()
    write(figure, tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "fig9_toy.csv"), figure.table)
    back = pd.read_csv(tmp_path / "fig9_toy_comparison.csv")
    assert tuple(back.columns) == COMPARED
    pd.testing.assert_frame_equal(back, figure.comparison)


def test_a_write_that_fails_leaves_no_mark_of_the_run_before(tmp_path: Path) -> None:
    figure = toy_figure()
    write(figure, tmp_path)
    (tmp_path / "fig9_toy_comparison.csv").unlink()
    (tmp_path / "fig9_toy_comparison.csv").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write(figure, tmp_path)
    assert read_mark("fig9_toy", tmp_path) is None


@pytest.mark.parametrize("name", ["", "Fig 2", "../fig2", "fig2.png"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="use lower-case letters"):
        toy_figure(name)


def test_a_comparison_has_the_agreed_columns() -> None:
    with pytest.raises(UserError, match=r"has columns ours; give quantity, ours, low, high, paper, unit"):
        replace(toy_figure(), comparison=pd.DataFrame({"ours": [1.0]}))


# ---- report ---------------------------------------------------------------------------------------------------------


def test_the_report_has_per_figure_picture_table_setting_and_differences(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scripts = [script(tmp_path / "scripts", name) for name in ("fig9_toy", "fig10_toy")]
    write(toy_figure(drawn=True), tmp_path, scale="laptop", seconds=3.2, script=identity(scripts[0]))
    write(toy_figure("extra"), tmp_path, scale="laptop", seconds=3.2, script=identity(scripts[0]))
    (tmp_path / "rows.json").write_text("[1]")
    text = write_report(tmp_path, scripts, {"fig10_toy": "it broke"}).read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert [section.splitlines()[0] for section in sections[1:]] == ["Failed", "Figure 9: toys", "Figure 9: toys"]
    assert "* `fig10_toy`: it broke (see [its log](logs/fig10_toy.log))" in sections[1]
    assert "| `fig10_toy` | not made | - |" in sections[0]
    assert "![Figure 9: toys](fig9_toy.png)" in sections[2] and "png" not in sections[3]
    assert "Target toy. Scale `laptop`, script `fig9_toy.py`." in sections[2]
    assert "| gain | 12,346 | - | - | tokens/s |" in sections[2]
    assert "| length | 2.50 | [2.25, 2.75] | 5.57 | tokens |" in sections[2]
    assert "\nA. B.\n" in sections[2]
    # Every link leads to a file, or to a heading of the page.
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link == "#figure-9-toys"
        elif not link.startswith("logs/"):
            assert (tmp_path / link).is_file()


# ---- which scripts --------------------------------------------------------------------------------------------------


def test_scripts_come_in_the_papers_order_and_shared_modules_are_none(tmp_path: Path) -> None:
    names = ["appendix_a", "fig10_z", "fig2_b", "predict", "table1_a"]
    for name in names:
        script(tmp_path, name)
    (tmp_path / "shared.py").write_text("X = 1\n")
    (tmp_path / "train.py").write_text('if __name__ == "__main__":\n    print()\n')
    found = find_scripts(tmp_path)
    assert [path.stem for path in found] == ["table1_a", "fig2_b", "fig10_z", "appendix_a", "predict"]
    assert [path.stem for path in choose(found, ["predict", "fig2"])] == ["fig2_b", "predict"]
    with pytest.raises(UserError, match="no paper figure 'fig1'; choose from table1_a, fig2_b"):
        choose(found, ["fig1"])


def test_the_clones_scripts_are_found_and_none_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "table1_accepted_length" in [path.stem for path in find_scripts()]
    assert run(tmp_path, "--all", scripts=tmp_path) == 2
    assert capsys.readouterr().err == f"error: no scripts of paper figures in {tmp_path}; give another folder\n"


def test_every_script_has_a_row_in_the_readme() -> None:
    text = (ROOT / "experiments" / "paper" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| `(\w+)\.py` \|[^|]+\|[^|]+\|[^|]+\|$", text, re.MULTILINE)
    assert len(rows) == len(set(rows)) and {path.stem for path in find_scripts()} <= set(rows)


# ---- running --------------------------------------------------------------------------------------------------------


def test_run_resume_and_one_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    scripts, out = tmp_path / "scripts", tmp_path / "out"
    script(scripts, "fig1_good")
    bad = script(scripts, "fig2_bad", 'raise UserError("no such drafter; choose another")')
    script(scripts, "fig3_good")

    assert run(out, scripts=scripts) == 0
    assert capsys.readouterr().out.count("complete at laptop: no") == 3 and not out.exists()

    # One that fails does not stop the others, and is named.
    assert run(out, "--all", "--scale", "smoke", scripts=scripts) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: 1 of 3 scripts failed: fig2_bad (no such drafter; choose another)"
    assert runs(out) == ["fig1_good smoke", "fig2_bad smoke", "fig3_good smoke"]
    report = (out / "report.md").read_text()
    assert "* `fig2_bad`: no such drafter; choose another" in report and "## Title of fig3_good" in report
    assert "UserError" not in (out / "logs" / "fig2_bad.log").read_text()
    table = (out / "fig1_good.csv").read_bytes(), (out / "fig1_good_comparison.csv").read_bytes()

    # The same call runs only what is missing, and the report forgets the failure.
    bad.write_text(SCRIPT.replace("BODY", "pass"))
    assert run(out, "--all", "--scale", "smoke", scripts=scripts) == 0
    assert runs(out)[3:] == ["fig2_bad smoke"]
    assert "Failed" not in (out / "report.md").read_text()

    # Another scale is made anew, with the same tables here.
    assert run(out, "fig1", "--scale", "laptop", scripts=scripts) == 0
    assert runs(out)[4:] == ["fig1_good laptop"]
    assert ((out / "fig1_good.csv").read_bytes(), (out / "fig1_good_comparison.csv").read_bytes()) == table


def test_ctrl_c_ends_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scripts, out = tmp_path / "scripts", tmp_path / "out"
    script(scripts, "fig1_good")
    script(scripts, "fig2_slow", '(out / "pid.txt").write_text(str(__import__("os").getpid())); time.sleep(60)')
    command = [sys.executable, "-m", "dspark_sim", "figures", "--all", "--scripts", str(scripts), "--out", str(out)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background passes on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (out / "pid.txt").is_file() or not (out / "pid.txt").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    lines = [line for line in re.split(r"[\r\n]+", error) if line and not line.startswith("figures:")]
    assert lines == ["interrupted; what was written so far is kept"]
    assert (
        is_complete(scripts / "fig1_good.py", out, "laptop") and "Title of fig1_good" in (out / "report.md").read_text()
    )
    assert (out / "logs" / "fig2_slow.log").read_text().strip().startswith("fig2_slow: interrupted")
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "pid.txt").read_text()), 0)


# ---- a real one -----------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_real_script_makes_its_recordings_once_and_the_same_tables_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    name = "fig5_threshold_sweep"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, f"experiments/paper/{name}.py", "--scale", "smoke", "--out", str(out)]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    (recording,) = (out / "recordings").iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in recording.iterdir()}
    assert {name.partition("-")[0] for name in made} == {"outputs", "dspark"}
    tables = [(out / f"{name}{ending}.csv").read_bytes() for ending in ("", "_comparison")]

    frame = pd.read_csv(out / f"{name}.csv")
    # A round judges at most the block and the bonus, at threshold 0 the whole of it (but where an output ends).
    total = frame["accepted_tokens_per_step"] + frame["rejected_tokens_per_step"]
    assert (frame["accepted_tokens_per_step"] >= 1).all() and (total <= 8).all()
    assert (total[frame["confidence_threshold"] == 0] > 7.5).all()
    rate = frame["accepted_tokens_per_step"] / total
    assert frame["acceptance_rate"].to_numpy() == pytest.approx(rate.to_numpy())

    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in recording.iterdir()} == made
    assert [(out / f"{name}{ending}.csv").read_bytes() for ending in ("", "_comparison")] == tables
