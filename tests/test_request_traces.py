import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sim.errors import UserError
from dspark_sim.request_traces import RequestTrace, read_request_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 00:00:00+00:00,100,10
2024-05-12 00:00:00.009930+00:00,200,20
2024-05-12 00:00:20+00:00,300,30
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,Conversation log
120.5,GPT-4,300,0,300,API log
130,GPT-4,30,7,37,API log
"""
BURST_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log
19440161.0,d5983bf9,2,ChatGPT,36,29,65,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 27482, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47, 2353]}
{"timestamp": 30535.5, "input_length": 7322, "output_length": 1, "hash_ids": []}
"""
SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 9}]},
    {
        "id": "b",
        "conversations": [
            {"from": "system", "value": "be kind"},
            {"from": "human", "value": "abc"},
            {"from": "gpt", "value": "y" * 400},
            {"from": "human", "value": "more"},
        ],
    },
    {"id": "c", "conversations": [{"from": "gpt", "value": "alone"}]},
]
VLLM = {
    "date": "20260102-030405",
    "max_concurrency": None,
    "completed": 3,
    "request_throughput": 1.5,
    "input_lens": [100, 200, 300, 50],
    "output_lens": [3, 2, 0, 8],
    "ttfts": [0.1, 0.2, 0.0, 0.3],
    "itls": [[0.05, 0.07], [0.1], [], [0.1] * 7],
    "start_times": [10.25, 11.5, 12.0, 11.0],
    "generated_texts": ["a", "b", "", "c"],
    "errors": ["", "", "timeout", ""],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "trace.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write


Write = Callable[[str], Path]


def rows(trace: RequestTrace) -> list[tuple[float | None, int, int]]:
    times = [None] * len(trace) if trace.arrival is None else np.round(trace.arrival, 9).tolist()
    return list(zip(times, trace.prompt_len.tolist(), trace.output_len.tolist(), strict=True))


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_azure(write: Write) -> None:
    trace = read_request_trace(write(AZURE))
    assert trace.format == "azure" and trace.name == "trace.txt"
    # Seven digits of a second are kept.
    assert rows(trace) == [(0.0, 374, 44), (4.314579, 396, 109), (4.541877, 879, 55)]
    assert rows(read_request_trace(write(AZURE_2024))) == [(0.0, 100, 10), (0.00993, 200, 20), (20.0, 300, 30)]


def test_burstgpt(write: Write) -> None:
    trace = read_request_trace(write(BURST))
    assert trace.format == "burstgpt" and trace.num_dropped == 1
    assert rows(trace) == [(0.0, 472, 18), (40.0, 1087, 230), (113.0, 417, 276), (125.0, 30, 7)]
    assert "1 rows without prompt or output tokens left out" in trace.summary()
    assert rows(read_request_trace(write(BURST_2))) == [(0.0, 906, 446), (51.0, 36, 29)]
    assert read_request_trace(write(BURST_2)).notes == ()


def test_mooncake(write: Write) -> None:
    trace = read_request_trace(write(MOONCAKE))
    assert trace.format == "mooncake" and trace.notes == ()
    assert rows(trace) == [(0.0, 6955, 52), (27.482, 6472, 26), (30.5355, 7322, 1)]


@pytest.mark.parametrize("indent", [None, 1])
def test_sharegpt(write: Write, indent: int | None) -> None:
    trace = read_request_trace(write(json.dumps(SHAREGPT, indent=indent)))
    assert trace.format == "sharegpt" and trace.arrival is None and trace.num_dropped == 1
    assert rows(trace) == [(None, 10, 3), (None, 1, 100)]
    assert trace.notes == ("lengths estimated at 4 characters per token",)
    counted = read_request_trace(write(json.dumps(SHAREGPT)), count_tokens=len)
    assert rows(counted) == [(None, 40, 9), (None, 3, 400)] and counted.notes == ()
    lines = read_request_trace(write("\n".join(json.dumps(entry) for entry in SHAREGPT)))
    assert rows(lines) == rows(trace)


@pytest.mark.parametrize("indent", [None, 2])
def test_vllm(write: Write, indent: int | None) -> None:
    trace = read_request_trace(write(json.dumps(VLLM, indent=indent)))
    assert trace.format == "vllm" and trace.num_dropped == 1
    assert rows(trace) == [(0.0, 100, 3), (0.75, 50, 8), (1.25, 200, 2)]
    assert trace.notes == ("1 rows came before the row above them: sorted by time",)
    old = read_request_trace(write(json.dumps({key: VLLM[key] for key in ("input_lens", "output_lens")})))
    assert rows(old) == [(None, 100, 3), (None, 200, 2), (None, 50, 8)] and old.notes == (
        "no start_times: lengths only",
    )
    limited = read_request_trace(write(json.dumps({**VLLM, "max_concurrency": 8})))
    assert "times are of sending, at most 8 requests at once" in limited.notes


def test_options(write: Write) -> None:
    path = write(BURST)
    fast = read_request_trace(path, speedup=4.0, limit=3, max_prompt_len=450, max_output_len=230)
    assert rows(fast) == [(0.0, 450, 18), (10.0, 450, 230), (28.25, 417, 230)]
    assert (fast.num_clipped_prompts, fast.num_clipped_outputs, fast.num_dropped) == (2, 1, 0)
    assert "2 prompts and 1 outputs clipped" in fast.summary()
    # A limit counts usable rows: the failed one between the third and the fourth is counted, not taken.
    assert read_request_trace(path, limit=4).num_dropped == 1
    assert len(read_request_trace(path, limit=99)) == 4


def test_the_summary_says_what_was_found(write: Write) -> None:
    summary = read_request_trace(write(BURST)).summary()
    assert summary.startswith("trace.txt: burstgpt, 4 requests over 125.0 s (0.024 per second); mean prompt 501.5 and")


def test_unknown_columns_are_named(write: Write) -> None:
    trace = read_request_trace(
        write("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.5,2,9,1\n")
    )
    assert rows(trace) == [(0.0, 9, 1)] and trace.notes == ("columns not used: NumImages",)
    line = '{"timestamp": 5, "input_length": 6, "output_length": 5, "session_id": "s", "delay": 3}\n'
    assert read_request_trace(write(line * 2), limit=1).notes == ("keys not used: delay, session_id",)


def test_marks_spaces_and_blank_lines_do_no_harm(write: Write) -> None:
    path = write("\ufeff" + BURST.replace("\n", "\r\n").replace("118", "\r\n118") + "\r\n")
    assert rows(read_request_trace(path)) == rows(read_request_trace(write(BURST)))
    assert rows(read_request_trace(write("\n\n" + AZURE))) == rows(read_request_trace(write(AZURE)))
    quoted = AZURE.replace("2023-11-16 18:15:46.6805900", '"2023-11-16 18:15:46.6805900"')
    assert rows(read_request_trace(write(quoted))) == rows(read_request_trace(write(AZURE)))
    assert rows(read_request_trace(write("\n" + MOONCAKE.replace("\n", "\n\n")))) == rows(
        read_request_trace(write(MOONCAKE))
    )


def test_the_digest_is_of_the_rows(write: Write) -> None:
    digest = read_request_trace(write(BURST)).digest()
    assert digest == read_request_trace(write(BURST.replace("GPT-4", "o1"))).digest()
    assert digest != read_request_trace(write(BURST.replace("276", "277"))).digest()
    assert digest != read_request_trace(write(BURST), speedup=2.0).digest()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**5)), min_size=1, max_size=30
    ).filter(lambda found: any(p and o for _, p, o in found))
)
def test_any_trace_comes_back_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[int, int, int]]
) -> None:
    """Milliseconds, prompt and output tokens, written in four formats: sorted, from 0, without empty ones."""
    kept = sorted(((ms, p, o) for ms, p, o in table if p and o), key=lambda row: row[0])
    wanted = [((ms - kept[0][0]) / 1000, p, o) for ms, p, o in kept]
    moments = [np.datetime64("2024-01-01T00:00:00.000") + np.timedelta64(ms, "ms") for ms, _, _ in table]
    texts = {
        "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"{str(t).replace('T', ' ')},{p},{o}\n" for t, (_, p, o) in zip(moments, table, strict=True)),
        "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        + "".join(f"{ms / 1000},m,{p},{o},{p + o},API log\n" for ms, p, o in table),
        "mooncake": "".join(
            json.dumps({"timestamp": ms, "input_length": p, "output_length": o}) + "\n" for ms, p, o in table
        ),
        "vllm": json.dumps(
            {
                "input_lens": [p for _, p, _ in table],
                "output_lens": [o for _, _, o in table],
                "start_times": [ms / 1000 for ms, _, _ in table],
            }
        ),
    }
    path = tmp_path_factory.mktemp("formats") / "trace"
    for name, text in texts.items():
        path.write_text(text)
        trace = read_request_trace(path)
        assert trace.format == name and trace.num_dropped == len(table) - len(kept)
        assert trace.arrival is not None and (np.diff(trace.arrival) >= 0).all()
        np.testing.assert_allclose(trace.arrival, [row[0] for row in wanted], atol=1e-9, rtol=1e-12)
        assert [row[1:] for row in rows(trace)] == [row[1:] for row in wanted]


