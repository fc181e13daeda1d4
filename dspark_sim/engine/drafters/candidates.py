"""Candidates of a slot: the tokens that a tree's siblings may have, and how likely each is thought to be accepted.

The first candidate is what a chain would draft (but for mode ``rejection``, see there). By acceptance mode, with the
drafter's law q at the slot:

* ``greedy``, ``target_match``: the most probable tokens. A candidate's share is q of it.
* ``coupled``: the best of the exponential race that target and drafter share, by q / noise. The share is that of the
  candidate's score in the sum of all: the probability that the target's race has this winner if log p - log q is
  Gumbel noise of its own for every token. At ``greedy`` the same argument gives q.
* ``rejection``: tokens drawn from q without replacement, one after the other (the best of a race with noise of the
  drafter's own; Kool et al. 2019). Shares must not look at drawn tokens: candidate j gets q's j-th largest value.

An estimate c of P(accept the first candidate) replaces its share, and the others share the 1 - c that is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.drafters.choose import DraftRule
from dspark_sim.engine.sampling import keyed_exponential, probabilities

IntArray = npt.NDArray[np.int64]

# A share of 0 would make a node that is never worth verifying, also where nothing speaks against it.
_LEAST_SHARE = 1e-30


@dataclass(slots=True)
class Candidates:
    """Of M slots, best first.

    Parameters
    ----------
    tokens
        [M, K] target token ids.
    shares
        [M, K] float64, estimated P(accepted | the slot is reached), not rising along a row.
    law
        [M, Vd] what they were drawn from in mode ``rejection``, else ``None``.
    """

    tokens: torch.Tensor
    shares: torch.Tensor
    law: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class CandidateRule:
    """How to find candidates.

    Parameters
    ----------
    rule
        Acceptance mode and sampling.
    request_ids, anchors
        [N], keys of the random numbers; `anchors` are positions.
    token_ids
        [Vd] target ids of the draft vocabulary.
    num_candidates
        K; no more than Vd are given.
    """

    rule: DraftRule
    request_ids: IntArray
    anchors: IntArray
    token_ids: torch.Tensor
    num_candidates: int

    def at(
        self, slot: int, logits: torch.Tensor, rows: IntArray | None = None, ways: IntArray | None = None
    ) -> Candidates:
        """Candidates of one slot, whose shares are the drafter's own.

        Parameters
        ----------
        slot
            Place in the block, from 0.
        logits
            [M, Vd].
        rows
            [M], which of the N requests each row is of; ``None``: of all, in order.
        ways
            [M], numbers that tell the rows of one block apart, for draws of their own; ``None``: the slot.
        """
        mode, params, num = self.rule.mode, self.rule.params, min(self.num_candidates, logits.shape[-1])
        law = None
        if mode == "greedy":
            top = logits.topk(num, dim=-1)
            index = top.indices
            shares = (top.values.float() - logits.float().logsumexp(dim=-1, keepdim=True)).double().exp()
        else:
            law = probabilities(logits, params)
            if mode == "target_match":
                index = logits.topk(num, dim=-1).indices
                shares = law.gather(-1, index).double()
            else:
                scores = _scores(law, self._noise(slot, rows, ways))
                top = scores.topk(num, dim=-1)
                index = top.indices
                if mode == "coupled":
                    shares = top.values / scores.sum(dim=-1, keepdim=True)
                else:
                    shares = law.topk(num, dim=-1).values.double()
        return Candidates(self.token_ids[index], shares.clamp(min=_LEAST_SHARE), law if mode == "rejection" else None)

    def rank(self, slot: int, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rank of given tokens among all candidates of one slot of all N blocks, [N].

        Parameters
        ----------
        slot, logits
            As in `at`.
        index
            [N] places in the draft vocabulary.
        """
        scores = logits
        if self.rule.mode == "coupled":
            every = np.arange(len(self.anchors))
            scores = _scores(probabilities(logits, self.rule.params), self.shared_noise(slot, every))
        # Exact, and ten times faster than a sum of booleans.
        return (scores > scores.gather(-1, index[:, None])).float().sum(dim=-1).long()

    def _noise(self, slot: int, rows: IntArray | None, ways: IntArray | None) -> torch.Tensor:
        """Noise [M, Vd]: shared with the target in mode ``coupled``, else the drafter's own."""
        rows = np.arange(len(self.anchors)) if rows is None else rows
        if self.rule.mode == "coupled":
            return self.shared_noise(slot, rows)
        keys = np.full(len(rows), slot) if ways is None else ways
        ids, anchors, seed = self.request_ids[rows], self.anchors[rows], self.rule.params.seed
        return keyed_exponential(seed, ids, anchors, self.token_ids, "draft", keys)

    def shared_noise(self, slot: int, rows: IntArray) -> torch.Tensor:
        """Noise [M, Vd] that the target too meets at a slot of blocks `rows` [M]: one draw for each block."""
        blocks, back = np.unique(rows, return_inverse=True)
        seed = self.rule.params.seed
        noise = keyed_exponential(seed, self.request_ids[blocks], self.anchors[blocks] + 1 + slot, self.token_ids)
        return noise if len(blocks) == len(rows) else noise[torch.from_numpy(back).to(noise.device)]


def _scores(law: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The race's scores, [M, V] float64; tokens of no probability come last, in the order of their noise."""
    return (law.double() + 1e-300) / noise


def with_confidence(shares: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
    """Shares [M, K] at an estimate [M] of P(accept the first candidate); ``None`` changes nothing.

    The others share what the first leaves over, as they do by the drafter's own shares, but none has more than the
    first. No share depends on how many candidates are looked at, so a narrower tree has the survivals of a wider one.
    """
    if confidence is None:
        return shares
    first = confidence.double()[:, None]
    rest = (shares / (1.0 - shares[:, :1]).clamp(min=_LEAST_SHARE)).clamp(max=1.0) * (1.0 - first)
    return torch.cat((first, torch.minimum(rest, first)[:, 1:]), dim=1).clamp(min=_LEAST_SHARE)
