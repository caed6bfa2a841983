"""``fxgraft bench``: run benchmarks of a source tree, and show committed results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fxgraft import results
from fxgraft.cli.console import messages, output, print_json, table
from fxgraft.errors import Error, InputError


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks to run (files in benchmarks/).")
    ] = None,
    folder: Annotated[Path, typer.Option(help="The folder of benchmarks.")] = Path("benchmarks"),
    summary: Annotated[bool, typer.Option("--summary", help="Print all results.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write the results as Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Run benchmarks, or print the results of those that ran."""
    if not folder.is_dir():
        raise InputError(f"option --folder: {folder} is no folder", "run this in a source tree")
    for name in names or []:
        _run(folder, name)
    found = results.read_all(folder / "results")
    if page is not None:
        page.write_text(results.page(found, folder / "results", page))
        messages.print(f"wrote {page}", highlight=False)
    if as_json:
        print_json([result.model_dump(exclude_none=True) for result in found])
    elif summary:
        _print(found)
    elif not names and page is None:
        scripts = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
        output.print("benchmarks: " + ", ".join(scripts), highlight=False)


def _run(folder: Path, name: str) -> None:
    script = folder / f"{name}.py"
    if not script.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")))
        raise InputError(f"there is no benchmark {name!r}", f"the benchmarks are: {known}")
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    status = subprocess.run([sys.executable, str(script)], env=environment, check=False).returncode
    if status:
        raise Error(f"benchmark {name!r} ended with status {status}", "see its output above")


def _print(found: list[results.Result]) -> None:
    rows = [
        [
            f"{result.name}: {row.metric}",
            f"{row.value:g} {row.unit}",
            "" if row.target is None else f"{'≤' if row.better == 'lower' else '≥'} {row.target:g}",
            {True: "yes", False: "NO", None: ""}[row.met],
            f"{row.peer.name}: {row.peer.value:g}" if row.peer else "",
            f"{row.bound.name}: {row.bound.value:g}" if row.bound else "",
        ]
        for result in found
        for row in result.rows
    ]
    table("Results", ["metric", "value", "target", "met", "peer", "bound"], rows)
