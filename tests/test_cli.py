import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd
import pytest
from toy import toy_cost, toy_trace

from dspark_sim import cli
from dspark_sim.analysis.metrics import summary
from dspark_sim.commands import live, replay
from dspark_sim.errors import UserError
from dspark_sim.options import ModelOptions, PolicyChoice, PolicyOptions, parse_table
from dspark_sim.policy_history import BatchSizeTable
from dspark_sim.policy_zoo import DEFAULT_TABLE, PolicyName, make_policy
from dspark_sim.trace import Trace

ROOT = Path(__file__).parent.parent
COMMANDS = (
    *("demo", "record", "profile", "simulate", "compare", "metrics", "explain", "export-trace", "verify", "evaluate"),
    *("synthesise", "merge-synthesis", "train", "learning-curves", "model-card", "fit-margin", "calibrate", "export"),
    *("cost", "fidelity", "bench"),
)
POLICIES = get_args(PolicyName)


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
        # A suite started in the background passes on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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
    # These make one file and print no table.
    silent = ("merge-synthesis", "learning-curves", "model-card", "export", "export-trace", "cost")
    assert ("--json" in text) == (command not in silent)
    assert "PATH (default" not in text and "INT (default" not in text and "STR (default" not in text


def test_every_choice_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("record", "--help") == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    choices = [*POLICIES, "head", "top1", "margin", "greedy", "rejection", "coupled", "target_match", "block"]
    for name in choices:
        assert any(line.startswith(f"{name}: ") for line in lines), name
    assert run("verify", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "changes the speed and never the output" in text and "exit status 1 if any fails" in text


def test_choices_are_the_engines_own() -> None:
    pytest.importorskip("torch")
    from dspark_sim.engine.drafters.choose import ConfidenceKind
    from dspark_sim.engine.verify import Mode

    assert get_args(get_type_hints(live.Record)["mode"]) == get_args(Mode)
    assert get_args(get_type_hints(ModelOptions, localns={"Confidence": Any, "Engine": Any})["confidence"]) == get_args(
        ConfidenceKind
    )


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


def test_every_law_of_load_can_be_asked_for(
    inputs: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from dspark_sim.gaps import ExponentialGaps, GammaGaps
    from dspark_sim.request_traces import read_request_trace
    from dspark_sim.workload import ClosedLoop, Deterministic, Gamma, ImportedArrivals, Stepped, Weibull, Workload

    recording, cost = inputs
    requests = tmp_path / "burst.csv"
    rows = "".join(f"{2 * i},GPT-4,{i + 5},{i + 3},{2 * i + 8},API log\n" for i in range(9))
    requests.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + rows)
    trace = read_request_trace(requests, speedup=4)
    asked: list[tuple[str, Workload]] = [
        ("--think-seconds 2 --think exponential --seed 3", ClosedLoop(4, 2.0, ExponentialGaps(), 3)),
        ("--rate 9 --arrivals gamma --cv 3 --seed 3", Gamma(9.0, 3.0, 3)),
        ("--rate 9 --arrivals weibull --cv 3", Weibull(9.0, cv=3.0)),
        ("--rate 9 --arrivals deterministic", Deterministic(9.0)),
        ("--rate 9 --steps 1:90,2:9", Stepped([(0, 9), (1, 90), (2, 9)])),
        ("--rate 9 --steps 1:90 --arrivals gamma --cv 2", Stepped([(0, 9), (1, 90)], GammaGaps(2.0))),
        (f"--request-trace {requests} --speedup 4", ImportedArrivals(trace)),
    ]
    for flags, workload in asked:
        out = tmp_path / "out"
        assert run("simulate", recording, "--cost", cost, *flags.split(), "--out", str(out)) == 0
        simulated = Trace.read(out)
        assert simulated.config["workload"] == workload.describe()
        if not isinstance(workload, ClosedLoop):
            assert simulated.requests["arrival"].to_numpy() == pytest.approx(workload.arrivals(6))
    assert "burst.csv: burstgpt, 9 requests over 4.0 s (2 per second)" in capfd.readouterr().out


def test_block_size_is_the_replayed_one(inputs: tuple[str, str], tmp_path: Path) -> None:
    recording, cost = inputs
    flags = ("simulate", recording, "--cost", cost, "--policy", "fixed", "--out", str(tmp_path / "twin"))
    for size in (0, 2):
        assert run(*flags, "--block-size", str(size)) == 0
        assert Trace.read(tmp_path / "twin").drafts["verify_len"].max() == size


# ---- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("extra", [(), ("--park",), ("--block-size", "2")])
def test_every_policy_simulates(
    policy: str, extra: tuple[str, ...], inputs: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recording, cost = inputs
    flags = ("simulate", recording, "--cost", cost, "--policy", policy, *extra)
    if policy == "none" and extra == ("--park",):
        assert "policy none never drafts" in refused(capfd, *flags)
        return
    assert run(*flags, "--out", str(tmp_path / "twin")) == 0
    twin = Trace.read(tmp_path / "twin")
    assert twin.requests["output_len"].tolist() == Trace.read(recording).requests["output_len"].tolist()
    assert twin.config["policy"].startswith(policy) and twin.config["policy"].endswith("parked") == ("--park" in extra)
    assert (twin.drafts["verify_len"].max() == 0) == (policy == "none")


def test_policy_flags_reach_the_policy(inputs: tuple[str, str], tmp_path: Path) -> None:
    def parameters(*flags: str) -> dict[str, Any]:
        out = tmp_path / "twin"
        assert run("simulate", inputs[0], "--cost", inputs[1], "--out", str(out), *flags) == 0
        found: dict[str, Any] = Trace.read(out).config["policy_parameters"]
        return found

    assert parameters()["kind"] == "PrefixScheduler"
    assert parameters("--policy", "threshold", "--threshold", "0.75")["threshold"] == 0.75
    assert parameters("--policy", "lagged", "--lag", "3")["lag"] == 3
    assert parameters("--policy", "tetris", "--capacity", "9")["capacity"] == 9
    assert parameters("--policy", "table", "--table", "2:4, 3:0")["table"] == [[2, 4], [3, 0]]
    assert parameters("--policy", "fixed", "--verify-len", "3")["verify_len"] == 3
    parked = parameters("--policy", "threshold", "--threshold", "0.25", "--park")
    assert (parked["kind"], parked["inner"]["threshold"]) == ("Parked", 0.25)


def test_the_table_as_text() -> None:
    assert parse_table("4:7,16:3,64:1") == ((4, 7), (16, 3), (64, 1))
    assert parse_table(PolicyChoice().table) == DEFAULT_TABLE
    assert PolicyChoice("table").make(7, None) == BatchSizeTable(DEFAULT_TABLE)


@pytest.mark.parametrize("policy", ["goodput", "prefix", "lagged", "argmax", "oracle"])
def test_policies_that_need_a_cost_table_say_so(policy: Any) -> None:
    with pytest.raises(UserError) as caught:
        PolicyOptions(policy).load(7)
    assert str(caught.value) == f"policy {policy} needs a cost table; give --cost, made by `dspark-sim profile`"


def test_options_make_what_the_zoo_makes(inputs: tuple[str, str]) -> None:
    cost = toy_cost()
    for policy in POLICIES:
        made = PolicyOptions(policy, cost=Path(inputs[1])).load(5)
        assert made == make_policy(policy, block_size=5, cost=cost)
    assert replay.Simulate(Path("a"), Path("b")).policy == PolicyChoice("prefix")


@pytest.mark.parametrize("policy", ["argmax", "tetris"])
def test_a_biased_simulation_is_refused_or_labelled(
    policy: str, inputs: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy_trace(4, mode="rejection").write(tmp_path / "sampled")
    flags = ("simulate", str(tmp_path / "sampled"), "--cost", inputs[1], "--policy", policy)
    assert "looks at sampled tokens" in refused(capfd, *flags)
    assert run(*flags, "--allow-biased", "--out", str(tmp_path / "twin")) == 0
    assert Trace.read(tmp_path / "twin").config["biased"] is True


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("dream",), "unknown command 'dream'; choose from demo"),
        (("simulate", "{trace}"), "--cost"),
        (("simulate", "{trace}", "--cost", "{cost}", "--users", "3"), "--users"),
        (("simulate", "{trace}", "--cost", "{cost}", "--concurrency", "many"), "many"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "magic"), "magic"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "threshold", "--threshold", "2"), "threshold is 2.0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "lagged", "--lag", "0"), "lag is 0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "tetris", "--capacity", "0"), "capacity is 0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "table", "--table", "4-7"), "has the part '4-7'"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "table", "--table", "4:7,"), "has the part ''"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "table", "--table", "4:x"), "has the part '4:x'"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "table", "--table", "4:7,4:3"), "numbers that rise"),
        (("simulate", "{trace}", "--cost", "{cost}", "--policy", "table", "--table", "4:-1"), "negative verify_len"),
        (("simulate", "{trace}", "--cost", "{cost}", "--out", "{cost}"), "is a file; give a folder"),
        (("record", "--policy", "magic"), "magic"),
        (("record", "--mode", "random"), "random"),
        (("record", "--confidence", "sure"), "sure"),
        (("record", "--confidence", "margin"), "give --margin, made by `dspark-sim fit-margin`"),
        (("record", "--margin", "{cost}"), "add --confidence margin"),
        (("record", "--confidence", "top1", "--margin", "{cost}"), "confidence is top1; add --confidence margin"),
        (("record", "--confidence", "margin", "--margin", "{none}"), "no margin file at"),
        (("record", "--confidence", "margin", "--margin", "{cost}"), "is not a margin file"),
        (("profile", "--confidence", "margin"), "give --margin"),
        (("fit-margin", "--concurrency", "0"), "num_users is 0"),
        (("verify", "--slow"), "--slow"),
        (("simulate", "{trace}", "--cost", "{cost}", "--concurrency", "0"), "num_users is 0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "-1"), "rate is -1.0"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "1", "--cv", "2"), "cv is 2.0 and arrivals are poisson"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "1", "--arrivals", "gamma"), "cv is None"),
        (("simulate", "{trace}", "--cost", "{cost}", "--arrivals", "gamma", "--cv", "2"), "give --rate"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "1", "--steps", "5-2"), "have the part '5-2'"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "1", "--steps", "5:-2"), "is -2.0 requests per second"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "1", "--think-seconds", "2"), "users of a closed loop"),
        (("simulate", "{trace}", "--cost", "{cost}", "--rate", "1", "--request-trace", "{none}"), "give one of them"),
        (("simulate", "{trace}", "--cost", "{cost}", "--request-trace", "{none}"), "no trace of requests at"),
        (("simulate", "{trace}", "--cost", "{cost}", "--request-trace", "{cost}"), "known formats are azure"),
        (("simulate", "{trace}", "--cost", "{cost}", "--speedup", "2"), "give --request-trace"),
        (("simulate", "{trace}", "--cost", "{cost}", "--timeout-seconds", "0"), "timeout_seconds is 0.0"),
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


