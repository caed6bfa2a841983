"""The table of translations, complete: importing this registers every operator's."""

from __future__ import annotations

from fxgraft.backends.onnx import aten as aten
from fxgraft.backends.onnx import ops as ops
from fxgraft.backends.onnx.call import TABLE as TABLE
