"""A toy world without torch: random outputs, random drafts with a known acceptance law, and a literal replayer.

Token 0 ends a sequence. Even prompts end by length, odd ones by the end token. The replayer compares tokens one by
one and never looks at a recorded count, so it is an oracle for everything built on counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dspark_sim.cost import CostModel, Curve
from dspark_sim.trace import SCHEMAS, Trace

FloatArray = npt.NDArray[np.float64]
EOS = 0
VOCABULARY = 9


@dataclass(frozen=True)
class Round:
    """One round of one request, by the oracle."""

    position: int
    draft_len: int
    verify_len: int
    num_accepted: int
    num_emitted: int


def toy_trace(
    num_prompts: int = 6,
    output_len: int = 24,
    block_size: int = 5,
    acceptance: Sequence[float] | float = 0.8,
    seed: int = 0,
    *,
    ragged: bool = False,
    confidence: bool = True,
    copies: int = 1,
    mode: str = "greedy",
) -> Trace:
    """A recorded trace with anchors.

    `acceptance` is P(draft k right | all before right), one number or one per depth. With `ragged` the drafter finds
    0 to γ tokens. Every prompt is requested `copies` times: with the same output in mode greedy, with others else.
    Outputs are up to `output_len` tokens, prompt 1 has one. `accept_prob` is 0 or 1 in mode greedy, else `acceptance`;
    `draft_prob` is random.
    """
    rng = np.random.default_rng(seed)
    # A generator of its own: the other columns are what they were without it.
    draft_rng = np.random.default_rng((seed, 1))
    chance = np.broadcast_to(np.asarray(acceptance, dtype=float), (block_size,))
    requests: list[dict[str, Any]] = []
    anchors: list[dict[str, Any]] = []
    for request_id in range(num_prompts * copies):
        prompt = request_id % num_prompts
        if request_id >= num_prompts and mode == "greedy":
            requests.append({**requests[prompt], "request_id": request_id})
            continue
        stops = prompt % 2 == 1
        length = 1 if prompt == 1 else int(rng.integers(2, output_len + 1)) if stops else output_len
        tokens = rng.integers(1, VOCABULARY, length).tolist()
        if stops:
            tokens[-1] = EOS
        prompt_len = int(rng.integers(1, 30))
        if request_id >= num_prompts:
            prompt_len = requests[prompt]["prompt_len"]
        requests.append(
            {
                **{"request_id": request_id, "prompt_id": f"toy-{prompt}", "domain": "toy", "arrival": 0.0},
                **{"prompt_len": prompt_len, "max_tokens": output_len, "output_len": length},
                **{"first_token": 0.0, "finish": 1.0, "finish_reason": "stop" if stops else "length"},
                **{"num_preemptions": 0, "output_tokens": tokens},
            }
        )
        for i in range(length - 1):
            future = tokens[i + 1 : i + 1 + block_size]
            draft = rng.integers(0, VOCABULARY, block_size).tolist()
            for k, token in enumerate(future):
                hit = rng.random() < chance[k]
                draft[k] = token if hit else int((token + rng.integers(1, VOCABULARY)) % VOCABULARY)
            draft = draft[: int(rng.integers(0, block_size + 1)) if ragged else block_size]
            agree = [left == right for left, right in zip(draft, future, strict=False)]
            right = [*map(float, agree), *[0.0] * (len(draft) - len(agree))]
            anchors.append(
                {
                    **{"request_id": request_id, "position": prompt_len + i, "draft_tokens": draft},
                    "confidence": np.clip(chance + rng.normal(0, 0.1, block_size), 0.01, 0.99)[: len(draft)].tolist()
                    if confidence
                    else [float("nan")] * len(draft),
                    "accept_prob": right if mode == "greedy" else chance[: len(draft)],
                    "draft_prob": draft_rng.uniform(0.1, 1.0, len(draft)),
                    "num_accepted": agree.index(False) if False in agree else len(agree),
                }
            )
    tables = {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    tables["requests"] = pa.Table.from_pylist(requests, schema=SCHEMAS["requests"])
    tables["anchors"] = pa.Table.from_pylist(anchors, schema=SCHEMAS["anchors"])
    return Trace(tables, "wall", {"block_size": block_size, "has_confidence": confidence, "mode": mode})


class ToyRecording:
    """The tokens and confidences of a toy trace by prompt (sampled ones: by prompt and request), for the oracle."""

    def __init__(self, trace: Trace) -> None:
        self.requests: dict[str, dict[str, Any]] = {}
        self.blocks: dict[str, list[dict[str, Any]]] = {}
        owner: dict[int, str] = {}
        for request in trace.tables["requests"].to_pylist():
            key = request["prompt_id"]
            if trace.config.get("mode", "greedy") != "greedy":
                key = f"{key}#{request['request_id']}"
            if key not in self.requests:
                self.requests[key] = request
                self.blocks[key] = []
                owner[request["request_id"]] = key
        for anchor in trace.tables["anchors"].to_pylist():
            self.blocks[owner[anchor["request_id"]]].append(anchor)

    def walk(self, key: str, block_size: int, choose: Callable[[int, list[float]], int]) -> list[Round]:
        """Decode one request by comparing tokens.

        `choose` gets the number of the round and the confidences of the draft, and returns how many to verify.
        """
        request = self.requests[key]
        output, max_tokens = request["output_tokens"], request["max_tokens"]
        emitted = output[:1]
        rounds: list[Round] = []
        while emitted[-1] != EOS and len(emitted) < max_tokens:
            block = self.blocks[key][len(emitted) - 1]
            room = max_tokens - len(emitted) - 1
            draft = block["draft_tokens"][:block_size][:room]
            verify_len = min(choose(len(rounds), block["confidence"][: len(draft)]), len(draft))
            before, num_accepted = len(emitted), 0
            for token in draft[:verify_len]:
                if token != output[len(emitted)]:
                    break
                emitted.append(token)
                num_accepted += 1
                if token == EOS:
                    break
            if num_accepted == 0 or emitted[-1] != EOS:
                emitted.append(output[len(emitted)])
            position = request["prompt_len"] + before - 1
            rounds.append(Round(position, len(draft), verify_len, num_accepted, len(emitted) - before))
        assert emitted == output
        return rounds


def algorithm_1(survival: FloatArray, seconds: FloatArray) -> list[int]:
    """The paper's Algorithm 1, line by line; ties by position, then request."""
    num_requests, draft_len = survival.shape
    pairs = [(-survival[r, j], j, r) for r in range(num_requests) for j in range(draft_len)]
    lens = [0] * num_requests
    batch_tokens, expected = num_requests, float(num_requests)
    best = expected / seconds[0]
    for negative, _, r in sorted(pairs):
        expected -= negative
        batch_tokens += 1
        throughput = expected / seconds[batch_tokens - num_requests]
        if throughput <= best:
            break
        best = throughput
        lens[r] += 1
    return lens


def toy_cost() -> CostModel:
    """Flat to 4 tokens, then rising: a small copy of a GPU's shape. Seconds."""
    return CostModel(
        verify=Curve((1.0, 4.0, 16.0), (0.010, 0.011, 0.030), (("context_tokens", 1e-6), ("num_requests", 1e-5))),
        draft=Curve(
            (1.0, 8.0), (0.001, 0.003), (("draft_len", 1e-4), ("draft_tokens", 1e-5), ("context_tokens", 1e-7))
        ),
        prefill=Curve((1.0, 100.0), (0.010, 0.050)),
        host=Curve((1.0, 8.0), (0.0005, 0.001)),
        prefill_host=Curve((1.0,), (0.002,)),
        provenance={"device": "toy"},
    )


def constant_cost(step_seconds: float, prefill_seconds: float) -> CostModel:
    """Every target pass takes the same time and everything else none."""
    return CostModel(verify=Curve((1.0,), (step_seconds,)), prefill=Curve((1.0,), (prefill_seconds,)))
