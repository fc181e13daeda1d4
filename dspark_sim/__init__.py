"""Record speculative decoding on a real engine once, then replay any schedule in a discrete-event simulator.

The names below are loaded on first use: importing the package imports neither torch nor transformers nor simpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_sim.api import compare, profile, record, simulate
    from dspark_sim.cost import CostModel
    from dspark_sim.engine.serve import Engine
    from dspark_sim.policy import Fixed, PrefixScheduler
    from dspark_sim.trace import Trace
    from dspark_sim.workload import ClosedLoop, Poisson

__version__ = "0.1.0"

__all__ = [
    "ClosedLoop",
    "CostModel",
    "Engine",
    "Fixed",
    "Poisson",
    "PrefixScheduler",
    "Trace",
    "__version__",
    "compare",
    "profile",
    "record",
    "simulate",
]


def __getattr__(name: str) -> Any:
    homes = {
        "ClosedLoop": "workload",
        "CostModel": "cost",
        "Engine": "engine.serve",
        "Fixed": "policy",
        "Poisson": "workload",
        "PrefixScheduler": "policy",
        "Trace": "trace",
        "compare": "api",
        "profile": "api",
        "record": "api",
        "simulate": "api",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
