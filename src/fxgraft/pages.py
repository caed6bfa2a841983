"""Self-contained HTML pages: style, script and data in one file that asks for nothing else."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path

from fxgraft.errors import InputError

_TEMPLATES = resources.files("fxgraft") / "templates"


def render(name: str, title: str, body: str = "", data: object = None) -> str:
    """A page from the templates ``name``.css, .html and .js, whichever exist.

    Args:
        name: of the templates.
        title: of the page.
        body: HTML that follows that of the template.
        data: JSON values; the script finds them in the element ``data``.
    """
    slots = {
        "title": html.escape(title),
        "style": template("page.css") + template(f"{name}.css"),
        "body": template(f"{name}.html").replace("{{title}}", html.escape(title)) + body,
        # A script element ends at the first "</" of any kind, also inside JSON text.
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": template(f"{name}.js"),
    }
    first, *rest = template("page.html").split("{{")
    parts = [part.split("}}", 1) for part in rest]
    return first + "".join(slots[slot] + literal for slot, literal in parts)


def write(path: Path, text: str) -> Path:
    """Write a page or drawing, making its folder where needed.

    Raises:
        InputError: the path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}",
            "give a file in a folder that you may write to",
        ) from error
    return path


def template(file: str) -> str:
    """The text of a template, empty if there is none of that name."""
    found = _TEMPLATES / file
    return found.read_text(encoding="utf-8") if found.is_file() else ""
