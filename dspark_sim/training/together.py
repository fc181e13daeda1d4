"""Several block drafters trained side by side on the same batches, with one pass of the target for all of them.

What a comparison of drafters asks for: the same text, sequences, anchors, updates and learning rates, so that they
differ in what is compared alone (layers, head, proposal length). The target's pass and its law are the larger part of
an update of a small drafter, and are had once. Blocks of different lengths stand at the same anchors: the law is made
for the longest block, and shorter ones read its first slots. Each drafter's run is that of `trainer.train` on this
text, is saved to its own folder, and can be resumed there; those that are behind catch up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

from dspark_sim.engine.models import load_target
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.training.build import new_drafter
from dspark_sim.training.config import TrainConfig
from dspark_sim.training.data import Batch, Batches, Packed, frequent_tokens, pack, text_digest, valid_slots
from dspark_sim.training.evaluation import evaluate
from dspark_sim.training.losses import Norm
from dspark_sim.training.parallel import processes
from dspark_sim.training.trainer import TargetStates, Trainer, training_text

OWN = ("out", "drafter", "block_size", "num_layers", "intermediate_size", "markov_rank", "markov_head_type")
"""Settings in which drafters that are trained together may differ."""


def train_together(configs: Sequence[TrainConfig], longest_block: int | None = None) -> list[Path]:
    """Train several block drafters on the same batches, evaluate and save them; returns their folders.

    Parameters
    ----------
    configs
        They may differ in the settings of `OWN`.
    longest_block
        Answers must be longer than so many tokens, so that separate calls with other blocks read the same text; at
        least the longest `block_size`, which ``None`` means.

    Raises
    ------
    UserError
        If two differ in anything else or share a folder, one is no block drafter, or as `trainer.train`.
    """
    longest = _require_alike(configs, longest_block)
    shared = replace(configs[0], block_size=longest)
    with processes(shared.device) as group:
        if group.world > 1:
            raise UserError(f"{group.world} processes were started; start one for each set of drafters, by itself")
        target = load_target(shared.target, dtype=shared.dtype, device=str(group.device))
        train_set, held_out = training_text(shared, target, group)
        size, text = shared.draft_vocab_size, text_digest(train_set)
        ids = frequent_tokens(train_set, target.config.vocab_size, size) if size else None
        trainers = [
            Trainer(config, target, new_drafter(config, target, ids), Path(config.out), group, text)
            for config in configs
        ]
        batches = Batches(train_set, shared.sequences_per_update, shared.anchors_per_sequence, shared.seed)
        done = [trainer.resume() for trainer in trainers]
        begin, end = min(done), shared.num_updates
        for update in tqdm(
            range(begin, end), initial=begin, total=end, unit="update", desc=f"train {len(trainers)} drafters"
        ):
            start = perf_counter()
            batch = batches.of(update)
            packed = pack(batch, longest, group.device)
            states = trainers[0].target_states(packed)
            behind = [trainer for trainer, number in zip(trainers, done, strict=True) if number <= update]
            share = (perf_counter() - start) / len(behind)
            for trainer in behind:
                values = trainer.step(update, partial(_gradients, trainer, batch, packed, states))
                trainer.seconds += share
                last = update + 1 == end
                with explain_os_errors(trainer.out, "write"):
                    if last or (update + 1) % shared.eval_every == 0:
                        read = trainer.read(update, values)
                        trainer.note(update + 1, {**read, **evaluate(trainer.drafter, target, held_out)})
                    if last or (update + 1) % shared.save_every == 0:
                        trainer.save(update + 1)
    return [trainer.out for trainer in trainers]


def _gradients(trainer: Trainer, batch: Batch, packed: Packed, states: TargetStates) -> torch.Tensor:
    """Add an update's gradients to a drafter's weights, from blocks that may be longer than its own."""
    gamma = trainer.config.block_size
    terms = trainer.loss(packed.first_slots(gamma), Norm.of(valid_slots(batch, gamma)), states)
    terms.loss.backward()
    return terms.values()


def _require_alike(configs: Sequence[TrainConfig], longest_block: int | None) -> int:
    """The longest block, after checking that the drafters can share batches and the target's pass."""
    if not configs:
        raise UserError("zero drafters to train; give at least one configuration")
    expected = _shared(configs[0])
    for config in configs:
        if config.drafter not in ("dspark", "dflash"):
            raise UserError(f"drafter {config.drafter} is no block drafter; train it alone with `dspark-sim train`")
        if config.accumulate != 1:
            raise UserError(f"accumulate is {config.accumulate}; drafters trained together need 1")
        for name, value in _shared(config).items():
            if value != expected[name]:
                raise UserError(
                    f"{name} is {value} for one drafter and {expected[name]} for another; drafters trained together "
                    "share it"
                )
    if len({Path(config.out) for config in configs}) < len(configs):
        raise UserError("two drafters have the same folder; give each its own")
    longest = max(config.block_size for config in configs)
    if longest_block is not None and longest_block < longest:
        raise UserError(f"longest_block is {longest_block} and a drafter has blocks of {longest}; raise it")
    return longest_block or longest


def _shared(config: TrainConfig) -> dict[str, object]:
    return {name: value for name, value in asdict(config).items() if name not in OWN}
