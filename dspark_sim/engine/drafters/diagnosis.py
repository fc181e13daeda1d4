"""Noticing a drafter that proposes nothing the target takes.

A checkpoint read in a wrong layout does not fail: it drafts, everything is rejected, and the output is right and
slow. So the first rounds of a run are looked at.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from dspark_sim.trace import Trace

_FIRST_ROUNDS, _ENOUGH, _SUSPICIOUS = 32, 16, 0.1


def rejects_nearly_all(verify_lens: npt.ArrayLike, num_accepted: npt.ArrayLike) -> bool:
    """Whether of the first 32 rounds in which anything was verified at most one in ten accepted a draft.

    Parameters
    ----------
    verify_lens, num_accepted
        [n] of a run's rounds, in order. Fewer than 16 rounds say nothing.
    """
    verified = np.asarray(verify_lens) > 0
    accepted = (np.asarray(num_accepted)[verified] > 0)[:_FIRST_ROUNDS]
    return len(accepted) >= _ENOUGH and float(accepted.mean()) <= _SUSPICIOUS


def warn_if_rejected(drafter: object, name: str, trace: Trace) -> None:
    """Warn, in one sentence, when a drafter of another project's checkpoint is rejected nearly always."""
    source = getattr(getattr(getattr(drafter, "network", None), "config", None), "source", "dspark_sim")
    if source == "dspark_sim" or trace.tables["drafts"].num_rows == 0:
        return
    drafts = trace.tables["drafts"]
    if rejects_nearly_all(drafts["verify_len"].to_numpy(), drafts["num_accepted"].to_numpy()):
        warnings.warn(
            f"{trace.config['target']} rejects nearly all drafts of {name} ({source} checkpoint): it was probably made "
            "for another target or another version of it, its layer ids count the embedding (off by one), or its slots "
            "are laid out 1+N and its config says otherwise; compare its config.json with its model card",
            stacklevel=2,
        )
