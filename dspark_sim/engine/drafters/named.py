"""Drafters by name: those that need no weights, the bundled ones, and folders."""

from __future__ import annotations

from pathlib import Path

from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.chain import RaggedChainDrafter
from dspark_sim.engine.drafters.chain_model import ChainDrafter
from dspark_sim.engine.drafters.checkpoint import load_drafter
from dspark_sim.engine.drafters.choose import Confidence
from dspark_sim.engine.drafters.ngram import NgramDrafter
from dspark_sim.engine.models import Target
from dspark_sim.engine.temperatures import default_confidence
from dspark_sim.errors import UserError

BUNDLED_DRAFTERS = ("dspark", "dspark-rnn", "dflash", "eagle3", "mtp1")


def named_drafter(
    name: str, target: Target, max_num_seqs: int, max_model_len: int, confidence: Confidence | None
) -> Drafter | None:
    """A drafter for a target, ready to run; ``None`` for ``none``.

    Parameters
    ----------
    name
        ``none``, ``ngram``, a bundled drafter or a folder.
    target
        Its target.
    max_num_seqs, max_model_len
        Slots of the KV cache and their length in tokens.
    confidence
        Where confidence comes from; ``None`` is the default of the drafter's folder.

    Raises
    ------
    UserError
        If there is no such drafter or it was made for another target.
    """
    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter()
    folder = Path(__file__).parent.parent.parent / "drafters" / name if name in BUNDLED_DRAFTERS else Path(name)
    if name not in BUNDLED_DRAFTERS and not folder.is_dir():
        raise UserError(
            f"no drafter {name!r}; choose none, ngram, {', '.join(BUNDLED_DRAFTERS)}, or give a drafter's folder"
        )
    network = load_drafter(folder, target)
    if name in BUNDLED_DRAFTERS and target.name != network.config.target:
        raise UserError(
            f"the bundled drafter {name} was trained for {network.config.target}, not {target.name}; "
            "use none or ngram, or train one with `dspark-sim train`"
        )
    judge = default_confidence(folder) if confidence is None else confidence
    drafter: RaggedChainDrafter | RaggedBlockDrafter
    if isinstance(network, ChainDrafter):
        drafter = RaggedChainDrafter(name, network, max_num_seqs, max_model_len, judge)
    else:
        drafter = RaggedBlockDrafter(name, network, max_num_seqs, max_model_len, judge)
    drafter.confidence.require_slots(drafter.block_size)
    return drafter
