"""Ragged attention: requests with different numbers of new tokens in one row of tokens.

The linear layers see the B tokens of all requests one after the other and nothing else. Only here are queries laid
out as [R, longest query], because the batch's keys are. The layout travels through the model as one keyword
argument (`ragged_batch`), by transformers' attention interface; no model code is copied.

Grouped-query attention without repeating keys: the G query heads that share a KV head are stacked along the query
axis, [R, H, Q, D] → [R, H/G, G·Q, D].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dspark_sim.engine.kv_cache import SlotCache

ATTENTION_NAME = "dspark_ragged"


@dataclass(eq=False)
class RaggedBatch:
    """Layout of one pass.

    Parameters
    ----------
    cache
        Where keys and values go.
    slots
        Slot of each request, [R].
    starts
        Absolute position of each request's first new token, [R].
    lens
        New tokens of each request, [R], each at least 1.
    causal
        Whether a new token sees only new tokens up to itself (target) or all of its request's (draft block).
    device
        Where index tensors live.
    """

    cache: SlotCache
    slots: np.ndarray
    starts: np.ndarray
    lens: np.ndarray
    device: torch.device
    causal: bool = True
    positions: torch.Tensor = field(init=False)
    row_slots: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_requests, self.max_query = len(self.lens), int(self.lens.max())
        longest = int((self.starts + self.lens).max())
        rounded = -(-longest // self.cache.length_step) * self.cache.length_step
        self.total_len = min(rounded, self.cache.max_len)
        request_of_row = np.repeat(np.arange(num_requests), self.lens)
        column = np.arange(len(request_of_row)) - np.repeat(np.cumsum(self.lens) - self.lens, self.lens)
        positions = self.starts[request_of_row] + column
        index = np.stack([positions, self.slots[request_of_row], request_of_row * self.max_query + column])
        index_tensor = torch.from_numpy(index).to(self.device)
        self.positions, self.row_slots, padded_row = index_tensor[0], index_tensor[1], index_tensor[2]
        self.padded_row = None if (self.lens == self.max_query).all() else padded_row
        lowest = int(self.slots[0])
        neighbours = np.array_equal(self.slots, np.arange(lowest, lowest + num_requests))
        self.read_slots: slice | torch.Tensor = (
            slice(lowest, lowest + num_requests) if neighbours else torch.from_numpy(self.slots).to(self.device)
        )
        self._mask: torch.Tensor | None = None
        self._needs_mask = bool(
            (self.causal and self.max_query > 1) or (self.starts + self.lens).min() < self.total_len
        )

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.lens)

    def mask(self, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask [R, 1, group·Q, total_len], made once per pass; ``None`` if every query sees every key."""
        if not self._needs_mask:
            return None
        if self._mask is None:
            column = np.arange(self.max_query)
            seen = self.starts[:, None] + (
                np.minimum(column, self.lens[:, None] - 1) + 1 if self.causal else self.lens[:, None] + 0 * column
            )
            allowed = np.arange(self.total_len) < seen[:, :, None]
            values = np.where(allowed, 0.0, -np.inf).astype(np.float32)
            mask = torch.from_numpy(values).to(self.device, dtype)
            self._mask = mask[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
        return self._mask

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [B, ...] to [R, Q, ...]; missing rows are zero."""
        shape = (self.num_requests, self.max_query, *rows.shape[1:])
        if self.padded_row is None:
            return rows.reshape(shape)
        padded = rows.new_zeros((shape[0] * shape[1], *rows.shape[1:]))
        padded[self.padded_row] = rows
        return padded.view(shape)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Inverse of `pad`."""
        rows = padded.flatten(0, 1)
        return rows if self.padded_row is None else rows[self.padded_row]


def attend(
    batch: RaggedBatch, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Store new keys and values, then attend over each request's cache.

    Parameters
    ----------
    batch
        Layout.
    layer
        Layer of the cache.
    queries
        [B, H, D].
    keys, values
        [B, KV heads, D].
    scale
        Of the scores.

    Returns
    -------
    tensor
        [B, H, D].
    """
    batch.cache.write(layer, batch.row_slots, batch.positions, keys, values)
    all_keys, all_values = batch.cache.read(layer, batch.read_slots, batch.total_len)
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    stacked = batch.pad(queries).view(batch.num_requests, batch.max_query, num_kv_heads, group, head_dim)
    stacked = stacked.permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        stacked, all_keys, all_values, attn_mask=batch.mask(group, queries.dtype), scale=scale
    )
    out = out.view(batch.num_requests, num_kv_heads, group, batch.max_query, head_dim)
    return batch.unpad(out.permute(0, 3, 1, 2, 4).reshape(batch.num_requests, batch.max_query, num_heads, head_dim))


def _transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    ragged_batch: RaggedBatch | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query, key and value are [1, heads, B, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None:
        raise NotImplementedError("attention logit soft-capping")
    if ragged_batch is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    rows = attend(
        ragged_batch,
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
    )
    return rows[None], None


def register_attention() -> None:
    """Make `attn_implementation="dspark_ragged"` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    # cuDNN's kernel plans anew for every cache length, some 100 ms each time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(ATTENTION_NAME, _transformers_attention)
