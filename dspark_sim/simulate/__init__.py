"""The simulator: recorded acceptance and fitted costs replayed under synthetic concurrency.

`acceptance` holds what was recorded, `executor` answers the decode loop from it, `processes` is the world around the
loop (users, arrivals), and `run` puts them together. Nothing here imports torch.
"""

from dspark_sim.simulate.acceptance import RecordedAnchors, RecordedPrompt
from dspark_sim.simulate.executor import ReplayExecutor
from dspark_sim.simulate.run import simulate

__all__ = ["RecordedAnchors", "RecordedPrompt", "ReplayExecutor", "simulate"]
