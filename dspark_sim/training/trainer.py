"""Training a block drafter on self-synthesised text, with target states computed on the fly.

One update sees a few whole sequences; a sequence's blocks at many anchors share one pass through a block mask.
Matrices are updated by Muon, the rest by AdamW (both torch's). A run can be stopped and resumed: weights and optimiser
state are safetensors files, and the order of data and anchors is keyed by (seed, update), so a resumed run meets the
same batches.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig
from dspark_sim.engine.drafters.checkpoint import save_drafter
from dspark_sim.engine.drafters.dense import dense_target, dense_walks, teacher_forced
from dspark_sim.engine.drafters.heads import greedy, run_head
from dspark_sim.engine.models import EMBEDDED, Target, load_target
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.training.losses import LossTerms, dspark_loss


@dataclass(frozen=True)
class TrainConfig:
    """Train a block drafter (DSpark, or DFlash with `markov_rank` 0).

    Parameters
    ----------
    data
        Parquet file written by `dspark-sim synthesise`.
    out
        Folder for the drafter, its state and its learning curve; an interrupted run there is resumed.
    target
        Target the drafter is for.
    num_updates
        Optimiser updates.
    sequences_per_update, anchors_per_sequence
        Size of an update.
    block_size, num_layers, intermediate_size, target_layer_ids, markov_rank, confidence_head, draft_vocab_size
        Shape of the drafter; 0 for `draft_vocab_size` means the target's vocabulary.
    muon_lr, adam_lr, warmup
        Peak learning rates and the fraction of updates that warms up; a cosine brings them to a twentieth.
    max_len
        Sequences are cut to so many tokens.
    holdout
        Sequences kept for evaluation, the last ones of the file.
    eval_every, save_every
        Updates between evaluations and between saved states.
    dtype, device
        Of the products; weights and optimiser state stay float32.
    seed
        Of initial weights, data order and anchors.
    """

    data: str = "runs/synthesis.parquet"
    out: str = "runs/drafter"
    target: str = EMBEDDED
    num_updates: int = 2000
    sequences_per_update: int = 1
    anchors_per_sequence: int = 24
    block_size: int = 7
    num_layers: int = 2
    intermediate_size: int = 1024
    target_layer_ids: tuple[int, ...] = (1, 14, 27)
    markov_rank: int = 64
    confidence_head: bool = True
    draft_vocab_size: int = 8192
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    warmup: float = 0.02
    max_len: int = 448
    holdout: int = 96
    eval_every: int = 250
    save_every: int = 500
    dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0


@dataclass(eq=False)
class Sequence:
    """One conversation: token ids [L], where the answer starts, and the temperature it was drawn at."""

    tokens: np.ndarray
    prompt_len: int
    temperature: float


def read_sequences(path: Path | str, max_len: int, block_size: int) -> list[Sequence]:
    """Conversations of a synthesis file, cut to `max_len`; those with too short an answer are left out.

    Raises
    ------
    UserError
        If the file is missing, damaged or holds nothing usable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no training text at {path}; write some with `dspark-sim synthesise`")
    try:
        table = pq.read_table(path, columns=["tokens", "prompt_len", "temperature"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a synthesis file ({str(error).splitlines()[0][:100]}); write it again"
        ) from error
    flat = table["tokens"].combine_chunks()
    values, offsets = flat.values.to_numpy(), flat.offsets.to_numpy()
    sequences = [
        Sequence(values[low : min(high, low + max_len)].astype(np.int64), int(prompt_len), float(temperature))
        for low, high, prompt_len, temperature in zip(
            offsets, offsets[1:], table["prompt_len"].to_numpy(), table["temperature"].to_numpy(), strict=False
        )
    ]
    usable = [s for s in sequences if len(s.tokens) - s.prompt_len > block_size + 1]
    if not usable:
        raise UserError(f"{path} has no answer longer than a block of {block_size}; synthesise longer answers")
    return usable


def frequent_tokens(sequences: list[Sequence], vocab_size: int, size: int) -> torch.Tensor:
    """Ascending ids of the `size` tokens that answers use most."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sequence in sequences:
        np.add.at(counts, sequence.tokens[sequence.prompt_len :], 1)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def train(config: TrainConfig) -> Path:
    """Train, evaluate and save a drafter; returns its folder.

    Raises
    ------
    UserError
        If the data or an interrupted run's state does not fit the configuration.
    """
    out = Path(config.out)
    target = load_target(config.target, dtype=config.dtype, device=config.device)
    sequences = read_sequences(config.data, config.max_len, config.block_size)
    if len(sequences) < 2 * config.holdout:
        raise UserError(f"{config.data} has {len(sequences)} sequences; holdout {config.holdout} needs twice as many")
    train_set, held_out = sequences[: -config.holdout], sequences[-config.holdout :]
    drafter = _new_drafter(config, target, train_set)
    trainer = _Trainer(config, target, drafter, out)
    start = trainer.resume()
    with (
        explain_os_errors(out, "write"),
        tqdm(total=config.num_updates, initial=start, unit="update", desc=f"train {out.name}") as bar,
    ):
        for update in range(start, config.num_updates):
            terms = trainer.update(update, _batch(config, train_set, update))
            if update % 20 == 0:
                bar.set_postfix(loss=f"{terms.loss.item():.3f}", acceptance=f"{terms.acceptance.item():.3f}")
            last = update + 1 == config.num_updates
            if last or (update + 1) % config.eval_every == 0:
                trainer.note(update + 1, terms, evaluate(drafter, target, held_out))
            if last or (update + 1) % config.save_every == 0:
                trainer.save(update + 1)
            bar.update()
    return out


def _new_drafter(config: TrainConfig, target: Target, train_set: list[Sequence]) -> BlockDrafter:
    text = target.config
    shape = BlockDrafterConfig(
        target=config.target,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        block_size=config.block_size,
        target_layer_ids=config.target_layer_ids,
        # An id that ordinary text does not use; its embedding only has to differ from those of real tokens.
        mask_token_id=text.vocab_size - 1 if target.tokenizer.unk_token_id is None else target.tokenizer.unk_token_id,
        num_hidden_layers=config.num_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=target.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=text.rms_norm_eps,
        markov_rank=config.markov_rank,
        enable_confidence_head=config.confidence_head,
        draft_vocab_size=config.draft_vocab_size,
    )
    ids = frequent_tokens(train_set, text.vocab_size, config.draft_vocab_size) if config.draft_vocab_size else None
    torch.manual_seed(config.seed)
    drafter = BlockDrafter(shape, ids)
    for name, parameter in drafter.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        if name.endswith("markov_w2.weight"):
            torch.nn.init.zeros_(parameter)
    return drafter.attach(target)


def _batch(config: TrainConfig, train_set: list[Sequence], update: int) -> list[tuple[Sequence, np.ndarray]]:
    """Sequences and sorted anchors of one update; a pure function of (seed, update)."""
    size = config.sequences_per_update
    epoch_len = len(train_set) // size
    epoch, index = divmod(update, max(epoch_len, 1))
    order = np.random.default_rng([config.seed, 1, epoch]).permutation(len(train_set))
    rng = np.random.default_rng([config.seed, 2, update])
    batch = []
    for number in order[index * size : (index + 1) * size]:
        sequence = train_set[number]
        # The last anchor still has one token to predict.
        choices = np.arange(sequence.prompt_len, len(sequence.tokens) - 1)
        anchors = rng.choice(choices, config.anchors_per_sequence, replace=len(choices) < config.anchors_per_sequence)
        batch.append((sequence, np.sort(anchors)))
    return batch


class _Trainer:
    """Drafter, optimisers and files of one run."""

    def __init__(self, config: TrainConfig, target: Target, drafter: BlockDrafter, out: Path) -> None:
        self.config, self.target, self.drafter, self.out = config, target, drafter, out
        named = dict(drafter.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and not n.startswith(("markov_head", "confidence"))}
        others = {n: p for n, p in named.items() if n not in matrices}
        muon = torch.optim.Muon(matrices.values(), lr=config.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others.values(), lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.groups = (("muon", muon, list(matrices), config.muon_lr), ("adam", adam, list(others), config.adam_lr))
        self.seconds = 0.0

    def update(self, update: int, batch: list[tuple[Sequence, np.ndarray]]) -> LossTerms:
        """One optimiser step."""
        start = perf_counter()
        scale = self._schedule(update)
        terms = self._loss(batch)
        for _, optimiser, _, rate in self.groups:
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            optimiser.zero_grad(set_to_none=True)
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        for _, optimiser, _, _ in self.groups:
            optimiser.step()
        self.seconds += perf_counter() - start
        return terms

    def _schedule(self, update: int) -> float:
        warm = max(1, int(self.config.warmup * self.config.num_updates))
        progress = update / max(1, self.config.num_updates)
        return min(1.0, (update + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress)))

    def _loss(self, batch: list[tuple[Sequence, np.ndarray]]) -> LossTerms:
        config, drafter, device = self.config, self.drafter, self.target.device
        length = max(len(sequence.tokens) for sequence, _ in batch)
        tokens = torch.zeros((len(batch), length), dtype=torch.long)
        for row, (sequence, _) in enumerate(batch):
            tokens[row, : len(sequence.tokens)] = torch.from_numpy(sequence.tokens)
        lens = torch.tensor([len(sequence.tokens) for sequence, _ in batch], device=device)
        anchors = torch.from_numpy(np.stack([anchors for _, anchors in batch])).to(device)
        tokens = tokens.to(device)
        final, features = dense_target(self.target, tokens, drafter.config.target_layer_ids)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            draft_logits, judged = teacher_forced(drafter, tokens, features, anchors)
        places = anchors[..., None] + torch.arange(config.block_size, device=device)
        valid = places + 1 < lens[:, None, None]
        places = places.clamp(max=length - 2)
        rows = torch.arange(len(batch), device=device)[:, None, None]
        labels = drafter.target_to_draft[tokens[rows, places + 1]]
        with torch.no_grad():
            judged_by = self.target.head(final[rows, places].flatten(0, 1)).float()
            norm = judged_by.logsumexp(dim=-1, keepdim=True)
            probs = (judged_by[..., drafter.draft_token_ids] - norm).exp()
        labels = labels.masked_fill(labels == drafter.config.head_size, -100)
        return dspark_loss(
            draft_logits.flatten(0, 1),
            probs,
            labels.flatten(0, 1),
            None if judged is None else judged.flatten(0, 1),
            valid.flatten(0, 1),
        )

    def note(self, update: int, terms: LossTerms, evaluation: dict[str, float]) -> None:
        """Append a row to the learning curve."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "learning_curve.csv"
        row = {
            "update": update,
            "seconds": round(self.seconds, 1),
            "loss": round(terms.loss.item(), 5),
            "cross_entropy": round(terms.cross_entropy.item(), 5),
            "distance": round(terms.distance.item(), 5),
            "expected_acceptance": round(terms.acceptance.item(), 5),
            **{name: round(value, 5) for name, value in evaluation.items()},
        }
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def save(self, update: int) -> None:
        """Write the drafter and what a resumed run needs."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in ("data", "out", "device")}
        notes = {"updates_done": update, "seconds": round(self.seconds, 1), **settings}
        save_drafter(self.drafter, self.out, notes)
        state = {f"weights.{name}": p.detach().cpu() for name, p in self.drafter.named_parameters()}
        for prefix, optimiser, names, _ in self.groups:
            for index, entry in optimiser.state_dict()["state"].items():
                for key, value in entry.items():
                    state[f"{prefix}.{names[index]}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        partial = self.out / ".state.safetensors.partial"
        save_file(state, partial, {"update": str(update), "seconds": str(self.seconds), "config": self._key()})
        partial.rename(self.out / "state.safetensors")

    def _key(self) -> str:
        return json.dumps({k: v for k, v in asdict(self.config).items() if k not in ("out", "data", "device")})

    def resume(self) -> int:
        """Updates done by an interrupted run in the same folder, after loading its state; else 0."""
        path = self.out / "state.safetensors"
        if not path.is_file():
            return 0
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
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
        self._forget_after(update)
        return update

    def _forget_after(self, update: int) -> None:
        """Drop rows of the learning curve that the interrupted run wrote after its last saved state."""
        path = self.out / "learning_curve.csv"
        if path.is_file():
            header, *rows = path.read_text().splitlines()
            kept = [row for row in rows if int(row.partition(",")[0]) <= update]
            path.write_text("\n".join([header, *kept]) + "\n")


@torch.no_grad()
def evaluate(drafter: BlockDrafter, target: Target, sequences: list[Sequence]) -> dict[str, float]:
    """Mean acceptance length at T = 0, bonus included, by walking held-out greedy answers block by block."""
    emitted = rounds = 0
    for sequence in _greedy_only(sequences):
        accepted = greedy_acceptance(drafter, target, sequence)
        at = 0
        while at < len(accepted):
            emitted += int(accepted[at]) + 1
            rounds += 1
            at += int(accepted[at]) + 1
    return {"mean_acceptance_length": emitted / max(rounds, 1)}


def _greedy_only(sequences: list[Sequence]) -> Iterator[Sequence]:
    return (sequence for sequence in sequences if sequence.temperature == 0.0)


def greedy_acceptance(drafter: BlockDrafter, target: Target, sequence: Sequence) -> np.ndarray:
    """Drafts accepted at every anchor of a greedy answer, at T = 0, [answer length - 1]."""
    device = target.device
    tokens = torch.from_numpy(sequence.tokens).to(device)[None]
    anchors = torch.arange(sequence.prompt_len, len(sequence.tokens) - 1, device=device)[None]
    _, features = dense_target(target, tokens, drafter.config.target_layer_ids, with_hidden=False)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=target.dtype == torch.bfloat16):
        walk = dense_walks(drafter, tokens[0], features[0], anchors[0])()
        gamma = drafter.config.block_size
        drafts = run_head(drafter, walk, tokens[0, anchors[0]], gamma, greedy).tokens
    padded = torch.nn.functional.pad(tokens[0], (0, gamma), value=-1)
    truth = padded[anchors[0][:, None] + 1 + torch.arange(gamma, device=device)]
    return (drafts == truth).cumprod(dim=1).sum(dim=1).cpu().numpy()
