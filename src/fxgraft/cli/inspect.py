"""``fxgraft passes``, ``diff`` and ``draw``: look at what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxgraft import registry
from fxgraft.cli.console import output, print_json, step, table
from fxgraft.cli.reading import read
from fxgraft.errors import Error, InputError
from fxgraft.pipeline import json_schema
from fxgraft.transform import Pass
from fxgraft.validation import type_name


def passes(
    name: Annotated[str | None, typer.Argument(help="Show one pass with its settings.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of pipeline files.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List the passes that are installed."""
    if schema:
        print_json(json_schema())
        return
    names = [name] if name else registry.names()
    found = {item: _describe(item) for item in names}
    if name and "problem" in found[name]:
        registry.find(name)
    if as_json:
        print_json(found)
    elif name:
        _print_one(name, found[name])
    else:
        rows = [
            [item, facts.get("effect", "broken"), facts.get("problem") or facts["summary"]]
            for item, facts in found.items()
        ]
        table("Passes", ["name", "effect", "what it does"], rows)


def _describe(name: str) -> dict[str, Any]:
    try:
        kind: type[Pass] = registry.find(name)
    except InputError:
        raise
    except Error as error:
        return {"problem": error.problem}
    settings = kind.model_json_schema().get("properties", {})
    return {
        "effect": str(kind.effect),
        "summary": (kind.__doc__ or "").strip().splitlines()[0],
        "settings": settings,
        "requires": sorted(kind.requires),
        "ensures": sorted(kind.ensures),
        "after": sorted(kind.after),
        "before": sorted(kind.before),
        "excludes": sorted(kind.excludes),
    }


def _print_one(name: str, facts: dict[str, Any]) -> None:
    output.print(f"[bold]{name}[/] ({facts['effect']}): {facts['summary']}", highlight=False)
    fields = registry.find(name).model_fields
    rows = [
        [
            key,
            type_name(fields[key].annotation),
            str(value.get("default", "required")),
            str(value.get("description", "")),
        ]
        for key, value in facts["settings"].items()
    ]
    if rows:
        table("Settings", ["key", "type", "default", "meaning"], rows)
    for rule in ("requires", "after", "before", "excludes"):
        if facts[rule]:
            output.print(f"{rule}: {', '.join(facts[rule])}", highlight=False)


def diff(
    before: Annotated[str, typer.Argument(help="Saved Program or model.")],
    after: Annotated[str, typer.Argument(help="Saved Program or model.")],
    html: Annotated[Path | None, typer.Option(help="Write the diff as an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show what differs between two Programs."""
    programs = [read(source) for source in (before, after)]
    changes = programs[1].diff(programs[0])
    if html is not None:
        changes.to_html(html)
    if as_json:
        print_json(changes.to_json())
    else:
        output.print(str(changes) or "no difference", markup=False, highlight=False, soft_wrap=True)


def draw(
    source: Annotated[str, typer.Argument(help="Saved Program or model.")],
    out: Annotated[Path, typer.Option(help="File to write: .svg or .html.")],
) -> None:
    """Draw a Program by its layers."""
    program = read(source)
    with step(f"draw to {out}"):
        program.draw(out)
