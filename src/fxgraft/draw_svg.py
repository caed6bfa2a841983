"""A Program by layers as SVG."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field

from fxgraft import pages
from fxgraft.listing import headline, subtitle
from fxgraft.outline import Row, passes_of
from fxgraft.program import Program

NUM_TONES = 6
_SPINE, _LEFT, _SIDE, _MARGIN = 34, 60, 96, 20
_NARROWEST = 760
_CHARACTER = 7.0  # width of a character of the 11.5 px monospaced font
_HEIGHT, _SIDE_HEIGHT, _GAP, _LABEL = 36, 26, 10, 18


@dataclass
class _Canvas:
    """Elements so far, and the height they take.

    Attributes:
        boxes: where the boxes of a row start.
        right: where the rows end.
        tones: style of each pass.
    """

    boxes: float
    right: float
    tones: dict[str, str]
    y: float = 0.0
    elements: list[str] = field(default_factory=list[str])

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">'
            f"{html.escape(words)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, style: str, radius: int = 6
    ) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'class="{style}"/>'
        )

    def chip(self, x: float, y: float, words: str, style: str) -> float:
        """A box around words; returns where it ends."""
        width = _chip_width(words)
        self.box(x, y - 10, width, 20, style, 5)
        self.text(x + 7, y + 4, words, f"{style} words")
        return x + width


def render(program: Program, rows: list[Row]) -> str:
    """The SVG text."""
    canvas = _layout(rows)
    _head(canvas, program)
    stops = list(_draw_rows(canvas, rows))
    width, height = canvas.right + _MARGIN, canvas.y + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">'
        f"<title>{html.escape(headline(program))}</title>"
        f"<style>{pages.template('draw_svg.css')}</style>"
        f'<rect width="100%" height="100%" class="paper"/>{_spine(stops) if stops else ""}'
        + "\n".join(canvas.elements)
        + "</svg>\n"
    )


def _layout(rows: list[Row]) -> _Canvas:
    """A canvas wide enough that no row's title, boxes and marks overlap."""
    tones = {name: f"tone-{place % NUM_TONES}" for place, name in enumerate(passes_of(rows))}
    boxes = _SIDE + 30 + max((_title_width(row) for row in rows), default=0.0)
    ends = [
        sum(_chip_width(words) + 6 for words in (*_boxes(row), *_marks(row))) + 80 for row in rows
    ]
    return _Canvas(boxes, max(_NARROWEST, boxes + max(ends, default=0.0)), tones)


def _chip_width(words: str) -> float:
    return _CHARACTER * len(words) + 14


def _title_width(row: Row) -> float:
    return _CHARACTER * 1.06 * len(row.title) + (40 if len(row.members) > 1 else 0)


def _boxes(row: Row) -> dict[str, str]:
    """Words of a row's boxes, with their styles."""
    return {words: style for words, style in ((row.mixer, "mixer"), (row.mlp, "mlp")) if words}


def _marks(row: Row) -> dict[str, str]:
    """Words of a row's marks, with the passes they stand for."""
    return {f"{name} {count}": name for name, count in row.made_by.items()}


def _head(canvas: _Canvas, program: Program) -> None:
    canvas.text(20, 30, headline(program), "title")
    canvas.text(20, 50, subtitle(program), "faint")
    canvas.y = 66
    x = 20.0
    for name, tone in canvas.tones.items():
        x = canvas.chip(x, canvas.y + 10, f"made by {name}", tone) + 6
    canvas.y += 32 if canvas.tones else 6


def _draw_rows(canvas: _Canvas, rows: list[Row]) -> Iterator[float]:
    """Draw the rows; gives the heights at which the spine passes one."""
    stream = ""
    for row in rows:
        height = _HEIGHT if row.on_stream else _SIDE_HEIGHT
        middle = canvas.y + height / 2
        _draw_row(canvas, row, middle, height)
        canvas.y += height + _GAP
        if row.on_stream:
            yield middle
        if row.stream not in ("", stream):
            stream = row.stream
            canvas.text(_LEFT, canvas.y + 4, f"residual stream {stream}", "faint small")
            canvas.y += _LABEL


def _draw_row(canvas: _Canvas, row: Row, middle: float, height: float) -> None:
    left = _LEFT if row.on_stream else _SIDE
    top, width = middle - height / 2, canvas.right - left
    style = "layer" if row.is_layer else "module" if row.on_stream else "side"
    if len(row.members) > 1:
        canvas.box(left + 4, top + 4, width, height, style)
    canvas.box(left, top, width, height, style)
    canvas.text(left + 12, middle + 4, row.title, "name")
    if len(row.members) > 1:
        end = left + _title_width(row) - 20
        canvas.text(end, middle + 4, f"×{len(row.members)}", "faint")
    x = canvas.boxes
    for words, box in _boxes(row).items():
        x = canvas.chip(x, middle, words, box) + 6
    canvas.text(canvas.right - 12, middle + 4, row.size, "faint small", "end")
    x = canvas.right - 20 - _CHARACTER * len(row.size)
    for words, name in reversed(_marks(row).items()):
        x -= _chip_width(words)
        canvas.chip(x, middle, words, canvas.tones[name])
        x -= 6


def _spine(stops: list[float]) -> str:
    line = (
        f'<path class="spine" d="M{_SPINE} {stops[0] - 24:g}V{stops[-1] + 22:g}m-5 -7l5 7l5 -7"/>'
    )
    dots = "".join(
        f'<path class="spine" d="M{_SPINE} {y:g}H{_LEFT}"/>'
        f'<circle class="dot" cx="{_SPINE}" cy="{y:g}" r="5"/>'
        for y in stops
    )
    return line + dots
