"""2:4 weights on the sparse tensor cores, through PyTorch's binding of cuSPARSELt.

cuSPARSELt multiplies only weights in its own form, which is made at the first call and kept beside
the packed weight as long as that lives. It is used where a measured table says so.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxgraft.errors import Error
from fxgraft.kernels.nm_linear.packing import unpack

# A multiple of rows that cuSPARSELt takes for 16-bit types.
_ROWS = 8
_compressed: Any = WeakTensorKeyDictionary()


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, pattern: tuple[int, int]
) -> Tensor:
    """x Wᵀ + bias for a packed 2:4 weight, forward only.

    Raises:
        Error: the weight is not 2:4, or its first call is under CUDA graph capture.
    """
    if pattern != (2, 4):
        raise Error(f"the sparse tensor cores take 2:4, not {pattern[0]}:{pattern[1]}")
    flat = x.reshape(-1, x.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, 0, 0, -flat.shape[0] % _ROWS))
    weight = _compressed_weight(values, indices)
    product = cast(Any, torch)._cslt_sparse_mm(weight, padded.t(), bias=bias)
    return product.t()[: flat.shape[0]].reshape(*x.shape[:-1], values.shape[2])


def _compressed_weight(values: Tensor, indices: Tensor) -> Tensor:
    """The weight in cuSPARSELt's form, made again where the values were changed."""
    known: tuple[int, Tensor] | None = _compressed.get(values)
    if known is not None and known[0] == values._version:
        return known[1]
    if torch.cuda.is_current_stream_capturing():
        raise Error(
            "a 2:4 weight is compressed for the sparse tensor cores under CUDA graph capture",
            "call the function once before it is captured",
        )
    made = cast(Any, torch)._cslt_compress(unpack(values, indices, 2, 4))
    _compressed[values] = (values._version, made)
    return made
