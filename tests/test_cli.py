import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import toy_cost, toy_trace

from dspark_sim import cli
from dspark_sim.analysis.metrics import summary
from dspark_sim.errors import UserError
from dspark_sim.trace import Trace

ROOT = Path(__file__).parent.parent
COMMANDS = ("demo", "record", "profile", "simulate", "compare", "synthesise", "train", "bench")


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    """A recording and a cost table on disk."""
    toy_trace(6, 24, 5).write(tmp_path / "recording")
    toy_cost().write(tmp_path / "cost.json")
    return str(tmp_path / "recording"), str(tmp_path / "cost.json")


def run(*arguments: str) -> int:
    """The exit status of a command in this process."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert run(*arguments) == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from dspark_sim.cli import main; main(['--help'])\n"
        "assert not {'torch', 'transformers', 'simpy', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    out, err = start("-c", script).communicate(timeout=60)
    assert err == "" and out.startswith("usage: dspark-sim")
    assert all(f"\n  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("synthesise", "train")])
def test_every_flag_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: dspark-sim {command}")
    assert "--json" in text
    assert "PATH (default" not in text and "INT (default" not in text and "STR (default" not in text


@pytest.mark.parametrize("command", ["synthesise", "train"])
def test_training_commands_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert run(command, "--help") == 0
    assert "--out" in capsys.readouterr().out


def test_simulate_and_compare(inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording, cost = inputs
    twin, rows = tmp_path / "twin", tmp_path / "tables" / "twin.json"
    assert run("simulate", recording, "--cost", cost, "--policy", "fixed", "--out", str(twin), "--json", str(rows)) == 0
    assert "output_throughput" in capsys.readouterr().out
    values = {row["metric"]: row["value"] for row in json.loads(rows.read_text())["rows"]}
    expected = summary(Trace.read(twin))
    assert values["output_throughput"] == pytest.approx(expected["output_throughput"])
    assert Trace.read(twin).config["policy"] == "fixed-5"

    table = tmp_path / "compare.json"
    assert run("compare", str(twin), str(twin), "--repeat", str(twin), "--json", str(table)) == 0
    printed = capsys.readouterr().out
    assert "rounds of 6 requests are equal" in printed
    compared = json.loads(table.read_text())["rows"]
    assert list(compared[0]) == ["metric", "live", "simulated", "error", "repeat_error"]
    assert all(row["error"] in (0.0, None) and row["repeat_error"] in (0.0, None) for row in compared)
    # The printed table and the JSON rows are the same metrics in the same order.
    assert [line.split()[0] for line in printed.splitlines()[2:-1]] == [row["metric"] for row in compared]


def test_a_seed_means_the_same_arrivals_as_in_a_live_run(inputs: tuple[str, str], tmp_path: Path) -> None:
    from dspark_sim.workload import Poisson

    recording, cost = inputs
    out = tmp_path / "open"
    assert run("simulate", recording, "--cost", cost, "--rate", "30", "--seed", "3", "--out", str(out)) == 0
    arrivals = Trace.read(out).requests["arrival"].to_numpy()
    assert arrivals == pytest.approx(Poisson(30, seed=3).arrivals(6))


def test_block_size_is_the_replayed_one(inputs: tuple[str, str], tmp_path: Path) -> None:
    recording, cost = inputs
    flags = ("simulate", recording, "--cost", cost, "--policy", "fixed", "--out", str(tmp_path / "twin"))
    for size in (0, 2):
        assert run(*flags, "--block-size", str(size)) == 0
        assert Trace.read(tmp_path / "twin").drafts["verify_len"].max() == size


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("dream",), "unknown command 'dream'; choose from demo"),
        (("simulate", "{trace}"), "--cost"),
        (("simulate", "{trace}", "--cost", "{cost}", "--users", "3"), "--users"),
        (("simulate", "{trace}", "--cost", "{cost}", "--concurrency", "many"), "many"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "oracle"), "oracle"),
        (("simulate", "{trace}", "--cost", "{cost}", "--concurrency", "0"), "num_users is 0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "-1"), "rate is -1.0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--num-requests", "0"), "num_requests is 0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--block-size", "6"), "recorded with 5"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "fixed", "--verify-len", "6"), "drafts 6 tokens"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "fixed", "--verify-len", "-1"), "verify_len is -1"),
        (("simulate", "{none}", "--cost", "{cost}"), "the folder does not exist"),
        (("simulate", "{trace}", "--cost", "{none}"), "no cost table at"),
        (("simulate", "{trace}", "--cost", "{trace}/steps.parquet"), "is not a cost table"),
        (("compare", "{trace}"), "Trace of a simulated run"),
        (("compare", "{trace}", "{none}"), "the folder does not exist"),
    ],
)
def test_bad_input_is_one_line(
    flags: tuple[str, ...], said: str, inputs: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"trace": inputs[0], "cost": inputs[1], "none": str(tmp_path / "nowhere")}
    assert said in refused(capfd, *(flag.format(**places) for flag in flags))


def test_a_truncated_table_is_one_line(inputs: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    recording, cost = inputs
    path = Path(recording) / "anchors.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert "anchors.parquet is truncated or not Parquet" in refused(capfd, "simulate", recording, "--cost", cost)


def test_different_prompts_are_not_compared(
    inputs: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recording, cost = inputs
    for name, count in (("six", "6"), ("five", "5")):
        flags = ("--cost", cost, "--num-requests", count, "--out", str(tmp_path / name))
        assert run("simulate", recording, *flags) == 0
    capfd.readouterr()
    assert "was served" in refused(capfd, "compare", str(tmp_path / "six"), str(tmp_path / "five"))


def test_errors_and_interrupts_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail_with(error: BaseException) -> None:
        def dispatch(arguments: object) -> None:
            raise error

        monkeypatch.setattr(cli, "_dispatch", dispatch)

    fail_with(UserError("the sun is down; wait"))
    assert refused(capfd, "demo") == "error: the sun is down; wait"
    fail_with(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert refused(capfd, "record") == "error: torch is not installed; run pip install 'dspark-sim[engine]'"
    fail_with(ModuleNotFoundError("No module named 'dspark_sim.lost'", name="dspark_sim.lost"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])
    fail_with(KeyboardInterrupt())
    assert run("demo") == 130
    assert capfd.readouterr().err.strip() == "interrupted; what was written so far is kept"


def test_ctrl_c_ends_a_running_command_in_one_line_and_harms_nothing(inputs: tuple[str, str], tmp_path: Path) -> None:
    recording, cost = inputs
    out = tmp_path / "twin"
    flags = ("simulate", recording, "--cost", cost, "--out", str(out))
    assert run(*flags) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = start("-m", "dspark_sim", *flags, "--num-requests", "1000000")
    # Its progress bar appears on standard error once it simulates.
    assert process.stderr is not None
    seen = process.stderr.read(8)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = (seen + errors).splitlines()[-1]
    assert last == "interrupted; what was written so far is kept" and "Traceback" not in errors and output == ""
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".twin")] == []


def test_a_closed_pipe_is_quiet(inputs: tuple[str, str]) -> None:
    recording, cost = inputs
    process = start("-m", "dspark_sim", "simulate", recording, "--cost", cost)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in errors and "BrokenPipe" not in errors, errors


@pytest.mark.model
def test_a_prompt_that_does_not_fit_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt_id": "long", "turns": ["word " * 3000]}) + "\n")
    flags = ("record", "--prompts", str(prompts), "--out", str(tmp_path / "trace"), "--drafter", "ngram")
    assert run(*flags) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "shorten the prompt" in lines[0]
    assert not (tmp_path / "trace").exists()
