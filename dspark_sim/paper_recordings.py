"""Dense recordings that several figures of the paper share, made once per folder of results.

The target's outputs of the bundled prompts are recorded once per temperature and scale by plain decoding, and every
drafter then drafts a block at every position of them, off the clock: walking these blocks gives the rounds of a live
run, exactly at temperature 0 and with the same law under rejection sampling above. A recording is named after what it
depends on (temperature, number of prompts and tokens, the prompts themselves, the drafter's weights), so a changed
drafter or prompt set is recorded anew and nothing stale is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dspark_sim.errors import explain_os_errors
from dspark_sim.paper_figures import Scale
from dspark_sim.policy import Fixed
from dspark_sim.trace import Trace
from dspark_sim.workload import DOMAINS, ClosedLoop, Prompt, bundled_prompts

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine

CONCURRENCY = 16
"""Requests decoded at once; changes only how long it takes."""


@dataclass(frozen=True)
class RecordingSize:
    """How much is recorded.

    Parameters
    ----------
    per_domain
        Prompts of each domain; ``None`` takes all.
    max_tokens
        Most output tokens per prompt.
    """

    per_domain: int | None
    max_tokens: int


SIZES: dict[Scale, RecordingSize] = {
    "smoke": RecordingSize(2, 24),
    "laptop": RecordingSize(None, 128),
    "gpu": RecordingSize(None, 512),
}


def recordings(
    out: Path, drafters: Sequence[str], scale: Scale, temperature: float = 1.0, *, engine: Engine | None = None
) -> dict[str, Trace]:
    """Recordings with dense anchors of several drafters over the same outputs; those that are missing are made.

    Parameters
    ----------
    out
        Folder of results; recordings are kept in its folder ``recordings``.
    drafters
        Bundled names, ``ngram``, or folders.
    scale
        See `SIZES`.
    temperature
        0 is greedy, others by rejection sampling.
    engine
        A loaded engine, to save loading one; by default the embedded target on a GPU where there is one.

    Returns
    -------
    dict
        Traces by the drafters' names (of a folder its last part), in the order asked for.

    Raises
    ------
    UserError
        If target or drafter cannot be had, or a file cannot be read or written.
    """
    size = SIZES[scale]
    prompts = bundled_prompts(per_domain=size.per_domain)
    folder = out / "recordings" / f"T{temperature:g}-{len(prompts)}x{size.max_tokens}-{_prompts_digest(prompts)}"
    places = {name: folder / f"{Path(name).name}{_drafter_digest(name)}" for name in drafters}
    missing = [name for name, place in places.items() if not place.is_dir()]
    if missing:
        from dspark_sim.engine.serve import Engine

        base = (engine or Engine.load(drafter="none", max_num_seqs=CONCURRENCY)).with_drafter("none")
        with tqdm(total=1 + len(missing), desc="recordings", unit="part") as bar:
            bar.set_postfix_str("the target's outputs")
            outputs = _outputs(base, prompts, size.max_tokens, temperature, folder / "outputs")
            bar.update()
            for name in missing:
                bar.set_postfix_str(name)
                base.with_drafter(name).anchors(outputs).write(places[name])
                bar.update()
    return {Path(name).name: Trace.read(place) for name, place in places.items()}


def setting(trace: Trace, drafters: str) -> str:
    """Target, drafters, temperature, prompts and hardware of a recording, as one line for figure and report."""
    config, hardware = trace.config, trace.provenance
    temperature, domains = config["sampling"]["temperature"], trace.requests["domain"]
    shown = ", ".join(name for name in DOMAINS if name in set(domains))
    threads = "1 thread" if hardware["num_threads"] == 1 else f"{hardware['num_threads']} threads"
    return (
        f"Target {config['target']} ({hardware['dtype']}), drafter{'s' if ',' in drafters else ''} {drafters}, "
        f"γ = {config['block_size']}, "
        f"T = {temperature:g}, {domains.size} bundled prompts ({shown}), at most {config['max_tokens']} output tokens; "
        f"{hardware['device']}, {threads}"
    )


def _outputs(base: Engine, prompts: Sequence[Prompt], max_tokens: int, temperature: float, place: Path) -> Trace:
    if not place.is_dir():
        base.record(
            prompts,
            Fixed(0),
            ClosedLoop(min(CONCURRENCY, base.max_num_seqs)),
            max_tokens=max_tokens,
            mode="rejection" if temperature else "greedy",
            temperature=temperature,
        ).write(place)
    return Trace.read(place)


def _prompts_digest(prompts: Sequence[Prompt]) -> str:
    text = json.dumps([(prompt.prompt_id, prompt.domain, prompt.turns) for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _drafter_digest(name: str) -> str:
    """Names a drafter's weights; empty where it has none."""
    bundled = Path(__file__).parent / "drafters" / name
    folder = bundled if bundled.is_dir() else Path(name)
    files = [folder / file for file in ("config.json", "model.safetensors", "temperatures.json")]
    whole = hashlib.sha256()
    for file in filter(Path.is_file, files):
        with explain_os_errors(file, "read"):
            whole.update(file.read_bytes())
    return f"-{whole.hexdigest()[:8]}" if any(map(Path.is_file, files)) else ""
