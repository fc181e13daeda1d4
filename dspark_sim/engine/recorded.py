"""What a live run left behind for the dense pass: outputs, and what its rounds settled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark_sim.engine.conditional import Known
from dspark_sim.trace import Trace

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class RecordedOutput:
    """One request's tokens, and the rounds that the live run made of it by the position of their anchors."""

    request_id: int
    prompt: list[int]
    output: list[int]
    rounds: dict[int, Known]

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_anchors(self) -> int:
        """Positions of the output but the last."""
        return len(self.output) - 1

    @property
    def anchors(self) -> IntArray:
        """Their positions."""
        return len(self.prompt) + np.arange(self.num_anchors)


def recorded_outputs(trace: Trace, drafter: str) -> list[RecordedOutput]:
    """Outputs of a live trace; of mode ``rejection`` with the rounds, if they are of chains of the same drafter."""
    config, rounds = trace.config, dict[int, dict[int, Known]]()
    if config["mode"] == "rejection" and config.get("drafter") == drafter and config.get("tree") is None:
        for row in trace.tables["drafts"].to_pylist():
            known = Known.of_round(row["draft_tokens"] or [], row["verify_len"], row["num_accepted"])
            rounds.setdefault(row["request_id"], {})[row["position"]] = known
    prompts = config["prompts"]
    return [
        RecordedOutput(
            row["request_id"], prompts[row["prompt_id"]], row["output_tokens"], rounds.get(row["request_id"], {})
        )
        for row in trace.tables["requests"].to_pylist()
    ]
