"""A graph diff as a page: before and after side by side, in blocks that open and close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxgraft import pages
from fxgraft.describe import block_of
from fxgraft.diff import GraphDiff, NamedChange, NodeChange, NodeView
from fxgraft.diff_text import arguments_text, collapse, named_sections, sides, summary


@dataclass(frozen=True)
class _Block:
    """One layer, or one module outside the layers: rows by path within the block."""

    name: str
    modules: tuple[tuple[str, tuple[NodeChange, ...]], ...]

    def key(self) -> object:
        """Equal for blocks that changed alike and are alike but for the layer's number."""
        return [(path, [_key(change) for change in rows]) for path, rows in self.modules]

    def counts(self) -> Counter[str]:
        """Nodes per category."""
        return _counts(change for _, rows in self.modules for change in rows)


def write(diff: GraphDiff, path: Path, title: str) -> Path:
    """See :meth:`GraphDiff.to_html`."""
    return pages.write(path, pages.render("diff", title, data=page_data(diff)))


def page_data(diff: GraphDiff) -> dict[str, Any]:
    """What the page's script draws, as JSON values.

    Neighbouring layers that read alike are one group, given once.
    """
    return {
        "summary": summary(diff),
        "counts": dict(_counts(diff.nodes)),
        "groups": [_group(blocks) for blocks in _alike(_blocks(diff.context or diff.nodes))],
        "named": [
            {
                "title": title,
                "counts": dict(Counter(change.kind for change in changes)),
                "rows": _named_rows(changes),
            }
            for title, changes in named_sections(diff)
        ],
    }


def _named_rows(changes: Sequence[NamedChange]) -> list[list[str]]:
    texts = ((c.name, (c.kind, c.before, c.after)) for c in changes)
    return [[kind, name, before, after] for name, (kind, before, after) in collapse(texts)]


def _blocks(rows: Iterable[NodeChange]) -> list[_Block]:
    blocks: dict[str, dict[str, list[NodeChange]]] = {}
    for row in rows:
        block = block_of(row.module)
        inner = row.module[len(block) :].lstrip(".")
        blocks.setdefault(block, {}).setdefault(inner, []).append(row)
    return [
        _Block(name, tuple((path, tuple(found)) for path, found in modules.items()))
        for name, modules in blocks.items()
    ]


def _alike(blocks: Iterable[_Block]) -> list[list[_Block]]:
    groups: list[tuple[object, list[_Block]]] = []
    for block in blocks:
        key = (block.name.rpartition(".")[0], block.key())
        if groups and groups[-1][0] == key and block.name[-1:].isdigit():
            groups[-1][1].append(block)
        else:
            groups.append((key, [block]))
    return [members for _, members in groups]


def _group(blocks: list[_Block]) -> dict[str, Any]:
    last = blocks[-1]
    return {
        "name": collapse((block.name, None) for block in blocks)[0][0] or "(top level)",
        "members": [block.name for block in blocks],
        "counts": dict(last.counts()),
        "modules": [
            {"path": path, "counts": dict(_counts(rows)), "rows": [_row(row) for row in rows]}
            for path, rows in last.modules
        ],
    }


def _key(change: NodeChange) -> object:
    """What makes two layers differ; of an unchanged node not where its inputs come from.

    The first layer reads the embedding where the others read the layer before them.
    """
    view = change.view
    return _row(change) if change.kinds else (view.label, view.op, view.value, view.made_by)


def _counts(rows: Iterable[NodeChange]) -> Counter[str]:
    return Counter(kind for row in rows for kind in row.kinds or ("same",))


def _row(change: NodeChange) -> dict[str, Any]:
    row: dict[str, Any] = {"kinds": change.kinds, "after": _cell(change.after, change.module)}
    if change.kinds:
        row["before"] = _cell(change.before, change.module)
    if change.details:
        row["details"] = [[d.kind, d.name, *sides(d, change.module)] for d in change.details]
    return row


def _cell(view: NodeView | None, module: str) -> list[str] | None:
    if view is None:
        return None
    arguments = arguments_text(view, module)
    return [view.label, view.op, arguments, view.value, view.source, view.made_by]
