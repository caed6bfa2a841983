"""Loss curves as a drawing."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from torch import Tensor

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 720, 360, 56, 36, 130
_POINTS = 200


def draw(losses: Mapping[str, Tensor]) -> str:
    """An SVG with one curve per name: loss on a logarithmic scale over steps.

    Args:
        losses: by name, float [steps].
    """
    curves = {name: _thin(values) for name, values in losses.items()}
    values = [value for _, curve in curves.items() for _, value in curve]
    low, high = (math.log(f(values, default=1.0)) for f in (min, max))
    high = max(high, low + 1e-3)
    steps = max((len(curve) for curve in losses.values()), default=1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, _HEIGHT - 8, f"step (1 to {steps})"),
        _text(4, 14, "relative error of the attention output"),
        _text(4, _y(low, low, high), f"{math.exp(low):.3g}"),
        _text(4, _y(high, low, high) + 12, f"{math.exp(high):.3g}"),
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour = f"hsl({360 * number // max(len(curves), 1)} 65% 42%)"
        points = " ".join(
            f"{_x(step, steps):.1f},{_y(math.log(value), low, high):.1f}" for step, value in curve
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        lines.append(_text(_WIDTH - _RIGHT + 12, 28 + 14 * number, name, colour))
    return "\n".join([*lines, "</svg>"])


def _thin(values: Tensor) -> list[tuple[int, float]]:
    """Means of runs of steps, so that a curve has few points; values of 0 are left out."""
    run = max(len(values) // _POINTS, 1)
    parts = [values[start : start + run] for start in range(0, len(values), run)]
    means = [float(part.float().mean()) for part in parts]
    return [(number * run, value) for number, value in enumerate(means) if value > 0]


def _x(step: int, steps: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(steps - 1, 1)


def _y(value: float, low: float, high: float) -> float:
    top = 24
    return top + (_HEIGHT - _BOTTOM - top) * (high - value) / (high - low)


def _text(x: float, y: float, text: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{html.escape(text)}</text>'
