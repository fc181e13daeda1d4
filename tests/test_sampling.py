"""Laws of the keyed random numbers and of sampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

torch = pytest.importorskip("torch")

from dspark_sim.engine.sampling import (  # noqa: E402
    SamplingParams,
    draw,
    keyed_exponential,
    keyed_uniform,
    probabilities,
    race,
)
from dspark_sim.errors import UserError  # noqa: E402

PURPOSES = ("draft", "accept", "residual", "bonus", "gumbel", "replay_draft", "replay_accept")


@given(
    seed=st.integers(0, 2**64 - 1),
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=8),
    position=st.integers(0, 2**31),
    purpose=st.sampled_from(PURPOSES),
)
def test_a_uniform_depends_on_its_keys_alone(seed, ids, position, purpose):
    ids = np.array(ids)
    together = keyed_uniform(seed, ids, position, purpose)
    alone = [keyed_uniform(seed, np.array([one]), np.array([position]), purpose)[0] for one in ids]
    assert together.tolist() == alone
    assert ((together > 0) & (together < 1)).all()
    assert keyed_uniform(seed, ids[::-1], position, purpose).tolist() == alone[::-1]


def test_request_ids_and_positions_broadcast():
    ids, positions = np.arange(3), np.arange(5)
    table = keyed_uniform(7, ids[:, None], positions, "accept")
    assert table.shape == (3, 5)
    assert table[2, 3] == keyed_uniform(7, np.array([2]), np.array([3]), "accept")[0]


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("axis", ["request", "position", "seed"])
def test_uniforms_are_uniform_along_every_key(axis, purpose):
    keys = np.arange(20_000)
    if axis == "request":
        u = keyed_uniform(0, keys, 17, purpose)
    elif axis == "position":
        u = keyed_uniform(0, 17, keys, purpose)
    else:
        u = np.array([keyed_uniform(seed, 17, 17, purpose) for seed in range(5_000)])
    # 12 cases in this test; p above 1e-3 at a fixed seed.
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert np.unique(u).size == u.size


def test_purposes_positions_requests_and_seeds_are_uncorrelated():
    keys = np.arange(20_000)
    series = [keyed_uniform(0, keys, 17, purpose) for purpose in PURPOSES]
    series += [keyed_uniform(0, keys, 18, "draft"), keyed_uniform(0, keys + 1, 17, "draft")]
    series += [keyed_uniform(1, keys, 17, "draft"), keyed_uniform(0, 17, keys, "draft")]
    correlation = np.corrcoef(series)
    off = correlation[~np.eye(len(series), dtype=bool)]
    # The standard error is 1/sqrt(20000) = 0.007; 28 pairs.
    assert np.abs(off).max() < 4.5 / np.sqrt(keys.size)


def _naive_probabilities(logits, temperature, top_k, top_p):
    """One row, float64, token by token."""
    scaled = [value / temperature for value in logits]
    if 0 < top_k < len(scaled):
        floor = sorted(scaled, reverse=True)[top_k - 1]
        scaled = [value if value >= floor else -np.inf for value in scaled]
    weights = [np.exp(value - max(scaled)) for value in scaled]
    probs = [weight / sum(weights) for weight in weights]
    if top_p < 1:
        kept, mass = [], 0.0
        for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if mass >= top_p:
                break
            kept.append(index)
            mass += probs[index]
        total = sum(probs[index] for index in kept)
        probs = [probs[index] / total if index in kept else 0.0 for index in range(len(probs))]
    return probs


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 20),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_probabilities_equal_a_naive_loop(seed, size, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, (3, size)).astype(np.float32)
    params = SamplingParams(temperature, top_k, top_p)
    probs = probabilities(torch.from_numpy(logits), params)
    assert probs.dtype == torch.float32
    expected = [_naive_probabilities(row.astype(np.float64).tolist(), temperature, top_k, top_p) for row in logits]
    np.testing.assert_allclose(probs.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(probs.sum(-1).numpy(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_a_nucleus_of_more_tokens_than_are_tried_first(spread):
    """Rows whose nucleus has hundreds of tokens beside rows where a few do."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (4, 700)) * np.array([spread, 8.0, spread, 8.0])[:, None]
    probs = probabilities(torch.from_numpy(logits.astype(np.float32)), SamplingParams(1.0, top_p=0.97)).numpy()
    expected = np.array([_naive_probabilities(row.tolist(), 1.0, 0, 0.97) for row in logits.astype(np.float32)])
    assert (expected[0] > 0).sum() > 256 or spread == 3.0
    assert (expected[1] > 0).sum() < 256
    if spread:
        np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-6)
    else:
        # All tokens of the flat rows are tied; which of them are kept is open, how many is not.
        np.testing.assert_allclose(np.sort(probs, axis=1), np.sort(expected, axis=1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        SamplingParams(**values)


def test_draws_follow_the_weights():
    law = np.array([0.05, 0.0, 0.4, 0.15, 0.3, 0.1])
    # Twice the law: weights need not sum to one.
    weights = torch.from_numpy(2 * law).float().expand(40_000, -1)
    tokens = draw(weights, keyed_uniform(0, np.arange(40_000), 3, "bonus")).numpy()
    counts = np.bincount(tokens, minlength=law.size)
    assert counts[1] == 0
    kept = law > 0
    assert stats.chisquare(counts[kept], 40_000 * law[kept]).pvalue > 1e-3


def test_a_draw_inverts_the_cumulative_sum():
    weights = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])
    for u, token in ((1e-12, 0), (0.2499, 0), (0.2501, 2), (0.7499, 2), (0.7501, 3), (1 - 2.0**-54, 3)):
        assert draw(weights, np.array([u])).item() == token


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), zeros=st.integers(0, 10), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_a_token_without_weight_is_never_drawn(seed, zeros, scale):
    rng = np.random.default_rng(seed)
    weights = (rng.random(11) * scale).astype(np.float32)
    weights[rng.permutation(11)[:zeros]] = 0.0
    weights[-1 - zeros // 2 :] = 0.0 if (weights[: -1 - zeros // 2] > 0).any() else weights[-1 - zeros // 2 :]
    uniforms = np.array([0.0, 2.0**-54, 0.5, 1 - 2.0**-53, np.nextafter(1.0, 0.0), 1.0])
    tokens = draw(torch.from_numpy(weights).expand(len(uniforms), -1), uniforms).numpy()
    assert (weights[tokens] > 0).all()
    assert tokens[-1] == np.flatnonzero(weights)[-1]


def test_slots_of_a_block_are_uniform_and_uncorrelated():
    u = keyed_uniform(0, np.arange(4000)[:, None], 17, "draft", np.arange(6))
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(u.T)
    assert np.abs(correlation[~np.eye(6, dtype=bool)]).max() < 4.5 / np.sqrt(4000)


def test_noise_is_exponential_and_keyed_by_token():
    ids = torch.arange(50)
    noise = keyed_exponential(3, np.arange(400), np.full(400, 9), ids)
    assert stats.kstest(noise.numpy().ravel(), "expon").pvalue > 1e-3
    assert torch.equal(keyed_exponential(3, np.arange(400), np.full(400, 9), ids[7::3]), noise[:, 7::3])
    assert torch.equal(keyed_exponential(3, np.array([5]), np.array([9]), ids)[0], noise[5])
    correlation = np.corrcoef(noise[:, :12].numpy().T)
    assert np.abs(correlation[~np.eye(12, dtype=bool)]).max() < 4.5 / np.sqrt(400)


def test_a_race_draws_from_the_law_and_couples_two_laws():
    """The winner has the law of its probabilities; two racers meet between (1 - TV)/(1 + TV) and 1 - TV."""
    num = 40_000
    rng = np.random.default_rng(2)
    p, q = (torch.from_numpy(rng.dirichlet(np.ones(5))) for _ in range(2))
    noise = keyed_exponential(0, np.arange(num), np.full(num, 4), torch.arange(5))
    first, second = race(p.expand(num, -1), noise), race(q.expand(num, -1), noise)
    for law, winner in ((p, first), (q, second)):
        counts = np.bincount(winner.numpy(), minlength=5)
        assert stats.chisquare(counts, num * law.numpy()).pvalue > 1e-3
    distance = 0.5 * (p - q).abs().sum().item()
    met = (first == second).double().mean().item()
    error = 4 / np.sqrt(num)
    assert (1 - distance) / (1 + distance) - error < met < 1 - distance + error
