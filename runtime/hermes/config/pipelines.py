"""Step-cost tables made on the way: a model, rewritten by passes, priced by a backend or device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from pydantic import ValidationInfo

from fxgraft.backend import Backend, find_backend
from fxgraft.cost_table import StepCostTable
from fxgraft.devices import device
from fxgraft.errors import InputError, SerializationError
from fxgraft.frontends import capture
from fxgraft.passes.dsla.fold import choices_of
from fxgraft.passes.dsla.levels import at_level
from fxgraft.pipeline import PipelineFile
from fxgraft.program import Program
from fxgraft.roofline import roofline_table
from fxgraft.validation import Where, nowhere
from fxgraft.yaml_source import YamlSource

_tables: dict[str, StepCostTable] = {}
_programs: dict[str, Program] = {}
"""The model that was captured last: clients of one system, and points of a sweep, share it."""


@runtime_checkable
class PricesSteps(Protocol):
    """A compiled model whose backend knows what steps cost."""

    def table(self) -> StepCostTable:
        """The step-cost table."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A pipeline of a system file.

    Attributes:
        content: model, passes, backend, options.
        path: the pipeline file, or a name in the folder that relative paths start at.
        where: gives the place of a key in the pipeline file.
    """

    content: Mapping[str, Any]
    path: Path
    where: Where = nowhere

    def parsed(self) -> PipelineFile:
        """The pipeline, checked.

        Raises:
            InputError: a key, pass or setting is wrong, or no model is named.
        """
        file = PipelineFile.parse(self.content, self.path, self.where)
        if file.model is None:
            raise InputError(
                f"{self.where(())}the pipeline names no model", "add `model: smollm2-135m`"
            )
        return file

    def digest(self, settings: Mapping[str, Any]) -> str:
        """Changes with the content, the settings, and the files that the content names."""
        named = [*_stamps(self.content, self.path.parent)]
        text = json.dumps([self.content, dict(settings), named, _version()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def recipe(value: Any, info: ValidationInfo) -> Any:
    """A pipeline file's path, or its content, as a ``Recipe``; relative to the system file."""
    folder = cast("dict[str, Path | None]", info.context or {}).get("folder") or Path()
    if isinstance(value, Mapping):
        return Recipe(cast("Mapping[str, Any]", value), folder / "pipeline")
    if not isinstance(value, (str, Path)):
        raise ValueError("should be a pipeline: a file, or keys as in one")
    source = YamlSource.read(folder / value)
    content: Any = source.value
    if not isinstance(content, Mapping):
        raise ValueError("should be a pipeline file with keys")
    return Recipe(cast("Mapping[str, Any]", content), source.file, source.where)


def table_of(
    made_by: Recipe, *, on: str | None, dtype: str | None, keep: Path | None
) -> StepCostTable:
    """Make a table, or take it from this process or from ``keep`` if nothing has changed.

    Args:
        made_by: model, passes, backend.
        on: device whose roofline prices the result; None asks the backend.
        dtype: data type that the roofline is for.
        keep: file that the table is kept in.

    Raises:
        InputError: something in the pipeline is wrong, or its backend has no costs.
        Error: whatever capturing, passes and backend raise.
    """
    digest = made_by.digest({"device": on, "dtype": dtype})
    if digest not in _tables:
        found = _kept(keep, digest) if keep else None
        _tables[digest] = found or _make(made_by.parsed(), on, dtype)
    table = _tables[digest]
    if keep and not keep.exists():
        notes = (*table.origin.notes, _note(digest))
        origin = table.origin.model_copy(update={"notes": notes})
        table.model_copy(update={"origin": origin}).save(keep)
    return table


def _make(file: PipelineFile, on: str | None, dtype: str | None) -> StepCostTable:
    backend = None if on else find_backend(file.backend)
    if backend is not None:
        backend.check_options(file.options)
    elif on is not None:
        device(on)
    program = file.pipeline.run(_captured(cast(str, file.model)))

    def price(one: Program) -> StepCostTable:
        if backend is None:
            return roofline_table(one, cast(str, on), cast(str, dtype))
        return _priced_by(backend, one, file)

    offered = len(choices_of(program))
    if not offered:
        return price(program)
    layers = sum("attention" in layer.kind.split("+") for layer in program.layers)
    softmax, converted = price(at_level(program, 0)), price(at_level(program, offered))
    return softmax.with_levels(converted, layers=layers, offered=offered)


def _priced_by(backend: Backend, program: Program, file: PipelineFile) -> StepCostTable:
    compiled = backend.lower(program, **file.options)
    if not isinstance(compiled, PricesSteps):
        raise InputError(
            f"backend {file.backend!r} does not say what steps cost",
            "use `backend: flexcim`, or give `device` and `dtype` for peak rates",
        )
    return compiled.table()


def _captured(model: str) -> Program:
    key = json.dumps([model, *_stamps(model, Path())])
    if key not in _programs:
        _programs.clear()
        _programs[key] = capture(model)
    return _programs[key]


def _kept(keep: Path, digest: str) -> StepCostTable | None:
    """The table of a file, if it was made from the same; a damaged one is made again."""
    try:
        table = StepCostTable.load(keep)
    except SerializationError:
        table = None
    if table is not None and _note(digest) in table.origin.notes:
        return table
    keep.unlink(missing_ok=True)
    return None


def _note(digest: str) -> str:
    return f"made from the pipeline with hash {digest}"


def _version() -> str:
    try:
        return version("fxgraft")
    except PackageNotFoundError:
        return ""


def _stamps(value: object, folder: Path) -> Iterator[tuple[str, int, int]]:
    """Path, time and size of the files that texts in nested settings name."""
    if isinstance(value, Mapping):
        value = list(cast("Mapping[str, object]", value).values())
    if isinstance(value, list):
        for item in cast("list[object]", value):
            yield from _stamps(item, folder)
    if not isinstance(value, str) or not value or not (folder / value).exists():
        return
    path = folder / value
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        status = file.stat()
        yield str(file), status.st_mtime_ns, status.st_size
