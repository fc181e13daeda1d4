"""Train and measure the 17 drafters behind Figures 3 and 4: layers 1 to 5, and proposal lengths 3, 7, 11 and 15.

All have the same text (written by the target), sequences, anchors, updates and rates, and differ in layers, head and
proposal length alone. One GPU does everything in order, and goes on where it was interrupted:

    python experiments/paper/train_depth_and_length.py everything --out runs/depth_and_length

Several processes share the work by `--part i/n`, each on its own device, after the text is there:

    python experiments/paper/train_depth_and_length.py train --part 1/6 --device cuda:0 --data text.parquet --out RUN
    ... evaluate --part 1/6 --device cuda:0 --out RUN, and, by one of them, outputs before and collect behind

`collect` writes ``depth_and_length.csv`` (a row per drafter, temperature and prompt), ``learning_curves.csv`` and
``round_latency.csv`` to the run's folder. With `--check` sizes are tiny: minutes on a CPU, to see that it runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from dspark_sim import Engine, Fixed, Trace, record
from dspark_sim.analysis.blocks import Blocks, prompt_counts, walk
from dspark_sim.errors import UserError
from dspark_sim.files import whole_file
from dspark_sim.training.config import TrainConfig

HEADS: dict[str, dict[str, Any]] = {
    "dflash": {"drafter": "dflash"},
    "dspark-markov": {"drafter": "dspark"},
    "dspark-rnn": {"drafter": "dspark", "markov_head_type": "rnn"},
}
LENGTHS = (3, 7, 11, 15)
BASE_LAYERS = 3
TEMPERATURES = (0.0, 1.0)
CONTEXTS = (512, 1024, 2048, 4096)
NUM_REQUESTS = 128
COLUMNS = (
    *("head", "num_layers", "block_size", "temperature", "domain", "prompt_id"),
    *("rounds", "num_tokens", "whole_rounds", "whole_emitted", "num_updates", "seed"),
)


@dataclass(frozen=True)
class Variant:
    """A drafter of the study."""

    head: str
    num_layers: int
    block_size: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.head}-layers{self.num_layers}-block{self.block_size}"

    @property
    def cost(self) -> float:
        """Of an update, roughly, to share the work evenly."""
        return 1.0 + self.block_size / 7 * (1.0 + 0.3 * self.num_layers + 0.4 * (self.head == "dspark-rnn"))


def variants() -> list[Variant]:
    """Figure 3's, then those that Figure 4 adds."""
    depth = [Variant("dspark-markov", layers, 7) for layers in range(1, 6)] + [Variant("dflash", 5, 7)]
    length = [Variant(head, BASE_LAYERS, block_size) for block_size in LENGTHS for head in HEADS]
    return list(dict.fromkeys(depth + length))


def part_of(part: str) -> list[Variant]:
    """Variants of part i/n; parts cost about the same.

    Raises
    ------
    UserError
        If it is no part.
    """
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"part is {part!r}; give i/n with i from 1 to n, such as 2/6")
    shares: list[list[Variant]] = [[] for _ in range(int(count))]
    for variant in sorted(variants(), key=lambda variant: -variant.cost):
        min(shares, key=lambda share: sum(one.cost for one in share)).append(variant)
    return shares[int(number) - 1]


@dataclass(frozen=True)
class Common:
    """What every step takes."""

    out: Path = Path("runs/depth_and_length")
    """Folder of the study."""
    device: str = "auto"
    """Where networks run."""
    part: str = "1/1"
    """Which share of the drafters, i/n."""
    check: bool = False
    """Tiny sizes."""


