"""What the arithmetic does to the laws: batch shapes, padding, bfloat16, and how fast the dense pass is."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np
import torch

from dspark_sim.engine.attention import RaggedBatch
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.models import Target
from dspark_sim.engine.serve import Engine
from dspark_sim.policy import Fixed
from dspark_sim.trace import Trace
from dspark_sim.workload import ClosedLoop, bundled_prompts

_STEPS = 24


def _cache(target: Target, num_slots: int, length_step: int) -> SlotCache:
    config = target.config
    return SlotCache(
        config.num_hidden_layers,
        num_slots,
        config.num_key_value_heads,
        512,
        target.head_dim,
        dtype=target.dtype,
        device=target.device,
        length_step=length_step,
    )


def _logits(
    target: Target, sequences: list[list[int]], cuts: list[list[int]], length_step: int = 1
) -> list[torch.Tensor]:
    """Logits [L, V] of each sequence, fed in pieces that end at `cuts` (one list per sequence, equally many)."""
    cache = _cache(target, len(sequences), length_step)
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    done = np.zeros(len(sequences), dtype=np.int64)
    for ends in zip(*cuts, strict=True):
        lens = np.array(ends) - done
        batch = RaggedBatch(cache, np.arange(len(sequences)), done, lens, target.device)
        tokens = [
            token for seq, start, n in zip(sequences, done, lens, strict=True) for token in seq[start : start + n]
        ]
        every = torch.arange(len(tokens), device=target.device)
        out, _ = target.forward(torch.tensor(tokens, device=target.device), batch, every)
        for row, part in enumerate(out.split(lens.tolist())):
            rows[row].append(part)
        done = np.array(ends)
    return [torch.cat(parts) for parts in rows]


def _texts(engine: Engine, num_prompts: int) -> list[list[int]]:
    """Prompts with their own greedy outputs."""
    trace = _plain(engine, num_prompts)
    rows = trace.tables["requests"].to_pylist()
    return [trace.config["prompts"][row["prompt_id"]] + row["output_tokens"] for row in rows]


def _plain(engine: Engine, num_prompts: int) -> Trace:
    prompts = bundled_prompts(per_domain=-(-num_prompts // 3))[:num_prompts]
    return engine.record(prompts, Fixed(0), ClosedLoop(num_prompts), max_tokens=_STEPS, progress=False)


def _pieces(sequence: list[int], size: int) -> list[int]:
    """Ends of pieces: all but the last `_STEPS` tokens, then `size` at a time."""
    first = len(sequence) - _STEPS
    return [first + step for step in range(0, _STEPS + 1, size)]


def batch_and_padding(engine: Engine) -> Iterator[tuple[str, int, str, str, bool]]:
    """(name, comparisons, found, wanted, held): one request alone or among others; short or padded caches."""
    texts = _texts(engine, 3)
    alone = [_logits(engine.target, [text], [_pieces(text, 8)])[0] for text in texts]
    together = _logits(engine.target, texts, [_pieces(text, 8) for text in texts])
    padded = _logits(engine.target, texts, [_pieces(text, 8) for text in texts], length_step=64)
    for name, left, right in (
        ("alone against in a batch", alone, together),
        ("padded against unpadded", padded, together),
    ):
        worst = max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
        same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(left, right, strict=True))
        total = sum(len(a) for a in left)
        found = f"{same} of {total} tokens equal, logits within {worst:.0e}"
        yield name, total, found, "all, within 1e-3", same == total and worst < 1e-3


def anchor_rates(engine: Engine, trace: Trace) -> tuple[float, float]:
    """Anchors a second: the dense pass over a recording, and rounds of decoding that visit one anchor each."""
    start = perf_counter()
    anchored = engine.anchors(trace, progress=False)
    dense = len(anchored.anchors) / (perf_counter() - start)
    visited = engine.record(
        bundled_prompts(per_domain=1)[:1], Fixed(engine.block_size), ClosedLoop(1), max_tokens=_STEPS, progress=False
    )
    rounds = visited.steps[visited.steps["num_prefill_tokens"] == 0]["step_seconds"]
    return dense, 1.0 / float(rounds.mean())


def bfloat16_report() -> Iterator[tuple[str, str]]:
    """(name, found) of what bfloat16 changes between decoding by blocks and one by one."""
    engine = Engine.load(dtype="bfloat16", max_num_seqs=6, max_model_len=512)
    prompts = bundled_prompts(per_domain=2)
    outputs = []
    for policy in (Fixed(0), Fixed(engine.block_size)):
        trace = engine.record(prompts, policy, ClosedLoop(6), max_tokens=_STEPS, progress=False)
        outputs.append([list(tokens) for tokens in trace.requests["output_tokens"]])
    texts = [
        trace.config["prompts"][name] + out for name, out in zip(trace.requests["prompt_id"], outputs[0], strict=True)
    ]
    single = [_logits(engine.target, [text], [_pieces(text, 1)])[0][-_STEPS:].float() for text in texts[:3]]
    block = [_logits(engine.target, [text], [_pieces(text, 8)])[0][-_STEPS:].float() for text in texts[:3]]
    differ = [
        (row, next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b))
        for row, pair in enumerate(zip(*outputs, strict=True))
        if pair[0] != pair[1]
    ]
    if differ:
        row, at = differ[0]
        text = texts[row]
        top = (
            _logits(engine.target, [text], [_pieces(text, 1)])[0][len(text) - len(outputs[0][row]) + at - 1]
            .float()
            .topk(2)
            .values
        )
        where = f"token {at + 1} of {prompts[row].prompt_id}, top-2 margin {float(top[0] - top[1]):.3f}"
        yield "first divergence, blocks against one by one", f"{where}; {len(differ)} of {len(prompts)} outputs differ"
    else:
        yield "first divergence, blocks against one by one", f"none in {len(prompts)} outputs of {_STEPS} tokens"
    distances = torch.cat(
        [0.5 * (a.softmax(-1) - b.softmax(-1)).abs().sum(-1) for a, b in zip(single, block, strict=True)]
    )
    found = f"mean {float(distances.mean()):.4f}, largest {float(distances.max()):.4f} over {len(distances)} positions"
    yield "total variation at T = 1, blocks of 8 against one by one", found
