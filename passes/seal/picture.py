"""The hidden states at breaks in two dimensions, as SVG."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fxgraft.generation.prompts import integers
from fxgraft.passes.seal.thoughts import KINDS
from fxgraft.passes.seal.vector import norm

_WIDTH, _HEIGHT, _MARGIN = 640, 480, 40
_COLOURS = ("#1f77b4", "#d62728", "#ff7f0e")


def plane(samples: Tensor, direction: Tensor) -> Tensor:
    """Samples [n, D] along the direction and along what varies most across it, [n, 2]."""
    wide = samples.double() - samples.double().mean(0)
    axis = direction.double() / norm(direction.double()).clamp(min=1e-12)
    along = wide @ axis
    rest = wide - along[:, None] * axis
    values: Any = torch.linalg
    across: Tensor = values.svd(rest, full_matrices=False)[2][0]
    return torch.stack((along, rest @ across), 1)


def scatter(points: Tensor, kinds: Tensor, title: str) -> str:
    """Points [n, 2] by kind int64 [n] as an SVG document."""
    low, high = points.amin(0), points.amax(0)
    span = (high - low).clamp(min=1e-12)
    size = torch.tensor([_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN])
    places = (points - low) / span * size + _MARGIN
    pairs = cast("list[list[float]]", cast(Any, places).tolist())
    dots = [
        f'<circle cx="{x:.1f}" cy="{_HEIGHT - y:.1f}" r="2.5" fill="{_COLOURS[kind]}" '
        f'fill-opacity="0.5"><title>{KINDS[kind]}</title></circle>'
        for (x, y), kind in zip(pairs, integers(kinds), strict=True)
    ]
    legend = [
        f'<text x="{_MARGIN + 130 * place}" y="{_HEIGHT - 8}" fill="{_COLOURS[place]}">'
        f"{kind} ({int((kinds == place).sum())})</text>"
        for place, kind in enumerate(KINDS)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="13">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_MARGIN}" y="20">{title}</text>',
            *dots,
            *legend,
            "</svg>",
            "",
        ]
    )
