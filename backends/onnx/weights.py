"""The file of weights that the graphs of a model share.

Each distinct tensor is written once, whichever graphs use it; a graph refers to a place in the
file. Views of weights, such as transposes, are made contiguous one at a time while writing.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from onnx import StringStringEntryProto, TensorProto
from torch import Tensor

from fxgraft.backends.onnx.builder import Value, identity
from fxgraft.backends.onnx.types import element_type

FILE = "weights.bin"
# Smaller tensors are kept inside the graphs.
_INLINE_BYTES = 1024
# Memory-mapped pages begin at multiples of this.
_ALIGNMENT = 4096


@dataclass
class WeightFile:
    """Places of tensors in one file.

    Attributes:
        folder: where the file is; None keeps every tensor inside its graph.
    """

    folder: Path | None
    _places: dict[Hashable, tuple[int, int]] = field(
        default_factory=dict[Hashable, tuple[int, int]]
    )
    _kept: list[Tensor] = field(default_factory=list[Tensor])
    _size: int = 0

    def initializer(self, value: Value) -> TensorProto:
        """The ONNX form of a constant; appends it to the file if it is not there yet."""
        tensor, dtype = value.constant, value.dtype
        assert tensor is not None
        assert dtype is not None
        proto = TensorProto(name=value.name, dims=tensor.shape, data_type=element_type(dtype))
        if self.folder is None or tensor.numel() * dtype.itemsize < _INLINE_BYTES:
            proto.raw_data = _array(tensor, dtype).tobytes()
            return proto
        offset, length = self._place(tensor, dtype)
        proto.data_location = TensorProto.EXTERNAL
        for key, text in (("location", FILE), ("offset", str(offset)), ("length", str(length))):
            proto.external_data.append(StringStringEntryProto(key=key, value=text))
        return proto

    def _place(self, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
        key = (identity(tensor), dtype)
        if key not in self._places:
            self._places[key] = self._append(tensor, dtype)
            # Kept, so that its memory is not given to another tensor that is then taken for it.
            self._kept.append(tensor)
        return self._places[key]

    def _append(self, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
        assert self.folder is not None
        offset = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        data = _array(tensor, dtype)
        with (self.folder / FILE).open("ab") as file:
            file.truncate(offset)
            file.write(data.data)
        self._size = offset + data.nbytes
        return offset, data.nbytes


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to(dtype).contiguous().numpy()
