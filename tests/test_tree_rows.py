"""Trees in ragged attention and in the cache: a node is as good as the end of a chain through its ancestors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import tiny_target  # noqa: E402

from dspark_sim.engine.attention import RaggedBatch, TreeRows, attend  # noqa: E402
from dspark_sim.engine.kv_cache import SlotCache  # noqa: E402

CPU = torch.device("cpu")
VOCABULARY, MAX_LEN = 11, 60


@st.composite
def trees(draw):
    """Parents of some nodes, -1 for the root's children; parents come first."""
    num_nodes = draw(st.integers(0, 7))
    return [draw(st.integers(-1, node - 1)) for node in range(num_nodes)]


def path(parents, node):
    """Nodes from the root's child to `node`."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


def padded(rows, fill=0):
    width = max(map(len, rows))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows], dtype=np.int64).reshape(len(rows), width)


def layout(starts, all_parents):
    depths = [[len(path(parents, node)) for node in range(len(parents))] for parents in all_parents]
    lens = np.array([len(parents) for parents in all_parents])
    return TreeRows.of(starts, padded(all_parents, -1), padded(depths), lens), lens


def forward(target, cache, slots, starts, rows, tree=None):
    lens = np.array([len(row) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row])
    batch = RaggedBatch(cache, slots, starts, lens, CPU, tree=tree)
    logits, features = target.forward(tokens, batch, torch.arange(len(tokens)), (1, 3))
    return torch.cat((logits, features), dim=1), np.cumsum(lens) - lens


# A window of 5 positions on some layers: the trees below are deeper and their rows farther apart than that.
WINDOWED = {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2}


@pytest.fixture(scope="module", params=["full", "windowed"])
def target(request):
    if request.param == "full":
        return tiny_target(VOCABULARY, torch.float64)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from dspark_sim.engine.attention import ATTENTION_NAME, register_attention
    from dspark_sim.engine.models import Target

    register_attention()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=128,
        attn_implementation=ATTENTION_NAME,
        **WINDOWED,
    )
    return Target("tiny", Qwen3ForCausalLM(config).double().eval().requires_grad_(False), None)


@settings(deadline=None, max_examples=25)
@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.data())
def test_a_node_is_the_end_of_the_chain_through_its_ancestors(target, all_parents, seed, data):
    rng = np.random.default_rng(seed)
    num = len(all_parents)
    slots = rng.permutation(5)[:num]
    prompts = [rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist() for _ in range(num)]
    drafts = [rng.integers(0, VOCABULARY, 1 + len(parents)).tolist() for parents in all_parents]
    starts = np.array([len(prompt) for prompt in prompts])
    cache = target.new_cache(5, MAX_LEN)
    # What was never written must never be seen.
    cache.keys.fill_(1e3)
    cache.values.fill_(1e3)
    forward(target, cache, slots, np.zeros_like(starts), prompts)
    tree, _ = layout(starts, all_parents)
    out, row_starts = forward(target, cache, slots, starts, drafts, tree)

    def alone(tokens):
        fresh = target.new_cache(1, MAX_LEN)
        return forward(target, fresh, np.array([0]), np.array([0]), [tokens])[0]

    nodes = [data.draw(st.integers(-1, len(parents) - 1)) for parents in all_parents]
    paths = [path(parents, node) for parents, node in zip(all_parents, nodes, strict=True)]
    chains = []
    for row in range(num):
        chain = [drafts[row][0], *(drafts[row][1 + node] for node in paths[row])]
        chains.append(prompts[row] + chain)
        expected = alone(chains[row])[len(prompts[row]) :]
        at = row_starts[row] + np.array([0, *(1 + node for node in paths[row])])
        torch.testing.assert_close(out[at], expected, rtol=1e-9, atol=1e-11)
    # The path is accepted; what follows sees a cache as if it had been a chain all along.
    lens = np.array([len(one) for one in paths])
    cache.compact(slots, starts, padded(paths), lens)
    more = [rng.integers(0, VOCABULARY, rng.integers(1, 4)).tolist() for _ in range(num)]
    out, row_starts = forward(target, cache, slots, starts + 1 + lens, more)
    for row in range(num):
        expected = alone(chains[row] + more[row])[len(chains[row]) :]
        torch.testing.assert_close(out[row_starts[row] :][: len(more[row])], expected, rtol=1e-9, atol=1e-11)


def test_a_tree_that_is_a_chain_has_the_bits_of_a_chain():
    target = tiny_target(VOCABULARY)
    rng = np.random.default_rng(1)
    starts, rows = np.array([4, 7, 2]), [rng.integers(0, VOCABULARY, length).tolist() for length in (5, 1, 3)]
    tree, _ = layout(starts, [list(range(-1, len(row) - 2)) for row in rows])
    outs, stores = [], []
    for given_tree in (None, tree):
        cache = target.new_cache(3, MAX_LEN)
        slots = np.arange(3)
        forward(target, cache, slots, np.zeros_like(starts), [[1] * start for start in starts])
        outs.append(forward(target, cache, slots, starts, rows, given_tree)[0])
        cache.compact(slots, starts, np.tile(np.arange(4), (3, 1)), np.array([4, 0, 2]))
        stores.append((cache.keys, cache.values))
    assert torch.equal(*outs)
    assert all(torch.equal(*pair) for pair in zip(*stores, strict=True))


def test_levels_of_a_tree_may_come_one_after_the_other():
    """A drafter grows its tree level by level: new rows are behind those of the levels before."""
    rng = np.random.default_rng(2)
    parents = [-1, -1, 0, 0, 1, 3]
    tree, _ = layout(np.array([3]), [parents])
    queries = torch.from_numpy(rng.normal(size=(10, 4, 4)))
    keys, values = (torch.from_numpy(rng.normal(size=(10, 2, 4))) for _ in range(2))

    def cache():
        return SlotCache(1, 1, 2, 16, 4, dtype=torch.float64, device=CPU)

    def go(store, low, high, rows=None):
        batch = RaggedBatch(store, np.array([0]), np.array([low]), np.array([high - low]), CPU, tree=rows)
        return attend(batch, 0, queries[low:high], keys[low:high], values[low:high], 0.5), batch.positions.tolist()

    whole, parts = cache(), cache()
    go(whole, 0, 3)
    go(parts, 0, 3)
    expected, positions = go(whole, 3, 10, tree)
    assert positions == [3, 4, 4, 5, 5, 5, 6]
    low = 0
    for high in (1, 3, 6, 7):
        level = TreeRows(tree.starts, tree.depths[:, :high], tree.sees[:, low:high, :high])
        out, at = go(parts, 3 + low, 3 + high, level)
        torch.testing.assert_close(out, expected[low:high])
        assert at == positions[low:high]
        low = high


def test_compaction_leaves_the_rest_alone():
    cache = SlotCache(2, 3, 1, 12, 1, dtype=torch.float64, device=CPU)
    cache.keys.copy_(torch.arange(72.0).view(2, 3, 1, 12, 1))
    cache.values.copy_(-cache.keys)
    before = cache.keys.clone()
    cache.compact(np.array([2, 0]), np.array([3, 1]), np.array([[1, 2, 5], [0, 7, 7]]), np.array([3, 1]))
    expected = before.clone()
    expected[:, 2, :, 4:7] = before[:, 2][:, :, [5, 6, 9]]
    assert torch.equal(cache.keys, expected) and torch.equal(cache.values, -expected)
