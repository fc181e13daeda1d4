"""Record speculative decoding on a real engine once, then replay any schedule in a discrete-event simulator.

The names below are loaded on first use: importing the package imports neither torch nor transformers nor simpy.
`simulate` is both the call (`api.simulate`) and the subpackage: whichever way it is imported, it can be called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_sim.api import compare, profile, record, simulate
    from dspark_sim.cost import CostModel
    from dspark_sim.engine.serve import Engine
    from dspark_sim.mixes import DomainMix
    from dspark_sim.policy import Fixed, PrefixScheduler
    from dspark_sim.policy_history import AcceptanceEMA, BatchSizeTable, Goodput, Parked
    from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, LaggedPrefixScheduler, Oracle, Tetris
    from dspark_sim.policy_zoo import make_policy
    from dspark_sim.request_traces import read_request_trace
    from dspark_sim.scheduler import SchedulerConfig
    from dspark_sim.trace import Trace
    from dspark_sim.tree import TokenTree
    from dspark_sim.tree_shapes import BestFirst, Chain, DynamicTopK, FixedWidth, Sequoia, parse_tree
    from dspark_sim.workload import (
        ClosedLoop,
        Deterministic,
        Gamma,
        ImportedArrivals,
        Poisson,
        Spike,
        Stepped,
        Weibull,
    )

__version__ = "0.1.0"

__all__ = [
    "AcceptanceEMA",
    "BatchSizeTable",
    "BestFirst",
    "Chain",
    "ClosedLoop",
    "ConfidenceThreshold",
    "CostModel",
    "Deterministic",
    "DomainMix",
    "DynamicTopK",
    "Engine",
    "Fixed",
    "FixedWidth",
    "Gamma",
    "GlobalArgmax",
    "Goodput",
    "ImportedArrivals",
    "LaggedPrefixScheduler",
    "Oracle",
    "Parked",
    "Poisson",
    "PrefixScheduler",
    "SchedulerConfig",
    "Sequoia",
    "Spike",
    "Stepped",
    "Tetris",
    "TokenTree",
    "Trace",
    "Weibull",
    "__version__",
    "compare",
    "make_policy",
    "parse_tree",
    "profile",
    "read_request_trace",
    "record",
    "simulate",
]


class _Package(ModuleType):
    """The type of this package: the import of a subpackage sets it as an attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "simulate" and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


class _CallableModule(ModuleType):
    """The subpackage `simulate`, which stands where the call of that name is looked for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("dspark_sim.api").simulate(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions can be sent to other processes, modules cannot.
        return import_module, (self.__name__,)

    @property
    def __signature__(self) -> Signature:
        return signature(import_module("dspark_sim.api").simulate)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "simulate":
        return import_module(f"{__name__}.simulate")
    homes = {
        "AcceptanceEMA": "policy_history",
        "BatchSizeTable": "policy_history",
        "BestFirst": "tree_shapes",
        "Chain": "tree_shapes",
        "ClosedLoop": "workload",
        "ConfidenceThreshold": "policy_ranked",
        "CostModel": "cost",
        "Deterministic": "workload",
        "DomainMix": "mixes",
        "DynamicTopK": "tree_shapes",
        "Engine": "engine.serve",
        "Fixed": "policy",
        "FixedWidth": "tree_shapes",
        "Gamma": "workload",
        "GlobalArgmax": "policy_ranked",
        "Goodput": "policy_history",
        "ImportedArrivals": "workload",
        "LaggedPrefixScheduler": "policy_ranked",
        "Oracle": "policy_ranked",
        "Parked": "policy_history",
        "Poisson": "workload",
        "PrefixScheduler": "policy",
        "SchedulerConfig": "scheduler",
        "Sequoia": "tree_shapes",
        "Spike": "workload",
        "Stepped": "workload",
        "Tetris": "policy_ranked",
        "TokenTree": "tree",
        "Trace": "trace",
        "Weibull": "workload",
        "compare": "api",
        "make_policy": "policy_zoo",
        "parse_tree": "tree_shapes",
        "profile": "api",
        "read_request_trace": "request_traces",
        "record": "api",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
