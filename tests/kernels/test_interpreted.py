"""Runs the tests of Triton kernels in Triton's interpreter, where there is no GPU for them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.kernels._interpreter import RUNS_KERNELS, run_interpreted

FILES = sorted(str(path) for path in Path(__file__).parent.glob("test_*_triton.py"))


@pytest.mark.slow
@pytest.mark.skipif(RUNS_KERNELS, reason="they run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_kernels_in_the_interpreter(file: str) -> None:
    passed = re.match(r"(\d+) passed", run_interpreted(file))
    assert passed is not None
    assert int(passed[1]) > 10
