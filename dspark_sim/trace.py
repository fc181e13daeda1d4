"""The trace: what one run did, as four Parquet tables in one folder (schema version 2).

``requests`` has a row per request, ``steps`` a row per engine iteration, ``drafts`` a row per request and decode
round, ``anchors`` a row per position of a recorded output (a block drafted there off the clock, so that any
schedule can be replayed). The live engine and the simulator write the same trace; ``clock`` says whether its
seconds were spent (``wall``) or computed (``virtual``). docs/trace-format.md lists every column.

All times are float seconds from the start of the run. A folder is written whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.request import Request

SCHEMA_VERSION = 2
# Version 1 knew chains only: what it lacks is null in a trace of chains.
_READABLE = (1, SCHEMA_VERSION)
Clock = Literal["wall", "virtual"]
SPANS = ("prefill", "draft", "head", "policy", "verify", "accept", "host")

_int, _float, _text = pa.int64(), pa.float64(), pa.string()
_tokens, _floats, _nodes = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.int16())

SCHEMAS: dict[str, pa.Schema] = {
    "requests": pa.schema(
        {
            **{"request_id": _int, "prompt_id": _text, "domain": _text, "arrival": _float, "prompt_len": _int},
            **{"max_tokens": _int, "output_len": _int, "first_token": _float, "finish": _float},
            **{"finish_reason": _text, "num_preemptions": _int, "output_tokens": _tokens},
        }
    ),
    "steps": pa.schema(
        {
            **dict.fromkeys(("step", "num_running", "num_waiting", "num_prefill_tokens", "draft_len"), _int),
            **dict.fromkeys(("batch_tokens", "padded_tokens", "context_tokens", "replica"), _int),
            **dict.fromkeys(("start", "kv_usage", *(f"{span}_seconds" for span in SPANS)), _float),
            **dict.fromkeys(("step_seconds", "predicted_step_seconds", "predicted_throughput"), _float),
        }
    ),
    "drafts": pa.schema(
        {
            **dict.fromkeys(("step", "request_id", "position", "draft_len", "verify_len"), _int),
            **{"num_accepted": _int, "num_emitted": _int, "draft_tokens": _tokens, "confidence": _floats},
            **{"parents": _nodes, "accepted_path": _nodes},
        }
    ),
    "anchors": pa.schema(
        {
            **{"request_id": _int, "position": _int, "draft_tokens": _tokens, "confidence": _floats},
            **{"accept_prob": _floats, "draft_prob": _floats, "num_accepted": _int},
            **{"target_rank": _tokens, "node_rank": _tokens, "node_survival": _floats, "first_at_depth": _tokens},
        }
    ),
}

_LATER = ("replica", "parents", "accepted_path", "node_survival", "first_at_depth")


@dataclass(slots=True)
class StepRow:
    """One engine iteration; `spans` maps names of `SPANS` to seconds."""

    step: int
    start: float
    num_running: int
    num_waiting: int
    num_prefill_tokens: int
    draft_len: int
    batch_tokens: int
    padded_tokens: int
    context_tokens: int
    kv_usage: float
    spans: dict[str, float]
    step_seconds: float
    predicted_step_seconds: float
    predicted_throughput: float
    replica: int = 0


@dataclass(slots=True)
class DraftRows:
    """One decode round: arrays [R], and [R, γ] for the drafts (`draft_tokens` may be missing).

    In a round of trees the drafts are nodes, `confidence` is their survival, `parents` [R, n] may be missing, and
    `accepted_path` [R, D] are the accepted nodes; chains have neither.
    """

    step: int
    request_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    draft_len: npt.NDArray[np.int64]
    verify_len: npt.NDArray[np.int64]
    num_accepted: npt.NDArray[np.int64]
    num_emitted: npt.NDArray[np.int64]
    draft_tokens: npt.NDArray[np.int32] | None
    confidence: npt.NDArray[np.float64]
    parents: npt.NDArray[np.int64] | None = None
    accepted_path: npt.NDArray[np.int64] | None = None


@dataclass(eq=False)
class Trace:
    """A run's record.

    Parameters
    ----------
    tables
        The four tables by name, in the schemas of this module.
    clock
        ``"wall"`` or ``"virtual"``.
    config
        The whole resolved configuration of the run, JSON types only.
    provenance
        Package versions, device, git revision, seeds.
    """

    tables: dict[str, pa.Table]
    clock: Clock
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """Table `requests` as a frame."""
        frame: pd.DataFrame = self.tables["requests"].to_pandas()
        return frame

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Table `steps` as a frame."""
        frame: pd.DataFrame = self.tables["steps"].to_pandas()
        return frame

    @cached_property
    def drafts(self) -> pd.DataFrame:
        """Table `drafts` as a frame."""
        frame: pd.DataFrame = self.tables["drafts"].to_pandas()
        return frame

    @cached_property
    def anchors(self) -> pd.DataFrame:
        """Table `anchors` as a frame; empty unless a dense pass was made."""
        frame: pd.DataFrame = self.tables["anchors"].to_pandas()
        return frame

    def with_anchors(self, anchors: pa.Table, **config: Any) -> Trace:
        """The same trace with a dense pass's anchors and extra configuration entries."""
        tables = {**self.tables, "anchors": anchors.cast(SCHEMAS["anchors"])}
        return Trace(tables, self.clock, {**self.config, **config}, self.provenance)

    def write(self, folder: Path | str) -> Path:
        """Write the trace as a folder of Parquet files.

        The files are written to a temporary folder beside the destination and moved when complete; a trace that
        stood there before is replaced only then.

        Raises
        ------
        UserError
            If the disk is full, the path cannot be written, or the folder holds something that is not a trace.
        """
        folder = Path(folder)
        refuse_foreign(folder)
        metadata = {
            b"dspark_sim.schema_version": str(SCHEMA_VERSION).encode(),
            b"dspark_sim.clock": self.clock.encode(),
            b"dspark_sim.config": json.dumps(self.config).encode(),
            b"dspark_sim.provenance": json.dumps(self.provenance).encode(),
        }
        with explain_os_errors(folder, "write"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                for name in SCHEMAS:
                    table = self.tables[name]
                    pq.write_table(table.replace_schema_metadata(metadata), partial / f"{name}.parquet")
                partial.chmod(0o755)
                if folder.exists():
                    shutil.rmtree(folder)
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return folder

    @staticmethod
    def read(folder: Path | str) -> Trace:
        """Read a trace folder.

        Raises
        ------
        UserError
            If the folder or a table is missing, truncated, of another schema version, or not a trace.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no trace at {folder}: the folder does not exist; record one with `dspark-sim record`")
        tables: dict[str, pa.Table] = {}
        metadata: dict[bytes, bytes] = {}
        for name, schema in SCHEMAS.items():
            path = folder / f"{name}.parquet"
            if not path.is_file():
                raise UserError(f"{folder} is not a complete trace: {path.name} is missing; record it again")
            with explain_os_errors(path, "read"):
                try:
                    table = pq.read_table(path)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                    reason = str(error).splitlines()[0][:120]
                    raise UserError(f"{path} is truncated or not Parquet ({reason}); record it again") from error
            metadata = table.schema.metadata or {}
            _check_version(path, metadata)
            table = _completed(name, table)
            if table.schema.names != schema.names:
                strange = sorted(set(table.schema.names) ^ set(schema.names))
                raise UserError(f"{path} has the wrong columns ({', '.join(strange)}); record it again")
            tables[name] = table.replace_schema_metadata(None)
        try:
            config = json.loads(metadata[b"dspark_sim.config"])
            provenance = json.loads(metadata[b"dspark_sim.provenance"])
            clock: Clock = "virtual" if metadata[b"dspark_sim.clock"] == b"virtual" else "wall"
        except (KeyError, ValueError) as error:
            raise UserError(f"{folder} has damaged metadata ({error}); record it again") from error
        return Trace(tables, clock, config, provenance)


class TraceRecorder:
    """Collects a run's rows in memory; a step costs a few list appends.

    Parameters
    ----------
    clock
        Whether the run's seconds are spent or computed.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock: Clock = clock
        self._steps: list[StepRow] = []
        self._drafts: list[DraftRows] = []
        self._requests: list[Request] = []

    def step(self, row: StepRow) -> None:
        """Note an iteration."""
        self._steps.append(row)

    def drafts(self, rows: DraftRows) -> None:
        """Note a decode round."""
        self._drafts.append(rows)

    def finish(self, request: Request) -> None:
        """Note a finished request."""
        self._requests.append(request)

    def trace(
        self,
        config: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        outputs: dict[int, list[int]] | None = None,
    ) -> Trace:
        """The collected rows as a trace without anchors; `outputs` maps request ids to output tokens."""
        tables = {
            "requests": self._request_table(outputs or {}),
            "steps": self._step_table(),
            "drafts": self._draft_table(),
            "anchors": SCHEMAS["anchors"].empty_table(),
        }
        return Trace(tables, self.clock, config or {}, provenance or {})

    def _request_table(self, outputs: dict[int, list[int]]) -> pa.Table:
        rows = [
            {
                **{name: getattr(request, name, None) for name in SCHEMAS["requests"].names},
                "output_len": request.num_generated,
                "output_tokens": outputs.get(request.request_id),
            }
            for request in sorted(self._requests, key=lambda request: request.request_id)
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMAS["requests"])

    def _step_table(self) -> pa.Table:
        schema = SCHEMAS["steps"]
        columns = [
            [row.spans.get(name.removesuffix("_seconds"), 0.0) for row in self._steps]
            if name.removesuffix("_seconds") in SPANS
            else [getattr(row, name) for row in self._steps]
            for name in schema.names
        ]
        return pa.table(columns, schema=schema)

    def _draft_table(self) -> pa.Table:
        schema = SCHEMAS["drafts"]
        rounds = self._drafts
        if not rounds:
            return schema.empty_table()
        lens = np.concatenate([rows.draft_len for rows in rounds])
        columns: dict[str, Any] = {
            "step": np.repeat([rows.step for rows in rounds], [rows.request_id.size for rows in rounds])
        }
        for name in ("request_id", "position", "draft_len", "verify_len", "num_accepted", "num_emitted"):
            columns[name] = np.concatenate([getattr(rows, name) for rows in rounds])
        confidence = [_leading(rows.confidence, rows.draft_len) for rows in rounds]
        columns["confidence"] = list_column(np.concatenate(confidence), lens, pa.float32())
        if all(rows.draft_tokens is not None or not rows.draft_len.any() for rows in rounds):
            tokens = [_leading(rows.draft_tokens, rows.draft_len) for rows in rounds if rows.draft_tokens is not None]
            values = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int32)
            columns["draft_tokens"] = list_column(values, lens, pa.int32())
        else:
            columns["draft_tokens"] = pa.nulls(lens.size, schema.field("draft_tokens").type)
        accepted = columns["num_accepted"]
        columns["parents"] = _node_column([(rows.parents, rows.draft_len) for rows in rounds], lens)
        columns["accepted_path"] = _node_column([(rows.accepted_path, rows.num_accepted) for rows in rounds], accepted)
        return pa.table([columns[name] for name in schema.names], schema=schema)


