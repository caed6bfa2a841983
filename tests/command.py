"""Runs the command inside the test's process."""

from __future__ import annotations

import os
import sys
from unittest import mock

import pytest

from fxgraft.cli.main import main


def command(*words: object) -> int:
    """Run ``fxgraft`` with these arguments; returns its exit code."""
    argv = ["fxgraft", *(str(word) for word in words)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)
