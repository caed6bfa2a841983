"""Cost of a Program: operations and bytes per node, as expressions over named dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import sympy
import torch
from torch.fx import Node

from fxgraft import cost_rules as rules
from fxgraft.cost_numbers import FIELDS, compile_expressions, readable
from fxgraft.errors import InputError
from fxgraft.graph import short_target
from fxgraft.kernels.spec import Cost, Expr, argument, expr, spec_of
from fxgraft.describe import block_of
from fxgraft.program import Program
from fxgraft.symbolic import derived_dimensions, named_symbols

Number = int | float | np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Row:
    """Cost of one node.

    Attributes:
        name: of the node.
        module: path of the module it came from.
        op: readable operator name, for example ``"aten.linear"``.
        cost: over the Program's named dimensions.
    """

    name: str
    module: str
    op: str
    cost: Cost


class Work(NamedTuple):
    """Evaluated cost: Python integers, or float64 arrays over a grid of sizes."""

    flops: Number
    bytes_read: Number
    bytes_written: Number
    state_bytes: Number


@dataclass(frozen=True)
class CostTable:
    """Cost of every node that does work.

    Attributes:
        rows: in graph order.
        dimensions: names that the expressions hold.
        unknown: operators without a rule, by number of nodes; their operations are missing from
            the table, their bytes are in it.
    """

    rows: tuple[Row, ...]
    dimensions: tuple[str, ...]
    unknown: dict[str, int]

    @cached_property
    def total(self) -> Cost:
        """Sum over all nodes."""
        return _sum(row.cost for row in self.rows)

    def by_layer(self) -> dict[str, Cost]:
        """Sum per block (``"model.layers.3"``) or module outside the blocks, in graph order."""
        return self._grouped(lambda row: block_of(row.module))

    def by_op(self) -> dict[str, Cost]:
        """Sum per operator, in order of first use."""
        return self._grouped(lambda row: row.op)

    def _grouped(self, key: Callable[[Row], str]) -> dict[str, Cost]:
        groups: dict[str, list[Cost]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row.cost)
        return {name: _sum(costs) for name, costs in groups.items()}

    def evaluate(self, **sizes: int | Iterable[int]) -> Work:
        """The total at given sizes.

        Args:
            sizes: of every dimension in ``dimensions``; arrays give the result for each element,
                as float64 (exact up to 2^53).

        Raises:
            InputError: a dimension is missing or unknown.
        """
        _check_names(sizes, self.dimensions)
        for name in self.dimensions:
            if name not in sizes:
                raise InputError(
                    f"the size of dimension {name!r} is missing", f"give evaluate({name}=...)"
                )
        return Work(*self._compiled(*(sizes[name] for name in self.dimensions)))

    @cached_property
    def _compiled(self) -> Callable[..., list[Number]]:
        return compile_expressions(self.dimensions, [getattr(self.total, f) for f in FIELDS])

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values; expressions with names in them are strings."""
        return {
            "dimensions": list(self.dimensions),
            "rows": [
                {"name": row.name, "module": row.module, "op": row.op, **_json(row.cost)}
                for row in self.rows
            ],
            "total": _json(self.total),
            "unknown": dict(self.unknown),
        }

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.op] = counts.get(row.op, 0) + 1
        lines = [(op, str(counts[op]), cost) for op, cost in self.by_op().items()]
        lines.append(("total", str(len(self.rows)), self.total))
        text = _aligned(
            [("op", "nodes", "flops", "read", "written", "state"),
             *((op, count, *(readable(getattr(cost, f), f) for f in FIELDS))
               for op, count, cost in lines)]
        )  # fmt: skip
        missing = ", ".join(f"{op} ({count})" for op, count in self.unknown.items())
        return f"{text}\nwithout a rule, flops missing: {missing}" if missing else text


def cost_table(program: Program, symbols: Mapping[str, int]) -> CostTable:
    """Cost of every node of a Program.

    Args:
        program: with shapes on every node.
        symbols: sizes of dimensions to put in; the others stay names.

    Raises:
        InputError: the Program has no dimension of that name.
    """
    names = {symbol: str(name) for symbol, name in named_symbols(program).items()}
    free = dict.fromkeys(names.values())
    _check_names(symbols, [*program.dimensions, *free])
    sizes = _Sizes(program, symbols)
    rows: list[Row] = []
    unknown: dict[str, int] = {}
    for node in program.graph.nodes:
        cost = _cost(node, sizes, unknown)
        if cost is not None:
            module = str(node.meta.get("module", ""))
            rows.append(Row(node.name, module, short_target(node), cost))
    return CostTable(tuple(rows), _free_names(rows, free), unknown)


def _check_names(given: Mapping[str, object], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                f"no dynamic dimension {name!r}", f"the dimensions are: {', '.join(known)}"
            )


def _free_names(rows: Iterable[Row], order: Iterable[str]) -> tuple[str, ...]:
    free = {
        str(symbol)
        for row in rows
        for field in FIELDS
        for symbol in cast(Expr, getattr(row.cost, field)).free_symbols
    }
    known = [name for name in order if name in free]
    return (*known, *sorted(free - set(known)))


