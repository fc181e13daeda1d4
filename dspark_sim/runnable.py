"""Which policies, acceptance modes and trees go together, said before a run begins."""

from __future__ import annotations

from typing import Literal

from dspark_sim.errors import UserError
from dspark_sim.policy import SpeculationPolicy
from dspark_sim.policy_ranked import ConfidenceThreshold
from dspark_sim.tree_shapes import BestFirst, DynamicTopK, TreeShape

Mode = Literal["greedy", "rejection", "coupled", "target_match", "block"]
"""How drafts are accepted; `engine.verify` has the rules."""


def require_runnable(
    policy: SpeculationPolicy, mode: Mode, has_confidence: bool, allow_biased: bool, tree: TreeShape | None = None
) -> bool:
    """Whether a policy biases the output under a mode of acceptance; refused unless that is allowed.

    Raises
    ------
    UserError
        If it would and is not allowed to, needs confidences that the drafter does not give, or if policy, mode and
        tree do not go together.
    """
    if tree is not None:
        _require_tree(tree, policy, mode, has_confidence)
    # True acceptance probabilities exist in replays alone, as an upper bound; nothing is emitted by them.
    peeks = policy.information == "sampled_token" and policy.signal != "accept_prob"
    biased = peeks and mode in ("rejection", "block")
    if biased and not allow_biased:
        raise UserError(
            f"policy {policy.label()} looks at sampled tokens, which biases the output under mode {mode}; "
            "use greedy, coupled or target_match, or --allow-biased for a negative control"
        )
    if policy.needs_confidence and not has_confidence:
        raise UserError(
            f"policy {policy.label()} needs confidence estimates and this drafter gives none; "
            "use a drafter with a confidence head, --confidence top1, or a fixed policy"
        )
    return biased


def _require_tree(tree: TreeShape, policy: SpeculationPolicy, mode: Mode, has_survival: bool) -> None:
    name = tree.label()
    if mode == "block":
        raise UserError(
            f"mode block judges the drafts of a chain together and tree {name} branches; use mode rejection"
        )
    if mode == "rejection" and isinstance(tree, BestFirst | DynamicTopK):
        raise UserError(
            f"tree {name} holds the drafter's likeliest tokens, and judging tokens that were not drawn by their "
            "probabilities biases the output under mode rejection; use greedy, coupled or target_match, or a tree of "
            "fixed shape (width, sequoia), whose tokens are drawn without replacement"
        )
    if isinstance(getattr(policy, "inner", policy), ConfidenceThreshold):
        raise UserError(
            f"policy {policy.label()} judges each draft by the one before it, and in tree {name} that need not be its "
            "parent; use policy prefix, lagged or fixed"
        )
    if policy.signal == "accept_prob":
        raise UserError(
            f"policy {policy.label()} needs the true acceptance of every draft, which is recorded for chains only; "
            "replay --tree chain or use policy prefix"
        )
    if policy.information != "history" and not has_survival:
        raise UserError(
            f"policy {policy.label()} goes by the survivals of nodes and this recording does not have those of tree "
            f"{name}; record it with --tree {name}, or use a policy that does not look at drafts, such as fixed"
        )
