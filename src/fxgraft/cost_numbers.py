"""Turning cost expressions into numbers and into text."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import sympy  # pyright: ignore[reportMissingTypeStubs]

from fxgraft.kernels.spec import Expr

FIELDS = ("flops", "bytes_read", "bytes_written", "state_bytes")
_STEPS = ("", "k", "M", "G", "T", "P", "E")
_WIDEST = 40


def compile_expressions(names: Sequence[str], expressions: Sequence[Expr]) -> Callable[..., Any]:
    """One function of the named sizes for several expressions.

    Numbers give exact integers; arrays, which broadcast, give float64 arrays.
    """
    symbols = [sympy.Symbol(name, integer=True, nonnegative=True) for name in names]
    lambdify = cast(Any, sympy).lambdify
    of_numbers = [_functions(max, min), "math"]
    of_arrays = [_functions(_reduce(np.maximum), _reduce(np.minimum)), "numpy"]
    scalar = lambdify(symbols, list(expressions), modules=of_numbers, cse=True)
    vector = lambdify(symbols, list(expressions), modules=of_arrays, cse=True)

    def evaluate(*sizes: Any) -> list[Any]:
        if all(isinstance(size, int) for size in sizes):
            return scalar(*sizes)
        arrays = np.broadcast_arrays(*(np.asarray(size, dtype=np.float64) for size in sizes))
        return [
            np.broadcast_to(np.asarray(v, np.float64), arrays[0].shape) for v in vector(*arrays)
        ]

    return evaluate


def _functions(maximum: Callable[..., Any], minimum: Callable[..., Any]) -> dict[str, Any]:
    """Implementations of the functions that torch puts into shapes."""
    return {
        "Max": maximum, "Min": minimum, "Mod": operator.mod, "PythonMod": operator.mod,
        "FloorDiv": _floor_divide, "CleanDiv": _floor_divide,
        "ModularIndexing": _modular_index, "CeilDiv": _ceil_divide,
    }  # fmt: skip


def _floor_divide(base: Any, divisor: Any) -> Any:
    return base // divisor


def _ceil_divide(base: Any, divisor: Any) -> Any:
    return -(-base // divisor)


def _modular_index(base: Any, divisor: Any, modulus: Any) -> Any:
    return base // divisor % modulus


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduced(*values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result

    return reduced


def readable(value: Expr, field: str) -> str:
    """A number with a decimal prefix (``"1.5 GB"``), or the expression where it is short."""
    unit = "" if field == "flops" else "B"
    if value.is_number:
        return _prefixed(float(value), unit)
    text = str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _prefixed(number: float, unit: str) -> str:
    step = 0
    while abs(number) >= 1000 and step < len(_STEPS) - 1:
        number /= 1000
        step += 1
    text = f"{number:.0f}" if step == 0 else f"{number:.3g}"
    return f"{text} {_STEPS[step]}{unit}".rstrip()
