"""Fixtures of the tests that need the embedded model; torch is imported only when one of them is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dspark_sim.engine.serve import Engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The embedded target with the bundled DSpark drafter, in float32 on two threads."""
    from dspark_sim.engine.serve import Engine

    return Engine.load(drafter="dspark", num_threads=2, max_num_seqs=16, max_model_len=512, device="cpu")


@pytest.fixture(scope="session")
def reference() -> Any:
    """The same weights in plain transformers, with torch's own attention and transformers' own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from dspark_sim.engine.models import embedded_model_folder

    model = AutoModelForCausalLM.from_pretrained(
        embedded_model_folder(), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)
