"""The example of tensor parallelism: two processes print what one prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples._examples import EXAMPLES, write_chat_model
from tests.passes._torchrun import torchrun

PROMPTS = ["hello", "what is this?"]


@pytest.mark.slow
def test_two_processes_answer_like_one(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    words = [*PROMPTS, "--model", str(folder), "--new-tokens", "9"]
    one, two = (torchrun(size, EXAMPLES / "tensor_parallel.py", *words) for size in (1, 2))
    assert two == one
    assert [line for line in one.splitlines() if line in PROMPTS] == PROMPTS
