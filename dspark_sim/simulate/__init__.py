"""The simulator: recorded acceptance and fitted costs replayed under synthetic concurrency.

`acceptance` holds what was recorded, `executor` answers the decode loop from it, `processes` is the world around the
loop (users, arrivals), and `run` puts them together. In place of a recording there may be a law: `synthetic` states
it, `synthetic_anchors` generates from it, `synthetic_fit` fits it to a recording, and `presets` has the paper's.
Nothing here imports torch.
"""

from dspark_sim.simulate.acceptance import RecordedAnchors, RecordedPrompt
from dspark_sim.simulate.executor import ReplayExecutor
from dspark_sim.simulate.presets import preset
from dspark_sim.simulate.run import simulate
from dspark_sim.simulate.synthetic import ConfidenceLaw, SyntheticAcceptance
from dspark_sim.simulate.synthetic_anchors import synthetic_anchors
from dspark_sim.simulate.synthetic_fit import SyntheticFit, fit_by_domain, fit_synthetic

__all__ = [
    "ConfidenceLaw",
    "RecordedAnchors",
    "RecordedPrompt",
    "ReplayExecutor",
    "SyntheticAcceptance",
    "SyntheticFit",
    "fit_by_domain",
    "fit_synthetic",
    "preset",
    "simulate",
    "synthetic_anchors",
]