@pytest.mark.model
def test_a_mode_that_does_not_go_with_the_temperature_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("record", "--mode", "rejection", "--per-domain", "1", "--out", str(tmp_path / "trace"))
    assert run(*flags, "--drafter", "none") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "mode rejection does not go with temperature 0.0; use greedy with 0" in lines[0]
    assert not (tmp_path / "trace").exists()


@pytest.mark.model
def test_fit_margin_writes_a_file_that_record_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    margin, rows = tmp_path / "margin.json", tmp_path / "rows.json"
    small = ("--drafter", "dflash", "--per-domain", "1", "--max-tokens", "12")
    assert run("fit-margin", *small, "--out", str(margin), "--json", str(rows)) == 0
    printed = capfd.readouterr().out
    values = {row["metric"]: row["value"] for row in json.loads(rows.read_text())["rows"]}
    assert list(values) == [
        *("intercept", "slope", "num_observations", "acceptance", "brier", "brier_constant", "auc"),
    ]
    assert [line.split()[0] for line in printed.splitlines()[2:9]] == list(values)
    document = json.loads(margin.read_text())
    assert document["slope"] == values["slope"] > 0 and document["drafter"] == "dflash"
    trace = tmp_path / "trace"
    flags = ("record", *small, "--policy", "threshold", "--confidence", "margin", "--margin", str(margin))
    assert run(*flags, "--max-tokens", "4", "--out", str(trace)) == 0
    assert Trace.read(trace).config["has_confidence"] is True
    capfd.readouterr()
    assert run(*flags, "--drafter", "dspark", "--out", str(trace)) == 2
    assert "was fitted to drafter dflash and this one is dspark" in capfd.readouterr().err
    assert run("fit-margin", "--drafter", "ngram") == 2
    assert "error: drafter ngram has no logits" in capfd.readouterr().err


