"""Cost of a Program: operations and bytes per node, as expressions over named dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft import cost_rules as rules
from fxgraft import cost_traffic as traffic
from fxgraft.cost_numbers import FIELDS, compile_expressions, readable
from fxgraft.cost_traffic import Sizes
from fxgraft.describe import block_of
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError
from fxgraft.graph import short_target
from fxgraft.kernels.spec import Cost, Expr, spec_of
from fxgraft.operators import operator_of
from fxgraft.program import Program
from fxgraft.symbolic import named_symbols

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
        dimensions: names that the expressions may hold.
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
            sizes: of every dimension that the total depends on; arrays, which broadcast, give
                the result for each element as float64 (exact up to 2^53).

        Raises:
            InputError: a dimension is missing or unknown.
        """
        self._check_sizes(sizes, self._needed)
        return Work(*self._compiled(*(sizes.get(name, 0) for name in self.dimensions)))

    def evaluate_rows(self, **sizes: int | Iterable[int]) -> dict[str, np.ndarray[Any, Any]]:
        """The cost of every row at a grid of sizes.

        Args:
            sizes: of every dimension that a row depends on; arrays, which broadcast.

        Returns:
            float64 [rows, ...] by field: ``flops``, ``bytes_read``, ``bytes_written``,
            ``state_bytes``.

        Raises:
            InputError: a dimension is missing or unknown.
        """
        self._check_sizes(sizes, _names_in(row.cost for row in self.rows))
        arrays = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(sizes.get(name, 0), np.float64)) for name in self.dimensions)
        )
        shape = arrays[0].shape if arrays else (1,)
        values = [np.broadcast_to(value, shape) for value in self._compiled_distinct(*arrays)]
        table = np.stack(values) if values else np.zeros((0, *shape))
        return {field: table[places] for field, places in self._places.items()}

    @cached_property
    def _distinct(self) -> dict[Expr, int]:
        """Every distinct expression of the rows with its number: equal layers share theirs."""
        costs = (getattr(row.cost, field) for row in self.rows for field in FIELDS)
        return {expression: place for place, expression in enumerate(dict.fromkeys(costs))}

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        return {f: [self._distinct[getattr(row.cost, f)] for row in self.rows] for f in FIELDS}

    @cached_property
    def _compiled_distinct(self) -> Callable[..., list[Any]]:
        return compile_expressions(self.dimensions, list(self._distinct))

    def _check_sizes(self, sizes: Mapping[str, object], needed: Iterable[str]) -> None:
        _check_names(sizes, self.dimensions)
        missing = sorted(set(needed) - set(sizes))
        if missing:
            raise InputError(
                f"the size of dimension {missing[0]!r} is missing",
                f"give evaluate({missing[0]}=...)",
            )

    @cached_property
    def _needed(self) -> set[str]:
        """Names that the total depends on."""
        return _names_in([self.total])

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


def cost_table(
    program: Program, symbols: Mapping[str, int], types: ElementTypes | None = None
) -> CostTable:
    """Cost of every node of a Program.

    Args:
        program: with shapes on every node.
        symbols: sizes of dimensions to put in; the others stay names.
        types: floating elements take as many bytes as if they had these types; None: their own.

    Raises:
        InputError: the Program has no dimension of that name.
    """
    names = {symbol: str(name) for symbol, name in named_symbols(program).items()}
    free = dict.fromkeys(names.values())
    _check_names(symbols, [*program.dimensions, *free])
    sizes = Sizes(program, symbols, types)
    rows: list[Row] = []
    unknown: dict[str, int] = {}
    for node in program.graph.nodes:
        cost = _cost(node, sizes, unknown)
        if cost is not None:
            module = str(node.meta.get("module", ""))
            rows.append(Row(node.name, module, short_target(node), cost))
    named = [name for name in free if name not in symbols]
    others = sorted(_names_in(row.cost for row in rows) - set(named))
    return CostTable(tuple(rows), (*named, *others), unknown)


def _check_names(given: Mapping[str, object], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                f"no dynamic dimension {name!r}", f"the dimensions are: {', '.join(known)}"
            )


def _names_in(costs: Iterable[Cost]) -> set[str]:
    expressions = {cast(Expr, getattr(cost, field)) for cost in costs for field in FIELDS}
    return {str(symbol) for expression in expressions for symbol in expression.free_symbols}


def _cost(node: Node, sizes: Sizes, unknown: dict[str, int]) -> Cost | None:
    """The node's cost; None for what does no work."""
    if operator_of(node) is None:
        return None
    outputs = traffic.tensors(node.meta.get("val"))
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
        sympy.sympify(traffic.bytes_read(node, sizes)),
        sympy.sympify(traffic.bytes_written(node, sizes)),
        sympy.sympify(traffic.state_bytes(node, sizes)),
    )


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
