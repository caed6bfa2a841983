"""Gated activation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fxgraft.errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
}


def gated_activation(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """Gate; arguments, result and errors are those of ``fxgraft.kernels.gated_activation.op``."""
    if activation not in ACTIVATIONS:
        raise InputError(
            f"gated_activation knows no activation {activation!r}",
            f"use one of {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[activation](gate) * up
