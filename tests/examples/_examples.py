"""Loads example scripts, and writes a model for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from tests import model_folder

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module, without running its ``main``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_chat_model(folder: Path) -> Path:
    """A tiny Llama whose tokenizer knows chats."""
    model_folder.write(folder)
    tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
