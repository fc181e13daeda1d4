"""Autoregressive drafters: dense walks equal a naive loop and the live batch; recordings of them replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from dspark_sim.engine.drafters import SequenceState  # noqa: E402
from dspark_sim.engine.drafters.chain import RaggedChainDrafter  # noqa: E402
from dspark_sim.engine.drafters.chain_model import ChainDrafter, ChainDrafterConfig  # noqa: E402
from dspark_sim.engine.drafters.choose import Confidence, DraftRule  # noqa: E402
from dspark_sim.engine.drafters.dense import dense_target, dense_walks, teacher_forced  # noqa: E402
from dspark_sim.engine.drafters.heads import greedy, run_head  # noqa: E402
from dspark_sim.engine.sampling import SamplingParams  # noqa: E402
from dspark_sim.engine.timing import SpanTimer  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.exactness import toy_replay  # noqa: E402
from dspark_sim.exactness.toy import BLOCK_SIZE, Toy  # noqa: E402
from dspark_sim.policy import Fixed, PrefixScheduler  # noqa: E402

KINDS = pytest.mark.parametrize("kind", ["eagle3", "mtp"])


def network(toy: Toy, kind: Any, draft_vocab_size: int = 0, **changes: Any) -> ChainDrafter:
    text = toy.target.config
    config = ChainDrafterConfig(
        target="toy",
        kind=kind,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        block_size=BLOCK_SIZE,
        target_layer_ids=(-1, 0) if kind == "eagle3" else (text.num_hidden_layers - 1,),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=16,
        rms_norm_eps=1e-5,
        draft_vocab_size=draft_vocab_size,
        **changes,
    )
    torch.manual_seed(2)
    ids = torch.tensor([0, 2, 3])[:draft_vocab_size] if draft_vocab_size else None
    made = ChainDrafter(config, ids)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return made.attach(toy.target).eval().requires_grad_(False)


def naive_chain(made: ChainDrafter, tokens: torch.Tensor, features: torch.Tensor, anchor: int) -> torch.Tensor:
    """Logits [γ, V] along the sequence's own tokens: every pair so far through the layer, one query at a time."""
    known = made.fuse(features)[:anchor]
    out = []
    for step in range(BLOCK_SIZE):
        last = anchor - 1 + step
        residual, entered = made.enter(known, tokens[1 : last + 2])
        rotary = made.rotary(torch.arange(last + 1), entered)
        queries, (keys, values) = made.queries(entered, rotary)[-1], made.keys(entered, rotary)
        groups = queries.shape[0] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        weights = torch.einsum("hd,jhd->hj", queries, keys).div(queries.shape[-1] ** 0.5).softmax(dim=-1)
        hidden = made.leave(residual[-1:], torch.einsum("hj,jhd->hd", weights, values)[None])
        known = torch.cat((known, hidden))
        out.append(F.linear(made.norm(hidden[0]), made._target.model.get_output_embeddings().weight))
    return torch.stack(out)


@KINDS
def test_teacher_forced_chains_equal_a_naive_loop(kind: Any) -> None:
    toy = Toy.make()
    toy.target.model.double()
    made = network(toy, kind).double()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (2, 16)))
    _, features = dense_target(toy.target, tokens, made.config.target_layer_ids, with_hidden=False)
    anchors = torch.tensor([[2, 5, 6, 11], [1, 3, 8, 12]])
    logits, confidence = teacher_forced(made, tokens, features, anchors)
    assert confidence is None and logits.shape == (2, 4, BLOCK_SIZE, 4)
    for row in range(2):
        for column, anchor in enumerate(anchors[row].tolist()):
            expected = naive_chain(made, tokens[row], features[row], anchor)
            torch.testing.assert_close(logits[row, column], expected, rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("draft_vocab_size", [0, 3])
def test_the_live_batch_drafts_what_the_dense_walk_says(kind: Any, draft_vocab_size: int) -> None:
    toy = Toy.make()
    toy.target.model.double()
    made = network(toy, kind, draft_vocab_size).double()
    drafter = RaggedChainDrafter("chain", made, 3, 40)
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, 4, length) for length in (20, 26)]
    features = [dense_target(toy.target, torch.from_numpy(s)[None], drafter.feature_layers)[1][0] for s in sequences]
    slots, done, timer = np.array([2, 0]), np.array([0, 0]), SpanTimer(toy.target.device)
    # Committed tokens arrive in uneven pieces, once without a draft between; then slot 2 gets a new request.
    for number, lens in enumerate(([3, 8], [1, 4], [5, 1], [2, 2], [-11, 3])):
        if lens[0] < 0:
            sequences[0], features[0], done[0], lens = sequences[1], features[1], 0, [6, 3]
        pieces = torch.cat([f[a : a + n] for f, a, n in zip(features, done, lens, strict=True)])
        drafter.observe(slots, done, np.array(lens), pieces)
        done = done + lens
        if number == 1:
            continue
        states = [
            SequenceState(row, 1, sequence[: at + 1].tolist(), int(slots[row]))
            for row, (sequence, at) in enumerate(zip(sequences, done, strict=True))
        ]
        drafted = drafter.draft(states, BLOCK_SIZE, np.array([9, 2]), DraftRule(), timer)
        assert drafted.lens.tolist() == [BLOCK_SIZE, 2]
        for row, (sequence, at) in enumerate(zip(sequences, done, strict=True)):
            tokens = torch.from_numpy(sequence)
            walk = dense_walks(made, tokens, features[row], torch.tensor([at]))()
            out = run_head(made, walk, tokens[at : at + 1], BLOCK_SIZE, greedy)
            assert drafted.tokens[row].tolist() == out.tokens[0].tolist()
        shorter = drafter.draft(states, 2, np.array([9, 9]), DraftRule(), timer)
        assert shorter.tokens.tolist() == drafted.tokens[:, :2].tolist()
    seconds = timer.collect()
    assert min(seconds["draft"], seconds["head"]) > 0


@KINDS
@pytest.mark.parametrize("mode", ["greedy", "coupled", "target_match", "rejection"])
def test_a_live_run_with_a_chain_is_its_own_replay(kind: Any, mode: Any) -> None:
    toy = Toy.make()
    toy.drafter = RaggedChainDrafter("chain", network(toy, kind), toy.max_num_seqs, 64, Confidence("top1"))
    params = SamplingParams(0.0 if mode == "greedy" else 0.8, seed=4)
    plain = toy.decode(Fixed(0), mode, params, num_requests=12, num_tokens=12)
    if mode != "rejection":
        assert (toy.decode(Fixed(3), mode, params, num_requests=12, num_tokens=12) == plain).all()
    for policy in (Fixed(3), Fixed(1), PrefixScheduler(toy_replay.COST)):
        verdict = toy_replay.identity(toy, policy, mode, params, 30)
        assert verdict, str(verdict)


def test_a_chain_refuses_a_target_without_its_layers() -> None:
    toy = Toy.make()
    with pytest.raises(UserError, match="block_size is 0"):
        ChainDrafterConfig("toy", "eagle3", 24, 4, 0, (0,), 4, 2, 6, 16, 1e-5)
    with pytest.raises(UserError, match="last layer alone"):
        ChainDrafterConfig("toy", "mtp", 24, 4, 1, (0, 1), 4, 2, 6, 16, 1e-5)
    config = network(toy, "mtp").config
    wrong = ChainDrafterConfig(**{**vars(config), "target_layer_ids": (0,)})
    with pytest.raises(UserError, match="reads the last one"):
        ChainDrafter(wrong).attach(toy.target)
