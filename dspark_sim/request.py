"""A request as the scheduler, the policies and the trace see it: counts and times, never tensors.

Positions are absolute: the prompt fills 0 .. prompt_len-1, output token i stands at prompt_len+i. The *anchor* is
the last token the target produced; the next draft block starts from it. Times are float seconds on the clock of
whoever runs the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "refused"]
"""``abort``: its user gave up. ``refused``: it is longer than the server can hold. Only the others have an answer."""


@dataclass(slots=True, eq=False)
class Request:
    """One generation request.

    Parameters
    ----------
    request_id
        Number of the request within a run; keys the random numbers.
    prompt_id
        Name of the prompt; keys recorded outputs and anchors.
    domain
        ``"math"``, ``"code"``, ``"chat"`` or any other label.
    prompt_len
        Prompt length in tokens, at least 1.
    max_tokens
        Most output tokens, at least 1.
    arrival
        When the request reached the server, in seconds.
    """

    request_id: int
    prompt_id: str
    domain: str
    prompt_len: int
    max_tokens: int
    arrival: float = 0.0
    num_generated: int = 0
    first_token: float = nan
    finish: float = nan
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0

    @property
    def position(self) -> int:
        """Absolute position of the anchor; valid once the first token is out."""
        return self.prompt_len + self.num_generated - 1

    @property
    def remaining(self) -> int:
        """Output tokens still allowed."""
        return self.max_tokens - self.num_generated

    @property
    def prefill_len(self) -> int:
        """Tokens a prefill must process: the prompt, or after a preemption everything before the anchor."""
        return self.prompt_len + max(self.num_generated - 1, 0)

    @property
    def context_len(self) -> int:
        """Tokens whose keys and values are in the cache between rounds (everything before the anchor)."""
        return self.prefill_len

    @property
    def is_finished(self) -> bool:
        """Whether the request has its last token."""
        return self.finish_reason is not None

    def append(self, num_tokens: int, stopped: bool, now: float) -> None:
        """Count `num_tokens` new output tokens that became visible at time `now`.

        Parameters
        ----------
        num_tokens
            Tokens emitted in this round, already cut at the end-of-sequence token and at the length limit.
        stopped
            Whether the last of them is an end-of-sequence token.
        now
            Time at the end of the round, in seconds.
        """
        if self.num_generated == 0 and num_tokens > 0:
            self.first_token = now
        self.num_generated += num_tokens
        if stopped:
            self.finish_reason = "stop"
        elif self.remaining <= 0:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.finish = now
