import subprocess
import sys
from pathlib import Path

import pytest

CORE = (
    *("errors", "request", "provenance", "trace", "cost", "workload", "policy", "policy_history", "policy_ranked"),
    *("cost_curve", "cost_parts", "cost_model", "cost_steps", "cost_noise", "cost_parametric", "cost_table"),
    *("model_shapes", "roofline", "policy_zoo", "scheduler", "loop"),
    *("gaps", "arrivals", "request_traces", "lengths", "mixes"),
)

SCRIPT = f"""
import importlib, sys
import dspark_sim
def heavy(*names):
    return sorted(set(names) & set(sys.modules))
assert not heavy("torch", "transformers", "simpy", "pandas.plotting._matplotlib"), "import dspark_sim"
for name in {CORE!r}:
    importlib.import_module("dspark_sim." + name)
    assert not heavy("torch", "transformers", "simpy", "matplotlib"), (name, heavy("torch", "transformers", "simpy"))
import dspark_sim.simulate
assert not heavy("torch", "transformers", "matplotlib"), "simulate"
"""


# Each begins in a process of its own; `checks` come after.
CALLS_FIRST = """
import dspark_sim
first = dspark_sim.simulate
from dspark_sim import simulate
assert first is simulate
import dspark_sim.simulate.run
"""
SUBPACKAGE_FIRST = """
import dspark_sim.simulate.run
import dspark_sim
from dspark_sim import simulate
"""
SUBPACKAGE_FROM = """
from dspark_sim.simulate.run import simulate as run
from dspark_sim.simulate import ReplayExecutor
import dspark_sim
from dspark_sim import simulate
"""
CHECKS = """
import inspect, pickle, sys
from dspark_sim import api
from dspark_sim.simulate.run import simulate as run
assert callable(simulate) and callable(dspark_sim.simulate) and dspark_sim.simulate is simulate
assert dspark_sim.simulate.run is sys.modules["dspark_sim.simulate.run"] and run is dspark_sim.simulate.run.simulate
assert inspect.ismodule(dspark_sim.simulate) and dspark_sim.simulate.ReplayExecutor
assert inspect.signature(simulate) == inspect.signature(api.simulate)
assert pickle.loads(pickle.dumps(simulate)) is simulate
sys.path.insert(0, "tests")
from toy import toy_cost, toy_trace
from dspark_sim import Fixed, Oracle, PrefixScheduler, make_policy
recorded, cost = toy_trace(3), toy_cost()
for call in (simulate, dspark_sim.simulate, api.simulate):
    assert call(recorded, policy=Fixed(2), cost=cost, concurrency=2).config["policy"] == "fixed-2"
try:
    simulate(recorded, policy=Fixed(6), cost=cost)
except dspark_sim.api.UserError as error:
    assert "drafts 6 tokens" in str(error)
else:
    raise AssertionError("the API's own check did not run")
assert not {"torch", "transformers"} & set(sys.modules)
"""


def run_script(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_the_core_stays_light() -> None:
    run_script(SCRIPT)


@pytest.mark.parametrize("first", [CALLS_FIRST, SUBPACKAGE_FIRST, SUBPACKAGE_FROM])
def test_simulate_can_be_called_whatever_was_imported_before(first: str) -> None:
    run_script(first + CHECKS)


def test_every_name_of_the_package_is_there() -> None:
    pytest.importorskip("torch")
    import dspark_sim

    assert dir(dspark_sim) == sorted(dspark_sim.__all__)
    assert all(getattr(dspark_sim, name) is not None for name in dspark_sim.__all__)
    with pytest.raises(AttributeError, match="no attribute 'simulator'"):
        _ = dspark_sim.simulator
