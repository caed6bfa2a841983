"""Registers an implementation for CUDA tensors beside the one that an op has for all devices."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from fxgraft.kernels.define import LIBRARY
from fxgraft.kernels.spec import OpSpec


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is optional, so only calls on CUDA tensors import it."""
    return importlib.util.find_spec("triton") is not None


def on_cuda(spec: OpSpec, implementation: Callable[..., Any], general: Callable[..., Any]) -> None:
    """Run ``implementation`` for CUDA tensors, or ``general`` where Triton is not installed."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (implementation if has_triton() else general)(*args, **kwargs)

    LIBRARY.impl(spec.name, choose, "CUDA")
