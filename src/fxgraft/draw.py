"""Drawing a Program by layers: the residual stream as a spine, the layers as rows along it."""

from __future__ import annotations

from pathlib import Path

from fxgraft import draw_html, draw_svg, pages
from fxgraft.errors import InputError
from fxgraft.listing import as_text
from fxgraft.outline import outline
from fxgraft.program import Program

_WRITERS = {".svg": draw_svg.render, ".html": draw_html.render}


def draw(program: Program, path: Path) -> Path:
    """Write a drawing; neighbouring layers that are alike are folded into one row.

    Nodes that passes made are marked by colour. The page (``.html``) also lists every layer's
    ops with their shapes.

    Raises:
        InputError: the file's suffix is neither ``.svg`` nor ``.html``, or it cannot be written.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise InputError(
            f"cannot draw to {path.name!r}", f"give a file that ends in {' or '.join(_WRITERS)}"
        )
    return pages.write(path, writer(program, outline(program)))


__all__ = ["as_text", "draw"]
