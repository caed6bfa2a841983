"""``Pipeline``: an ordered list of passes, from Python or from a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import models_json_schema

from fxgraft import contracts, facts, registry
from fxgraft.errors import Error, InputError
from fxgraft.program import Program
from fxgraft.transform import Pass, apply, check_definition
from fxgraft.validation import Loc, Where, located, nowhere, readable
from fxgraft.yaml_source import YamlSource

PassSpec = Pass | str | Mapping[str, Mapping[str, object] | None]
"""One pass: an instance, a name, or ``{name: {field: value}}``."""

Progress = Callable[[str, int, int], None]
"""Called with a pass's name, its index and the number of passes, before the pass runs."""

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they are applied.

    Attributes:
        passes: the passes.
        places: for each pass the start of a message about it, ``"file.yaml, line 4: "``; empty
            if they come from no file.
    """

    passes: tuple[Pass, ...]
    places: tuple[str, ...] = ()

    @staticmethod
    def parse(spec: Pipeline | Sequence[PassSpec] | str | Path) -> Pipeline:
        """Make a Pipeline.

        Args:
            spec: a Pipeline, a list of passes (instances, names, or ``{name: {field: value}}``),
                or the path of a YAML file.

        Raises:
            InputError: a pass or field is unknown, missing or of the wrong type; names the place
                and what is valid.
            PassError: a plug-in cannot be imported.
        """
        if isinstance(spec, Pipeline):
            return spec
        if isinstance(spec, (str, Path)):
            return _from_path(spec)
        if not isinstance(spec, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"argument 'passes' is a {type(spec).__name__}",
                "give a list of passes or the path of a .yaml file",
            )
        return Pipeline(tuple(_parse_item(item, i, _in_list) for i, item in enumerate(spec)))

    def validate(self, program: Program) -> None:
        """Check, before anything runs, that the passes can be applied to a Program in this order.

        Raises:
            ContractError: an ordering rule or a required fact is not met.
            InputError: a pass's settings cannot work on this Program.
        """
        for step, place in self._placed():
            with located(place):
                check_definition(step)
        contracts.check_order([*_ran(program), *self._order()])
        self._check_facts(program)
        for step, place in self._placed():
            with located(place):
                step.precheck(program)

    def run(
        self, program: Program, *, progress: Progress | None = None, check: bool = True
    ) -> Program:
        """Apply all passes, each to the result of the one before.

        Args:
            program: is not changed, whatever happens.
            progress: told of each pass before it runs.
            check: run the numeric check of each pass.

        Returns:
            A new Program; its ``history`` has a record of each pass.

        Raises:
            Error: as ``validate`` and ``fxgraft.transform.apply``; names the pass.
        """
        self.validate(program)
        for index, (step, place) in enumerate(self._placed()):
            if progress is not None:
                progress(step.name, index, len(self.passes))
            with located(place):
                program = apply(program, step, check=check)
        return program

    def _placed(self) -> list[tuple[Pass, str]]:
        return list(zip(self.passes, self.places or [""] * len(self.passes), strict=True))

    def _order(self) -> list[contracts.Place]:
        return [contracts.Place(step.name, type(step), place) for step, place in self._placed()]

    def _check_facts(self, program: Program) -> None:
        holding = facts.facts(program)
        removed_by: dict[str, str] = {}
        for step, place in self._placed():
            kind = type(step)
            with located(place):
                contracts.check_required(kind, holding, removed_by)
            if step.neutral() == step:
                continue
            removed_by |= dict.fromkeys(holding & kind.removes, kind.name)
            holding = (holding - kind.removes) | kind.ensures


def _ran(program: Program) -> list[contracts.Place]:
    """The passes that ran already, with the rules of those that are installed."""
    places: list[contracts.Place] = []
    for record in program.history:
        try:
            rules = registry.find(record.name)
        except Error:
            rules = None
        places.append(contracts.Place(record.name, rules, done=True))
    return places


def _from_path(spec: str | Path) -> Pipeline:
    path = Path(spec)
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"argument 'passes' is {str(spec)!r}, which is no .yaml file",
            f"give the path of a .yaml file, or a list such as [{str(spec)!r}]",
        )
    return PipelineFile.read(path).pipeline


def _in_list(loc: Loc) -> str:
    return f"passes[{loc[1]}]: " if len(loc) > 1 else ""


def _parse_item(
    item: object, index: int, where: Where, folder: Path | None = None, *, strict: bool = False
) -> Pass:
    if isinstance(item, Pass):
        return item
    name, config = _name_and_config(item, where(("passes", index)))
    with located(where(("passes", index, name))):
        kind = registry.find(name)
    return kind.from_config(
        config,
        where=lambda loc: where(("passes", index, name, *loc)),
        folder=folder,
        strict=strict,
    )


def _name_and_config(item: object, place: str) -> tuple[str, Mapping[str, object]]:
    if isinstance(item, str):
        return item, {}
    remedy = "write `name` or `name: {key: value}`; the passes are: "
    if not isinstance(item, Mapping) or len(cast("Mapping[str, object]", item)) != 1:
        raise InputError(f"{place}this is no pass: {item!r}", remedy + ", ".join(registry.names()))
    ((name, config),) = cast("Mapping[str, object]", item).items()
    if config is None:
        return name, {}
    if not isinstance(config, Mapping):
        raise InputError(
            f"{place}the settings of pass {name!r} are {config!r}",
            f"write them as `{name}: {{key: value}}`",
        )
    return name, cast("Mapping[str, object]", config)


class _Keys(BaseModel):
    """A pipeline file of fxgraft."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """Alias, hub id or path of the model; a relative path is relative to this file."""
    passes: list[Any] = []
    """The passes in order, each `name` or `name: {key: value}`."""
    backend: str = "auto"
    """Backend that runs the result."""
    options: dict[str, Any] = {}
    """Options of the backend."""
    prompt: str | None = None
    """Text to try the result on."""
    serve: dict[str, Any] = {}
    """Options of `fxgraft serve`: address, limits, timeouts, and those of the engine."""


@dataclass(frozen=True)
class PipelineFile:
    """What a YAML pipeline file says.

    Attributes:
        path: the file.
        pipeline: its passes.
        model: alias, hub id or path of the model, None if the file names none.
        backend: name of the backend.
        options: options of the backend.
        prompt: text to try the result on, None if the file has none.
        serve: options of the server; whoever serves checks them.
        where: gives the place of a key in the file.
    """

    path: Path
    pipeline: Pipeline
    model: str | None = None
    backend: str = "auto"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    prompt: str | None = None
    serve: dict[str, Any] = field(default_factory=dict[str, Any])
    where: Where = nowhere

    @staticmethod
    def read(path: str | Path) -> PipelineFile:
        """Read a YAML file. Relative paths in it are relative to its folder.

        Raises:
            InputError: names the file, the line, the key and the valid keys.
            PassError: a plug-in cannot be imported.
        """
        source = YamlSource.read(Path(path))
        return PipelineFile.parse(source.value, source.file, source.where)

    @staticmethod
    def parse(value: object, path: Path, where: Where = nowhere) -> PipelineFile:
        """Check the content of a pipeline file, which may stand inside another file.

        Args:
            value: the content.
            path: the file; relative paths in the content are relative to its folder.
            where: gives the place of a key in the file.

        Raises:
            InputError: see ``read``.
            PassError: a plug-in cannot be imported.
        """
        try:
            keys = _Keys.model_validate(value, strict=True)
        except ValidationError as error:
            raise readable(error, _Keys, "the pipeline file", where) from error
        folder = path.parent
        items = list(enumerate(keys.passes))
        pipeline = Pipeline(
            tuple(_parse_item(item, i, where, folder, strict=True) for i, item in items),
            tuple(where(("passes", i)) for i, _ in items),
        )
        model = keys.model
        if model is not None and (folder / model).exists():
            model = str(folder / model)
        return PipelineFile(
            path, pipeline, model, keys.backend, keys.options, keys.prompt, keys.serve, where
        )


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a pipeline file, with every pass that can be imported."""
    kinds = registry.passes()
    references, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds.values()], ref_template="#/$defs/{model}"
    )
    settings = {
        name: _settings_schema(kind, references[kind, "validation"]) for name, kind in kinds.items()
    }
    schema = _Keys.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "fxgraft pipeline"
    schema["properties"]["passes"]["items"] = {
        "anyOf": [
            {"enum": [name for name, kind in kinds.items() if not _has_required(kind)]},
            {
                "type": "object",
                "properties": settings,
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    return schema | {"$defs": definitions.get("$defs", {})}


def _settings_schema(kind: type[Pass], reference: dict[str, Any]) -> dict[str, Any]:
    if _has_required(kind):
        return reference
    return {"anyOf": [reference, {"type": "null"}]}


def _has_required(kind: type[Pass]) -> bool:
    return any(each.is_required() for each in kind.model_fields.values())
