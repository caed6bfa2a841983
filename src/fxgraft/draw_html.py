"""A Program by layers as a page: every layer opens to a list of its ops."""

from __future__ import annotations

import html

from fxgraft import pages
from fxgraft.draw_svg import NUM_TONES
from fxgraft.listing import headline, subtitle
from fxgraft.outline import Op, Row, passes_of
from fxgraft.program import Program


def render(program: Program, rows: list[Row]) -> str:
    """The page's text."""
    tones = {name: f"tone-{place % NUM_TONES}" for place, name in enumerate(passes_of(rows))}
    legend = "".join(_chip(f"made by {name}", tone) for name, tone in tones.items())
    title = headline(program)
    body = (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="faint">{html.escape(subtitle(program))}</p>'
        f'<p class="legend">{legend}</p></header>'
        f"<main>{''.join(_row(row, tones) for row in rows)}</main>"
    )
    return pages.render("draw", title, body)


def _row(row: Row, tones: dict[str, str]) -> str:
    kind = "layer" if row.is_layer else "module" if row.on_stream else "side"
    times = f' <span class="faint">×{len(row.members)}</span>' if len(row.members) > 1 else ""
    marks = "".join(_chip(f"{name} {n}", tones[name]) for name, n in row.made_by.items())
    stream = f'<p class="stream faint">residual stream {row.stream}</p>' if row.stream else ""
    modules = "".join(_module(name, ops, tones) for name, ops in row.modules)
    stop = "stop" if row.on_stream else ""
    return (
        f'<div class="{stop}"><details class="row {kind}"><summary>'
        f'<span class="name code">{html.escape(row.title)}</span>'
        f"{times}{_chip(row.mixer, 'mixer')}{_chip(row.mlp, 'mlp')}"
        f'<span class="marks">{marks}<span class="faint">{row.size}</span></span></summary>'
        f"{modules}{stream}</details></div>"
    )


def _module(name: str, ops: tuple[Op, ...], tones: dict[str, str]) -> str:
    items = "".join(_op(op, tones) for op in ops)
    head = f'<h2 class="code">{html.escape(name)}</h2>' if name else ""
    return f'{head}<ol class="code">{items}</ol>'


def _op(op: Op, tones: dict[str, str]) -> str:
    tone = tones.get(op.made_by, "")
    made_by = _chip(f"made by {op.made_by}", tone) if op.made_by else ""
    return (
        f'<li class="{tone}" title="{html.escape(op.source)}"><b>{html.escape(op.label)}</b> '
        f'{html.escape(op.call)} <span class="faint">{html.escape(op.value)}</span>{made_by}</li>'
    )


def _chip(words: str, style: str) -> str:
    return f'<span class="chip {style}">{html.escape(words)}</span>' if words else ""
