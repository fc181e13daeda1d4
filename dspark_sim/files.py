"""Files that are written whole or not at all: an interrupted run leaves no half of one under its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_sim.errors import explain_os_errors


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A path to write to that gets the name `path` when the block ends well, and is removed when it does not.

    Folders above it are made.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    path = Path(path)
    with explain_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path | str, document: Any) -> None:
    """Write a JSON document, which may hold no infinity and no not-a-number.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
