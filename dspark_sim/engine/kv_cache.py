"""Keys and values of running requests: one slot per request, lengths kept by the caller.

Rolling back rejected drafts is a length change: their places are overwritten by the next round. Of a tree the accepted
path is moved together first. The tensors are [layers, slots, KV heads, max_len, head_dim], so that the batch's keys at
one layer are a view whenever its slots are neighbours; slots are handed out lowest first to keep it so.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dspark_sim.errors import UserError

IntArray = npt.NDArray[np.int64]


class SlotCache:
    """KV cache with a fixed number of slots.

    Parameters
    ----------
    num_layers, num_slots, num_kv_heads, max_len, head_dim
        Shape of the store; of KV heads and head_dim the largest that any layer needs.
    dtype, device
        Of the store.
    length_step
        The batch reads lengths rounded up to a multiple of this. ``None`` means 64 on CUDA, where kernels are chosen,
        and planned, per shape (few shapes, or every step plans anew), and 1 on a CPU.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        length_step: int | None = None,
    ) -> None:
        shape = (num_layers, num_slots, num_kv_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.length_step = length_step or (64 if device.type == "cuda" else 1)

    def write(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store rows [B, KV heads, head_dim] at (slots [B], positions [B]); small ones fill a corner."""
        heads, size = keys.shape[1:]
        self.keys[layer, slots, :heads, positions, :size] = keys
        self.values[layer, slots, :heads, positions, :size] = values

    def read(self, layer: int, slots: slice | torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R, KV heads, length, head_dim]; a view when `slots` is a slice."""
        return self.keys[layer, slots, :, :length], self.values[layer, slots, :, :length]

    def lengthen(self, max_len: int) -> None:
        """Make room for `max_len` places in every slot, if there is less; what is there stays."""
        missing = max_len - self.max_len
        if missing > 0:
            self.keys, self.values = (F.pad(store, (0, 0, 0, missing)) for store in (self.keys, self.values))
            self.max_len = max_len

    def compact(self, slots: IntArray, roots: IntArray, paths: IntArray, lens: IntArray) -> None:
        """Make a chain of the accepted path of a tree: its keys and values move to the places behind the root.

        Parameters
        ----------
        slots, roots
            [R], and the place of each tree's root.
        paths
            [R, k], nodes of the path from the root on: node i stands at place root + 1 + i. They rise.
        lens
            [R], nodes of each path; later entries are ignored.
        """
        depth = np.arange(paths.shape[1])
        row, column = np.nonzero((depth < lens[:, None]) & (paths != depth))
        if not row.size:
            return
        index = np.stack((slots[row], roots[row] + 1 + paths[row, column], roots[row] + 1 + column))
        slot, source, destination = torch.from_numpy(index).to(self.keys.device)
        # All are read before any is written: a place may be both.
        for store in (self.keys, self.values):
            store[:, slot, :, destination] = store[:, slot, :, source]


class SlotPool:
    """Hands out slot numbers, lowest first."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._slots: dict[int, int] = {}

    def acquire(self, request_id: int) -> int:
        """A free slot for a request."""
        if not self._free:
            raise UserError("every KV slot is taken; raise max_num_seqs of the engine or lower the concurrency")
        slot = self._slots[request_id] = heapq.heappop(self._free)
        return slot

    def release(self, request_id: int) -> None:
        """Give a request's slot back."""
        heapq.heappush(self._free, self._slots.pop(request_id))

    def __getitem__(self, request_id: int) -> int:
        return self._slots[request_id]
