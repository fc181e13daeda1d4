"""Errors a user can act on.

Every failure that a user can cause or cure ends as one sentence: the bad value, then the remedy. Such failures
are raised as `UserError`; the command line prints them as one line and exits with status 2. Anything else is a
defect of this package and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A failure with a remedy; its text is one sentence fit to print."""


@contextmanager
def explain_os_errors(path: Path | str, action: str) -> Iterator[None]:
    """Turn an `OSError` raised in the block into a `UserError` that names the path.

    Parameters
    ----------
    path
        The file or folder the block reads or writes.
    action
        What was attempted, as a verb: ``"write"`` or ``"read"``.

    Raises
    ------
    UserError
        In place of any `OSError`; a full disk gets its own wording.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to {action} {path}; free some space or choose another folder") from error
        raise UserError(f"cannot {action} {path}: {error.strerror or error}; check the path and its rights") from error
