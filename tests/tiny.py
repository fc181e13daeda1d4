"""A tiny random Llama: a target whose passes take milliseconds. Import it only where torch is."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark_sim.engine.attention import ATTENTION_NAME, register_attention
from dspark_sim.engine.models import Target

HIDDEN = 24


def tiny_llama(vocab_size: int, **changes) -> LlamaForCausalLM:
    """Four layers of width 24 with six heads of four, by the engine's attention; the same weights every time."""
    register_attention()
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attn_implementation": ATTENTION_NAME,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval().requires_grad_(False)


def tiny_target(vocab_size: int, dtype: torch.dtype = torch.float32, **changes) -> Target:
    """The same as a target without a tokenizer."""
    return Target("tiny", tiny_llama(vocab_size, **changes).to(dtype), SimpleNamespace(eos_token_id=0))
