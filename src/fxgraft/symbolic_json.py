"""Sizes over named dimensions as JSON, so that no expression is ever parsed from a string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from fxgraft.errors import SerializationError
from fxgraft.strict_json import typed

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": sympy.Add,
    "multiply": sympy.Mul,
    "power": sympy.Pow,
    "floor_divide": FloorDiv,
    "modulo": Mod,
    "maximum": Max,
    "minimum": Min,
}
_NAMES: dict[object, str] = {function: name for name, function in _FUNCTIONS.items()}


def encode_size(size: sympy.Expr) -> Any:
    """An expression as nested JSON: numbers, names, and ``{"add": [...]}`` and the like.

    Raises:
        SerializationError: it holds a function that has no JSON form.
    """
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Symbol):
        return str(size)
    if size.func not in _NAMES:
        raise SerializationError(
            f"a dimension has the size {size}, which cannot be stored", "capture it as fixed"
        )
    return {_NAMES[size.func]: [encode_size(cast(sympy.Expr, part)) for part in size.args]}


def decode_size(value: object, where: str) -> sympy.Expr:
    """Undo ``encode_size``.

    Raises:
        SerializationError: the JSON is malformed.
    """
    if type(value) is int:
        return sympy.Integer(value)
    if isinstance(value, str):
        return sympy.Symbol(value, integer=True, nonnegative=True)
    entries = cast("dict[str, object]", typed(value, f"the size of {where}", dict))
    if len(entries) != 1 or not set(entries) <= set(_FUNCTIONS):
        raise SerializationError(f"{where} has a malformed size", "restore the file")
    ((name, parts),) = entries.items()
    items = [decode_size(part, where) for part in typed(parts, f"the size of {where}", list)]
    try:
        return _FUNCTIONS[name](*items)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise SerializationError(f"{where} has a malformed size: {error}", "restore") from error
