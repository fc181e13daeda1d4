"""Decode rounds as machine code, where numba is installed: the same numbers as `rounds.ArrayRounds`, in one call.

A round of 64 requests is some forty array operations of a microsecond each, and nearly all of that microsecond is the
price of the call. Here one loop over the requests does the same (`kernels`).

Policies stay what they are. `Fixed` and Algorithm 1 are known to the kernels; every other controller is asked as
always, and the kernel plays what it chose.
"""

from __future__ import annotations

import numpy as np

from dspark_sim.policy import (
    Controller,
    IntArray,
    LoadView,
    RankedController,
    admits_by_algorithm_1,
    fixed_length,
    never_falling,
)
from dspark_sim.simulate.array_recorder import ArrayRecorder
from dspark_sim.simulate.batch import Batch
from dspark_sim.simulate.block_tables import BlockTables
from dspark_sim.simulate.kernels import ROOM, ROW, Kernels


class CompiledRounds:
    """Rounds by kernels; see `rounds.Rounds`.

    Parameters
    ----------
    controller, tables, recorder, looks
        As for `rounds.ArrayRounds`.
    kernels
        From `compiled_kernels` or `plain_kernels`.

    Attributes
    ----------
    draft_len
        What a known policy always drafts; ``None`` where the controller has to be asked.
    """

    def __init__(
        self, controller: Controller, tables: BlockTables, recorder: ArrayRecorder, looks: bool, kernels: Kernels
    ) -> None:
        self._controller, self._tables, self._recorder = controller, tables, recorder
        self._looks, self._kernels = looks, kernels
        self._fixed = fixed_length(controller)
        self._ranked = controller if admits_by_algorithm_1(controller) else None
        self.draft_len = self._fixed
        if self._ranked is not None:
            self.draft_len = self._ranked.max_draft_len or tables.block_size
        nothing = np.zeros(0, dtype=np.int64)
        self._whole = nothing if tables.whole is None else tables.whole
        self._nothing = nothing
        self._lens = nothing
        self._heap = nothing
        self._heads = np.zeros(0)

    def play(self, batch: Batch, load: LoadView | None, draft_len: int) -> tuple[int, int]:
        """See `Rounds`."""
        num, tables = len(batch.requests), self._tables
        lens, constant = self._nothing, 0
        asked: tuple[IntArray, IntArray] | None = None
        if self._fixed is not None:
            constant = self._fixed
        elif self._ranked is not None and draft_len:
            context = batch.context_tokens if load is None else load.context_tokens
            lens = self._algorithm_1(self._ranked, batch, context, draft_len)
        else:
            assert load is not None
            rows = batch.column(ROW)
            drafted = np.minimum(batch.column(ROOM), tables.draft_lens(rows, draft_len))
            survival = tables.survival(rows, draft_len, drafted) if self._looks else tables.blank(num, draft_len)
            lens = np.minimum(self._controller.verify_lens(load, survival), drafted)
            asked = lens, tables.accepted(rows, lens)
        place, record = self._recorder.reserve(num)
        verified, emitted, ended = self._kernels.play(
            batch.state, num, draft_len, tables.num_accepted, self._whole, lens, constant, record, place
        )
        batch.context_tokens += emitted
        if asked is not None and load is not None:
            self._controller.observe(load, *asked)
        return verified, ended

    def _algorithm_1(self, ranked: RankedController, batch: Batch, context: int, draft_len: int) -> IntArray:
        num = len(batch.requests)
        if self._lens.size < num:
            size = 2 * num
            self._lens, self._heap, self._heads = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size)
        seconds = ranked.cost.round_table(num, draft_len, context)
        survival = self._tables.survival_rows
        given = batch.state, num, draft_len, survival, self._whole
        work = self._lens, self._heap, self._heads
        if not self._kernels.admit(*given, seconds, *work):
            self._kernels.admit(*given, never_falling(seconds), *work)
        return self._lens
