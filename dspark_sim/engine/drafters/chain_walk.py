"""Walking chains of an autoregressive drafter from many anchors of known sequences at once.

All chains of a sequence share its context keys; a chain's own keys are a few rows per anchor. Scores against both are
computed apart and meet in one softmax, so that nothing is copied per anchor.
"""

from __future__ import annotations

import torch

from dspark_sim.engine.drafters.chain_model import ChainDrafter
from dspark_sim.engine.drafters.walk import Branch, Slots


class ChainWalk:
    """Walk of a chain drafter; see `Walk`. Rows are the anchors of all sequences, N = S·M.

    Parameters
    ----------
    network
        The drafter.
    tokens, features
        [S, L] token ids and [S, L, n·d] target features.
    anchors
        [S, M] positions, each at least 1.
    """

    def __init__(
        self, network: ChainDrafter, tokens: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor
    ) -> None:
        self.network, self.anchors = network, anchors
        known = network.fuse(features.to(network.hidden_norm.weight.dtype))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # The last position has no token behind it and is never seen: an anchor at L - 1 sees positions before L - 2.
        behind = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
        _, entered = network.enter(known, behind)
        rotary = network.rotary(places.expand(len(tokens), -1), known)
        keys, values = network.keys(entered, rotary)
        self._context = keys.permute(0, 2, 3, 1), values.transpose(1, 2)
        self._unseen = places >= anchors[..., None] - 1
        self._known = known.gather(1, (anchors - 1)[..., None].expand(-1, -1, known.shape[-1]))
        self._chain: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Of the ways of the last branching: what is known, and the keys and values of their own tokens.
        self._ways: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def step(self, previous: torch.Tensor, rows: torch.Tensor | None = None) -> Slots:
        """Go to the next slot; see `Walk`."""
        network = self.network
        residual, entered = network.enter(self._known, previous.view_as(self.anchors))
        rotary = network.rotary(self.anchors - 1 + len(self._chain), entered)
        self._chain.append(network.keys(entered, rotary))
        self._known = network.leave(residual, self._attend(network.queries(entered, rotary)))
        hidden = network.norm(self._known).flatten(0, 1)
        hidden = hidden if rows is None else hidden[rows]
        return Slots(network.base_logits(hidden), hidden, None)

    def along(self, previous: torch.Tensor) -> Slots:
        """Slots along known tokens; see `Walk`."""
        return Slots.stack([self.step(column) for column in previous.unbind(dim=1)], dim=1)

    def _attend(self, queries: torch.Tensor) -> torch.Tensor:
        """[S, M, H, D] over the context and over the chains' own keys."""
        num_kv_heads = self._context[0].shape[1]
        grouped = queries.unflatten(2, (num_kv_heads, -1)) * queries.shape[-1] ** -0.5
        own_keys = torch.stack([keys for keys, _ in self._chain], dim=2)
        own_values = torch.stack([values for _, values in self._chain], dim=2)
        stacked = grouped.permute(0, 2, 1, 3, 4)
        scores = (stacked.flatten(2, 3) @ self._context[0]).unflatten(2, stacked.shape[2:4])
        scores = scores.masked_fill(self._unseen[:, None, :, None], -torch.inf)
        own = torch.einsum("smkgd,smjkd->skmgj", grouped, own_keys)
        weights = torch.cat((scores, own), dim=-1).softmax(dim=-1, dtype=torch.promote_types(own.dtype, torch.float32))
        weights = weights.to(own_values.dtype)
        length = scores.shape[-1]
        out = (weights[..., :length].flatten(2, 3) @ self._context[1]).unflatten(2, stacked.shape[2:4])
        out = out + torch.einsum("skmgj,smjkd->skmgd", weights[..., length:], own_values)
        return out.permute(0, 2, 1, 3, 4).flatten(2, 3)

    def branch(self, rows: torch.Tensor, parents: torch.Tensor | None, previous: torch.Tensor) -> Branch:
        """Go to the next slot by many ways, each over its own keys alone; see `Walk`. Of one sequence only."""
        network = self.network
        if len(self.anchors) != 1:
            raise ValueError(f"{len(self.anchors)} sequences; ways branch from anchors of one")
        last = self._known[0][rows] if parents is None or self._ways is None else self._ways[0][parents]
        depth = 0 if self._ways is None else self._ways[1].shape[1]
        residual, entered = network.enter(last, previous)
        rotary = network.rotary(self.anchors[0][rows] - 1 + depth, entered)
        keys, values = (one[:, None] for one in network.keys(entered, rotary))
        if self._ways is not None and parents is not None:
            keys = torch.cat((self._ways[1][parents], keys), dim=1)
            values = torch.cat((self._ways[2][parents], values), dim=1)
        attended = self._attend_ways(network.queries(entered, rotary), rows, keys, values)
        known = network.leave(residual, attended)
        self._ways = known, keys, values
        hidden = network.norm(known)
        return Branch(hidden, None, lambda part: network.base_logits(hidden[part]))

    def _attend_ways(
        self, queries: torch.Tensor, rows: torch.Tensor, own_keys: torch.Tensor, own_values: torch.Tensor
    ) -> torch.Tensor:
        """[W, H, D] over the context before each way's anchor and over its own keys [W, k, KV heads, D]."""
        grouped = queries.unflatten(1, (own_keys.shape[2], -1)) * queries.shape[-1] ** -0.5
        context = torch.einsum("wkgd,kdl->wkgl", grouped, self._context[0][0])
        context = context.masked_fill(self._unseen[0][rows][:, None, None], -torch.inf)
        own = torch.einsum("wkgd,wjkd->wkgj", grouped, own_keys)
        scores = torch.cat((context, own), dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(own.dtype, torch.float32)).to(own.dtype)
        length = context.shape[-1]
        out = torch.einsum("wkgl,kld->wkgd", weights[..., :length], self._context[1][0])
        return (out + torch.einsum("wkgj,wjkd->wkgd", weights[..., length:], own_values)).flatten(1, 2)
