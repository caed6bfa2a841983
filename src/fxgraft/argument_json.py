"""Arguments of graph nodes as JSON: plain values as they are, the rest as one-entry objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.fx import Node

from fxgraft.errors import SerializationError
from fxgraft.strict_json import typed

_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}
_OWN_DEVICE = "own"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, for example ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object, where: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        SerializationError: there is none.
    """
    return _lookup(_DTYPES, name, where, "dtype")


def encode_argument(value: object, device: torch.device, where: str) -> Any:
    """A node argument as JSON.

    Args:
        value: the argument.
        device: the Program's own; it is not stored, so that it follows the weights on loading.
        where: names the node in errors.

    Raises:
        SerializationError: the argument is of a type that cannot be stored.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [encode_argument(item, device, where) for item in cast("list[object]", value)]
    if isinstance(value, tuple):
        items = cast("tuple[object, ...]", value)
        return {"tuple": [encode_argument(item, device, where) for item in items]}
    if isinstance(value, slice):
        bounds = cast(Any, value)
        parts = (bounds.start, bounds.stop, bounds.step)
        return {"slice": [encode_argument(part, device, where) for part in parts]}
    return _encode_leaf(value, device, where)


def _encode_leaf(value: object, device: torch.device, where: str) -> dict[str, Any]:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, float):
        return {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [str(value.real), str(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": _OWN_DEVICE if value.type == device.type else str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    raise SerializationError(
        f"{where} has an argument of type {type(value).__name__}, which cannot be stored",
        "pass numbers, strings, dtypes, devices or nodes",
    )


def decode_argument(value: object, known: Mapping[str, Node], where: str) -> Any:
    """Undo ``encode_argument``.

    Args:
        value: the JSON.
        known: nodes by name.
        where: names the node in errors.

    Raises:
        SerializationError: the JSON is malformed, or names something that does not exist.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode_argument(item, known, where) for item in cast("list[object]", value)]
    entries = cast("dict[str, Any]", value)
    if len(entries) != 1:
        raise SerializationError(f"{where} has a malformed argument {entries}", "restore the file")
    ((tag, content),) = entries.items()
    if tag in ("tuple", "slice"):
        items = [
            decode_argument(i, known, where) for i in typed(content, f"a {tag} of {where}", list)
        ]
        return tuple(items) if tag == "tuple" else _slice(items, where)
    return _decode_leaf(tag, content, known, where)


def _slice(parts: list[Any], where: str) -> slice:
    if len(parts) != 3:
        raise SerializationError(f"{where} has a malformed slice", "restore the file")
    return slice(*parts)


def _decode_leaf(tag: str, content: object, known: Mapping[str, Node], where: str) -> Any:
    if tag == "complex":
        parts = [_number(part, where) for part in typed(content, f"a number of {where}", list)]
        return complex(*parts[:2])
    if tag == "float":
        return _number(content, where)
    if tag == "device":
        return _device(typed(content, f"a device of {where}", str), where)
    tables: dict[str, Mapping[str, Any]] = {
        "node": known,
        "dtype": _DTYPES,
        "layout": _LAYOUTS,
        "memory_format": _MEMORY_FORMATS,
    }
    return _lookup(_lookup(tables, tag, where, "kind of argument"), content, where, tag)


def _number(text: object, where: str) -> float:
    try:
        return float(typed(text, f"a number of {where}", str))
    except ValueError:
        raise SerializationError(f"{where} has the number {text!r}", "restore the file") from None


def _device(name: str, where: str) -> torch.device:
    if name == _OWN_DEVICE:
        return torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise SerializationError(f"{where} has the device {name!r}", "restore the file") from None


def _lookup(table: Mapping[str, Any], name: object, where: str, kind: str) -> Any:
    if isinstance(name, str) and name in table:
        return table[name]
    raise SerializationError(f"{where} names the {kind} {name!r}, which does not exist here",
                             "restore the file, or use a newer fxgraft")  # fmt: skip
