"""Turns pydantic's validation errors into fxgraft's, and resolves relative paths in settings."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fxgraft.errors import Error, InputError

Loc = tuple[str | int, ...]
"""Path of a value in nested settings, for example ``("passes", 1, "flow", "budget")``."""

Where = Callable[[Loc], str]
"""Gives the place of a value as the start of a message, ``"file.yaml, line 4: "``, or ``""``."""


@contextlib.contextmanager
def located(place: str) -> Generator[None]:
    """Put ``place`` in front of the message of any fxgraft error raised inside."""
    try:
        yield
    except Error as error:
        error.problem = place + error.problem
        error.args = (f"{place}{error.args[0]}",)
        raise


def nowhere(loc: Loc) -> str:
    """The place of a value that came from no file."""
    return ""


def suggestion(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'flow'?"`` for a name close to a known one, else ``""``."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def readable(
    error: ValidationError, model: type[BaseModel], owner: str, where: Where
) -> InputError:
    """An error with one line per wrong key, and the valid keys as the remedy.

    Args:
        error: what pydantic found.
        model: the model that was validated.
        owner: what the keys belong to, for example ``"pass 'flow'"``.
        where: gives the place of a key in its source.
    """
    details = error.errors(include_url=False)
    lines = [where(_place(detail)) + _describe(detail, model, owner) for detail in details]
    concerned = _model_at(model, details[0]["loc"])
    return InputError("\n".join(lines), f"the valid keys are: {valid_keys(concerned)}")


def valid_keys(model: type[BaseModel]) -> str:
    """The fields of a model with their types, for messages: ``sparsity (float), ...``."""
    fields = model.model_fields.items()
    return ", ".join(f"{key} ({type_name(f.annotation)})" for key, f in fields) or "none"


def type_name(annotation: object) -> str:
    """A type as a person would write it."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("pathlib.", "")


def _place(detail: ErrorDetails) -> Loc:
    """A missing key has no place of its own: its mapping's is the nearest."""
    loc = detail["loc"]
    return loc[:-1] if detail["type"] == "missing" else loc


def _describe(detail: ErrorDetails, model: type[BaseModel], owner: str) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{owner} needs the key {key!r}"
    if detail["type"] == "extra_forbidden":
        known = _model_at(model, detail["loc"]).model_fields
        return f"{owner} has no key {key!r}{suggestion(detail['loc'][-1], known)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    subject = f"key {key!r} of {owner}" if key else owner
    return f"{subject} is {detail['input']!r}: it {_lower(message)}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _model_at(model: type[BaseModel], loc: Loc) -> type[BaseModel]:
    """The (nested) model whose key is the last part of ``loc``."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return model


def resolve_paths(
    model: type[BaseModel], config: Mapping[str, object], folder: Path
) -> dict[str, object]:
    """Make the relative paths among a model's top-level settings relative to ``folder``.

    Text in a field that takes paths or other text (``Path | str``) is resolved only where a file
    of that name exists.
    """
    resolved = dict(config)
    for key, field in model.model_fields.items():
        kinds = set(_leaf_types(field.annotation))
        if key in resolved and Path in kinds:
            resolved[key] = _resolve(resolved[key], folder, certain=str not in kinds)
    return resolved


def _resolve(value: object, folder: Path, *, certain: bool) -> object:
    if isinstance(value, list):
        items = cast("list[object]", value)
        return [_resolve(item, folder, certain=certain) for item in items]
    if isinstance(value, dict):
        named = cast("dict[object, object]", value)
        return {key: _resolve(item, folder, certain=certain) for key, item in named.items()}
    if not isinstance(value, str):
        return value
    path = folder / value
    return str(path) if certain or path.exists() else value


def _leaf_types(annotation: Any) -> Iterable[object]:
    """The types that an annotation is built from; a literal text counts as ``str``."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from {type(value) for value in typing.get_args(annotation)}
        return
    parts = typing.get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaf_types(part)
