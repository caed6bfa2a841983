"""Reading the models that a command is given."""

from __future__ import annotations

from pathlib import Path

import fxgraft
from fxgraft.cli.console import step
from fxgraft.errors import InputError, SerializationError


def read(source: str | Path) -> fxgraft.Program:
    """Capture a model or load a saved Program, and show how long it takes.

    Raises:
        InputError: it does not exist, is damaged, or is of a newer version.
        CaptureError: it cannot be captured.
    """
    with step(f"read {source}"):
        try:
            return fxgraft.capture(source)
        except SerializationError as error:
            raise InputError(error.problem, error.remedy) from error
