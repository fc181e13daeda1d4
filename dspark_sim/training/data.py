"""What an update sees: sequences of like length, anchors in them, and the slots behind the anchors.

Everything here is numpy on the host and a pure function of the data, the seed and the number of the update, so that
a resumed run, and every process of a parallel one, meets the same batches. `pack` brings a part of a batch to the
device in one copy, and nothing of it is read back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dspark_sim.errors import UserError
from dspark_sim.training.corpus import read_corpus, rows_of

# Batches whose sequences are sorted by length together.
_WINDOW = 16


@dataclass(eq=False)
class Sequence:
    """One conversation: token ids [L], where the answer starts, and the temperature it was drawn at."""

    tokens: np.ndarray
    prompt_len: int
    temperature: float

    @property
    def prompt(self) -> bytes:
        """The prompt's token ids, as little-endian int32."""
        return self.tokens[: self.prompt_len].astype("<i4").tobytes()


Batch = list[tuple[Sequence, np.ndarray]]


def read_sequences(
    files: Path | str | Iterable[Path | str], max_len: int, block_size: int, say: Callable[[str], object] = print
) -> list[Sequence]:
    """Conversations of synthesis files, cut to `max_len`; those with too short an answer are left out.

    Raises
    ------
    UserError
        If a file is missing, damaged or not what was written, or nothing usable is left.
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    usable = []
    for path in paths:
        table, _ = read_corpus(path, say)
        for (tokens, prompt_len), temperature in zip(rows_of(table), table["temperature"].to_numpy(), strict=True):
            if min(len(tokens), max_len) - prompt_len > block_size + 1:
                usable.append(Sequence(tokens[:max_len].astype(np.int64), prompt_len, float(temperature)))
    if not usable:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names} has no answer longer than a block of {block_size}; synthesise longer answers")
    return usable


def text_digest(sequences: Iterable[Sequence]) -> str:
    """SHA-256 of the sequences in their order, where their answers start, and at what temperature they were drawn."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.array([sequence.tokens.size, sequence.prompt_len], dtype="<i8").tobytes())
        digest.update(np.array([sequence.temperature], dtype="<f8").tobytes())
        digest.update(sequence.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def without_prompts(sequences: list[Sequence], prompts: Iterable[list[int]]) -> list[Sequence]:
    """The sequences that do not answer one of the given prompts (token ids)."""
    known = {np.array(prompt, dtype="<i4").tobytes() for prompt in prompts}
    return [sequence for sequence in sequences if sequence.prompt not in known]


def split_held_out(sequences: list[Sequence], holdout: int) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences to train on, and those with one of the `holdout` prompts whose keyed hashes are smallest.

    A prompt's side depends on the set of prompts alone: neither on the order of sequences nor on the seed.

    Raises
    ------
    UserError
        If there are fewer than twice as many prompts.
    """
    hashes = {
        sequence.prompt: hashlib.blake2b(sequence.prompt, key=b"dspark_sim held-out prompts", digest_size=16).digest()
        for sequence in sequences
    }
    if len(hashes) < 2 * holdout:
        raise UserError(
            f"the training text has {len(hashes)} prompts; holdout {holdout} needs twice as many: lower it, or "
            "synthesise more"
        )
    chosen = set(sorted(hashes, key=lambda prompt: hashes[prompt])[:holdout])
    held_out = sorted((s for s in sequences if s.prompt in chosen), key=lambda s: hashes[s.prompt])
    return [sequence for sequence in sequences if sequence.prompt not in chosen], held_out


def frequent_tokens(sequences: list[Sequence], vocab_size: int, size: int) -> torch.Tensor:
    """Ascending ids of the `size` tokens that answers use most."""
    answers = np.concatenate([sequence.tokens[sequence.prompt_len :] for sequence in sequences])
    counts = np.bincount(answers, minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


class Batches:
    """The batches of a run.

    Parameters
    ----------
    train_set
        Sequences.
    size, num_anchors
        Sequences of a batch and anchors of each.
    seed
        Of order and anchors.

    Raises
    ------
    UserError
        If there are fewer sequences than a batch takes.
    """

    def __init__(self, train_set: list[Sequence], size: int, num_anchors: int, seed: int) -> None:
        if len(train_set) < size:
            raise UserError(
                f"there are {len(train_set)} sequences to train on and an update takes {size}; lower "
                "sequences_per_update, or synthesise more"
            )
        self._train_set, self._size, self._num_anchors, self._seed = train_set, size, num_anchors, seed
        self._lens = np.array([len(sequence.tokens) for sequence in train_set])
        self._epoch: tuple[int, np.ndarray] | None = None

    def of(self, update: int) -> Batch:
        """Sequences and sorted anchors [M] of an update; a pure function of (seed, update)."""
        epoch, index = divmod(update, len(self._train_set) // self._size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        rng = np.random.default_rng([self._seed, 2, update])
        batch = []
        for number in self._epoch[1][index]:
            sequence = self._train_set[number]
            # The last anchor still has one token to predict.
            choices = np.arange(sequence.prompt_len, len(sequence.tokens) - 1)
            anchors = rng.choice(choices, self._num_anchors, replace=len(choices) < self._num_anchors)
            batch.append((sequence, np.sort(anchors)))
        return batch

    def _order(self, epoch: int) -> np.ndarray:
        """Sequences of each batch of an epoch, [batches, size]; those of a batch are of like length."""
        rng = np.random.default_rng([self._seed, 1, epoch])
        num_batches = len(self._train_set) // self._size
        order = rng.permutation(len(self._train_set))[: num_batches * self._size]
        for start in range(0, len(order), _WINDOW * self._size):
            window = order[start : start + _WINDOW * self._size]
            window[:] = window[np.argsort(self._lens[window], kind="stable")]
        return order.reshape(num_batches, self._size)[rng.permutation(num_batches)]


def valid_slots(batch: Batch, block_size: int) -> np.ndarray:
    """Which slots lie inside their sequences, [S·M, γ]."""
    behind = 1 + np.arange(block_size)
    return np.concatenate([anchors[:, None] + behind < len(sequence.tokens) for sequence, anchors in batch])


@dataclass(slots=True)
class Packed:
    """A part of a batch on the device.

    Parameters
    ----------
    tokens
        [S, L], right-padded with 0.
    anchors
        [S, M].
    valid
        [S, M, γ], whether a slot lies inside its sequence.
    following
        [S, M, γ] token that slot k of anchor a predicts, that at a + 1 + k; 0 where not valid.
    places
        [P] distinct positions a + k whose target law valid slots are compared with, as indices into [S·L].
    rows
        [S, M, γ] row of `places` for each slot; 0 where not valid.
    """

    tokens: torch.Tensor
    anchors: torch.Tensor
    valid: torch.Tensor
    following: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor

    def first_slots(self, block_size: int) -> Packed:
        """The same anchors with the first slots of their blocks alone; `places` stay."""
        valid, following, rows = (part[..., :block_size] for part in (self.valid, self.following, self.rows))
        return Packed(self.tokens, self.anchors, valid, following, self.places, rows)


def pack(batch: Batch, block_size: int, device: torch.device) -> Packed:
    """Lay out a part of a batch and copy it to the device without waiting for the copy."""
    length = max(len(sequence.tokens) for sequence, _ in batch)
    # Attention kernels of GPUs want a mask of aligned rows.
    length = -(-length // 16) * 16 if device.type == "cuda" else length
    tokens = np.zeros((len(batch), length), dtype=np.int64)
    for row, (sequence, _) in enumerate(batch):
        tokens[row, : len(sequence.tokens)] = sequence.tokens
    anchors = np.stack([anchors for _, anchors in batch])
    shape = (*anchors.shape, block_size)
    valid = valid_slots(batch, block_size).reshape(shape)
    slots = np.where(valid, anchors[..., None] + np.arange(block_size), 0)
    flat = slots + length * np.arange(len(batch))[:, None, None]
    following = np.where(valid, tokens.ravel()[flat + 1], 0)
    seen = np.zeros(tokens.size, dtype=bool)
    seen[flat[valid]] = True
    rows = np.where(valid, (np.cumsum(seen) - 1)[flat], 0)
    arrays = (tokens, anchors, valid.astype(np.int64), following, np.flatnonzero(seen), rows)
    together = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    parts = together.split([array.size for array in arrays])
    shaped = [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
    return Packed(shaped[0], shaped[1], shaped[2] != 0, *shaped[3:])
