"""A timed round is a round: how many tokens the target sees, and that the state stays where it was."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_sim.engine.round_latency import COMMITTED, round_seconds  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.exactness.toy import BLOCK_SIZE, Toy  # noqa: E402


def test_the_target_sees_anchors_and_whole_blocks_behind_the_context():
    toy, seen = Toy.make(), []

    def note(_module, _arguments, keywords):
        batch = keywords["ragged_batch"]
        seen.append((keywords["input_ids"].shape[1], batch.starts.tolist(), batch.lens.tolist()))

    hook = toy.target.model.register_forward_pre_hook(note, with_kwargs=True)
    networks = {"a": toy.drafter.network, "b": toy.drafter.network}
    found = round_seconds(toy.target, networks, 5, 20, repeats=3, warm_up=1)
    hook.remove()
    # Warm-up and repeats, of each drafter in turn; every one from the same state.
    assert seen == [(5 * (1 + BLOCK_SIZE), [20] * 5, [1 + BLOCK_SIZE] * 5)] * (2 * (1 + 3))
    for seconds in found.values():
        assert 0 < max(seconds.draft, seconds.verify) < seconds.whole < 10
        assert np.isfinite([seconds.draft, seconds.verify]).all()


@pytest.mark.parametrize(
    ("num_requests", "context_len", "repeats", "message"),
    [(0, 20, 1, "num_requests is 0"), (2, COMMITTED - 1, 1, "context_len is 3"), (2, 20, 0, "repeats is 0")],
)
def test_impossible_rounds_are_refused(num_requests, context_len, repeats, message):
    toy = Toy.make()
    with pytest.raises(UserError, match=message):
        round_seconds(toy.target, {"a": toy.drafter.network}, num_requests, context_len, repeats=repeats)
