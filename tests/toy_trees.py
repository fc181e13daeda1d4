"""A recording of trees with known tokens, and the rounds that a live run of any shape would make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from toy import EOS, toy_trace

from dspark_sim.trace import SCHEMAS, Trace
from dspark_sim.tree import TreeBatch, never_rising
from dspark_sim.tree_accept import accept_matching_tree, path_places
from dspark_sim.tree_builders import Candidates
from dspark_sim.tree_shapes import TreeShape

GAMMA, WIDTH = 4, 4


class ToyTrees:
    """Candidates at every anchor of a toy trace's outputs: four a slot, the output's token among them more or less.

    The same whatever shape is asked for, as a drafter's are.
    """

    def __init__(self, num_prompts: int = 6, output_len: int = 24, seed: int = 0) -> None:
        rng = np.random.default_rng((seed, 2))
        self.base = toy_trace(num_prompts, output_len, GAMMA, seed=seed)
        self.requests = self.base.tables["requests"].to_pylist()
        self.blocks: dict[int, list[Candidates]] = {}
        self.futures: dict[int, npt.NDArray[np.int64]] = {}
        for request in self.requests:
            output = request["output_tokens"]
            futures = np.full((len(output) - 1, GAMMA), -7, dtype=np.int64)
            blocks = []
            for anchor in range(len(output) - 1):
                after = output[anchor + 1 : anchor + 1 + GAMMA]
                futures[anchor, : len(after)] = after
                tokens = 1000 + np.argsort(rng.random((GAMMA, 50)), axis=1)[:, :WIDTH]
                for depth, token in enumerate(after):
                    rank = int(rng.choice(WIDTH + 1, p=[0.45, 0.2, 0.1, 0.05, 0.2]))
                    if rank < WIDTH:
                        tokens[depth, rank] = token
                chance = -np.sort(-rng.dirichlet(np.full(WIDTH + 1, 0.7), GAMMA)[:, :WIDTH], axis=1)
                blocks.append(Candidates(tokens[None], np.log(chance)[None]))
            self.blocks[request["request_id"]] = blocks
            self.futures[request["request_id"]] = futures

    def tree(self, request_id: int, anchor: int, shape: TreeShape) -> TreeBatch:
        """What a drafter makes at one anchor."""
        return self.blocks[request_id][anchor].build(shape)

    def trace(self, shape: TreeShape | None, *, ranks: bool = True) -> Trace:
        """A recording of a shape (fitted), or of chains."""
        rows: list[dict[str, Any]] = []
        for row in self.base.tables["anchors"].to_pylist():
            request_id = row["request_id"]
            anchor = row["position"] - self.requests[request_id]["prompt_len"]
            future = self.futures[request_id][anchor]
            block = self.blocks[request_id][anchor]
            hits = block.tokens[0] == future[:, None]
            rank = np.where(hits.any(axis=1), hits.argmax(axis=1), 2**31 - 1)
            row |= {
                "draft_tokens": block.tokens[0, :, 0],
                "confidence": np.exp(block.log_acceptance[0, :, 0]),
                "accept_prob": None,
                "draft_prob": None,
                "num_accepted": int(np.cumprod(rank == 0).sum()),
                "target_rank": rank if ranks else None,
            }
            if shape is not None:
                tree = block.build(shape)
                row |= {
                    "node_rank": path_places(tree, future[None])[0],
                    "node_survival": tree.survival[0],
                    "first_at_depth": tree.first_at_depth(GAMMA)[0],
                }
            rows.append(row)
        tables = {**self.base.tables, "anchors": pa.Table.from_pylist(rows, schema=SCHEMAS["anchors"])}
        config = {"block_size": GAMMA, "has_confidence": True, "mode": "greedy", "num_candidates": WIDTH}
        return Trace(tables, "wall", config if shape is None else {**config, "tree": shape.label()})

    def rounds(
        self, request_id: int, shape: TreeShape, choose: Callable[[npt.NDArray[np.float64]], int]
    ) -> list[tuple[int, int, int, int, int, list[int]]]:
        """Position, drafted, verified, accepted, emitted, path of every round of a live run, by comparing tokens.

        `choose` gets the survivals of the drafted nodes and returns how many are verified.
        """
        request = self.requests[request_id]
        output, limit = request["output_tokens"], request["max_tokens"]
        emitted, found = output[:1], []
        while emitted[-1] != EOS and len(emitted) < limit:
            anchor = len(emitted) - 1
            tree = self.tree(request_id, anchor, shape)
            tree = tree.prefix(tree.within(np.array([limit - len(emitted) - 1])))
            drafted = int(tree.num_nodes[0])
            verify = min(choose(never_rising(tree.survival[0])), drafted)
            # At a node of depth d the target says output token anchor + 1 + d if the node is on its path.
            said = np.full((1, drafted + 1), -9, dtype=np.int64)
            future = np.append(self.futures[request_id][anchor], -7)
            said[0, 0] = future[0]
            said[0, 1:] = future[tree.depths[0]]
            taken = accept_matching_tree(tree, np.array([verify]), said)
            accepted = int(taken.num_accepted[0])
            path = taken.nodes[0, :accepted].tolist()
            new = output[len(emitted) : len(emitted) + accepted + 1]
            if EOS in new:
                new = new[: new.index(EOS) + 1]
                accepted = min(accepted, len(new))
            found.append(
                (request["prompt_len"] + anchor, drafted, verify, accepted, len(new), path[:accepted]),
            )
            emitted = emitted + new
        assert emitted == output
        return found
