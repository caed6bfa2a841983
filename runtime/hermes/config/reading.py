"""Wrong keys and values of a system file as messages with file, line, key and the valid keys."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fxgraft.errors import InputError
from fxgraft.validation import Loc, Where, suggestion


def refuse(error: ValidationError, model: type[BaseModel], value: object, where: Where) -> NoReturn:
    """Raise an ``InputError`` with one line per wrong key.

    Args:
        error: what pydantic found.
        model: the model that was validated.
        value: the content of the file.
        where: gives the place of a key in the file.
    """
    details = error.errors(include_url=False)
    lines: list[str] = []
    valid: list[str] = []
    for detail in details:
        if detail["type"] == "too_short" and _has_errors_inside(detail["loc"], details):
            continue
        section, path = _locate(model, value, detail["loc"])
        lines.append(where(path) + _describe(detail, section, path))
        valid.append(
            f"the valid keys of {_owner(path[:-1])} are: {', '.join(section.model_fields)}"
        )
    raise InputError("\n".join(lines), valid[0])


def _has_errors_inside(loc: Loc, details: list[ErrorDetails]) -> bool:
    """Pydantic also reports a list whose items are all wrong as too short."""
    return any(len(d["loc"]) > len(loc) and d["loc"][: len(loc)] == loc for d in details)


def _describe(detail: ErrorDetails, section: type[BaseModel], path: Loc) -> str:
    name = str(path[-1]) if path else ""
    if detail["type"] == "missing":
        return f"{_owner(path[:-1])} needs the key {name!r}"
    if detail["type"] == "extra_forbidden":
        return f"{_owner(path[:-1])} has no key {name!r}{suggestion(name, section.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message[:1].lower() + message[1:]
    if isinstance(detail["input"], (dict, list, BaseModel)):
        return f"{_owner(path)} {message}"
    return f"{_owner(path)} is {detail['input']!r}: it {message}"


def _owner(path: Loc) -> str:
    return ".".join(str(part) for part in path) or "the system"


def _plain(annotation: Any) -> Any:
    """A type without its constraints."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _locate(model: type[BaseModel], value: object, loc: Loc) -> tuple[type[BaseModel], Loc]:
    """The section that a location is in, and its path in the file.

    Locations also name the chosen kind of a section (``arrivals, poisson, rate``), which is no key.
    """
    path: list[str | int] = []
    section, annotation = model, cast(Any, model)
    for place, part in enumerate(loc):
        is_key = _is_inside(value, part) or place == len(loc) - 1
        if is_key:
            path.append(part)
            value = _child(value, part)
            annotation = _descend(annotation, part)
        else:
            annotation = _choose(annotation, part)
        found = _only_model(annotation)
        if found is not None and place < len(loc) - 1:
            section = found
    return section, tuple(path)


def _is_inside(value: object, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, (list, tuple)) and isinstance(part, int)


def _child(value: object, part: str | int) -> object:
    if isinstance(value, Mapping):
        return cast("Mapping[object, object]", value).get(part)
    if isinstance(value, (list, tuple)) and isinstance(part, int):
        items = cast("list[object]", value)
        return items[part] if part < len(items) else None
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All models that a type may be."""
    annotation = _plain(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _only_model(annotation: Any) -> type[BaseModel] | None:
    models = _models(annotation)
    return models[0] if len(models) == 1 else None


def _choose(annotation: Any, kind: str | int) -> Any:
    """The model of a union whose ``kind`` is this."""
    for model in _models(annotation):
        field = model.model_fields.get("kind")
        if field is not None and kind in typing.get_args(field.annotation):
            return model
    return annotation


def _descend(annotation: Any, part: str | int) -> Any:
    """The type of a key, list item or mapping value."""
    annotation = _plain(annotation)
    model = _only_model(annotation)
    if model is not None:
        field = model.model_fields.get(str(part))
        return field.annotation if field else None
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (tuple, list) and parts:
        return parts[0]
    if typing.get_origin(annotation) is dict:
        return parts[1]
    return annotation
