import subprocess
import sys
from pathlib import Path

CORE = ("errors", "request", "provenance", "trace", "cost", "workload", "policy", "scheduler", "loop")

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


def test_the_core_stays_light() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
