"""SGLang's table of steps per second, in and out.

SGLang's DSpark scheduler reads (``--speculative-dspark-sps-table-path``) a JSON object of two lists of equal length,
``sample_batch_tokens``, rising, and ``sample_steps_per_sec``, and ``max_batch_tokens``, at least the largest probe. A
step is a whole iteration, host included. SGLang takes the rate of the largest probe that is not above the batch. Here
the probes become seconds, and sizes between them are interpolated in seconds.

Interpolating the rates instead would be wrong: between probes whose seconds differ by a factor r, the middle would be
too fast by a factor of (1 + r)² / 4r, which is 36 % too few seconds for r = 4 and 60 % for r = 8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dspark_sim.cost_curve import Curve
from dspark_sim.cost_model import CostModel
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.files import whole_file

PROBES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Batch tokens at which a cost model is written out unless others are chosen."""


def read_sglang_table(path: Path | str, provenance: Mapping[str, Any] | None = None) -> CostModel:
    """A cost model whose target pass takes 1/rate seconds at every probe; nothing else takes any.

    Parameters
    ----------
    path
        SGLang's JSON file.
    provenance
        Device, model, dtype and thread count it was measured on; the file does not say.

    Raises
    ------
    UserError
        If the file is missing or not such a table.
    """
    path = Path(path)
    with explain_os_errors(path, "read"):
        text = path.read_bytes()
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
        if "bias_seconds" in document:
            raise ValueError("it is SGLang's additive table")
        sizes = [float(size) for size in document["sample_batch_tokens"]]
        rates = [float(rate) for rate in document["sample_steps_per_sec"]]
        if not sizes or len(sizes) != len(rates):
            raise ValueError(f"it has {len(sizes)} batch sizes and {len(rates)} rates")
        if sizes[0] < 1 or any(high <= low for low, high in pairwise(sizes)):
            raise ValueError(f"its batch sizes {sizes} do not rise from at least 1")
        # Not-a-number compares false.
        if not all(0.0 < rate < float("inf") for rate in rates):
            raise ValueError(f"its rates {rates} are not all positive")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path} is not SGLang's table of steps per second ({reason}); give lists sample_batch_tokens and "
            "sample_steps_per_sec of equal length"
        ) from error
    verify = Curve(tuple(sizes), tuple(1.0 / rate for rate in rates))
    return CostModel(verify, provenance={**(provenance or {}), "source": "sglang sample_steps_per_sec"})


def sglang_table(
    cost: CostModel, probes: Sequence[int] = PROBES, *, context_len: int = 0, draft_len: int = 0
) -> dict[str, Any]:
    """SGLang's table of any cost model.

    Parameters
    ----------
    cost
        Gives the seconds of whole rounds.
    probes
        Batch tokens, rising.
    context_len
        Tokens in the KV cache of each request.
    draft_len
        Tokens drafted per request, γ; a batch of B tokens then holds B / (1 + γ) requests, at least 1. With 0, the
        table is that of plain decoding, as SGLang's own profiler measures it.

    Raises
    ------
    UserError
        If the probes do not rise from at least 1, or a round takes no time.
    """
    if not probes or probes[0] < 1 or any(high <= low for low, high in pairwise(probes)):
        raise UserError(f"probes are {list(probes)}; give one or more batch sizes, rising from at least 1")
    rates = []
    for batch_tokens in probes:
        num_requests = max(batch_tokens // (1 + draft_len), 1)
        seconds = cost.round_seconds(batch_tokens, num_requests * context_len, num_requests, draft_len)
        if not seconds > 0.0:
            raise UserError(
                f"a round of {batch_tokens} tokens takes {seconds} seconds; give a cost table that has costs"
            )
        rates.append(1.0 / seconds)
    return {
        "sample_batch_tokens": list(probes),
        "sample_steps_per_sec": rates,
        "max_batch_tokens": probes[-1],
    }


def write_sglang_table(
    cost: CostModel, path: Path | str, probes: Sequence[int] = PROBES, *, context_len: int = 0, draft_len: int = 0
) -> None:
    """Write `sglang_table` as JSON.

    Raises
    ------
    UserError
        As `sglang_table`, and if the file cannot be written.
    """
    text = json.dumps(sglang_table(cost, probes, context_len=context_len, draft_len=draft_len), indent=1) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text)
