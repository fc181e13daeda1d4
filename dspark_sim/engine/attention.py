"""Ragged attention: requests with different numbers of new tokens in one row of tokens.

The linear layers see the B tokens of all requests one after the other and nothing else. Only here are queries laid
out as [R, longest query], because the batch's keys are. The layout travels through the model as one keyword
argument (`ragged_batch`), by transformers' attention interface; no model code is copied.

Grouped-query attention without repeating keys: the G query heads that share a KV head are stacked along the query
axis, [R, H, Q, D] → [R, H/G, G·Q, D].

Layers with a sliding window of w see, from position p, only positions above p - w; the mask is made once per window
size and pass. Where a family soft-caps attention scores (Gemma 2: c·tanh(s/c)), they are computed one operation after
the other, since no fused kernel does it.

The nodes of a drafted tree stand one behind the other in the cache, whatever their depth. Such a row has a *place* in
the cache and a *position*, its depth behind the tree's root, for the rotary embedding and the windows; and of its tree
it sees its own ancestors alone (`TreeRows`). A chain's rows need none of that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dspark_sim.engine.kv_cache import SlotCache

ATTENTION_NAME = "dspark_ragged"
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TreeRows:
    """Trees in the cache: every request's root at `starts`, its nodes at the places behind.

    Parameters
    ----------
    starts
        [R], place and position of each root. Every row of the request sees all keys before it.
    depths
        [R, W], depth of what stands at place starts + w; 0 for the root.
    sees
        [R, Q, W], whether the pass's new row sees place starts + w: its ancestors and itself.
    """

    starts: IntArray
    depths: IntArray
    sees: npt.NDArray[np.bool_]

    @staticmethod
    def of(starts: IntArray, parents: IntArray, depths: IntArray, lens: IntArray) -> TreeRows:
        """Rows of a pass over whole trees: each request's root, then its first `lens` nodes.

        Parameters
        ----------
        starts
            [R], as above.
        parents, depths
            [R, n], of nodes in an order that has parents before children; -1 is the root.
        lens
            [R], nodes of each request.
        """
        width = int(lens.max(initial=0))
        requests = np.arange(len(lens))
        sees = np.zeros((len(lens), 1 + width, 1 + width), dtype=np.bool_)
        sees[:, 0, 0] = True
        for node in range(width):
            real = node < lens
            sees[:, 1 + node] = sees[requests, np.where(real, parents[:, node] + 1, 0)]
            sees[:, 1 + node, 1 + node] = real
        below = np.where(np.arange(width) < lens[:, None], depths[:, :width], 0)
        return TreeRows(starts, np.concatenate((np.zeros((len(lens), 1), dtype=np.int64), below), axis=1), sees)


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
        Place in the cache of each request's first new token, [R]; also its absolute position, unless `tree` says
        another.
    lens
        New tokens of each request, [R], each at least 1.
    causal
        Whether a new token sees only new tokens up to itself (target) or all of its request's (draft block).
    device
        Where index tensors live.
    tree
        The trees that the new tokens are nodes of; ``None`` where all are chains.

    Attributes
    ----------
    positions, places
        [B], of every row: its absolute position, and where its keys and values go.
    """

    cache: SlotCache
    slots: np.ndarray
    starts: np.ndarray
    lens: np.ndarray
    device: torch.device
    causal: bool = True
    tree: TreeRows | None = None
    positions: torch.Tensor = field(init=False)
    places: torch.Tensor = field(init=False)
    row_slots: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_requests, self.max_query = len(self.lens), int(self.lens.max())
        longest = int((self.starts + self.lens).max())
        rounded = -(-longest // self.cache.length_step) * self.cache.length_step
        self.total_len = min(rounded, self.cache.max_len)
        request_of_row = np.repeat(np.arange(num_requests), self.lens)
        column = np.arange(len(request_of_row)) - np.repeat(np.cumsum(self.lens) - self.lens, self.lens)
        places = self.starts[request_of_row] + column
        index = [places, self.slots[request_of_row], request_of_row * self.max_query + column]
        if self.tree is not None:
            index.append(self._positions(request_of_row, column))
        index_tensor = torch.from_numpy(np.stack(index)).to(self.device)
        self.places, self.row_slots, padded_row = index_tensor[0], index_tensor[1], index_tensor[2]
        self.positions = self.places if self.tree is None else index_tensor[3]
        self.padded_row = None if (self.lens == self.max_query).all() else padded_row
        lowest = int(self.slots[0])
        neighbours = np.array_equal(self.slots, np.arange(lowest, lowest + num_requests))
        self.read_slots: slice | torch.Tensor = (
            slice(lowest, lowest + num_requests) if neighbours else torch.from_numpy(self.slots).to(self.device)
        )
        self._masks: dict[int | None, torch.Tensor] = {}
        self._longest = longest
        self._needs_mask = bool(
            self.tree is not None
            or (self.causal and self.max_query > 1)
            or (self.starts + self.lens).min() < self.total_len
        )

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.lens)

    def mask(self, group: int, dtype: torch.dtype, window: int | None = None) -> torch.Tensor | None:
        """Additive mask [R, 1, group·Q, total_len], made once per pass; ``None`` if every query sees every key.

        Parameters
        ----------
        group
            Query heads per KV head, G.
        dtype
            Of the scores.
        window
            Positions that a token sees, itself included; ``None`` means all before it.
        """
        if window is not None and window >= self._longest:
            window = None
        if window is None and not self._needs_mask:
            return None
        if window not in self._masks:
            allowed = self._allowed(window) if self.tree is None else self._allowed_in_trees(self.tree, window)
            values = np.where(allowed, 0.0, -np.inf).astype(np.float32)
            mask = torch.from_numpy(values).to(self.device, dtype)
            self._masks[window] = mask[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
        return self._masks[window]

    def _columns(self) -> IntArray:
        """Number of the new token that each query [R, Q] stands for; what pads repeats the last."""
        columns: IntArray = np.minimum(np.arange(self.max_query), self.lens[:, None] - 1)
        return columns

    def _allowed(self, window: int | None) -> npt.NDArray[np.bool_]:
        """Whether a query sees a key, [R, Q, total_len]."""
        column = self._columns()
        own = self.starts[:, None] + column
        seen = own + 1 if self.causal else (self.starts + self.lens)[:, None] + 0 * column
        key = np.arange(self.total_len)
        allowed: npt.NDArray[np.bool_] = key < seen[:, :, None]
        if window is not None:
            allowed &= key > own[:, :, None] - window
        return allowed

    def _allowed_in_trees(self, tree: TreeRows, window: int | None) -> npt.NDArray[np.bool_]:
        """The same where rows are nodes of trees."""
        requests, column = np.arange(self.num_requests)[:, None], self._columns()
        key = np.arange(self.total_len)
        allowed: npt.NDArray[np.bool_] = np.broadcast_to(
            key < tree.starts[:, None, None], (self.num_requests, self.max_query, self.total_len)
        ).copy()
        place = tree.starts[:, None] + np.arange(tree.depths.shape[1])
        row, node = np.nonzero(place < self.total_len)
        allowed[row, :, place[row, node]] = tree.sees[requests, column][row, :, node]
        if window is not None:
            key_position = np.broadcast_to(key, (self.num_requests, self.total_len)).copy()
            key_position[row, place[row, node]] = (tree.starts[:, None] + tree.depths)[row, node]
            own = self._positions(requests, column)
            allowed &= key_position[:, None] > own[:, :, None] - window
        return allowed

    def _positions(self, request: IntArray, column: IntArray) -> IntArray:
        """Absolute positions of new tokens by request and number."""
        assert self.tree is not None
        node = (self.starts - self.tree.starts)[request] + column
        positions: IntArray = self.tree.starts[request] + self.tree.depths[request, node]
        return positions

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
    batch: RaggedBatch,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
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
        [B, KV heads, D]; the cache may be made for more heads and larger ones.
    scale
        Of the scores.
    window
        See `RaggedBatch.mask`.
    softcap
        c, if scores are soft-capped.

    Returns
    -------
    tensor
        [B, H, D].
    """
    batch.cache.write(layer, batch.row_slots, batch.places, keys, values)
    all_keys, all_values = batch.cache.read(layer, batch.read_slots, batch.total_len)
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads = keys.shape[1]
    if all_keys.shape[1] != num_kv_heads or all_keys.shape[3] != head_dim:
        all_keys, all_values = all_keys[:, :num_kv_heads, :, :head_dim], all_values[:, :num_kv_heads, :, :head_dim]
    group = num_heads // num_kv_heads
    stacked = batch.pad(queries).view(batch.num_requests, batch.max_query, num_kv_heads, group, head_dim)
    stacked = stacked.permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = batch.mask(group, queries.dtype, window)
    out = _weigh(stacked, all_keys, all_values, mask, scale, softcap)
    out = out.view(batch.num_requests, num_kv_heads, group, batch.max_query, head_dim)
    return batch.unpad(out.permute(0, 3, 1, 2, 4).reshape(batch.num_requests, batch.max_query, num_heads, head_dim))


def _weigh(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of queries [..., Q, D] over keys and values [..., L, D] of the same heads."""
    if softcap is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(queries @ keys.transpose(-1, -2) * scale / softcap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype) @ values


def _transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    ragged_batch: RaggedBatch | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query, key and value are [1, heads, B, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if ragged_batch is None:
        return _whole_sequences(query, key, value, attention_mask, scale, sliding_window, softcap), None
    rows = attend(
        ragged_batch,
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        window=sliding_window,
        softcap=softcap,
    )
    return rows[None], None


def _whole_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of the last Q of L positions, [S, heads, Q, D] over [S, KV heads, L, D] to [S, Q, heads, D]."""
    num_queries, length = query.shape[2], key.shape[2]
    whole = num_queries == length and (window is None or window >= length)
    if mask is None and whole and softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    if mask is None:
        own = torch.arange(length - num_queries, length, device=query.device)[:, None]
        place = torch.arange(length, device=query.device)
        hidden = place > own if window is None else (place > own) | (place <= own - window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _weigh(query, keys, values, mask, scale, softcap).transpose(1, 2)


def register_attention() -> None:
    """Make `attn_implementation="dspark_ragged"` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    # cuDNN's kernel plans anew for every cache length, some 100 ms each time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(ATTENTION_NAME, _transformers_attention)
