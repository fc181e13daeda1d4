"""A decode round of the simulated server on arrays: draft, choose, verify, and count what came out.

`ArrayRounds` asks any policy and works on whole arrays; `compiled.CompiledRounds` does the same in one call of machine
code. Both are tested equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dspark_sim.policy import Controller, LoadView
from dspark_sim.simulate.array_recorder import ArrayRecorder
from dspark_sim.simulate.batch import Batch
from dspark_sim.simulate.block_tables import BlockTables
from dspark_sim.simulate.kernels import ID, LEFT, POSITION, ROOM, ROW


class Rounds(Protocol):
    """Plays decode rounds."""

    @property
    def draft_len(self) -> int | None:
        """What the policy always drafts, where that is known; ``None`` where its controller has to be asked."""
        ...

    def play(self, batch: Batch, load: LoadView | None, draft_len: int) -> tuple[int, int]:
        """One round of every request of the batch, whose columns move on.

        Parameters
        ----------
        batch
            The running requests, at least one.
        load
            What the policy may know of the server; ``None`` for one whose `draft_len` is known, and a load of now.
        draft_len
            Tokens drafted per request.

        Returns
        -------
        num_verified, num_ended
            Drafts verified, over all requests, and requests that have their last token.
        """
        ...


@dataclass(frozen=True, slots=True)
class ArrayRounds:
    """Rounds by array operations.

    Parameters
    ----------
    controller
        The policy's.
    tables
        Recorded outcomes.
    recorder
        Notes every round.
    looks
        Whether the policy looks at survivals; by the contract of policies its choice does not depend on them
        otherwise, and they are not looked up.
    """

    controller: Controller
    tables: BlockTables
    recorder: ArrayRecorder
    looks: bool
    draft_len: None = None

    def play(self, batch: Batch, load: LoadView | None, draft_len: int) -> tuple[int, int]:
        """See `Rounds`."""
        assert load is not None
        rows, tables = batch.column(ROW), self.tables
        num = len(rows)
        drafted = tables.drafted(rows, draft_len, batch.column(ROOM))
        survival = tables.survival(rows, draft_len, drafted) if self.looks else tables.blank(num, draft_len)
        verify = np.minimum(self.controller.verify_lens(load, survival), drafted)
        accepted = tables.accepted(rows, verify)
        emitted = np.minimum(accepted + 1, batch.column(LEFT))
        self.controller.observe(load, verify, accepted)
        place, record = self.recorder.reserve(num)
        if record.size:
            noted = (batch.column(ID), rows, batch.column(POSITION), drafted, verify, emitted)
            for line, values in zip(record, noted, strict=True):
                line[place : place + num] = values
        batch.advance(emitted)
        return int(verify.sum()), num - int(np.count_nonzero(batch.column(LEFT)))