def list_column(values: npt.NDArray[Any], lens: npt.NDArray[np.int64], value_type: pa.DataType) -> pa.ListArray:
    """A list column from its concatenated values and the length of each row."""
    offsets = np.concatenate(([0], np.cumsum(lens))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=value_type, from_pandas=False))


def _node_column(
    rounds: list[tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64]]], lens: npt.NDArray[np.int64]
) -> pa.Array:
    """Leading nodes of every row as lists; null if a round that has some does not say which."""
    known = [(rows, counts) for rows, counts in rounds if rows is not None]
    if not known or any(rows is None and counts.any() for rows, counts in rounds):
        return pa.nulls(lens.size, _nodes)
    return list_column(np.concatenate([_leading(rows, counts) for rows, counts in known]), lens, pa.int16())


def _completed(name: str, table: pa.Table) -> pa.Table:
    """A table of an earlier version with the columns that have come since: null, and one replica."""
    schema = SCHEMAS[name]
    for place, column in enumerate(schema):
        if column.name in _LATER and column.name not in table.schema.names:
            missing = pa.nulls(table.num_rows, column.type)
            table = table.add_column(place, column, missing.fill_null(0) if column.name == "replica" else missing)
    return table


def _leading(rows: npt.NDArray[Any], lens: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The first ``lens[r]`` entries of every row, concatenated."""
    selected: npt.NDArray[Any] = rows[np.arange(rows.shape[1]) < lens[:, None]]
    return selected


def _check_version(path: Path, metadata: dict[bytes, bytes]) -> None:
    version = metadata.get(b"dspark_sim.schema_version")
    if version is None:
        raise UserError(f"{path} was not written by dspark_sim; give a folder made by `dspark-sim record`")
    if version not in [str(readable).encode() for readable in _READABLE]:
        raise UserError(
            f"{path} has trace schema version {version.decode(errors='replace')} and this package reads "
            f"{' and '.join(map(str, _READABLE))}; record it again or install the matching release"
        )


def refuse_foreign(folder: Path) -> None:
    """Refuse a destination that holds anything but a trace; call it before a long run, too.

    Raises
    ------
    UserError
        If it is a file, or a folder with something else in it.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a folder for the trace")
    if folder.is_dir():
        strange = [path.name for path in folder.iterdir() if path.stem not in SCHEMAS or path.suffix != ".parquet"]
        if strange:
            raise UserError(f"{folder} holds {strange[0]}, which is no part of a trace; give an empty or new folder")