def test_a_large_file_is_quick(write: Write) -> None:
    """The published files have millions of rows."""
    head, *lines = BURST.splitlines(keepends=True)
    path = write(head + "".join(lines) * 60_000)
    start = time.perf_counter()
    trace = read_request_trace(path)
    assert time.perf_counter() - start < 6.0
    assert len(trace) == 240_000 and trace.num_dropped == 60_000


# ---- bad input ------------------------------------------------------------------------------------------------------


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "trace.txt is empty"),
        (" \n\n", "trace.txt is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no usable request (0 rows"),
        (changed(AZURE, ",109", ",x"), "trace.txt line 3: GeneratedTokens is 'x'; give a whole number, 0 or more"),
        (changed(AZURE, ",109", ",-1"), "trace.txt line 3: GeneratedTokens is '-1'"),
        (changed(AZURE, ",109", ",1.5"), "trace.txt line 3: GeneratedTokens is '1.5'"),
        (changed(AZURE, ",109", ",inf"), "trace.txt line 3: GeneratedTokens is 'inf'"),
        (changed(AZURE, ",109", ",nan"), "trace.txt line 3: GeneratedTokens is 'nan'"),
        (changed(AZURE, ",396", ","), "trace.txt line 3: ContextTokens is ''"),
        (
            changed(AZURE, "2023-11-16 18:15:50.9951690", "\n\nlater"),
            "trace.txt line 5: TIMESTAMP is 'later'; give a time",
        ),
        (changed(AZURE, "2023-11-16 18:15:50.9951690", "2023"), "trace.txt line 3: TIMESTAMP is '2023'"),
        (changed(AZURE, ",109", ""), "trace.txt line 3 has 2 fields and the header 3"),
        (changed(AZURE, ",109", ",109,7"), "trace.txt line 3 has 4 fields and the header 3"),
        (changed(AZURE, "44\n", "44,1\n").replace("109\n", "109,1\n").replace("55\n", "55,1\n"), "line 2 has 4 fields"),
        (changed(AZURE, "879,55\n", "8"), "trace.txt line 4 has 2 fields"),
        (changed(BURST, "417,276,693,Conversation log", "417,2"), "trace.txt line 4 has 4 fields and the header 6"),
        (changed(BURST, "118", "soon"), "trace.txt line 4: Timestamp is 'soon'; give a time such as 118.0"),
        (changed(BURST, "118", "inf"), "trace.txt line 4: Timestamp is 'inf'"),
        (changed(BURST, "Request tokens", "Prompt tokens"), "columns of format burstgpt but not Request tokens"),
        (changed(AZURE, "GeneratedTokens", "OutputTokens"), "columns of format azure but not GeneratedTokens"),
        ("time,in,out\n1,2,3\n", "has the unknown columns 'time, in, out'; known formats are azure (TIMESTAMP"),
        ('{"when": 3, "what": 4}', "has the keys when, what; known formats are azure"),
        ("[1, 2]", "has the keys of no object"),
        (changed(MOONCAKE, "27482", '"x"'), "trace.txt line 2: timestamp is 'x'; give a number of milliseconds"),
        (changed(MOONCAKE, "27482", "NaN"), "trace.txt line 2: timestamp is nan"),
        (changed(MOONCAKE, "27482", "9" * 400), "trace.txt line 2: timestamp is 999"),
        (changed(MOONCAKE, "6472", "9" * 400), "trace.txt line 2: input_length is 999"),
        (changed(MOONCAKE, "6472", "1e400"), "trace.txt line 2: input_length is inf"),
        ('{"timestamp": 1, "input_length": 1, "output_length": ' + "[" * 99_999, "nested too deep"),
        (json.dumps(VLLM).replace("300", "9" * 5000), "cannot be read as JSON"),
        (json.dumps(SHAREGPT, indent=0).replace('"c"', "9" * 5000), "is not JSON (Exceeds the limit"),
        (changed(AZURE, ",396", "," + "x" * 9999), "trace.txt line 3: ContextTokens is 'xxx"),
        (changed(MOONCAKE, "6472", "-4"), "trace.txt line 2: input_length is -4; give a whole number"),
        (changed(MOONCAKE, "6472", "true"), "trace.txt line 2: input_length is True"),
        (changed(MOONCAKE, '"output_length": 26, ', ""), "trace.txt line 2 has no output_length"),
        (MOONCAKE + "[3]\n", "trace.txt line 4 is no object"),
        (MOONCAKE[:-30], "trace.txt line 3 is not JSON"),
        (json.dumps(SHAREGPT, indent=1)[:-40], "is not JSON"),
        (json.dumps(SHAREGPT)[:-1], "line 1 ends inside the list"),
        (json.dumps([*SHAREGPT, {"id": 3}], indent=0), "begins an entry without a list `conversations`"),
        (json.dumps([{"conversations": [{"from": "human"}]}]), "line 1 begins a conversation with a turn that has no"),
        (json.dumps(SHAREGPT[2:]), "has no usable request (1 rows"),
        (json.dumps(VLLM)[:-3], "trace.txt line 1 is not JSON"),
        (json.dumps(VLLM) + "\n" + json.dumps(VLLM), "Extra data); keep one result a file"),
        (json.dumps({"request_throughput": 3.0}), "has no list input_lens, output_lens; run vLLM's bench serve with"),
        (json.dumps({**VLLM, "output_lens": [1]}), "has 4 input_lens and 1 output_lens"),
        (json.dumps({**VLLM, "start_times": [1, 2, None, 3]}), "start_times[2] is None; give a number of seconds"),
        (json.dumps({**VLLM, "input_lens": [1, 2, 2.5, 3]}), "input_lens[2] is 2.5; give a whole number"),
    ],
)
def test_a_malformed_file_is_one_sentence(write: Write, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_request_trace(write(text))
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_line_far_down_is_named(write: Write) -> None:
    head, *lines = BURST.splitlines(keepends=True)
    path = write(head + "".join(lines) * 50_000 + "7,x,3,4,five\n")
    with pytest.raises(UserError, match="line 250002 has 5 fields"):
        read_request_trace(path)


@pytest.mark.parametrize("text", [AZURE, BURST, MOONCAKE, json.dumps(SHAREGPT), json.dumps(VLLM)])
@pytest.mark.parametrize("format", ["azure", "burstgpt", "mooncake", "sharegpt", "vllm"])
def test_a_format_that_does_not_match_is_refused(write: Write, text: str, format: str) -> None:
    path = write(text)
    found = read_request_trace(path).format
    if found == format:
        assert read_request_trace(path, format).format == found  # type: ignore[arg-type]
    else:
        with pytest.raises(UserError, match=f"is in format {found} and format {format} was asked for"):
            read_request_trace(path, format)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("azure", "a,b\n1,2\n", "has no column TIMESTAMP, ContextTokens, GeneratedTokens: its header line is 'a,b'"),
        ("mooncake", '{"a": 1}\n', "line 1 has no timestamp, input_length, output_length"),
        ("vllm", '{"a": 1}\n', "has no list input_lens, output_lens"),
        ("vllm", "[]", "it is not an object"),
        ("sharegpt", '{"a": 1}\n', "line 1 begins an entry without a list"),
    ],
)
def test_an_explicit_format_names_what_is_missing(write: Write, format: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_request_trace(write(text), format)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_bad_paths_and_options(tmp_path: Path, write: Write) -> None:
    with pytest.raises(UserError, match="no trace of requests at"):
        read_request_trace(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no trace of requests at"):
        read_request_trace(tmp_path)
    path = write(AZURE)
    for options, said in (
        ({"format": "csv"}, "unknown format csv; choose from azure, burstgpt"),
        ({"limit": 0}, "limit is 0"),
        ({"speedup": 0.0}, "speedup is 0.0"),
        ({"speedup": float("nan")}, "speedup is nan"),
        ({"max_prompt_len": 0}, "max_prompt_len is 0"),
        ({"max_output_len": -3}, "max_output_len is -3"),
        ({"chars_per_token": -1.0}, "chars_per_token is -1.0"),
    ):
        with pytest.raises(UserError, match=said):
            read_request_trace(path, **options)  # type: ignore[arg-type]
    path.write_bytes(AZURE.encode() + b"\xff\xfe,3,4\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_request_trace(path)
    path.write_bytes(b"\x1f\x8b\x08\x00\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text .* decompress it"):
        read_request_trace(path)
