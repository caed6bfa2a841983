"""Blocks of a model by module path: the layer that a module belongs to, or the module itself."""

from __future__ import annotations


def block_of(module: str) -> str:
    """The layer's path, up to its number: ``model.layers.3`` for ``model.layers.3.mlp.act``.

    A module outside every numbered list is a block of its own.
    """
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return module
