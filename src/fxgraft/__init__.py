"""fxgraft: graft published efficiency methods onto PyTorch models people already have.

``capture`` makes a Program of a model, ``compile`` rewrites it with passes and lowers it,
``export_onnx`` writes it as ONNX, and ``load`` reads what was saved.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import fxgraft.kernels  # noqa: F401  (registers the ops that graphs are made of)
from fxgraft.api import capture, compile, export_onnx, load
from fxgraft.backend import Backend, Compiled, Outputs
from fxgraft.errors import Error
from fxgraft.pipeline import Pipeline
from fxgraft.program import Input, Program, Range
from fxgraft.state import StepProgram, insert_state
from fxgraft.transform import Effect, Pass

try:
    __version__ = version("fxgraft")
except PackageNotFoundError:
    __version__ = "0+source"

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
    "capture",
    "compile",
    "export_onnx",
    "insert_state",
    "load",
]
