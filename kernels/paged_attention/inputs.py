"""The arguments of one call of the Triton kernels of paged attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxgraft.kernels.launch import power_of_2
from fxgraft.kernels.paged_attention.gate import Gate


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, as ``fxgraft.kernels.paged_attention.op`` describes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    past: Tensor
    cos: Tensor | None
    sin: Tensor | None
    sinks: Tensor | None
    gate: Gate | None


@dataclass(frozen=True)
class Rules:
    """The options of a call."""

    scale: float
    window: int | None
    softcap: float
    interleaved: bool


def sizes_of(inputs: Inputs) -> dict[str, Any]:
    """The sizes that all kernels are compiled for."""
    head_dim, value_dim = inputs.query.shape[3], inputs.value.shape[3]
    return {
        "PAGE": inputs.key_cache.shape[2],
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, power_of_2(head_dim)),
        "BLOCK_V": max(16, power_of_2(value_dim)),
    }
