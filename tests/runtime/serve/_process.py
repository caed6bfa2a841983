"""The command ``fxgraft serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from tests import model_folder
from tests.runtime.serve._app import TEMPLATE

_STARTUP = 300.0


@dataclass
class ServerProcess:
    """A server that answers.

    Attributes:
        process: of the command.
        address: that it announced.
        messages: file of its standard error.
    """

    process: subprocess.Popen[str]
    address: str
    messages: Path

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """Its exit code."""
        return self.process.wait(timeout=seconds)


@contextlib.contextmanager
def server(pipeline: Path, *words: str, **environment: str) -> Generator[ServerProcess]:
    """Run ``fxgraft serve`` until it answers; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "fxgraft.cli.main", "serve", str(pipeline), *words]
    variables = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryDirectory() as folder:
        messages = Path(folder) / "messages"
        with (
            messages.open("w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
            ) as process,
        ):  # fmt: skip
            try:
                yield ServerProcess(process, _announced(process, messages), messages)
            finally:
                process.kill()


def _announced(process: subprocess.Popen[str], messages: Path) -> str:
    """The address in the first line of output; waits for it."""
    assert process.stdout is not None
    end = time.monotonic() + _STARTUP
    while time.monotonic() < end:
        line = process.stdout.readline()
        if line.startswith("serving on "):
            return line.removeprefix("serving on ").strip()
        if process.poll() is not None:
            break
    raise AssertionError(f"the server did not start: {messages.read_text()}")


def tiny_pipeline(folder: Path, *lines: str) -> Path:
    """A pipeline file of a tiny model, with a chat template; ``lines`` are of its section serve."""
    model = folder / "tiny"
    if not model.exists():
        model_folder.write(model, model_folder.llama(max_position_embeddings=2048))
        (model / "chat_template.jinja").write_text(TEMPLATE)
    file = folder / "pipeline.yaml"
    section = ["serve:", "  port: 0", "  memory_bytes: 20000000", *(f"  {line}" for line in lines)]
    head = ["model: tiny", "passes: [optimize]", "backend: torch"]
    file.write_text("\n".join([*head, *section]) + "\n")
    return file