@dataclass(frozen=True)
class Train(Common):
    """Train a share of the drafters."""

    data: str = ""
    """Training text, files of `dspark-sim synthesise` with commas between; empty means text.parquet of the study."""
    num_updates: int = 3000
    """Updates of each drafter."""
    save_every: int = 500
    """Updates between saved states."""

    def run(self) -> None:
        from dspark_sim.training.together import train_together

        train_together([self.config(variant) for variant in part_of(self.part)], longest_block=max(LENGTHS))

    def config(self, variant: Variant) -> TrainConfig:
        """Of one drafter."""
        sizes: dict[str, Any] = {
            **{"sequences_per_update": 32, "anchors_per_sequence": 48, "max_len": 320, "holdout": 96},
            **{"eval_every": 500, "save_every": self.save_every},
        }
        if self.check:
            sizes = {
                **{"sequences_per_update": 2, "anchors_per_sequence": 4, "max_len": 96, "holdout": 2},
                **{"eval_every": self.num_updates, "save_every": self.num_updates},
            }
        return TrainConfig(
            data=self.data or str(self.out / "text.parquet"),
            out=str(self.out / "drafters" / variant.name),
            num_updates=self.num_updates,
            block_size=variant.block_size,
            num_layers=variant.num_layers,
            intermediate_size=768,
            target_layer_ids=(1, 8, 15, 22, 28),
            markov_rank=128,
            draft_vocab_size=8192,
            muon_lr=2e-3,
            adam_lr=1.5e-3,
            warmup=0.03,
            device=self.device,
            **HEADS[variant.head],
            **sizes,
        )


@dataclass(frozen=True)
class Outputs(Common):
    """Record the target's own outputs for the bundled prompts, by which drafters are judged."""

    def run(self) -> None:
        prompts, max_tokens, users = (1, 24, 3) if self.check else (None, 128, 24)
        engine = Engine.load(drafter="none", device=self.device, max_num_seqs=users)
        for temperature in TEMPERATURES:
            folder = outputs_folder(self.out, temperature)
            if not (folder / "requests.parquet").exists():
                record(
                    engine=engine,
                    policy=Fixed(0),
                    concurrency=users,
                    per_domain=prompts,
                    max_tokens=max_tokens,
                    mode="rejection" if temperature else "greedy",
                    temperature=temperature,
                    out=folder,
                )


