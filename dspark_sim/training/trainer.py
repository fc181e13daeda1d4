"""Training a drafter on self-synthesised text, with target states computed on the fly.

One update sees whole sequences; a sequence's blocks at many anchors share one pass, in which the context's keys are
held once however many anchors see them. The target's law is computed once for each distinct position. Matrices are
updated by Muon, the rest by AdamW (both torch's). A run can be stopped and resumed: weights and optimiser state are
safetensors files, and the order of data and anchors is keyed by (seed, update), so a resumed run meets the same
batches. Splitting an update into passes (`accumulate`) or over processes (torchrun) changes nothing but rounding.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dspark_sim.engine.drafters.checkpoint import save_drafter
from dspark_sim.engine.drafters.dense import dense_target, teacher_forced
from dspark_sim.engine.models import Target, load_target
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file
from dspark_sim.training.build import AnyDrafter, new_drafter
from dspark_sim.training.config import TrainConfig
from dspark_sim.training.data import (
    Batch,
    Batches,
    Packed,
    Sequence,
    frequent_tokens,
    pack,
    read_sequences,
    split_held_out,
    text_digest,
    valid_slots,
    without_prompts,
)
from dspark_sim.training.evaluation import evaluate
from dspark_sim.training.losses import LossTerms, Norm, dspark_loss
from dspark_sim.training.parallel import Processes, processes
from dspark_sim.workload import bundled_prompts

# Settings that do not change what is learned.
_ELSEWHERE = ("out", "data", "device", "accumulate")
# Logits of the target that are held at a time.
_HEAD_ENTRIES = 1 << 28


def train(config: TrainConfig) -> Path:
    """Train, evaluate and save a drafter; returns its folder.

    Under torchrun every process calls this; the first one writes.

    Raises
    ------
    UserError
        If the data or an interrupted run's state does not fit the configuration, or the loss is no number.
    """
    out = Path(config.out)
    with processes(config.device) as group:
        share = group.world * config.accumulate
        if share > config.sequences_per_update:
            raise UserError(
                f"sequences_per_update is {config.sequences_per_update} and {group.world} processes with accumulate "
                f"{config.accumulate} need at least {share}; raise it, or start fewer processes"
            )
        target = load_target(config.target, dtype=config.dtype, device=str(group.device))
        train_set, held_out = training_text(config, target, group)
        size = config.draft_vocab_size
        ids = frequent_tokens(train_set, target.config.vocab_size, size) if size else None
        trainer = Trainer(config, target, new_drafter(config, target, ids), out, group, text_digest(train_set))
        batches = Batches(train_set, config.sequences_per_update, config.anchors_per_sequence, config.seed)
        start = trainer.resume()
        with (
            explain_os_errors(out, "write"),
            tqdm(
                total=config.num_updates,
                initial=start,
                unit="update",
                desc=f"train {out.name}",
                disable=not group.is_first,
            ) as bar,
        ):
            for update in range(start, config.num_updates):
                values = trainer.update(update, batches.of(update))
                if update % 20 == 0:
                    # The only place, evaluations aside, where the host waits for the device.
                    read = trainer.read(update, values)
                    bar.set_postfix(loss=f"{read['loss']:.3f}", acceptance=f"{read['expected_acceptance']:.3f}")
                last = update + 1 == config.num_updates
                if last or (update + 1) % config.eval_every == 0:
                    read = trainer.read(update, values)
                    trainer.note(update + 1, {**read, **evaluate(trainer.drafter, target, held_out, group)})
                if last or (update + 1) % config.save_every == 0:
                    trainer.save(update + 1)
                bar.update()
    return out


def training_text(config: TrainConfig, target: Target, group: Processes) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences to train on and held-out ones, neither with a bundled evaluation prompt."""

    def say(line: str) -> None:
        if group.is_first:
            print(line, flush=True)

    read = read_sequences(config.files, config.max_len, config.block_size, say)
    sequences = without_prompts(read, (target.encode(prompt.turns[0]) for prompt in bundled_prompts()))
    train_set, held_out = split_held_out(sequences, config.holdout)
    say(
        f"{len(train_set)} sequences to train on and {len(held_out)} held out; {len(read) - len(sequences)} dropped, "
        "because they answer an evaluation prompt."
    )
    return train_set, held_out


