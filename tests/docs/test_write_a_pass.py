"""The page ``docs/write_a_pass.md`` runs as it stands, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from fxgraft.pipeline import Pipeline
from fxgraft.transform import Pass

PAGE = Path(__file__).parents[2] / "docs" / "write_a_pass.md"
_BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def run_page(page: Path) -> dict[str, Any]:
    """Execute a page's Python blocks in order and hold each ``text`` block against the output.

    Returns:
        The namespace that the blocks left.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed = ""
    for number, (language, body) in enumerate(_BLOCK.findall(page.read_text())):
        if language == "text":
            assert printed == body, f"block {number} of {page.name}"
        if language == "python":
            output = io.StringIO()
            file = f"{page.name}:{number}"
            linecache.cache[file] = (len(body), None, body.splitlines(keepends=True), file)
            with contextlib.redirect_stdout(output):
                exec(compile(body, file, "exec", dont_inherit=True), namespace)
            printed = output.getvalue()
    return namespace


def blocks(language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(PAGE.read_text()) if kind == language]


def test_the_page_runs_and_prints_what_it_says() -> None:
    assert len(blocks("text")) == 5
    namespace = run_page(PAGE)
    assert issubclass(namespace["BanTokens"], Pass)
    (entry,) = [yaml.safe_load(block)["passes"] for block in blocks("yaml")]
    ((name, settings),) = entry[0].items()
    made = namespace[name.title().replace("_", "")].from_config(settings)
    assert isinstance(Pipeline.parse([made]).passes[0], Pass)
    (toml,) = blocks("toml")
    assert tomllib.loads(toml)["project"]["entry-points"]["fxgraft.passes"].keys() == {name}


def test_the_pass_is_thirty_lines() -> None:
    source = blocks("python")[0]
    lines = [line for line in source[source.index("class ") :].splitlines() if line.strip()]
    assert len(lines) <= 30
