"""Backend ``triton``: fused kernels, state in pools, decode steps in CUDA graphs."""

from fxgraft.backends.triton.backend import BACKEND, TritonCompiled, TritonOptions

__all__ = ["BACKEND", "TritonCompiled", "TritonOptions"]
