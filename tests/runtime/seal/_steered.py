"""A tiny model that writes paragraph breaks, steered by vectors that requests choose."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

import fxgraft
from fxgraft.passes.seal import Seal
from tests import model_folder

VECTORS = {"one": 1, "two": 2, "three": 3}
_NEWLINES = 3.0


@cache
def talkative() -> fxgraft.Program:
    """The model of ``model_folder``, many of whose likeliest tokens are newlines."""
    model = model_folder.llama()
    with torch.no_grad():
        cast(Any, model).lm_head.weight[_newline_row()] *= _NEWLINES
    return fxgraft.compile(model, ["optimize"], backend="torch").program


def _newline_row() -> int:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet()).index("Ċ")


def write_vectors(folder: Path) -> dict[str, Path]:
    """A tokenizer and random vectors; returns their files by name."""
    model_folder.write_tokenizer(folder)
    found: dict[str, Path] = {}
    for name, seed in VECTORS.items():
        vector = torch.randn(model_folder.HIDDEN, generator=torch.Generator().manual_seed(seed))
        found[name] = model_folder.write_vector(folder / f"{name}.safetensors", vector=vector)
    return found


def choosing(folder: Path, **fields: Any) -> fxgraft.Compiled:
    """The model with vectors that requests choose from."""
    values: dict[str, Any] = {"vectors": write_vectors(folder), "tokenizer": str(folder), **fields}
    return fxgraft.compile(talkative(), [Seal(**values)], backend="torch", check=False)


def fixed(folder: Path, name: str | None, coefficient: float = 1.0) -> fxgraft.Compiled:
    """The model with one vector for all, or none."""
    path, passes = folder / f"{name}.safetensors", list[Seal]()
    if name is not None:
        passes = [Seal(vector=path, tokenizer=str(folder), coefficient=coefficient)]
    return fxgraft.compile(talkative(), passes, backend="torch", check=False)
