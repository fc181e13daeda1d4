"""Scatter of step times: a fit's relative residuals, drawn anew for every iteration.

A cost model gives the mean of an iteration's seconds. Measured ones scatter about it, and the tails of latency come
from there. `Noisy` multiplies all parts of an iteration by one residual, drawn with replacement from those that the fit
has kept. Their mean is 1, so mean seconds stay. A draw depends on (seed, step) alone, never on what was drawn before.

Draws are independent: bursts, where a machine is slow for a while, keep their frequency and lose their length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_sim.cost_model import CostModel
from dspark_sim.errors import UserError

# Keeps these draws apart from any others under the same seed.
_PURPOSE = 0x4E015E
_BLOCK = 4096


class ResidualNoise:
    """Factors by step.

    Parameters
    ----------
    residuals
        Measured over fitted seconds, at least 0 and of mean 1; empty means always 1.
    seed
        Same seed, same factors.
    stream
        Number of an independent series under the same seed.

    Raises
    ------
    UserError
        If a residual is negative or their mean is not 1.
    """

    def __init__(self, residuals: Sequence[float], seed: int, stream: int = 0) -> None:
        values = np.asarray(residuals, dtype=np.float64)
        if values.size and not (values.min() >= 0.0 and abs(float(values.mean()) - 1.0) < 1e-3):
            raise UserError(
                f"residuals have mean {values.mean():.4g} and least {values.min():.4g}; give ratios of measured to "
                "fitted seconds divided by their mean"
            )
        self._residuals = values
        self._key = (_PURPOSE, seed, stream)
        self._block = -1
        self._factors: list[float] = []

    def factor(self, step: int) -> float:
        """The factor of one step; a block of them is drawn at once."""
        if not self._residuals.size:
            return 1.0
        block, index = divmod(step, _BLOCK)
        if block != self._block:
            rng = np.random.default_rng(np.random.SeedSequence((*self._key, block)))
            self._factors = self._residuals[rng.integers(0, self._residuals.size, _BLOCK)].tolist()
            self._block = block
        return self._factors[index]


class Noisy:
    """A cost model whose iterations scatter as the measured ones did; for one simulated run.

    The parts of an iteration share a factor. Its host seconds are asked for once, last: after them the next step
    begins. Policies take the cost model itself, since none can foresee the scatter.

    Parameters
    ----------
    cost
        With residuals, as `dspark_sim.cost.fit` keeps them.
    seed
        Same seed, same seconds.

    Raises
    ------
    UserError
        If the cost model has no residuals.
    """

    def __init__(self, cost: CostModel, seed: int) -> None:
        if not cost.residuals:
            raise UserError(
                "this cost table has no residuals to draw noise from; make one with `dspark-sim profile`, or leave "
                "noise out"
            )
        self.cost = cost
        self.step = 0
        self._rounds = ResidualNoise(cost.residuals, seed)
        self._prefills = ResidualNoise(cost.prefill_residuals, seed, 1)

    def prefill_seconds(self, num_tokens: int, context_tokens: int = 0, num_requests: int = 1) -> float:
        """Target pass over prompt tokens."""
        return self.cost.prefill_seconds(num_tokens, context_tokens, num_requests) * self._prefills.factor(self.step)

    def prefill_host_seconds(self, num_requests: int) -> float:
        """The rest of a prefill iteration; ends it."""
        seconds = self.cost.prefill_host_seconds(num_requests) * self._prefills.factor(self.step)
        self.step += 1
        return seconds

    def draft_seconds(self, num_requests: int, draft_len: int, context_tokens: int) -> float:
        """Drafting `draft_len` tokens for each request."""
        return self.cost.draft_seconds(num_requests, draft_len, context_tokens) * self._rounds.factor(self.step)

    def step_seconds(self, batch_tokens: int, context_tokens: int, num_requests: int) -> float:
        """Target pass of a decode round."""
        return self.cost.step_seconds(batch_tokens, context_tokens, num_requests) * self._rounds.factor(self.step)

    def host_seconds(self, num_requests: int) -> float:
        """The rest of a decode round; ends it."""
        seconds = self.cost.host_seconds(num_requests) * self._rounds.factor(self.step)
        self.step += 1
        return seconds
