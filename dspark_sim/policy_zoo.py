"""Every policy there is: as a union type, and by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

from dspark_sim.cost import CostModel
from dspark_sim.errors import UserError
from dspark_sim.policy import Fixed, PrefixScheduler
from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler, Oracle, Tetris

Policy = (
    Fixed
    | BatchSizeTable
    | AcceptanceEMA
    | Goodput
    | Parked
    | ConfidenceThreshold
    | PrefixScheduler
    | LaggedPrefixScheduler
    | GlobalArgmax
    | Tetris
    | Oracle
)
PolicyName = Literal[
    "none", "fixed", "threshold", "table", "ema", "goodput", "prefix", "lagged", "argmax", "tetris", "oracle"
]
DEFAULT_TABLE = ((4, 7), (16, 3), (64, 1), (65, 0))


def make_policy(
    name: PolicyName,
    *,
    block_size: int,
    cost: CostModel | None,
    verify_len: int | None = None,
    threshold: float = 0.5,
    lag: int = 2,
    capacity: int = 32,
    table: tuple[tuple[int, int], ...] = DEFAULT_TABLE,
    park: bool = False,
) -> Policy:
    """A policy by name.

    Parameters
    ----------
    name
        none, fixed, threshold, table, ema, goodput, prefix, lagged, argmax, tetris or oracle.
    block_size
        Most tokens the drafter can propose.
    cost
        Cost table; goodput, prefix, lagged, argmax, oracle and parking need one.
    verify_len
        For fixed: drafted tokens verified per request; ``None`` is the whole block.
    threshold
        For threshold: least confidence of a verified draft.
    lag
        For lagged: rounds.
    capacity
        For tetris: drafted tokens verified per round.
    table
        For table: pairs (largest number of running requests, drafted tokens verified per request).
    park
        Do not draft while drafts do not pay.

    Raises
    ------
    UserError
        If the name is unknown, a value out of range, or a cost table missing.
    """
    if name == "none" and park:
        raise UserError("policy none never drafts, so it cannot be parked; leave out park or choose another policy")

    def table_for(what: str) -> CostModel:
        if cost is None:
            raise UserError(f"{what} needs a cost table; give --cost, made by `dspark-sim profile`")
        return cost

    priced = f"policy {name}"
    makers: dict[str, Callable[[], Policy]] = {
        "none": lambda: Fixed(0),
        "fixed": lambda: Fixed(block_size if verify_len is None else verify_len),
        "threshold": lambda: ConfidenceThreshold(threshold),
        "table": lambda: BatchSizeTable(table),
        "ema": lambda: AcceptanceEMA(),
        "goodput": lambda: Goodput(table_for(priced)),
        "prefix": lambda: PrefixScheduler(table_for(priced)),
        "lagged": lambda: LaggedPrefixScheduler(table_for(priced), lag),
        "argmax": lambda: GlobalArgmax(table_for(priced)),
        "tetris": lambda: Tetris(capacity),
        "oracle": lambda: Oracle(table_for(priced)),
    }
    if name not in makers:
        raise UserError(f"no policy {name!r}; choose from {', '.join(makers)}")
    policy = makers[name]()
    return Parked(policy, table_for("parking")) if park else policy


def policy_from_parameters(parameters: Mapping[str, Any], cost: CostModel | None) -> Policy:
    """The policy that `policy.parameters` wrote down, as a trace's configuration has it.

    Parameters
    ----------
    parameters
        Its kind and parameters, JSON types.
    cost
        Its cost table, which is recorded apart; ``None`` will do for a policy without one.

    Raises
    ------
    UserError
        If the kind is unknown, a parameter is not one of the policy's or out of range, or a cost table is missing.
    """
    kinds = {kind.__name__: kind for kind in get_args(Policy)}
    name = parameters.get("kind")
    if name not in kinds:
        raise UserError(f"the trace has policy kind {name!r}; this package knows {', '.join(sorted(kinds))}")
    kind = kinds[name]
    known = {field.name: field.type for field in fields(kind)}
    strange = sorted(set(parameters) - set(known) - {"kind"})
    if strange:
        raise UserError(f"policy {name} has no parameter {strange[0]}; the trace was written by another version")
    values = {key: _tuples(value) for key, value in parameters.items() if key in known}
    if "inner" in values:
        values["inner"] = policy_from_parameters(parameters["inner"], cost)
    if "cost" in known:
        if cost is None:
            raise UserError(f"policy {name} chose by a cost table that the trace does not hold; give --cost")
        values["cost"] = cost
    try:
        policy: Policy = kind(**values)
    except TypeError as error:
        raise UserError(f"policy {name} cannot be made of the trace's parameters ({error})") from error
    return policy


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
