"""Element types: torch's, ONNX's and numpy's names for them."""

from __future__ import annotations

import torch
from onnx import TensorProto

# onnxruntime's CPU provider has no bfloat16 arithmetic; float32 holds every bfloat16 number.
# Complex numbers are pairs.
_STAND_INS = {
    torch.bfloat16: torch.float32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
"""Types that onnxruntime computes with on a CPU."""


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The element type that stands for ``dtype`` in ONNX files."""
    return _STAND_INS.get(dtype, dtype)


def element_type(dtype: torch.dtype) -> int:
    """ONNX's number of an element type.

    Raises:
        KeyError: ONNX has no such type, or onnxruntime does not compute with it.
    """
    return ELEMENT_TYPES[stored_dtype(dtype)]
