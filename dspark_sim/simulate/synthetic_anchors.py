"""Anchors of synthetic outputs, so that the replay of recordings also runs a synthetic law.

Luck is keyed by (seed, output, anchor): it depends neither on the policy nor on how many requests there are or how
long the others are, so policies meet the same luck and differences are paired. As many outputs are generated as fit
`max_rows` anchors. While every request can have its own, it has; beyond that a bank of outputs is drawn from with
replacement, each request beginning at a random anchor of the output it drew (the anchors of an output are
exchangeable). Memory is then that of the bank plus a few hundred bytes a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtri

from dspark_sim.errors import UserError
from dspark_sim.simulate.acceptance import FloatArray, IntArray, RecordedAnchors, RecordedPrompt
from dspark_sim.simulate.synthetic import SyntheticAcceptance
from dspark_sim.trace import Trace

MAX_ROWS = 2**19
MIN_OUTPUTS = 256
"""Of a bank: with fewer, the spread of requests would hang on a handful of draws."""

# Purposes of random numbers.
_BANK, _DRAW, _OUTPUT = 1, 2, 3


def synthetic_anchors(
    law: SyntheticAcceptance | Mapping[str, SyntheticAcceptance],
    num_requests: int,
    *,
    domains: Sequence[str] | None = None,
    prompt_len: npt.ArrayLike = 1000,
    output_len: npt.ArrayLike = 250,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> RecordedAnchors:
    """Anchors of requests whose acceptance follows a law.

    Parameters
    ----------
    law
        The law, or one for each domain.
    num_requests
        Requests; number i gets its own luck, keyed by i.
    domains
        Domain of every request, where there are several laws.
    prompt_len, output_len
        Tokens, one number for all requests or one for each. Every output ends by its length.
    seed
        Of all random numbers.
    max_rows
        Most anchors to generate for a law (at least 256 outputs are).

    Returns
    -------
    RecordedAnchors
        With true acceptance probabilities and without tokens (-1). `request_prompts` holds one name a request.

    Raises
    ------
    UserError
        If a number is out of range, or the laws differ in what a run has once (block size, confidences, mode).
    """
    if num_requests < 1:
        raise UserError(f"num_requests is {num_requests}; simulate at least 1 request")
    if seed < 0:
        raise UserError(f"seed is {seed}; give a whole number of at least 0")
    laws = {law.domain: law} if isinstance(law, SyntheticAcceptance) else dict(law)
    prompt_lens = _per_request("prompt_len", prompt_len, num_requests)
    output_lens = _per_request("output_len", output_len, num_requests)
    owners = _owners(laws, domains, num_requests)
    first = _same(laws)
    parts: list[tuple[FloatArray, FloatArray, IntArray]] = []
    first_row = np.zeros(num_requests, dtype=np.int64)
    num_outputs: dict[str, int] = {}
    num_rows = 0
    for place, (domain, one) in enumerate(laws.items()):
        mine = np.flatnonzero(owners == place)
        if not mine.size:
            continue
        width = max(int(output_lens[mine].max()) - 1, 1)
        if mine.size <= max(MIN_OUTPUTS, max_rows // width):
            draws = np.array([np.random.default_rng((seed, _OUTPUT, i)).random() for i in mine.tolist()])
            effects, keys = ndtri(draws), mine
            starts = np.arange(mine.size, dtype=np.int64) * width
        else:
            size = max(MIN_OUTPUTS, max_rows // width)
            rng = np.random.default_rng((seed, _BANK, place))
            # One in each of as many equally likely parts: the bank's spread is the law's.
            effects, keys = ndtri((rng.permutation(size) + rng.random(size)) / size), np.arange(size)
            drawn = np.random.default_rng((seed, _DRAW)).random((num_requests, 2))[mine]
            slack = width - np.maximum(output_lens[mine] - 1, 0) + 1
            starts = (drawn[:, 0] * size).astype(np.int64) * width + (drawn[:, 1] * slack).astype(np.int64)
        parts.append(_blocks(one, one.difficulty_sd * effects, keys, width, seed))
        first_row[mine] = num_rows + starts
        num_rows += effects.size * width
        num_outputs[domain] = int(effects.size)
    accept_prob, confidence, num_accepted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = list(laws)
    request_prompts = tuple(f"synthetic-{i}" for i in range(num_requests))
    columns = (request_prompts, owners.tolist(), prompt_lens.tolist(), output_lens.tolist(), first_row.tolist())
    prompts = {
        name: RecordedPrompt(name, names[owner], prompt, output, output, "length", row)
        for name, owner, prompt, output, row in zip(*columns, strict=True)
    }
    shape = (num_rows, first.block_size)
    return RecordedAnchors(
        prompts=prompts,
        request_prompts=request_prompts,
        num_accepted=num_accepted,
        draft_len=np.full(num_rows, first.block_size, dtype=np.int64),
        draft_tokens=np.broadcast_to(np.int32(-1), shape),
        confidence=np.broadcast_to(np.nan, shape) if first.confidence is None else confidence,
        has_confidence=first.confidence is not None,
        mode=first.mode,
        accept_prob=accept_prob,
        source={
            "kind": "synthetic",
            "num_outputs": num_outputs,
            "laws": {domain: one.to_json() for domain, one in laws.items()},
            "seed": seed,
        },
    )


def _blocks(
    law: SyntheticAcceptance, effects: FloatArray, keys: IntArray, width: int, seed: int
) -> tuple[FloatArray, FloatArray, IntArray]:
    """True acceptance [T, γ], confidence [T, γ] and accepted drafts [T] of outputs, one an effect; T = n · width."""
    gamma = law.block_size
    shape = (effects.size * width, gamma)
    accept_prob = np.empty(shape)
    confidence = np.empty(shape if law.confidence is not None else (shape[0], 0))
    num_accepted = np.empty(shape[0], dtype=np.int64)
    theta = law.logits
    if law.confidence is not None:
        scale, shift, noise_sd = law.confidence.per_position(gamma)
    for place, (effect, key) in enumerate(zip(effects.tolist(), keys.tolist(), strict=True)):
        rows = slice(place * width, (place + 1) * width)
        # The columns of a row do not depend on the law: another spread or confidence meets the same luck.
        luck = np.random.default_rng((seed, _OUTPUT, key, 1)).random((width, 1 + 3 * gamma))
        x = theta + effect
        if law.anchor_sd:
            x = x + law.anchor_sd * ndtri(luck[:, :1])
        if law.position_sd:
            x = x + law.position_sd * ndtri(luck[:, 1 : 1 + gamma])
        chance = np.broadcast_to(expit(x), (width, gamma))
        accept_prob[rows] = chance
        accepted = luck[:, 1 + 2 * gamma :] < chance
        num_accepted[rows] = np.logical_and.accumulate(accepted, axis=1).sum(axis=1)
        if law.confidence is not None:
            seen = scale * x + shift
            if noise_sd.any():
                seen = seen + noise_sd * ndtri(luck[:, 1 + gamma : 1 + 2 * gamma])
            confidence[rows] = expit(seen)
    return accept_prob, confidence, num_accepted


def as_anchors(
    source: Trace | RecordedAnchors | SyntheticAcceptance, num_requests: int | None, seed: int
) -> RecordedAnchors:
    """What a run replays: a recording as it is, a law's requests generated (1000 prompt and 250 output tokens).

    Raises
    ------
    UserError
        If a law is given and not how many requests, or a trace has no anchors.
    """
    if isinstance(source, Trace):
        return RecordedAnchors.from_trace(source)
    if isinstance(source, RecordedAnchors):
        return source
    if num_requests is None:
        raise UserError("a synthetic law has no recorded requests to serve once; give num_requests")
    return synthetic_anchors(source, num_requests, seed=seed)


def _per_request(name: str, values: npt.ArrayLike, num_requests: int) -> IntArray:
    given = np.asarray(values)
    if given.ndim > 1 or given.size not in (1, num_requests):
        raise UserError(f"{name} has shape {given.shape}; give one number, or one for each of {num_requests} requests")
    if not np.issubdtype(given.dtype, np.integer) or given.min() < 1:
        raise UserError(f"{name} has {given.min()}; every length is a whole number of at least 1 token")
    return np.broadcast_to(given.reshape(-1), (num_requests,)).astype(np.int64)


def _owners(laws: Mapping[str, SyntheticAcceptance], domains: Sequence[str] | None, num_requests: int) -> IntArray:
    """Place of every request's law, [num_requests]."""
    if not laws:
        raise UserError("there is no synthetic law; give at least one")
    if domains is None:
        if len(laws) > 1:
            raise UserError(f"there are {len(laws)} laws ({', '.join(laws)}); give the domain of every request")
        return np.zeros(num_requests, dtype=np.int64)
    if len(domains) != num_requests:
        raise UserError(f"there are {len(domains)} domains for {num_requests} requests; give one for each")
    places = {domain: place for place, domain in enumerate(laws)}
    unknown = sorted(set(domains) - set(places))
    if unknown:
        raise UserError(f"there is no law for domain {unknown[0]}; give one, or choose of {', '.join(laws)}")
    return np.array([places[domain] for domain in domains], dtype=np.int64)


def _same(laws: Mapping[str, SyntheticAcceptance]) -> SyntheticAcceptance:
    """The first law, once the others agree in block size, mode and whether there are confidences."""
    facts = {(law.block_size, law.mode, law.confidence is not None) for law in laws.values()}
    if len(facts) > 1:
        raise UserError("the laws of a run must agree in block size, mode and whether there are confidences")
    return next(iter(laws.values()))
