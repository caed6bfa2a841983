"""``fxgraft calibrate``: compute a pass's artifact from a model and data."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fxgraft import placement, registry
from fxgraft.cli.console import messages, output, print_json
from fxgraft.cli.reading import read
from fxgraft.errors import InputError
from fxgraft.offline import OfflineStage, Progress
from fxgraft.validation import resolve_paths
from fxgraft.yaml_source import YamlSource


def calibrate(
    name: Annotated[str, typer.Argument(help="The pass that the artifact is for.", metavar="PASS")],
    model: Annotated[str, typer.Argument(help="Alias, hub id, path, or saved Program.")],
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="File of calibration data; may be repeated.")
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, KEY=VALUE; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device to compute on.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Compute a pass's artifact; a run that was interrupted goes on where it stopped."""
    stage = _stage(name, settings, data or [], changes or [])
    program = read(model).copy()
    placement.move(program, device)
    with _bars() as progress:
        written, made = stage.calibrate(program, out, progress)
    if as_json:
        print_json({"folder": str(written.folder), "results": written.results})
        return
    for line in made.summary:
        output.print(line, highlight=False, markup=False)
    output.print(f"artifact in {written.folder}", highlight=False, markup=False, soft_wrap=True)


def _stage(
    name: str, settings: Path | None, data: Sequence[Path], changes: Sequence[str]
) -> OfflineStage:
    kind = registry.find(name).offline
    if kind is None:
        able = [other for other, found in registry.passes().items() if found.offline is not None]
        raise InputError(
            f"pass {name!r} has no offline stage",
            f"it takes no artifact; passes with one are: {', '.join(able) or 'none'}",
        )
    chosen: dict[str, Any] = {}
    if settings is not None:
        source = YamlSource.read(settings)
        # Paths in the file are relative to it, those of the command line to the working folder.
        chosen = resolve_paths(kind, _mapping(source.value, settings), source.file.parent)
    chosen |= {"data": [str(path) for path in data]} if data else {}
    return kind.from_config(chosen | dict(_change(text) for text in changes))


def _mapping(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no settings", "write `key: value` lines")
    return cast("dict[str, Any]", value)


def _change(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"option --set is {text!r}", "write --set KEY=VALUE")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"option --set {key}: {value!r} is no YAML value", "quote it") from error


@contextmanager
def _bars() -> Generator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Bars(*columns, console=messages) as bars:
        tasks: dict[str, Any] = {}

        def progress(title: str, done: int, total: int) -> None:
            step = title.partition(", ")[0]
            if step not in tasks:
                tasks[step] = bars.add_task(title, total=total)
            bars.update(tasks[step], description=title, completed=done, total=total)

        yield progress
