"""Reading JSON that may be damaged or hostile: every surprise is one clear error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from fxgraft.errors import SerializationError

_MAX_DEPTH = 64
Kinds = Mapping[str, type | tuple[type, ...]]


def parse(text: bytes, where: str) -> Any:
    """Parse JSON without duplicate keys and without NaN or infinity literals.

    Raises:
        SerializationError: the text is damaged.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise SerializationError(f"{where} is damaged: {error}", "restore the file") from error
    return value


def _check_depth(value: object) -> None:
    """Limit nesting, so that what walks the value may recurse."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for parent in level for item in _items(parent)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast("dict[str, object]", value).values())
    return cast("list[object]", value) if isinstance(value, list) else []


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(literal: str) -> Any:
    raise ValueError(f"{literal} is no JSON number")


def fields(value: object, where: str, required: Kinds, optional: Kinds | None = None) -> Any:
    """Check that ``value`` is an object with exactly these fields and return it.

    Raises:
        SerializationError: a field is missing, unknown or of another type; names it.
    """
    kinds = {**required, **(optional or {})}
    record = typed(value, where, dict)
    for name in record:
        if name not in kinds:
            raise SerializationError(
                f"{where} has an unknown field {name!r}", f"its fields are: {', '.join(kinds)}"
            )
    for name in required:
        if name not in record:
            raise SerializationError(f"{where} has no field {name!r}", "restore the file")
    for name, field in record.items():
        typed(field, f"field {name!r} of {where}", kinds[name])
    return record


def typed(value: object, where: str, kind: type | tuple[type, ...]) -> Any:
    """Check the type of a JSON value (a boolean is no number) and return it.

    Raises:
        SerializationError: it has another type.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) in kinds:
        return value
    names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise SerializationError(
        f"{where} is {type(value).__name__}, it must be {names}", "restore the file"
    )


def plain(value: object, where: str) -> Any:
    """A value of JSON types and tuples as strict JSON; infinities and NaN become tagged objects.

    Raises:
        SerializationError: it holds something else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        items = cast("list[object]", value)
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(items)]
    if isinstance(value, dict):
        entries = cast("dict[object, object]", value)
        return {_key(key, where): plain(item, f"{where}.{key}") for key, item in entries.items()}
    raise SerializationError(
        f"{where} is of type {type(value).__name__}, which JSON has not",
        "keep numbers, strings, lists and dictionaries there",
    )


def _key(key: object, where: str) -> str:
    if isinstance(key, str):
        return key
    raise SerializationError(f"{where} has the key {key!r}, which is no string", "use strings")


def unplain(value: Any) -> Any:
    """Undo ``plain`` (tuples come back as lists)."""
    if isinstance(value, list):
        return [unplain(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entries = cast("dict[str, Any]", value)
    if set(entries) == {"float"} and entries["float"] in ("inf", "-inf", "nan"):
        return float(entries["float"])
    return {key: unplain(item) for key, item in entries.items()}
