"""Markdown pages: their code blocks, run in order and held against what they say is printed."""

from __future__ import annotations

import contextlib
import doctest
import io
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: the word after the fence.
        body: its text, with the last line's end.
        line: number of its first line in the page.
        is_run: false where ``<!-- not run: reason -->`` stands above it.
        is_adjacent: whether nothing stands between it and the block before.
    """

    language: str
    body: str
    line: int
    is_run: bool
    is_adjacent: bool


def blocks_of(page: Path, language: str | None = None) -> Iterator[Block]:
    """The fenced blocks of a page in order, those of one language or all."""
    text, end = page.read_text(encoding="utf-8"), 0
    for found in _BLOCK.finditer(text):
        is_adjacent, end = not text[end : found.start()].strip(), found.end()
        if language in (None, found["language"]):
            line = text.count("\n", 0, found.start("body")) + 1
            is_run = found["mark"] is None
            yield Block(found["language"], found["body"], line, is_run, is_adjacent)


def run_page(page: Path) -> dict[str, Any]:
    """Execute a page's Python blocks in order, in one namespace.

    A ``text`` block right below a Python block is what that prints; ``...`` in it stands for
    anything.

    Returns:
        The namespace that the blocks left.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed: str | None = None
    for block in blocks_of(page):
        if block.language == "text" and block.is_adjacent and printed is not None:
            assert _matches(block.body, printed), (
                f"{page.name}, line {block.line}: the page says\n{block.body}\n"
                f"and this was printed:\n{printed}"
            )
        is_code = block.language == "python" and block.is_run
        printed = _run(block, page, namespace) if is_code else None
    return namespace


def _run(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    """Execute a block; errors show its lines as lines of the page."""
    file = f"{page.name}:{block.line}"
    lines = block.body.splitlines(keepends=True)
    linecache.cache[file] = (len(block.body), None, lines, file)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block.body, file, "exec", dont_inherit=True), namespace)
    return output.getvalue()


def _matches(expected: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
