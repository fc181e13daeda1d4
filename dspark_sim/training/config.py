"""What one training run is made of; the same for every kind of drafter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from dspark_sim.engine.drafters.markov import MarkovHeadType
from dspark_sim.engine.models import EMBEDDED
from dspark_sim.errors import UserError

DrafterKind = Literal["dspark", "dflash", "eagle3", "mtp"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a drafter: DSpark, DFlash, Eagle3 or MTP.

    Under torchrun, each process takes its share of every update; the run is the same as that of one process.

    Parameters
    ----------
    data
        Parquet files written by `dspark-sim synthesise`, with commas between.
    out
        Folder for the drafter, its state and its learning curve; an interrupted run there is resumed.
    target
        Target the drafter is for.
    drafter
        ``dspark``: a block in parallel with a sequential head. ``dflash``: the same without the head. ``eagle3`` and
        ``mtp``: one layer, run once for each drafted token.
    num_updates
        Optimiser updates.
    sequences_per_update, anchors_per_sequence
        Size of an update, over all processes.
    accumulate
        Passes that an update is split into, to save memory; it changes nothing else.
    block_size
        Tokens drafted per round, γ; 1 with `mtp` is MTP-1.
    num_layers, markov_rank, markov_head_type, confidence_head
        Shape of a block drafter: `eagle3` and `mtp` have one layer and no heads, `dflash` no heads.
    intermediate_size, draft_vocab_size
        Shape of any drafter; 0 for `draft_vocab_size` means the target's vocabulary.
    target_layer_ids
        Target layers that are read; `mtp` reads the last one, whatever is given.
    muon_lr, adam_lr, warmup
        Peak learning rates and the fraction of updates that warms up; a cosine brings them to a twentieth.
    max_len
        Sequences are cut to so many tokens.
    holdout
        Prompts kept for evaluation, chosen by a hash of the prompt: the same ones in whatever files they are.
    eval_every, save_every
        Updates between evaluations and between saved states.
    dtype, device
        Of the products; weights and optimiser state stay float32.
    seed
        Of initial weights, data order and anchors.
    """

    data: str | tuple[str, ...] = "runs/synthesis.parquet"
    out: str = "runs/drafter"
    target: str = EMBEDDED
    drafter: DrafterKind = "dspark"
    num_updates: int = 2000
    sequences_per_update: int = 1
    anchors_per_sequence: int = 24
    accumulate: int = 1
    block_size: int = 7
    num_layers: int = 2
    intermediate_size: int = 1024
    target_layer_ids: tuple[int, ...] = (1, 14, 27)
    markov_rank: int = 64
    markov_head_type: MarkovHeadType = "vanilla"
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

    def __post_init__(self) -> None:
        for name, kind in (("drafter", DrafterKind), ("markov_head_type", MarkovHeadType)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(get_args(kind))}")
        for name in (
            *("num_updates", "sequences_per_update", "anchors_per_sequence", "accumulate", "block_size"),
            *("num_layers", "max_len", "holdout", "eval_every", "save_every"),
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.accumulate > self.sequences_per_update:
            raise UserError(
                f"accumulate is {self.accumulate} and an update has {self.sequences_per_update} sequences; "
                "a pass needs at least one, so lower accumulate"
            )
        if not self.files:
            raise UserError("data names no file; give a Parquet file written by `dspark-sim synthesise`")

    def applicable(self) -> dict[str, object]:
        """The settings that this kind of drafter has, by name."""
        unused: tuple[str, ...] = ()
        if self.drafter in ("eagle3", "mtp"):
            unused = ("num_layers", "markov_rank", "markov_head_type", "confidence_head")
        elif self.drafter == "dflash":
            unused = ("markov_rank", "markov_head_type", "confidence_head")
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @property
    def files(self) -> tuple[str, ...]:
        """The files of `data`."""
        parts = self.data.split(",") if isinstance(self.data, str) else self.data
        return tuple(part.strip() for part in parts if part.strip())
