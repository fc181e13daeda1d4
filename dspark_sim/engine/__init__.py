"""The live decoding engine (torch): models, ragged attention, KV cache, drafters, verification, timing.

The same code runs on a CPU and on CUDA. `serve.Engine` is the way in.
"""
