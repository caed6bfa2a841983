"""The cost model of a Program: every linear layer on macros, everything else in digital logic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fxgraft.backends.flexcim.baselines import Layer
from fxgraft.backends.flexcim.costs import Costs, NodeCost
from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.linears import Linear, Patterns
from fxgraft.backends.flexcim.macro import FEMTO, Layout
from fxgraft.backends.flexcim.mapper import Objective, check_objective, layouts, map_gemm
from fxgraft.cost_table import Energy, StepCostTable
from fxgraft.cost_table_grid import Array
from fxgraft.describe import block_of
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError
from fxgraft.program import Program
from fxgraft.step_costs import StepGraph, Work
from fxgraft.step_tables import Priced, Ranges, Setting, step_table


@dataclass(frozen=True)
class _Outcome:
    """A linear layer at all points; arrays [points]."""

    cycles: Array
    energy: Mapping[str, Array]
    off_chip_bytes: Array
    layouts: Sequence[Layout]


class CostModel:
    """Costs of a Program on one hardware configuration.

    Args:
        program: what to cost; it is not changed.
        hardware: the configuration.
        objective: what the mapper minimises.
        patterns: N:M by glob over weight names; other weights as declared, or as their zeros say.
        padded: globs of weights whose input dimension was padded to whole groups.
        like: a model of the same Program with the same patterns, whose work need not be counted
            again.

    Raises:
        InputError: a pattern is impossible, or with ``resident`` the weights do not fit.
        LoweringError: a weight is denser than declared, or an operator has no cost.

    Warns:
        UserWarning: the Program has no linear layer.
    """

    def __init__(
        self,
        program: Program,
        hardware: Hardware,
        objective: Objective = "latency",
        patterns: Mapping[str, str] | None = None,
        padded: Sequence[str] = (),
        *,
        like: CostModel | None = None,
    ) -> None:
        check_objective(objective)
        self.program, self.hardware = program, hardware
        self.objective: Objective = objective
        activations = f"int{hardware.activation_bits}"
        self.types = ElementTypes(f"int{hardware.weight_bits}", activations, activations)
        self._graphs: dict[ElementTypes, StepGraph] = {} if like is None else like._graphs
        if self.types not in self._graphs:
            self._graphs[self.types] = StepGraph(program, self.types)
        self.graph = self._graphs[self.types]
        self.graph.require_known()
        self._patterns, self._padded = dict(patterns or {}), tuple(padded)
        if like is not None and _same_selectors(like.hardware, hardware):
            self.linears = like.linears
        else:
            self.linears = self._find_linears()
        if not self.linears:
            warnings.warn("the Program has no linear layer: all of it runs in digital logic",
                          stacklevel=2)  # fmt: skip
        if hardware.resident:
            self._check_fit()

    def _find_linears(self) -> dict[int, Linear]:
        found = Patterns(self.graph.program, self.hardware, self._patterns, self._padded)
        return {
            place: found.linear(node.product)
            for place, node in enumerate(self.graph.nodes)
            if node.product is not None
        }

    def on(self, hardware: Hardware) -> CostModel:
        """The same Program on another configuration."""
        return CostModel(
            self.program, hardware, self.objective, self._patterns, self._padded, like=self
        )

    @cached_property
    def weight_bits(self) -> int:
        """Bits of all weights: those of linear layers as stored, with indices; others as they are.

        A weight that two layers share is counted once.
        """
        stored: dict[str, int] = {}
        inside: set[str] = set()
        for place, linear in self.linears.items():
            product = self.graph.nodes[place].product
            assert product is not None
            inside.update(product.weights)
            layout = layouts(self.hardware, linear.gemm)[0]
            stored[linear.weight] = layout.weight_bits * linear.copies
        named = [(name, w) for name, w in self.program.weights() if w.is_floating_point()]
        seen = {id(weight) for name, weight in named if name in inside}
        others = {id(w): w.numel() for _, w in named if id(w) not in seen}
        return sum(stored.values()) + sum(others.values()) * self.hardware.weight_bits

    @property
    def streamed(self) -> bool:
        """Whether weights come from off-chip memory."""
        memory = self.hardware.weight_memory
        return memory is not None and self.weight_bits > 8 * memory

    @property
    def macros_needed(self) -> int:
        """Macros that hold all linear layers at once, a shared weight once."""
        tiles = {
            linear.weight: min(layout.tiles for layout in layouts(self.hardware, linear.gemm))
            * linear.copies
            for linear in self.linears.values()
        }
        return sum(tiles.values())

    def _check_fit(self) -> None:
        needed, there = self.macros_needed, self.hardware.macros
        if needed > there:
            size = self.hardware.cells * self.hardware.weight_bits / 8
            raise InputError(
                f"resident weights need {needed * size:,.0f} bytes in macros, "
                f"{there * size:,.0f} are there",
                f"set macros to at least {needed}, or resident to false",
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions that the figures hang on."""
        own = ElementTypes.of(self.program)
        notes: list[str] = []
        if own.weights != self.types.weights:
            notes.append(
                f"the model is {own.weights}, costed as if quantised to {self.types.weights} "
                f"weights and {self.types.activations} activations"
            )
        if self.graph.without_steps:
            notes.append(f"whole sequences only: {self.graph.without_steps}")
        if any(linear.copies > 1 for linear in self.linears.values()):
            notes.append("rows choose different experts as long as there are any, evenly")
        if self.hardware.cell == "pair" and any(
            linear.gemm.pattern.is_sparse and linear.most is None
            for linear in self.linears.values()
        ):
            notes.append("weights without values replay every pair of a group")
        return tuple(notes)

    def price(self, work: Work) -> Priced:
        """Seconds and joules of each node, [nodes, points]."""
        cycles, joules = self._vector(work)
        for place, node in enumerate(work.nodes):
            linear = self._by_name.get(node.node.name)
            if linear is not None:
                found = self._linear(linear, work.rows[place], work.active[place])
                extra = self._beside(linear, work, place)
                energy = np.sum(list(found.energy.values()), axis=0)
                cycles[place] = found.cycles + extra[0]
                joules[place] = energy + extra[1]
        return cycles / self.hardware.clock, joules

    @cached_property
    def _by_name(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears.values()}

    def _vector(self, work: Work) -> tuple[Array, Array]:
        """Cycles and joules if digital logic did everything."""
        hardware = self.hardware
        operations = np.ceil(work.flops / hardware.vector_operations)
        moving = np.ceil(work.bytes / hardware.vector_bytes)
        cycles = np.maximum(operations, moving)
        parts = self._vector_energy(work.flops, work.bytes, cycles)
        return cycles, np.sum(list(parts.values()), axis=0)

    def _vector_energy(self, flops: Any, moved: Any, cycles: Any) -> dict[str, Any]:
        unit = self.hardware.energies
        return {
            "vector_operations": flops * unit.vector_operation * FEMTO,
            "vector_memory": moved * 8 * unit.memory_bit * FEMTO,
            "leakage": unit.leakage * self.hardware.macros * cycles / self.hardware.clock,
        }

    def _beside(self, linear: Linear, work: Work, place: int) -> tuple[Array, Array]:
        """Cycles and joules of what is fused to a product: norms, activations, residuals."""
        operations = self._extra(linear, work, place)
        cycles = np.ceil(operations / self.hardware.vector_operations)
        parts = self._vector_energy(operations, 0.0, cycles)
        return cycles, np.sum(np.broadcast_arrays(*parts.values()), axis=0)

    def _extra(self, linear: Linear, work: Work, place: int) -> Array:
        product = 2 * work.rows[place] * linear.gemm.reduction * linear.gemm.outputs
        return np.maximum(work.flops[place] - product, 0.0)

    def _linear(self, linear: Linear, rows: Array, active: Array) -> _Outcome:
        """A linear layer at all points; rows are spread evenly over the active copies."""
        tokens = np.ceil(rows / active)
        key = (linear.gemm, tokens.tobytes(), active.tobytes())
        if key not in self._known:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._map(linear, tokens, active)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[Any, _Outcome]:
        return {}

    def _map(self, linear: Linear, tokens: Array, active: Array) -> _Outcome:
        cycles, off_chip = np.zeros(tokens.shape), np.zeros(tokens.shape)
        energy: dict[str, Array] = {}
        chosen: list[Layout | None] = [None] * len(tokens)
        for copies in np.unique(active):
            here = np.flatnonzero(active == copies)
            gemm = replace(linear.gemm, copies=int(copies))
            mapped = map_gemm(
                self.hardware, gemm, tokens[here], self.objective, streamed=self.streamed
            )
            cycles[here], off_chip[here] = mapped.cycles, mapped.off_chip_bytes
            for part, values in mapped.energy.items():
                energy.setdefault(part, np.zeros(tokens.shape))[here] = values
            for place, layout in zip(here.tolist(), mapped.layouts, strict=True):
                chosen[place] = layout
        return _Outcome(cycles, energy, off_chip, [layout for layout in chosen if layout])

    def costs(self, batch: int = 1, new_tokens: int = 1, context: int = 0) -> Costs:
        """Costs of one step.

        Args:
            batch: sequences.
            new_tokens: of each.
            context: tokens of each before the new ones.

        Raises:
            InputError: a size is below 1, or the Program cannot have a context.
        """
        for name, value, least in (
            ("batch", batch, 1), ("new_tokens", new_tokens, 1), ("context", context, 0)
        ):  # fmt: skip
            if not math.isfinite(value) or value < least or int(value) != value:
                raise InputError(f"argument {name!r} is {value}", f"give at least {least}")
        if context and not self.graph.states:
            raise InputError(
                f"argument 'context' is {context}: {self.graph.without_steps}", "give 0"
            )
        work = self.graph.work(batch, new_tokens, context)
        nodes = tuple(self._node(work, place) for place in range(len(work.nodes)))
        return Costs(nodes, batch, new_tokens, context, self.hardware.name, self.notes)

    def _node(self, work: Work, place: int) -> NodeCost:
        node = work.nodes[place]
        module = node.row.module
        common: dict[str, Any] = {
            "name": node.row.name, "module": module, "op": node.row.op,
            "block": block_of(module) or node.row.op, "flops": float(work.flops[place, 0]),
        }  # fmt: skip
        linear = self._by_name.get(node.row.name)
        if linear is None:
            one = work.of([place])
            cycles = float(self._vector(one)[0][0, 0])
            moved = float(one.bytes[0, 0])
            energy = self._vector_energy(common["flops"], moved, cycles)
            return NodeCost(
                **common, unit="vector", cycles=cycles, seconds=cycles / self.hardware.clock,
                energy=energy, bytes=moved,
            )  # fmt: skip
        return self._linear_node(common, linear, work, place)

    def _linear_node(
        self, common: dict[str, Any], linear: Linear, work: Work, place: int
    ) -> NodeCost:
        found = self._linear(linear, work.rows[place], work.active[place])
        extra = float(self._extra(linear, work, place)[0])
        beside = float(self._beside(linear, work, place)[0][0])
        energy = {part: float(values[0]) for part, values in found.energy.items()}
        for part, value in self._vector_energy(extra, 0.0, beside).items():
            energy[part] = energy.get(part, 0.0) + float(value)
        layout, cycles = found.layouts[0], float(found.cycles[0]) + beside
        return NodeCost(
            **common,
            unit="macros",
            cycles=cycles,
            seconds=cycles / self.hardware.clock,
            energy=energy,
            off_chip_bytes=float(found.off_chip_bytes[0]),
            pattern=str(layout.pattern),
            wanted=str(linear.gemm.pattern),
            merge=layout.merge,
            replays=layout.replays,
            tiles=layout.tiles,
            waves=layout.waves,
            utilisation=layout.utilisation,
            occupancy=layout.occupancy,
        )

    def layers(self, batch: int = 1, new_tokens: int = 1, context: int = 0) -> list[Layer]:
        """The linear layers of a step, for comparisons with other hardware."""
        work = self.graph.work(batch, new_tokens, context)
        found: list[Layer] = []
        for place, linear in self.linears.items():
            rows, active = float(work.rows[place, 0]), int(work.active[place, 0])
            gemm = replace(linear.gemm, copies=active)
            found.append(Layer(linear.name, gemm, math.ceil(rows / active), linear.most))
        return found

    @property
    def widest(self) -> int:
        """M of the widest pattern that any layer has; 1 if all are dense."""
        patterns = [linear.gemm.pattern for linear in self.linears.values()]
        return max((pattern.m for pattern in patterns if pattern.is_sparse), default=1)

    def table(self, ranges: Ranges | None = None) -> StepCostTable:
        """The step-cost table that the serving simulator reads.

        Raises:
            InputError: the Program takes no tokens.
        """
        unit, hardware = self.hardware.energies, self.hardware
        constants = [f"{name} = {value} {measure} [{source}]".replace("  ", " ")
                     for name, value, measure, source, _ in hardware.constants()]  # fmt: skip
        setting = Setting(
            backend="flexcim",
            device="flexcim",
            configuration=hardware.name,
            notes=(*self.notes, f"objective = {self.objective}", *constants),
            energy=Energy(source="formula", idle_watts=unit.idle + unit.leakage * hardware.macros),
            capacity=hardware.memory,
            weight_bytes=-(-self.weight_bits // 8),
        )
        return step_table(self.graph, self.price, setting, ranges)


_MOST_KNOWN = 512


def _same_selectors(one: Hardware, other: Hardware) -> bool:
    """Whether layers have the same patterns and replays on both."""
    same = one.cell == other.cell
    return same and (one.cell != "pair" or one.columns == other.columns)
