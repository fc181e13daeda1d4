"""Recorded traces of requests: when they came, and how long their prompts and outputs were.

Formats: the Azure LLM inference traces and BurstGPT (CSV), Mooncake (JSON Lines), ShareGPT conversations (JSON), and
the detailed results of vLLM's ``bench serve`` (JSON). All are read into one type. The format is told from the
content, and an explicit ``format`` that does not match it is refused. Times are float seconds from the first
request, lengths are tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.request_traces.csv_files import read_csv
from dspark_sim.request_traces.formats import FORMATS, Chunks, Notes, TraceFormat, detect_format
from dspark_sim.request_traces.json_files import read_mooncake, read_sharegpt, read_vllm

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """Requests of a recorded trace, in order of arrival.

    Parameters
    ----------
    name
        File name, for messages.
    format
        Where it came from.
    arrival
        Seconds [n] from the first request, not falling; ``None`` if the file has no times (ShareGPT, and results of
        older versions of vLLM).
    prompt_len, output_len
        Tokens [n], each at least 1.
    num_dropped
        Rows left out because they have no prompt or no output tokens: failed requests, as a rule.
    num_clipped_prompts, num_clipped_outputs
        Lengths that were above the limit and are now at it.
    notes
        What else a reader should know: columns not used, estimated lengths, rows out of order.
    """

    name: str
    format: TraceFormat
    arrival: FloatArray | None
    prompt_len: IntArray
    output_len: IntArray
    num_dropped: int = 0
    num_clipped_prompts: int = 0
    num_clipped_outputs: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.prompt_len.size

    @property
    def duration_seconds(self) -> float:
        """From the first arrival to the last; nan without times."""
        return math.nan if self.arrival is None else float(self.arrival[-1])

    def digest(self) -> str:
        """Sixteen hexadecimal digits of a hash of the rows: the same rows, the same digest."""
        parts = [self.prompt_len, self.output_len] + ([] if self.arrival is None else [self.arrival])
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    def summary(self) -> str:
        """One line to print: the format, size, rate, mean lengths and everything that was changed."""
        parts = [f"{self.name}: {self.format}, {len(self):,} requests"]
        if self.arrival is not None:
            parts[0] += f" over {self.duration_seconds:,.1f} s"
            if self.duration_seconds > 0:
                parts[0] += f" ({(len(self) - 1) / self.duration_seconds:.4g} per second)"
        parts.append(f"mean prompt {self.prompt_len.mean():.1f} and output {self.output_len.mean():.1f} tokens")
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} rows without prompt or output tokens left out")
        if self.num_clipped_prompts or self.num_clipped_outputs:
            parts.append(f"{self.num_clipped_prompts:,} prompts and {self.num_clipped_outputs:,} outputs clipped")
        return "; ".join([*parts, *self.notes])


def read_request_trace(
    path: Path | str,
    format: TraceFormat | None = None,
    *,
    limit: int | None = None,
    speedup: float = 1.0,
    max_prompt_len: int | None = None,
    max_output_len: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    chars_per_token: float = 4.0,
) -> RequestTrace:
    """Read a trace of requests.

    Parameters
    ----------
    path
        The file. UTF-8, not compressed.
    format
        ``None`` tells it from the content; another one than the content shows is refused.
    limit
        Take the first so many usable rows of the file, and stop reading soon after.
    speedup
        Divide all times by this: 2 doubles the rate.
    max_prompt_len, max_output_len
        Longer lengths are set to these, and counted.
    count_tokens
        For ShareGPT: number of tokens of a text.
    chars_per_token
        For ShareGPT without `count_tokens`: lengths are characters over this, rounded up; a note says so.

    Raises
    ------
    UserError
        If the file is missing, empty, of an unknown format or malformed (the line and the value are named), or an
        option is out of range.
    """
    path = Path(path)
    _check_options(format, limit, speedup, max_prompt_len, max_output_len, chars_per_token)
    if not path.is_file():
        raise UserError(f"no trace of requests at {path}; give a file of one of the formats {', '.join(FORMATS)}")
    notes: Notes = []
    with explain_os_errors(path, "read"):
        try:
            found = detect_format(path, format)
            chunks: Chunks
            if found in ("azure", "burstgpt"):
                chunks = read_csv(path, found, notes)
            elif found == "mooncake":
                chunks = read_mooncake(path, notes)
            elif found == "vllm":
                chunks = read_vllm(path, notes)
            else:
                chunks = read_sharegpt(path, notes, count_tokens, chars_per_token)
            with closing(chunks):
                arrival, prompt_len, output_len, num_dropped = _take(chunks, limit)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); decompress it or save it as UTF-8") from error
        except RecursionError:
            raise UserError(f"{path} is JSON nested too deep for a trace of requests; give another file") from None
    if not prompt_len.size:
        raise UserError(f"{path} has no usable request ({num_dropped} rows without prompt or output tokens)")
    if arrival is not None:
        num_late = int((np.diff(arrival) < 0).sum())
        if num_late:
            notes.append(f"{num_late:,} rows came before the row above them: sorted by time")
            order = np.argsort(arrival, kind="stable")
            arrival, prompt_len, output_len = arrival[order], prompt_len[order], output_len[order]
        arrival = (arrival - arrival[0]) / speedup
    prompt_len, num_clipped_prompts = _clip(prompt_len, max_prompt_len)
    output_len, num_clipped_outputs = _clip(output_len, max_output_len)
    return RequestTrace(
        path.name,
        found,
        arrival,
        prompt_len,
        output_len,
        num_dropped,
        num_clipped_prompts,
        num_clipped_outputs,
        tuple(notes),
    )


def _clip(lengths: IntArray, most: int | None) -> tuple[IntArray, int]:
    return (lengths, 0) if most is None else (np.minimum(lengths, most), int((lengths > most).sum()))


def _take(chunks: Chunks, limit: int | None) -> tuple[FloatArray | None, IntArray, IntArray, int]:
    """The first `limit` rows with a prompt and an output, and how many others stood between them."""
    arrivals, prompt_lens, output_lens = [], [], []
    num_dropped = num_taken = 0
    for arrival, prompt_len, output_len in chunks:
        usable = np.flatnonzero((prompt_len >= 1) & (output_len >= 1))
        end = prompt_len.size
        if limit is not None and num_taken + usable.size >= limit:
            usable = usable[: limit - num_taken]
            end = int(usable[-1]) + 1
        num_dropped += end - usable.size
        num_taken += usable.size
        prompt_lens.append(prompt_len[usable])
        output_lens.append(output_len[usable])
        if arrival is not None:
            arrivals.append(arrival[usable])
        if num_taken == limit:
            break
    empty = np.zeros(0, dtype=np.int64)
    return (
        np.concatenate(arrivals) if arrivals else None,
        np.concatenate([empty, *prompt_lens]),
        np.concatenate([empty, *output_lens]),
        num_dropped,
    )


def _check_options(
    format: str | None,
    limit: int | None,
    speedup: float,
    max_prompt_len: int | None,
    max_output_len: int | None,
    chars_per_token: float,
) -> None:
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format {format}; choose from {', '.join(FORMATS)}")
    for name, most in (("limit", limit), ("max_prompt_len", max_prompt_len), ("max_output_len", max_output_len)):
        if most is not None and most < 1:
            raise UserError(f"{name} is {most}; give at least 1")
    for name, value in (("speedup", speedup), ("chars_per_token", chars_per_token)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value}; give a positive number")