@dataclass(frozen=True)
class Evaluate(Common):
    """Draft a block at every position of the target's outputs with a share of the drafters, and count their rounds."""

    def run(self) -> None:
        engine = Engine.load(drafter="none", device=self.device, max_num_seqs=1)
        recordings = {temperature: Trace.read(outputs_folder(self.out, temperature)) for temperature in TEMPERATURES}
        for variant in part_of(self.part):
            path = self.out / "evaluation" / f"{variant.name}.csv"
            if path.exists():
                continue
            drafting = engine.with_drafter(str(self.out / "drafters" / variant.name))
            tables = []
            for temperature, recording in recordings.items():
                blocks = Blocks.from_trace(drafting.anchors(recording))
                sums = prompt_counts(blocks, walk(blocks)).reset_index()
                tables.append(sums.assign(temperature=f"{temperature:g}"))
            frame = pd.concat(tables, ignore_index=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(frame[[name for name in COLUMNS if name in frame.columns]], path)


@dataclass(frozen=True)
class Latency(Common):
    """Time rounds of networks with random weights: a batch at several contexts, for every head and length."""

    dtype: str = "bfloat16"
    """Of target and drafters."""

    def run(self) -> None:
        from dspark_sim.engine.models import load_target

        num_requests, contexts, repeats = (2, (16,), 1) if self.check else (NUM_REQUESTS, CONTEXTS, 15)
        target = load_target(device=self.device, dtype=self.dtype)
        self.out.mkdir(parents=True, exist_ok=True)
        write(latency_table(target, num_requests, contexts, repeats), self.out / "round_latency.csv")


def latency_table(
    target: Any, num_requests: int, contexts: tuple[int, ...], repeats: int, **shape: Any
) -> pd.DataFrame:
    """Round latency of every head and length: a row each per context, in milliseconds."""
    import torch

    from dspark_sim.engine.round_latency import round_seconds
    from dspark_sim.provenance import processor
    from dspark_sim.training.build import new_drafter

    cuda = target.device.type == "cuda"
    device = torch.cuda.get_device_name(target.device) if cuda else processor()
    networks = {}
    for head in HEADS:
        for block_size in LENGTHS:
            options = {"draft_vocab_size": 8192, "markov_rank": 128, "intermediate_size": 768, **HEADS[head], **shape}
            options = {"target_layer_ids": (1, 8, 15, 22, 28), "num_layers": BASE_LAYERS, **options}
            config = TrainConfig(target=target.name, block_size=block_size, **options)
            ids = torch.arange(config.draft_vocab_size) if config.draft_vocab_size else None
            networks[head, block_size] = new_drafter(config, target, ids).to(target.dtype).eval().requires_grad_(False)
    named = {f"{head} {block_size}": network for (head, block_size), network in networks.items()}
    rows = []
    for context in contexts:
        found = round_seconds(target, named, num_requests, context, repeats=repeats, progress=True)
        for head, block_size in networks:
            seconds = found[f"{head} {block_size}"]
            rows.append(
                {
                    **{"head": head, "num_layers": BASE_LAYERS, "block_size": block_size},
                    **{"num_requests": num_requests, "context_len": context},
                    **{f"{name}_ms": 1e3 * getattr(seconds, name) for name in ("draft", "verify", "whole")},
                    **{"device": device, "dtype": str(target.dtype).removeprefix("torch.")},
                }
            )
    return pd.DataFrame(rows).round({"draft_ms": 4, "verify_ms": 4, "whole_ms": 4})


@dataclass(frozen=True)
class Collect(Common):
    """Put what was measured into one table, and the learning curves into another."""

    def run(self) -> None:
        import json

        tables, curves = [], []
        for variant in variants():
            path, folder = self.out / "evaluation" / f"{variant.name}.csv", self.out / "drafters" / variant.name
            own: dict[str, Any] = {"head": variant.head, "num_layers": variant.num_layers}
            own["block_size"] = variant.block_size
            if (folder / "learning_curve.csv").exists():
                curves.append(pd.read_csv(folder / "learning_curve.csv").assign(**own))
            if path.exists():
                notes = json.loads((folder / "config.json").read_text())["training"]
                done = {"num_updates": notes["updates_done"], "seed": notes["seed"]}
                tables.append(pd.read_csv(path).assign(**own, **done))
        if not tables:
            raise UserError(f"{self.out} holds no evaluated drafter; run train, outputs and evaluate first")
        write(pd.concat(tables, ignore_index=True)[list(COLUMNS)], self.out / "depth_and_length.csv")
        names = ["head", "num_layers", "block_size", "update", "loss", "mean_acceptance_length"]
        write(pd.concat(curves, ignore_index=True)[names], self.out / "learning_curves.csv")
        print(f"Wrote {len(tables)} of {len(variants())} drafters to {self.out / 'depth_and_length.csv'}.")


@dataclass(frozen=True)
class Everything(Common):
    """All steps in order, on one device."""

    num_tokens: int = 5_000_000
    """Answer tokens of training text."""
    num_updates: int = 3000
    """Updates of each drafter."""

    def run(self) -> None:
        from dspark_sim.training.synthesis import SynthesisConfig, synthesise

        text = self.out / "text.parquet"
        if not text.exists():
            wave = {"batch_size": 24, "max_question_tokens": 48, "max_answer_tokens": 48} if self.check else {}
            wave = wave or {"batch_size": 2048}
            synthesise(SynthesisConfig(out=str(text), num_tokens=self.num_tokens, device=self.device, **wave))
        common = {"out": self.out, "device": self.device, "check": self.check}
        Train(**common, num_updates=self.num_updates).run()
        for step in (Outputs, Evaluate, Latency, Collect):
            if step is not Latency or not (self.out / "round_latency.csv").exists():
                step(**common).run()


def outputs_folder(out: Path, temperature: float) -> Path:
    """Where the target's outputs at a temperature are."""
    return out / f"outputs_t{temperature:g}"


def write(frame: pd.DataFrame, path: Path) -> None:
    """As CSV, whole or not at all."""
    with whole_file(path) as partial:
        frame.to_csv(partial, index=False, lineterminator="\n")


Step = (
    Annotated[Everything, tyro.conf.subcommand("everything")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Outputs, tyro.conf.subcommand("outputs")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Latency, tyro.conf.subcommand("latency")]
    | Annotated[Collect, tyro.conf.subcommand("collect")]
)

if __name__ == "__main__":
    try:
        tyro.cli(Step, description=__doc__).run()
    except UserError as error:
        sys.exit(f"train_depth_and_length: {error}")
