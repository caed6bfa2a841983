"""Runs Triton kernels on the CPU: what a test process does before its first kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
# Kernels run where this process interprets them, or on a GPU.
RUNS_KERNELS = INTERPRETED or torch.cuda.is_available()
_ROOT = Path(__file__).parents[2]


def prepare() -> None:
    """Make up for three gaps of Triton 3.6's interpreter, in a process that interprets kernels."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    _index_arrays_of_one_element(interpreter)
    _multiply_bfloat16(interpreter)
    _round_bfloat16(interpreter)


def _index_arrays_of_one_element(interpreter: Any) -> None:
    """It makes loop bounds of such arrays by ``int``, which numpy no longer takes since 2.4."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _multiply_bfloat16(interpreter: Any) -> None:
    """It holds bfloat16 as 16-bit integers and multiplies those in ``tl.dot``."""
    language = interpreter.tl
    original = interpreter.InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype.scalar != language.bfloat16:
            return x
        data = interpreter._convert_float(x.data, language.bfloat16, language.float32, None)
        return interpreter.TensorHandle(data.view("float32"), language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _round_bfloat16(interpreter: Any) -> None:
    """It truncates float32 to bfloat16 where a GPU rounds to the nearest, ties to even."""
    language, original = interpreter.tl, interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return original(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(data), 0x7FC0, rounded)
        return rounded.astype(np.uint16).reshape(np.shape(data))

    interpreter._convert_float = convert


def run_interpreted(*files: str) -> str:
    """Run the tests of files in a process that interprets kernels; returns pytest's last line."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *files,
    ]
    result = subprocess.run(
        words, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip().splitlines()[-1]
