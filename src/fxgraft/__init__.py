"""fxgraft: graft published efficiency methods onto PyTorch models people already have.

``capture`` makes a Program of a model, ``compile`` rewrites it with passes and lowers it,
``export_onnx`` writes it as ONNX, and ``load`` reads what was saved.
"""

from __future__ import annotations

from fxgraft import kernels as _kernels  # registers the ops that graphs are made of
from fxgraft.api import capture, compile, export_onnx, load
from fxgraft.backend import Backend, Compiled, Outputs
from fxgraft.errors import Error
from fxgraft.pipeline import Pipeline
from fxgraft.program import Input, Program, Range
from fxgraft.state import StepProgram, insert_state
from fxgraft.transform import Effect, Pass
from fxgraft.version import __version__

_ = _kernels

__all__ = [
    "Backend",
    "Compiled",
    "Effect",
    "Error",
    "Input",
    "Outputs",
    "Pass",
    "Pipeline",
    "Program",
    "Range",
    "StepProgram",
    "__version__",
    "capture",
    "compile",
    "export_onnx",
    "insert_state",
    "load",
]
