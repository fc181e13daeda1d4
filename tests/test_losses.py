"""The loss against a loop over anchors, and the dense pass against the ragged one, on a tiny random target."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import tiny_target  # noqa: E402

from dspark_sim.engine.attention import RaggedBatch  # noqa: E402
from dspark_sim.engine.drafters import SequenceState  # noqa: E402
from dspark_sim.engine.drafters.block import RaggedBlockDrafter  # noqa: E402
from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.choose import DraftRule  # noqa: E402
from dspark_sim.engine.drafters.dense import dense_hidden, dense_target, teacher_forced  # noqa: E402
from dspark_sim.engine.drafters.heads import greedy, run_head  # noqa: E402
from dspark_sim.engine.drafters.walk import BlockWalk  # noqa: E402
from dspark_sim.engine.kv_cache import SlotCache  # noqa: E402
from dspark_sim.engine.timing import SpanTimer  # noqa: E402
from dspark_sim.training.losses import Norm, dspark_loss  # noqa: E402

VOCABULARY = 50


def _naive_loss(logits, probs, labels, confidence, valid):
    """Block by block, slot by slot; returns loss, cross entropy, distance, confidence loss and acceptance."""
    sums, norm, accepted, count = np.zeros(4), 0.0, 0.0, 0
    for block in range(logits.shape[0]):
        for slot in range(logits.shape[1]):
            if not valid[block, slot]:
                continue
            q = np.exp(logits[block, slot] - logits[block, slot].max())
            q /= q.sum()
            label = labels[block, slot]
            entropy = 0.0 if label == -100 else -np.log(q[label])
            # Outside the draft vocabulary q is zero, so all of the target's mass there is distance.
            distance = sum(abs(a - b) for a, b in zip(q, probs[block, slot], strict=True))
            distance += 1.0 - probs[block, slot].sum()
            acceptance = sum(min(a, b) for a, b in zip(q, probs[block, slot], strict=True))
            assert acceptance == pytest.approx(1 - distance / 2)
            judged = 0.0
            if confidence is not None:
                c = 1 / (1 + np.exp(-confidence[block, slot]))
                judged = -acceptance * np.log(c) - (1 - acceptance) * np.log(1 - c)
            weight = np.exp(-slot / 4)
            sums += weight * np.array([0.1 * entropy + 0.9 * distance + judged, entropy, distance, judged])
            norm, accepted, count = norm + weight, accepted + acceptance, count + 1
    return (*(sums / norm), accepted / count)


@pytest.mark.parametrize("with_confidence", [True, False])
@pytest.mark.parametrize("outside", [0, 4])
def test_loss_equals_a_naive_loop(outside, with_confidence):
    rng = np.random.default_rng(outside)
    blocks, gamma, size = 9, 5, 11
    logits = rng.normal(0, 2, (blocks, gamma, size)).astype(np.float32).astype(np.float64)
    whole = rng.dirichlet(np.ones(size + outside), (blocks, gamma))
    probs = whole[..., :size]
    labels = rng.integers(0, size, (blocks, gamma))
    if outside:
        labels[rng.random(labels.shape) < 0.3] = -100
    valid = np.arange(gamma) < rng.integers(1, gamma + 1, blocks)[:, None]
    confidence = rng.normal(0, 2, (blocks, gamma)).astype(np.float32).astype(np.float64) if with_confidence else None
    terms = dspark_loss(
        torch.from_numpy(logits),
        torch.from_numpy(probs),
        torch.from_numpy(labels),
        None if confidence is None else torch.from_numpy(confidence),
        torch.from_numpy(valid),
    )
    ours = [terms.loss, terms.cross_entropy, terms.distance, terms.confidence, terms.acceptance]
    np.testing.assert_allclose(
        [value.item() for value in ours], _naive_loss(logits, probs, labels, confidence, valid), rtol=1e-6
    )


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_shared_laws_held_in_chunks_have_the_loss_and_gradient_of_whole_ones(chunk):
    rng = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 5, 11, generator=rng, dtype=torch.float64, requires_grad=True)
    distinct = torch.randn(7, 13, generator=rng, dtype=torch.float64).softmax(-1)[:, :11]
    rows = torch.randint(7, (9, 5), generator=rng)
    labels = torch.randint(11, (9, 5), generator=rng).masked_fill(torch.rand(9, 5, generator=rng) < 0.3, -100)
    valid = torch.rand(9, 5, generator=rng) < 0.8
    confidence = torch.randn(9, 5, generator=rng, dtype=torch.float64)
    whole = dspark_loss(logits, distinct[rows], labels, confidence, valid)
    whole.loss.backward()
    expected, logits.grad = logits.grad, None
    terms = dspark_loss(logits, distinct, labels, confidence, valid, rows=rows, chunk=chunk)
    terms.loss.backward()
    torch.testing.assert_close(terms.values(), whole.values())
    torch.testing.assert_close(logits.grad, expected)


def test_parts_under_the_norm_of_the_whole_add_up():
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 5, 11, generator=rng, dtype=torch.float64)
    probs = torch.randn(9, 5, 11, generator=rng, dtype=torch.float64).softmax(-1)
    labels = torch.randint(11, (9, 5), generator=rng)
    valid = torch.arange(5) < torch.randint(1, 6, (9, 1), generator=rng)
    norm = Norm.of(valid.numpy())
    whole = dspark_loss(logits, probs, labels, None, valid).values()
    parts = [
        dspark_loss(*(x[part::4] for x in (logits, probs, labels)), None, valid[part::4], norm=norm)
        for part in range(4)
    ]
    torch.testing.assert_close(sum(part.values() for part in parts), whole, rtol=1e-6, atol=1e-9)


def test_invalid_slots_have_no_gradient_and_confidence_does_not_teach_the_draft():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, generator=rng, requires_grad=True)
    confidence = torch.randn(4, 3, generator=rng, requires_grad=True)
    probs = torch.rand(4, 3, 6, generator=rng).softmax(-1)
    labels = torch.zeros(4, 3, dtype=torch.long)
    valid = torch.arange(3) < torch.tensor([3, 2, 1, 0])[:, None]
    dspark_loss(logits, probs, labels, confidence, valid).loss.backward()
    assert (logits.grad[~valid] == 0).all() and (confidence.grad[~valid] == 0).all()
    assert (logits.grad[valid].abs().sum(-1) > 0).all()
    with_head = logits.grad.clone()
    logits.grad = None
    dspark_loss(logits, probs, labels, None, valid).loss.backward()
    torch.testing.assert_close(logits.grad, with_head)


def test_a_perfect_draft_has_no_distance():
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    every = torch.ones(2, 3, dtype=torch.bool)
    terms = dspark_loss(logits, logits.softmax(-1), torch.zeros(2, 3, dtype=torch.long), None, every)
    assert terms.distance.item() == pytest.approx(0, abs=1e-5)
    assert terms.acceptance.item() == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def target():
    return tiny_target(VOCABULARY, torch.float64)


def _drafter(target, draft_vocab_size, markov_rank, markov_head_type="vanilla"):
    config = BlockDrafterConfig(
        target="tiny",
        hidden_size=24,
        vocab_size=VOCABULARY,
        block_size=4,
        target_layer_ids=(-1, 1, 2),
        mask_token_id=VOCABULARY - 1,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=16,
        rms_norm_eps=1e-5,
        markov_rank=markov_rank,
        enable_confidence_head=markov_rank > 0,
        draft_vocab_size=draft_vocab_size,
        markov_head_type=markov_head_type,
    )
    torch.manual_seed(1)
    ids = torch.randperm(VOCABULARY)[:draft_vocab_size].sort().values if draft_vocab_size else None
    return BlockDrafter(config, ids).double().attach(target).eval().requires_grad_(False)


def _target_cache(target):
    config = target.config
    shape = (config.num_hidden_layers, 3, config.num_key_value_heads, 64, target.head_dim)
    return SlotCache(*shape, dtype=torch.float64, device=target.device)


def test_the_ragged_target_equals_the_dense_one(target):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, VOCABULARY, length) for length in (9, 17, 12)]
    slots, cache = np.array([2, 0, 1]), _target_cache(target)
    done = np.zeros(3, dtype=np.int64)
    rows: list[list] = [[], [], []]
    for lens in ([4, 1, 7], [1, 9, 1], [4, 7, 4]):
        tokens = np.concatenate([s[a : a + n] for s, a, n in zip(sequences, done, lens, strict=True)])
        batch = RaggedBatch(cache, slots, done, np.array(lens), target.device)
        logits, features = target.forward(torch.from_numpy(tokens), batch, torch.arange(len(tokens)), (-1, 1, 2))
        for request, part in enumerate(torch.cat((logits, features), dim=-1).split(lens)):
            rows[request].append(part)
        done = done + lens
    for sequence, parts in zip(sequences, rows, strict=True):
        hidden, features = dense_target(target, torch.from_numpy(sequence)[None], (-1, 1, 2))
        dense = torch.cat((target.head(hidden), features), dim=-1)[0]
        torch.testing.assert_close(torch.cat(parts), dense, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("draft_vocab_size", "markov_rank"), [(0, 5), (20, 5), (20, 0)])
def test_the_dense_pass_equals_the_ragged_drafter(target, draft_vocab_size, markov_rank):
    network = _drafter(target, draft_vocab_size, markov_rank)
    drafter = RaggedBlockDrafter("tiny", network, 3, 64)
    hidden_seen = []
    backbone = network.backbone
    network.backbone = lambda *args: hidden_seen.append(backbone(*args)) or hidden_seen[-1]
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, VOCABULARY, length) for length in (20, 26)]
    features = [dense_target(target, torch.from_numpy(s)[None], drafter.feature_layers)[1][0] for s in sequences]
    slots, rule, timer = np.array([2, 0]), DraftRule(), SpanTimer(target.device)
    done = np.array([0, 0])
    # Committed tokens arrive in uneven pieces; blocks written behind the context are overwritten by it.
    for lens in ([3, 8], [1, 4], [5, 1], [2, 2]):
        pieces = torch.cat([f[a : a + n] for f, a, n in zip(features, done, lens, strict=True)])
        drafter.observe(slots, done, np.array(lens), pieces)
        done = done + lens
        states = [
            SequenceState(row, 1, sequence[: at + 1].tolist(), int(slots[row]))
            for row, (sequence, at) in enumerate(zip(sequences, done, strict=True))
        ]
        drafted = drafter.draft(states, 4, np.array([9, 2]), rule, timer)
        ragged_hidden = hidden_seen.pop().view(2, 4, -1)
        assert drafted.lens.tolist() == [4, 2]
        for row, (sequence, at) in enumerate(zip(sequences, done, strict=True)):
            tokens, anchor = torch.from_numpy(sequence)[None], torch.tensor([[at]])
            dense = dense_hidden(network, tokens, features[row][None], anchor)[0]
            hidden_seen.clear()
            torch.testing.assert_close(ragged_hidden[row], dense[0], rtol=1e-8, atol=1e-9)
            out = run_head(network, BlockWalk(network, dense), tokens[0, anchor[0]], 4, greedy)
            assert drafted.tokens[row].tolist() == out.tokens[0].tolist()
            if markov_rank:
                np.testing.assert_allclose(drafted.confidence[row], out.confidence[0].numpy(), rtol=1e-5)
            if draft_vocab_size:
                assert np.isin(drafted.tokens[row], network.draft_token_ids.numpy()).all()
        # A shorter draft is the start of a longer one.
        shorter = drafter.draft(states, 2, np.array([9, 9]), rule, timer)
        hidden_seen.clear()
        assert shorter.tokens.tolist() == drafted.tokens[:, :2].tolist()


def test_blocks_of_one_dense_pass_do_not_see_each_other_or_the_future(target):
    network = _drafter(target, 20, 5)
    rng = np.random.default_rng(4)
    tokens = torch.from_numpy(rng.integers(0, VOCABULARY, (2, 20)))
    _, features = dense_target(target, tokens, network.config.target_layer_ids)
    anchors = torch.tensor([[3, 7, 8, 18], [0, 1, 12, 12]])
    together = dense_hidden(network, tokens, features, anchors)
    for row in range(2):
        for column, anchor in enumerate(anchors[row].tolist()):
            visible = features[row : row + 1].clone()
            visible[:, anchor:] = 1e3
            alone = dense_hidden(network, tokens[row : row + 1], visible, torch.tensor([[anchor]]))
            torch.testing.assert_close(together[row, column], alone[0, 0], rtol=1e-8, atol=1e-9)


def _naive_slots(network, target, tokens, features, anchor):
    """Logits and confidence of one block, slot by slot: no other anchor, no context but that before it.

    The formulas of the heads, written out.
    """
    weights = {name: value.detach() for name, value in network.named_parameters()}
    head = {name.removeprefix("markov_head."): value for name, value in weights.items() if "markov_head." in name}
    w1, w2 = head["markov_w1.weight"], head["markov_w2.weight"]
    kind, rank = network.config.markov_head_type, w1.shape[1]
    visible = features[None, : anchor + 1].clone()
    visible[:, anchor:] = 1e3
    hidden = dense_hidden(network, tokens[None, : anchor + 1], visible, torch.tensor([[anchor]]))[0, 0]
    ids = network.draft_token_ids
    state, logits, confidence = torch.zeros(rank, dtype=torch.float64), [], []
    for slot, h in enumerate(hidden):
        token = tokens[anchor + slot]
        # All tokens outside the draft vocabulary share the last row of W1.
        place = (ids == token).nonzero()
        e = w1[place.item() if len(place) else len(ids)]
        if kind == "vanilla":
            feature = e
        elif kind == "gated":
            feature = torch.sigmoid(head["gate_proj.weight"] @ torch.cat((h, e)) + head["gate_proj.bias"]) * e
        else:
            z = head["joint_proj.weight"] @ torch.cat((state, e, h)) + head["joint_proj.bias"]
            g, c, o = z[:rank], z[rank : 2 * rank], z[2 * rank :]
            state = torch.sigmoid(g) * state + (1 - torch.sigmoid(g)) * torch.tanh(c)
            feature = torch.tanh(o)
        logits.append(target.head(h)[ids] + w2 @ feature)
        w, b = weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"]
        confidence.append((w @ torch.cat((h, e)) + b)[0])
    return torch.stack(logits), torch.stack(confidence)


@pytest.mark.parametrize("draft_vocab_size", [0, 20])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_many_anchors_at_once_equal_a_naive_loop_over_them(target, kind, draft_vocab_size):
    network = _drafter(target, draft_vocab_size, 5, kind)
    rng = np.random.default_rng(6)
    tokens = torch.from_numpy(rng.integers(0, VOCABULARY, (2, 24)))
    _, features = dense_target(target, tokens, network.config.target_layer_ids)
    anchors = torch.from_numpy(np.sort(rng.integers(0, 20, (2, 9)), axis=1))
    logits, confidence = teacher_forced(network, tokens, features, anchors)
    for row in range(2):
        for column, anchor in enumerate(anchors[row].tolist()):
            expected = _naive_slots(network, target, tokens[row], features[row], anchor)
            torch.testing.assert_close(logits[row, column], expected[0], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(confidence[row, column], expected[1], rtol=1e-6, atol=1e-9)
