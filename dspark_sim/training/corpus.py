"""Files of training text: conversations as token ids, with what is needed to trust them.

One Parquet file. Its metadata hold, as JSON, the schema version, where the text came from, the version of the
package that wrote it, and the SHA-256 of its tokens. Files of several processes are merged into one, in which no
prompt occurs twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dspark_sim import __version__
from dspark_sim.errors import UserError
from dspark_sim.files import whole_file

SCHEMA = pa.schema(
    [
        ("domain", pa.string()),
        ("temperature", pa.float64()),
        ("prompt_len", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
    ]
)
SCHEMA_VERSION = 1
_KEY = b"dspark_sim.synthesis"


def write_corpus(table: pa.Table, path: Path | str, source: Mapping[str, Any]) -> None:
    """Write a table of `SCHEMA` with its metadata; `source` says where it came from.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    path = Path(path)
    document = {
        "schema_version": SCHEMA_VERSION,
        "dspark_sim": __version__,
        "num_sequences": len(table),
        "sha256": digest(table),
        **source,
    }
    with whole_file(path) as partial:
        pq.write_table(table.cast(SCHEMA).replace_schema_metadata({_KEY: json.dumps(document)}), partial)


def read_corpus(path: Path | str, say: Callable[[str], object] = print) -> tuple[pa.Table, dict[str, Any]]:
    """Table and metadata of a file; one of before there were versions is read unchecked, and `say` tells so.

    Raises
    ------
    UserError
        If it is missing or damaged, of another version, or does not hold the tokens it was written with.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no training text at {path}; write some with `dspark-sim synthesise`")
    try:
        table = pq.read_table(path, columns=SCHEMA.names)
        document = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        table = table.replace_schema_metadata(None).select(SCHEMA.names).cast(SCHEMA)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{path} is not a synthesis file ({reason}); write it again") from error
    if "schema_version" not in document:
        say(f"{path} has no schema version and no digest, so its tokens cannot be checked.")
        return table, document
    if document["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {document['schema_version']} and this release reads {SCHEMA_VERSION}; "
            "synthesise it again, or install the release that wrote it"
        )
    if document.get("sha256") != digest(table):
        raise UserError(f"{path} does not hold the tokens it was written with (their SHA-256 differs); write it again")
    return table, document


def digest(table: pa.Table) -> str:
    """SHA-256 over the rows: prompt length and number of tokens as little-endian int64, then the tokens as int32."""
    known = hashlib.sha256()
    for tokens, prompt_len in rows_of(table):
        known.update(np.array([prompt_len, len(tokens)], dtype="<i8").tobytes())
        known.update(tokens.astype("<i4", copy=False).tobytes())
    return known.hexdigest()


def rows_of(table: pa.Table) -> list[tuple[np.ndarray, int]]:
    """Token ids [L] and prompt length of each row."""
    flat = table["tokens"].combine_chunks()
    if isinstance(flat, pa.ChunkedArray):  # no rows
        return []
    values, offsets = flat.values.to_numpy(), flat.offsets.to_numpy()
    lens = table["prompt_len"].to_numpy()
    return [(values[a:b], int(n)) for a, b, n in zip(offsets[:-1], offsets[1:], lens, strict=True)]


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote: conversations kept, and those left out because their prompt was there already."""

    num_kept: int
    num_dropped: int


def merge(files: Sequence[Path], out: Path) -> MergeReport:
    """Write one file of the conversations of several; of those with the same prompt the first is kept.

    Raises
    ------
    UserError
        If `out` exists, or a file cannot be read.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another file")
    seen: set[bytes] = set()
    kept: list[pa.Table] = []
    sources, num_dropped = [], 0
    for file in files:
        table, document = read_corpus(file)
        new = np.zeros(len(table), dtype=bool)
        for row, (tokens, prompt_len) in enumerate(rows_of(table)):
            prompt = tokens[:prompt_len].tobytes()
            new[row] = prompt not in seen
            seen.add(prompt)
        kept.append(table.filter(pa.array(new)))
        num_dropped += int((~new).sum())
        sources.append({"file": str(file), "num_kept": int(new.sum()), "metadata": document})
    merged = pa.concat_tables(kept).combine_chunks()
    write_corpus(merged, out, {"merged_from": sources})
    return MergeReport(len(merged), num_dropped)
