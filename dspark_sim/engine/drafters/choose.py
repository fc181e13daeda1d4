"""How drafted tokens are chosen in each acceptance mode, and where their confidence comes from.

``rejection`` and ``block`` draw from the drafter's law; ``coupled`` races it against the noise that the target will
meet at the same position; ``greedy`` and ``target_match`` take the most probable token, which a target that chooses
for itself agrees with most often. The live batch and the dense pass use the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.drafters.network import DraftNetwork
from dspark_sim.engine.sampling import SamplingParams, draw, keyed_exponential, keyed_uniform, probabilities, race
from dspark_sim.errors import UserError
from dspark_sim.loop import Mode

IntArray = npt.NDArray[np.int64]
Choose = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
ConfidenceKind = Literal["head", "top1", "margin"]


@dataclass(frozen=True)
class DraftRule:
    """How to choose drafts.

    Parameters
    ----------
    mode
        Acceptance mode.
    params
        Sampling of target and drafter.
    with_prob
        Whether the probability of every drafted token is wanted.
    """

    mode: Mode = "greedy"
    params: SamplingParams = field(default_factory=SamplingParams)
    with_prob: bool = False

    def choose(self, request_ids: IntArray, anchors: IntArray, token_ids: torch.Tensor) -> Choose:
        """A function (slot, logits [N, Vd]) to (indices [N], law [N, Vd] that they were drawn from, or ``None``).

        Parameters
        ----------
        request_ids, anchors
            [N], keys of the random numbers; `anchors` are positions.
        token_ids
            [Vd] target ids of the draft vocabulary.
        """
        params = self.params

        def most_probable(_slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
            return logits.argmax(dim=-1), None

        def sample(slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            law = probabilities(logits, params)
            return draw(law, keyed_uniform(params.seed, request_ids, anchors, "draft", slot)), law

        def couple(slot: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            law = probabilities(logits, params)
            return race(law, keyed_exponential(params.seed, request_ids, anchors + 1 + slot, token_ids)), law

        if self.mode in ("rejection", "block"):
            return sample
        return couple if self.mode == "coupled" else most_probable


@dataclass(frozen=True)
class Confidence:
    """Where P(accept k | all before k accepted) is read from; always before token k is chosen.

    Parameters
    ----------
    kind
        ``head``: the drafter's confidence head. ``top1``: probability of its most probable token. ``margin``: a
        logistic function of the difference of its two largest logits.
    intercept, slope
        Of the logistic function; see `fit_margin`.
    temperatures
        One for each slot of a block, [γ]: slot k's estimate c becomes σ(logit(c) / T_k). Empty leaves the estimates as
        they are. They are constants, so an estimate still depends on nothing but what stands before its token, and
        policies that ask for no more stay exact.

    Raises
    ------
    UserError
        If a temperature is not a positive number.
    """

    kind: ConfidenceKind = "head"
    intercept: float = 0.0
    slope: float = 1.0
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            if not (isfinite(temperature) and temperature > 0):
                raise UserError(f"temperatures have the value {temperature}; give positive numbers")

    def require_slots(self, block_size: int) -> None:
        """Check that there are temperatures for blocks of `block_size` slots, or none at all.

        Raises
        ------
        UserError
            If there are more or fewer.
        """
        if self.temperatures and len(self.temperatures) != block_size:
            raise UserError(
                f"there are {len(self.temperatures)} temperatures and the drafter proposes {block_size} tokens; fit "
                "them to this drafter with `dspark-sim calibrate`"
            )

    def calibrate(self, estimates: torch.Tensor) -> torch.Tensor:
        """Estimates of a block's first k slots, [N, k], at their temperatures.

        Raises
        ------
        UserError
            If there are temperatures, but fewer than k.
        """
        if not self.temperatures:
            return estimates
        num_slots = estimates.shape[1]
        if num_slots > len(self.temperatures):
            self.require_slots(num_slots)
        return (estimates.logit() / estimates.new_tensor(self.temperatures[:num_slots])).sigmoid()

    def calibrate_slot(self, estimates: torch.Tensor, slot: int) -> torch.Tensor:
        """Estimates [N] of one slot, from 0, at its temperature; as `calibrate` has them."""
        if not self.temperatures:
            return estimates
        if slot >= len(self.temperatures):
            self.require_slots(slot + 1)
        return (estimates.logit() / estimates.new_tensor(self.temperatures[slot])).sigmoid()

    def estimate(
        self, network: DraftNetwork, hidden: torch.Tensor, embedding: torch.Tensor | None, logits: torch.Tensor
    ) -> torch.Tensor | None:
        """[N] estimates, or ``None`` where the drafter has no confidence head and `kind` asks for it."""
        if self.kind == "head":
            return self.from_head(network, hidden, embedding)
        if self.kind == "top1":
            return logits.float().softmax(dim=-1).amax(dim=-1)
        top = logits.float().topk(2, dim=-1).values
        return (self.intercept + self.slope * (top[..., 0] - top[..., 1])).sigmoid()

    @staticmethod
    def from_head(network: DraftNetwork, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor | None:
        """[N] estimates of the confidence head; ``None`` without one."""
        judged = network.confidence_logits(hidden, embedding)
        return None if judged is None else judged.float().sigmoid()