class _Sizes:
    """Sizes of values with dimensions' names, or given numbers, in place of the graph's symbols."""

    def __init__(self, program: Program, symbols: Mapping[str, int]) -> None:
        names = named_symbols(program)
        given = {name: sympy.Integer(size) for name, size in symbols.items()}
        self._replace = {symbol: given.get(str(name), name) for symbol, name in names.items()}
        for name, size in derived_dimensions(program).items():
            if name in given and isinstance(size, sympy.Symbol):
                self._replace[size] = given[name]
        self._known: dict[Expr, rules.Size] = {}

    def __call__(self, value: Any) -> rules.Sizes:
        """Sizes of a node, tensor, or sequence of sizes."""
        if isinstance(value, Node):
            value = value.meta["val"]
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            value = value[0]
        sizes = value.shape if isinstance(value, torch.Tensor) else value
        return tuple(size if isinstance(size, int) else self.named(expr(size)) for size in sizes)

    def named(self, size: Expr) -> Any:
        """An expression over the graph's symbols as one over named dimensions."""
        if size not in self._known:
            named = size.xreplace(self._replace)
            self._known[size] = int(named) if named.is_Integer else named
        return self._known[size]


def _cost(node: Node, sizes: _Sizes, unknown: dict[str, int]) -> Cost | None:
    """The node's cost; None for what does no work."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    outputs = _tensors(node.meta.get("val"))
    if not outputs:
        return None
    spec = spec_of(node)
    if spec is not None:
        flops = sizes.named(spec.flops(node))
    elif rules.is_view(node, sizes):
        return None
    else:
        flops = rules.operations(node, sizes)
    if flops is None:
        unknown[short_target(node)] = unknown.get(short_target(node), 0) + 1
    return Cost(
        sympy.sympify(flops or 0),
        sympy.sympify(_read(node, sizes)),
        sympy.sympify(_written(node, sizes, outputs)),
        sympy.sympify(_state(node, sizes)),
    )


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = cast("tuple[object, ...]", value) if isinstance(value, (tuple, list)) else ()
    return [item for item in items if isinstance(item, torch.Tensor)]


def _bytes(value: torch.Tensor, sizes: _Sizes) -> rules.Size:
    """Bytes of a tensor in memory; an expanded dimension is there once."""
    pairs = zip(sizes(value), sizes(value.stride()), strict=True)
    stored = [size for size, stride in pairs if stride != 0]
    return rules.product(stored) * value.element_size()


def _read(node: Node, sizes: _Sizes) -> rules.Size:
    name = rules.base_name(node)
    if name in rules.FACTORIES or name in rules.ALLOCATIONS:
        return 0
    sources = list(node.all_input_nodes)
    gathered: rules.Size = 0
    if name in rules.GATHERS:
        sources = sources[1:]
        gathered = _bytes(node.meta["val"], sizes)
    if _overwrites(node):
        sources = sources[1:]
    values = [value for source in sources for value in _tensors(source.meta.get("val"))]
    return gathered + sum(_bytes(value, sizes) for value in values)


def _overwrites(node: Node) -> bool:
    """Whether an in-place op replaces what was there without reading it."""
    name = node.target._schema.name.split("::")[1]  # pyright: ignore
    return name in ("copy_", "index_put_", "scatter_", "fill_", "zero_", "index_copy_")


def _written(node: Node, sizes: _Sizes, outputs: list[torch.Tensor]) -> rules.Size:
    if rules.base_name(node) in rules.ALLOCATIONS:
        return 0
    if _overwrites(node):
        values = [n for n in node.all_input_nodes[1:] if _tensors(n.meta.get("val"))]
        outputs = [values[-1].meta["val"]] if values else outputs
    return sum(_bytes(value, sizes) for value in outputs)


def _state(node: Node, sizes: _Sizes) -> rules.Size:
    """Bytes that a stateful op keeps after this node ran."""
    spec = spec_of(node)
    total: rules.Size = 0
    for state in spec.states if spec and spec.causal(node) else ():
        if state.kind == "fixed":
            total += _bytes(node.meta["val"][state.output], sizes)
            continue
        value = cast(Node, argument(node, state.argument)).meta["val"]
        shape = list(sizes(value))
        limit = argument(node, state.limit) if state.limit else None
        if isinstance(limit, int):
            kept = sympy.Min(shape[state.dim], limit - 1)
            shape[state.dim] = int(kept) if kept.is_Integer else kept
        total += rules.product(shape) * value.element_size()
    return total


def _sum(costs: Iterable[Cost]) -> Cost:
    """Add many costs at once; term by term is quadratic in sympy."""
    items = list(costs)
    return Cost(*(sympy.Add(*(getattr(cost, field) for cost in items)) for field in FIELDS))


def _json(cost: Cost) -> dict[str, int | str]:
    values = {field: getattr(cost, field) for field in FIELDS}
    return {field: int(v) if v.is_Integer else str(v) for field, v in values.items()}


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