# ---- verify ---------------------------------------------------------------------------------------------------------


def checks(*statuses: str) -> pd.DataFrame:
    rows = [
        {
            **{"group": "laws", "case": f"case {number}", "num_cases": 10 + number, "found": "TV 0", "wanted": "0"},
            **{"status": status, "seconds": 0.25},
        }
        for number, status in enumerate(statuses)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("statuses", "code", "last"),
    [
        (("pass", "pass", "info"), 0, "2 checks, 21 comparisons: all passed"),
        (("pass", "FAIL", "FAIL"), 1, "3 checks, 33 comparisons: failed: laws: case 1; laws: case 2"),
    ],
)
def test_verify_prints_every_check_and_fails_when_one_does(
    statuses: tuple[str, ...],
    code: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    from dspark_sim.exactness import battery

    asked = []
    monkeypatch.setattr(battery, "run", lambda quick: asked.append(quick) or checks(*statuses))
    rows = tmp_path / "rows.json"
    assert run("verify", "--quick", "--json", str(rows)) == code
    assert asked == [True]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["group", "case", "cases", "found", "wanted", "status"]
    assert lines[2].split() == ["laws", "case", "0", "10", "TV", "0", "0", "pass"]
    assert lines[-1] == last
    written = json.loads(rows.read_text())["rows"]
    assert list(written[0]) == ["group", "case", "num_cases", "found", "wanted", "status", "seconds"]
    assert [row["status"] for row in written] == list(statuses)
