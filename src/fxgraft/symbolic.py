"""Fake inputs with named symbolic dimensions, for graphs that are built rather than captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxgraft.errors import GraphError
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Program, Range

_FIRST_HINT = 5
Size = int | torch.SymInt


def fake_inputs(
    inputs: Sequence[Input],
    dimensions: Mapping[str, Range],
    device: torch.device | str = "cpu",
    *,
    hints: Mapping[str, int] | None = None,
    derived: Mapping[str, sympy.Expr] | None = None,
) -> list[torch.Tensor]:
    """Fake tensors for ``inputs`` in which equal dimension names share one symbol.

    Args:
        inputs: shapes and dtypes.
        dimensions: every name that occurs in a shape.
        device: of the fake tensors.
        hints: sizes to stand in for dimensions wherever a choice must be made on a size.
        derived: dimensions that follow from others, as expressions over symbols of their names,
            for example ``total = past + sequence``.
    """
    derived = derived or {}
    free = {str(symbol) for size in derived.values() for symbol in size.free_symbols}
    names = [name for name in [*dimensions, *sorted(free - set(dimensions))] if name not in derived]
    environment = ShapeEnv()
    sizes: dict[str, Size] = {
        name: _size(environment, name, hint)
        for name, hint in _hints(names, dimensions, hints or {}).items()
    }
    for name, expression in derived.items():
        sizes[name] = _derive(environment, expression, sizes)
    with FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True):
        return [_fake(spec, sizes, device) for spec in inputs]


def _hints(
    names: Sequence[str], dimensions: Mapping[str, Range], wanted: Mapping[str, int]
) -> dict[str, int]:
    """One size per name, larger than 1 and pairwise different.

    So no dimension is taken for a constant or for another dimension.
    """
    found: dict[str, int] = {}
    for name in names:
        allowed = dimensions.get(name, Range())
        size = wanted.get(name, 0)
        size = max(size if size > 1 else _FIRST_HINT, allowed.minimum)
        while size in found.values():
            size += 2
        if allowed.maximum is not None and size > allowed.maximum:
            size = next(
                (s for s in range(allowed.maximum, 1, -1) if s not in found.values()),
                max(allowed.maximum, 2),
            )
        found[name] = size
    return found


def _size(environment: ShapeEnv, name: str, hint: int) -> Size:
    source = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return environment.create_symintnode(symbol, hint=hint, source=source)


def _derive(environment: ShapeEnv, expression: sympy.Expr, sizes: Mapping[str, Size]) -> Size:
    nodes = {symbol: cast(Any, sizes[str(symbol)]).node for symbol in expression.free_symbols}
    named = cast(Any, expression)
    size = named.xreplace({symbol: node.expr for symbol, node in nodes.items()})
    hint = named.subs({symbol: node.hint for symbol, node in nodes.items()})
    return environment.create_symintnode(size, hint=int(hint))


def _fake(spec: Input, sizes: Mapping[str, Size], device: torch.device | str) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device=device)


def hints_of(program: Program) -> dict[str, int]:
    """The size that stands in for each dynamic dimension of a Program."""
    found: dict[str, int] = {}
    for spec, node in zip(program.inputs, program.placeholders, strict=True):
        sizes: list[Any] = list(node.meta["val"].shape)
        for name, size in zip(spec.shape, sizes, strict=True):
            if isinstance(name, str) and not isinstance(size, int) and size.node.has_hint():
                found.setdefault(name, int(size.node.hint))
    return found


def named_symbols(program: Program) -> dict[sympy.Symbol, sympy.Symbol]:
    """Each symbol of the graph's inputs with a symbol called like its dimension.

    An input may have a symbol of its own for a dimension whose equality nothing in the graph
    relies on; it is given the same name.
    """
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for name, size in _named_sizes(program):
        if isinstance(size, sympy.Symbol) and size not in found:
            found[size] = sympy.Symbol(name, integer=True, nonnegative=True)
    return found


def derived_dimensions(program: Program) -> dict[str, sympy.Expr]:
    """Dimensions that follow from others, as expressions over named symbols."""
    names = named_symbols(program)
    free = {str(symbol) for symbol in names.values()}
    derived = {name: cast(Any, size) for name, size in _named_sizes(program) if name not in free}
    return {name: size.xreplace(names) for name, size in derived.items()}


def _named_sizes(program: Program) -> list[tuple[str, sympy.Expr]]:
    return [
        (name, size)
        for spec, node in zip(program.inputs, program.placeholders, strict=True)
        for name, size in zip(spec.shape, dims(node), strict=True)
        if isinstance(name, str)
    ]


def check_dynamic(values: Sequence[torch.Tensor]) -> None:
    """Fail if computing a graph's shapes fixed a dimension of these inputs.

    Args:
        values: fake inputs from ``fake_inputs``, after their graph's values were computed.

    Raises:
        GraphError: names the dimension and what it was fixed to.
    """
    fakes = [value for value in values if isinstance(value, FakeTensor)]
    environment = cast(Any, fakes[0].fake_mode.shape_env) if fakes else None
    if environment is None:
        return
    names = {symbol: found[0].name for symbol, found in environment.var_to_sources.items()}
    for symbol, value in environment.replacements.items():
        if symbol in names and (value.is_Integer or value in names):
            raise GraphError(
                f"the graph's shapes force dimension {names[symbol]!r} to be "
                f"{names.get(value, value)}",
                "an op in the graph works for this size only; look at the pass that inserted it",
            )