@dataclass(slots=True)
class TargetStates:
    """What the target says of a part of a batch.

    Parameters
    ----------
    features
        [S, L, n·d] outputs of the layers that the drafter reads.
    probs
        [P, Vd] float32 laws at the distinct positions of `Packed.places`.
    """

    features: torch.Tensor
    probs: torch.Tensor


class Trainer:
    """Drafter, optimisers and files of one run."""

    def __init__(
        self,
        config: TrainConfig,
        target: Target,
        drafter: AnyDrafter,
        out: Path,
        group: Processes | None = None,
        text: str = "",
    ) -> None:
        self.text = text
        self.config, self.target, self.drafter, self.out = config, target, drafter, out
        self.group = group or Processes(0, 1, target.device)
        named = dict(drafter.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and not n.startswith(("markov_head", "confidence"))}
        others = {n: p for n, p in named.items() if n not in matrices}
        muon = torch.optim.Muon(matrices.values(), lr=config.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        fused = True if target.device.type == "cuda" else None
        adam = torch.optim.AdamW(others.values(), lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.groups = (("muon", muon, list(matrices), config.muon_lr), ("adam", adam, list(others), config.adam_lr))
        self.seconds = 0.0

    def update(self, update: int, batch: Batch) -> torch.Tensor:
        """One optimiser step; returns the loss's terms of the whole update, [5] on the device."""
        return self.step(update, lambda: self.gradients(batch))

    def step(self, update: int, gradients: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One optimiser step; `gradients` adds them to the weights, and what it returns is returned."""
        start = perf_counter()
        scale = self._schedule(update)
        for _, optimiser, _, rate in self.groups:
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            optimiser.zero_grad(set_to_none=True)
        values = gradients()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        for _, optimiser, _, _ in self.groups:
            optimiser.step()
        self.seconds += perf_counter() - start
        return values

    def gradients(self, batch: Batch) -> torch.Tensor:
        """Add an update's gradients to the weights, over its passes and all processes; returns the terms [5]."""
        norm = Norm.of(valid_slots(batch, self.config.block_size))
        values = torch.zeros(5, dtype=torch.float64, device=self.target.device)
        for part in self._parts(batch):
            packed = pack(part, self.config.block_size, self.target.device)
            terms = self.loss(packed, norm, self.target_states(packed))
            terms.loss.backward()
            values += terms.values()
        self.group.add_up([p.grad for p in self.drafter.parameters() if p.grad is not None])
        self.group.add_up([values])
        return values

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Passes of this process: every n-th sequence, so that all have the same lengths to work on."""
        world, passes = self.group.world, self.config.accumulate
        for number in range(passes):
            yield batch[self.group.rank + number * world :: world * passes]

    def _schedule(self, update: int) -> float:
        warm = max(1, int(self.config.warmup * self.config.num_updates))
        progress = update / max(1, self.config.num_updates)
        return min(1.0, (update + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def target_states(self, packed: Packed) -> TargetStates:
        """What the target says of a part of a batch; any drafter of the same layers and vocabulary may use it."""
        final, features = dense_target(self.target, packed.tokens, self.drafter.config.target_layer_ids)
        return TargetStates(features, self._target_probs(final.flatten(0, 1)[packed.places]))

    def loss(self, packed: Packed, norm: Norm, states: TargetStates) -> LossTerms:
        """Loss of a part of a batch, from what the target says of it."""
        drafter, device = self.drafter, self.target.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            draft_logits, judged = teacher_forced(drafter, packed.tokens, states.features, packed.anchors)
        labels = drafter.target_to_draft[packed.following]
        labels = labels.masked_fill(labels == drafter.config.head_size, -100)
        return dspark_loss(
            draft_logits.flatten(0, 1),
            states.probs,
            labels.flatten(0, 1),
            None if judged is None else judged.flatten(0, 1),
            packed.valid.flatten(0, 1),
            rows=packed.rows.flatten(0, 1),
            norm=norm,
        )

    @torch.no_grad()
    def _target_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [P, d] to float32 probabilities [P, Vd] of the draft vocabulary, normed over all of it.

        The head is applied to some positions at a time.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        config = self.drafter.config
        probs = torch.empty((len(hidden), config.head_size), dtype=wide, device=hidden.device)
        size = max(1, _HEAD_ENTRIES // config.vocab_size)
        for part, out in zip(hidden.split(size), probs.split(size), strict=True):
            logits = self.target.head(part)
            norm = logits.to(wide).logsumexp(dim=-1, keepdim=True)
            chosen = logits[:, self.drafter.draft_token_ids] if config.draft_vocab_size else logits
            torch.exp(chosen.to(wide) - norm, out=out)
        return probs

    def read(self, update: int, values: torch.Tensor) -> dict[str, float]:
        """Terms of the loss by name; waits for the device.

        Raises
        ------
        UserError
            If the loss is no number.
        """
        start = perf_counter()
        names = ("loss", "cross_entropy", "distance", "confidence", "expected_acceptance")
        read = dict(zip(names, values.tolist(), strict=True))
        self.seconds += perf_counter() - start
        if not math.isfinite(read["loss"]):
            raise UserError(f"the loss is {read['loss']} at update {update + 1}; lower muon_lr and adam_lr")
        return read

    def note(self, update: int, row: dict[str, float]) -> None:
        """Append a row to the learning curve."""
        if not self.group.is_first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "learning_curve.csv"
        rounded = {name: round(value, 5) for name, value in row.items()}
        whole = {"update": update, "seconds": round(self.seconds, 1), **rounded}
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(whole))
            if new:
                writer.writeheader()
            writer.writerow(whole)

    def save(self, update: int) -> None:
        """Write the drafter and what a resumed run needs."""
        if not self.group.is_first:
            return
        settings = {k: v for k, v in self.config.applicable().items() if k not in _ELSEWHERE}
        notes = {"updates_done": update, "seconds": round(self.seconds, 1), "text_sha256": self.text, **settings}
        save_drafter(self.drafter, self.out, notes)
        state = {f"weights.{name}": p.detach().cpu() for name, p in self.drafter.named_parameters()}
        for prefix, optimiser, names, _ in self.groups:
            for index, entry in optimiser.state_dict()["state"].items():
                for key, value in entry.items():
                    state[f"{prefix}.{names[index]}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        with whole_file(self.out / "state.safetensors") as partial:
            run = {"config": self._key(), "text": self.text}
            save_file(state, partial, {"update": str(update), "seconds": str(self.seconds), **run})

    def _key(self) -> str:
        return json.dumps({k: v for k, v in asdict(self.config).items() if k not in _ELSEWHERE})

    def resume(self) -> int:
        """Updates done by an interrupted run in the same folder, after loading its state; else 0."""
        path = self.out / "state.safetensors"
        if not path.is_file():
            return 0
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        if notes.get("text") != self.text:
            raise UserError(f"{self.out} holds a run on other text; give that text, or choose another folder")
        if notes.get("config") != self._key():
            raise UserError(f"{self.out} holds a run with other settings; choose another folder or remove it")
        state = load_file(path)
        with torch.no_grad():
            for name, parameter in self.drafter.named_parameters():
                parameter.copy_(state[f"weights.{name}"])
        for prefix, optimiser, names, _ in self.groups:
            loaded = optimiser.state_dict()
            for index, name in enumerate(names):
                start = f"{prefix}.{name}."
                entry = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
                if entry:
                    loaded["state"][index] = entry
            optimiser.load_state_dict(loaded)
        self.seconds = float(notes["seconds"])
        update = int(notes["update"])
        if self.group.is_first:
            self._forget_after(update)
        return update

    def _forget_after(self, update: int) -> None:
        """Drop rows of the learning curve that the interrupted run wrote after its last saved state."""
        path = self.out / "learning_curve.csv"
        if path.is_file():
            header, *rows = path.read_text().splitlines()
            kept = [row for row in rows if int(row.partition(",")[0]) <= update]
            path.write_text("\n".join([header, *kept]) + "\n")
