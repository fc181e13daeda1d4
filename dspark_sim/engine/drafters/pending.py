"""Target features of committed tokens that wait for the next draft, which turns them into a drafter's context."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]

_MAX_ROWS = 4096


class PendingFeatures:
    """A list of rows (slot, position, features).

    Parameters
    ----------
    max_len
        Positions of a slot.
    """

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._parts: list[tuple[IntArray, IntArray, torch.Tensor]] = []

    def add(self, slots: IntArray, starts: IntArray, lens: IntArray, features: torch.Tensor) -> None:
        """Append `lens` rows for each slot from position `starts` on; features are [Σ lens, n·d]."""
        column = np.arange(int(lens.sum())) - np.repeat(np.cumsum(lens) - lens, lens)
        self._parts.append((np.repeat(slots, lens), np.repeat(starts, lens) + column, features))

    @property
    def is_full(self) -> bool:
        """Whether so many wait that they should be taken now, though nothing drafts."""
        return sum(len(slots) for slots, _, _ in self._parts) > _MAX_ROWS

    def take(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Slots [N], positions [N] and features [N, n·d] of all rows, which leave the list; ``None`` if there are none.

        A slot may have changed hands: of two rows for one place only the later one is given.
        """
        if not self._parts:
            return None
        rows = np.stack([np.concatenate([part[index] for part in self._parts]) for index in (0, 1)])
        places = rows[0] * self._max_len + rows[1]
        last = len(places) - 1 - np.unique(places[::-1], return_index=True)[1]
        slots, positions = torch.from_numpy(rows[:, last]).to(device)
        features = torch.cat([part[2] for part in self._parts])[torch.from_numpy(last).to(device)]
        self._parts.clear()
        return slots, positions, features
