"""The nodes of one step of a served model, what their work depends on, and how much it is.

A language model's Program is taken as the step graph that ``insert_state`` makes of it; a Program
without steps (an encoder) as it is, so that a step is one pass over whole sequences. Two things
differ from the cost of that graph as it stands:

* putting new entries behind the state writes the new ones only, as a paged state does;
* causal attention over ``n`` new and ``p`` past tokens does ``p + (n + 1) / 2`` of the ``p + n``
  columns of scores, as kernels do that skip what is masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.collectives import is_collective
from fxgraft.cost import CostTable, Row, cost_table
from fxgraft.cost_numbers import compile_expressions
from fxgraft.cost_table_grid import Array
from fxgraft.cost_traffic import Sizes, joins_state
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError, LoweringError, StateError
from fxgraft.kernels.spec import ZERO, Cost, Expr, argument, spec_of
from fxgraft.program import Program
from fxgraft.state import StateTensor, insert_state
from fxgraft.weight_products import WeightProduct, weight_products

Kind = Literal["linear", "attention", "recurrence", "collective", "other"]
KINDS: tuple[Kind, ...] = ("linear", "attention", "recurrence", "collective", "other")
Scope = Literal["tokens", "sequences", "context"]
_PAST = "past"


@dataclass(frozen=True)
class StepNode:
    """One node that does work.

    Attributes:
        row: its cost.
        node: of the step graph.
        kind: which unit of a device runs it.
        scope: what its work depends on: all new ``"tokens"`` of a step, its ``"sequences"``, or
            each sequence's own new tokens and ``"context"``.
        product: what is multiplied, for linear layers.
        is_triangular: masked scores may be left out.
    """

    row: Row
    node: Node
    kind: Kind
    scope: Scope
    product: WeightProduct | None = None
    is_triangular: bool = False


@dataclass(frozen=True)
class Work:
    """Work of nodes at a number of points.

    Attributes:
        nodes: that the first axis counts.
        flops, bytes_read, bytes_written: [nodes, points].
        rows: rows of x of each node's product, [nodes, points]; 0 where there is none.
        active: matrices of each node's product that meet a row, [nodes, points].
    """

    nodes: tuple[StepNode, ...]
    flops: Array
    bytes_read: Array
    bytes_written: Array
    rows: Array
    active: Array

    @property
    def bytes(self) -> Array:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def of(self, chosen: list[int]) -> Work:
        """The work of some nodes, by their places."""
        return Work(
            tuple(self.nodes[place] for place in chosen),
            *(getattr(self, name)[chosen] for name in _ARRAYS),
        )


_ARRAYS = ("flops", "bytes_read", "bytes_written", "rows", "active")


class StepGraph:
    """A Program's step, ready to be costed.

    Args:
        program: whose steps.
        types: floating elements count as if of these types; None: their own.

    Attributes:
        model: the Program whose steps these are.
        types: that elements are counted as; the Program's own commonest one if none was given.
        program: the step graph, or the Program itself if it has no steps.
        states: what it keeps from step to step; empty without steps.
        without_steps: why it has no steps, empty if it has.
        nodes: those that do work.
        unknown: operators without a rule, by number of nodes.
    """

    def __init__(self, program: Program, types: ElementTypes | None = None) -> None:
        self.model, self.program = program, program
        self.types = types or ElementTypes.of(program)
        self.states: tuple[StateTensor, ...] = ()
        self.without_steps = ""
        try:
            step = insert_state(program)
        except StateError as error:
            self.without_steps = error.problem
        else:
            self.program, self.states = step.program, step.states
        table = cost_table(self.program, {}, types)
        self.unknown = table.unknown
        self._sizes = Sizes(self.program, {}, types)
        self.nodes = self._nodes(table)
        self.table = replace(table, rows=tuple(node.row for node in self.nodes))

    def _nodes(self, table: CostTable) -> tuple[StepNode, ...]:
        by_name = {node.name: node for node in self.program.graph.nodes}
        products = weight_products(self.program)
        found: list[StepNode] = []
        scopes: dict[Cost, Scope] = {}
        for row in table.rows:
            node = by_name[row.name]
            if joins_state(node):
                row = replace(row, cost=self._appending(node, row.cost))
            kind = "linear" if node in products else _kind(node)
            scope = scopes[row.cost] = scopes.get(row.cost) or _scope(row.cost)
            found.append(StepNode(row, node, kind, scope, products.get(node), _is_triangular(node)))
        return tuple(found)

    def _appending(self, node: Node, cost: Cost) -> Cost:
        """The cost of keeping new entries where those of earlier steps stay in place."""
        new = node.all_input_nodes[1]
        size: Any = self._sizes.bytes_of(new.meta["val"], "state")
        return Cost(ZERO, ZERO + size, ZERO + size, cost.state_bytes)

    def require_known(self) -> None:
        """Refuse nodes whose operations are unknown, rather than costing them as nothing.

        Raises:
            LoweringError: names a node, its operator, module and source line.
        """
        for node in self.nodes:
            if node.row.op in self.unknown:
                source = node.node.meta.get("source", "?")
                raise LoweringError(
                    f"node {node.row.name!r} ({node.row.op}) in module {node.row.module!r} at "
                    f"{source} has no cost",
                    "add a rule to src/fxgraft/cost_rules.py, or an op with a cost under kernels/",
                )

    @property
    def has_tokens(self) -> bool:
        """Whether the Program takes sequences."""
        return "sequence" in self.table.dimensions

    def sizes(self, batch: Array, new: Array, past: Array) -> dict[str, Array]:
        """Sizes of all dimensions.

        Args:
            batch: sequences.
            new: new tokens of each.
            past: tokens of each before the new ones.

        Raises:
            InputError: a dimension follows from none of them.
        """
        known: dict[str, Array] = {
            "batch": batch, "sequence": new, _PAST: past, "total": past + new
        }  # fmt: skip
        found: dict[str, Array] = {}
        for name in self.table.dimensions:
            kept = name.removeprefix(f"{_PAST}_")
            if name in known:
                found[name] = known[name]
            elif kept != name and kept.isdigit():
                found[name] = np.minimum(past, int(kept))
            else:
                raise InputError(
                    f"the work of a step depends on {name!r}, which is neither batch nor tokens",
                    "evaluate program.cost() with sizes of your own",
                )
        return found

    def rows_of(self, node: StepNode) -> Expr:
        """Rows of x that a node's product has, over named dimensions; 0 where there is none."""
        return ZERO if node.product is None else ZERO + self._sizes.named(node.product.rows)

    def work(self, batch: Any, new: Any, past: Any) -> Work:
        """Work of every node for steps of equal sequences.

        Args:
            batch, new, past: see ``sizes``; numbers or arrays [points].
        """
        arrays = [np.atleast_1d(np.asarray(size, np.float64)) for size in (batch, new, past)]
        batches, news, pasts = np.broadcast_arrays(*arrays)
        sizes = self.sizes(batches, news, pasts)
        values = self.table.evaluate_rows(**sizes)  # pyright: ignore[reportArgumentType]
        flops, read = values["flops"], values["bytes_read"]
        triangular = [node.is_triangular for node in self.nodes]
        columns = (pasts + (news + 1) / 2) / (pasts + news)
        flops = np.where(np.asarray(triangular)[:, None], flops * columns, flops)
        rows, active = self._rows(sizes, batches.shape)
        read = read - self._unread(active)
        return Work(self.nodes, flops, read, values["bytes_written"], rows, active)

    def _rows(self, sizes: Mapping[str, Array], shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Rows of x, and matrices that meet any; of experts at most one per row."""
        given = [sizes.get(name, np.zeros(shape)) for name in self.table.dimensions]
        found = [np.broadcast_to(value, shape) for value in self._row_counts(*given)]
        rows, active = np.zeros((len(self.nodes), *shape)), np.zeros((len(self.nodes), *shape))
        for place, values in zip(self._products, found, strict=True):
            product = self.nodes[place].product
            assert product is not None
            rows[place] = values
            most = np.minimum(values, product.copies) if product.is_grouped else product.copies
            active[place] = most
        return rows, active

    @cached_property
    def _products(self) -> list[int]:
        return [place for place, node in enumerate(self.nodes) if node.product is not None]

    @cached_property
    def _row_counts(self) -> Any:
        counts = [self.rows_of(self.nodes[place]) for place in self._products]
        return compile_expressions(self.table.dimensions, counts)

    def _unread(self, active: Array) -> Array:
        """Bytes of experts' weights that no row meets."""
        unread = np.zeros(active.shape)
        for place in self._products:
            product = self.nodes[place].product
            assert product is not None
            if product.is_grouped:
                whole = float(self._sizes.bytes_of(product.operand.meta["val"], "weights"))
                unread[place] = whole * (1 - active[place] / product.copies)
        return unread


def _kind(node: Node) -> Kind:
    if is_collective(node):
        return "collective"
    spec = spec_of(node)
    if spec is not None and spec.kind == "mixer":
        grows = any(state.kind == "grows" for state in spec.states)
        return "attention" if grows else "recurrence"
    return "other"


def _scope(cost: Cost) -> Scope:
    expressions = (cost.flops, cost.bytes_read, cost.bytes_written)
    names = {str(symbol) for expression in expressions for symbol in expression.free_symbols}
    if any(name == "total" or name.split("_")[0] == _PAST for name in names):
        return "context"
    if "sequence" in names and _mixes_sequences(cost):
        return "context"
    return "tokens" if "sequence" in names or "batch" not in names else "sequences"


def _mixes_sequences(cost: Cost) -> bool:
    """Whether the work does not just follow the number of tokens.

    That of attention without a past grows faster than the tokens; a recurrence has work per
    sequence besides.
    """
    expressions: list[Any] = [cost.flops, cost.bytes_read, cost.bytes_written]
    for expression in expressions:
        symbols = {str(symbol): symbol for symbol in expression.free_symbols}
        tokens = symbols.get("sequence")
        if tokens is None:
            continue
        if not expression.is_polynomial(tokens):
            return True
        polynomial: Any = cast(Any, sympy).Poly(expression, tokens)
        rest = polynomial.nth(0)
        if polynomial.degree() > 1 or symbols.get("batch") in rest.free_symbols:
            return True
    return False


def _is_triangular(node: Node) -> bool:
    spec = spec_of(node)
    if spec is None or spec.kind != "mixer" or not spec.causal(node):
        return False
    growing = [state for state in spec.states if state.kind == "grows"]
    return bool(growing) and not any(s.limit and argument(node, s.limit) for s in growing)
