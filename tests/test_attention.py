"""Ragged attention against attention written out per request, in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from dspark_sim.engine.attention import RaggedBatch, attend  # noqa: E402
from dspark_sim.engine.kv_cache import SlotCache, SlotPool  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402

CPU = torch.device("cpu")
NUM_SLOTS, MAX_LEN, HEAD_DIM, SCALE = 6, 40, 4, 0.37


def _cache(num_kv_heads: int, num_layers: int = 2) -> SlotCache:
    cache = SlotCache(num_layers, NUM_SLOTS, num_kv_heads, MAX_LEN, HEAD_DIM, dtype=torch.float64, device=CPU)
    # What was never written must never be seen.
    cache.keys.fill_(1e3)
    cache.values.fill_(1e3)
    return cache


def _naive(queries, keys, values, start, causal):
    """One request: queries [Q, H, D] at positions start.., keys and values [L, KV heads, D]; loops over all."""
    num_heads, group = queries.shape[1], queries.shape[1] // keys.shape[1]
    out = np.zeros_like(queries)
    for row in range(len(queries)):
        seen = start + row + 1 if causal else start + len(queries)
        for head in range(num_heads):
            scores = keys[:seen, head // group] @ queries[row, head] * SCALE
            weights = np.exp(scores - scores.max())
            out[row, head] = (weights / weights.sum()) @ values[:seen, head // group]
    return out


class Requests:
    """The keys and values that each request has committed, kept beside the cache."""

    def __init__(self, rng, slots, num_heads, num_kv_heads):
        self.rng, self.slots = rng, np.asarray(slots)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.keys = [np.zeros((0, num_kv_heads, HEAD_DIM)) for _ in slots]
        self.values = [np.zeros((0, num_kv_heads, HEAD_DIM)) for _ in slots]

    def step(self, cache, layer, lens, kept=None, causal=True):
        """One pass; checks it, then keeps only the first `kept` new tokens of each request."""
        lens = np.asarray(lens)
        starts = np.array([len(keys) for keys in self.keys])
        batch = RaggedBatch(cache, self.slots, starts, lens, CPU, causal=causal)
        total = int(lens.sum())
        queries = self.rng.normal(size=(total, self.num_heads, HEAD_DIM))
        keys, values = self.rng.normal(size=(2, total, self.num_kv_heads, HEAD_DIM))
        out = attend(batch, layer, *(torch.from_numpy(rows) for rows in (queries, keys, values)), SCALE).numpy()
        assert out.shape == queries.shape
        positions, offset = batch.positions.tolist(), 0
        for row, length in enumerate(lens):
            new = slice(offset, offset + length)
            assert positions[new] == list(range(starts[row], starts[row] + length))
            all_keys = np.concatenate((self.keys[row], keys[new]))
            all_values = np.concatenate((self.values[row], values[new]))
            expected = _naive(queries[new], all_keys, all_values, starts[row], causal)
            np.testing.assert_allclose(out[new], expected, rtol=1e-10, atol=1e-12)
            end = starts[row] + (length if kept is None else kept[row])
            self.keys[row], self.values[row] = all_keys[:end], all_values[:end]
            offset += length


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=4, unique=True),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    causal=st.booleans(),
    data=st.data(),
)
def test_ragged_attention_equals_attention_per_request(seed, slots, heads, causal, data):
    lens = st.lists(st.integers(1, 7), min_size=len(slots), max_size=len(slots))
    requests = Requests(np.random.default_rng(seed), slots, *heads)
    cache = _cache(heads[1])
    requests.step(cache, 1, data.draw(lens))
    requests.step(cache, 1, data.draw(lens), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_rejected_tokens_are_overwritten(causal):
    requests = Requests(np.random.default_rng(0), [4, 1, 2], 4, 2)
    cache = _cache(2)
    requests.step(cache, 0, [5, 3, 9])
    for kept in ([1, 4, 2], [0, 0, 0], [3, 1, 4]):
        requests.step(cache, 0, [4, 4, 4], kept=kept, causal=causal)
    requests.step(cache, 0, [1, 1, 1])
    requests.step(cache, 0, [1, 6, 2])


def test_layers_and_other_slots_are_left_alone():
    cache = _cache(2)
    requests = Requests(np.random.default_rng(0), [3, 0], 4, 2)
    requests.step(cache, 1, [4, 2])
    assert (cache.keys[0] == 1e3).all() and (cache.values[0] == 1e3).all()
    assert (cache.keys[1, [1, 2, 4, 5]] == 1e3).all()
    assert (cache.keys[1, 3, :, 4:] == 1e3).all() and (cache.keys[1, 0, :, 2:] == 1e3).all()


def test_neighbouring_slots_are_read_without_copying():
    cache = _cache(2)
    for slots, view in (([2, 3, 4], True), ([2, 4, 3], False), ([0, 2], False), ([5], True)):
        ones = np.ones(len(slots), dtype=np.int64)
        batch = RaggedBatch(cache, np.array(slots), ones, ones, CPU)
        keys, _ = cache.read(0, batch.read_slots, batch.total_len)
        shared = keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
        assert shared == view
        assert keys.shape == (len(slots), 2, 2, HEAD_DIM)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_unpad_undoes_pad(lens):
    batch = RaggedBatch(_cache(1), np.arange(len(lens)), np.zeros_like(lens), np.array(lens), CPU)
    rows = torch.arange(1.0, sum(lens) + 1)[:, None].expand(-1, 3)
    padded = batch.pad(rows)
    assert padded.shape == (len(lens), max(lens), 3)
    assert (padded[..., 0] != 0).sum(dim=1).tolist() == lens
    assert torch.equal(batch.unpad(padded), rows)


def test_slots_are_handed_out_lowest_first_and_run_out():
    pool = SlotPool(3)
    assert [pool.acquire(request) for request in (10, 11, 12)] == [0, 1, 2]
    with pytest.raises(UserError, match="max_num_seqs"):
        pool.acquire(13)
    pool.release(12)
    pool.release(10)
    assert pool.acquire(14) == 0
    assert (pool[11], pool[14]) == (1, 0)
