"""Costs of a Program on macros and digital logic, node by node, at one size of step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fxgraft.backends.flexcim.macro import PARTS

ENERGY_PARTS = (*PARTS, "vector_operations", "vector_memory")


@dataclass(frozen=True)
class NodeCost:
    """One node.

    Attributes:
        name, module, op: of the node.
        block: of the model that it is in (``"model.layers.3"``), or its module.
        unit: ``"macros"`` or ``"vector"`` (digital logic).
        cycles: of the clock, all together.
        seconds: the same.
        energy: joules by part; sums to the node's energy.
        flops, bytes: operations, and bytes moved by digital logic.
        off_chip_bytes: moved between chip and off-chip memory.
        pattern: stored pattern, for example ``"2:4"``; empty for digital logic.
        wanted: pattern of the weight; another one than ``pattern`` if it runs as dense.
        merge: sub-macros that serve the same outputs.
        replays: phi of the pair cell.
        tiles, waves: macros' worth of weights, and how often all macros are filled.
        utilisation, occupancy: shares of the cells in the tiles, and of the macros; 0 for logic.
    """

    name: str
    module: str
    op: str
    block: str
    unit: str
    cycles: float
    seconds: float
    energy: dict[str, float]
    flops: float
    bytes: float = 0.0
    off_chip_bytes: float = 0.0
    pattern: str = ""
    wanted: str = ""
    merge: int = 0
    replays: int = 0
    tiles: int = 0
    waves: int = 0
    utilisation: float = 0.0
    occupancy: float = 0.0

    @property
    def joules(self) -> float:
        """Energy of all parts."""
        return sum(self.energy.values())

    @property
    def runs_as_dense(self) -> bool:
        """Whether zeros are stored because selecting would cost more."""
        return self.unit == "macros" and self.pattern != self.wanted


@dataclass(frozen=True)
class Costs:
    """Costs of one step.

    Attributes:
        nodes: in graph order, those that do work.
        batch, new_tokens, context: sequences, new tokens of each, tokens of each before them.
        configuration: name of the hardware configuration.
        notes: assumptions.
    """

    nodes: tuple[NodeCost, ...]
    batch: int
    new_tokens: int
    context: int
    configuration: str
    notes: tuple[str, ...] = ()

    @property
    def cycles(self) -> float:
        """Of all nodes, one after the other."""
        return sum(node.cycles for node in self.nodes)

    @property
    def seconds(self) -> float:
        """Of all nodes, one after the other."""
        return sum(node.seconds for node in self.nodes)

    @property
    def joules(self) -> float:
        """Of all nodes."""
        return sum(node.joules for node in self.nodes)

    @property
    def energy(self) -> dict[str, float]:
        """Joules by part."""
        return {p: sum(node.energy.get(p, 0.0) for node in self.nodes) for p in ENERGY_PARTS}

    @property
    def vector_share(self) -> float:
        """Share of the time that digital logic takes."""
        vector = sum(node.seconds for node in self.nodes if node.unit == "vector")
        return vector / self.seconds if self.seconds else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the tiles' cells that hold weights, all linear layers together."""
        tiles = sum(node.tiles for node in self.nodes)
        return sum(node.utilisation * node.tiles for node in self.nodes) / tiles if tiles else 0.0

    def by_block(self) -> dict[str, tuple[float, float]]:
        """Seconds and joules per block, in graph order."""
        return _grouped((node.block, node) for node in self.nodes)

    def by_op(self) -> dict[str, tuple[float, float]]:
        """Seconds and joules per operator, in order of first use."""
        return _grouped((node.op, node) for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "configuration": self.configuration,
            "batch": self.batch, "new_tokens": self.new_tokens, "context": self.context,
            "cycles": self.cycles, "seconds": self.seconds, "joules": self.joules,
            "energy": self.energy, "vector_share": self.vector_share,
            "utilisation": self.utilisation, "notes": list(self.notes),
            "nodes": [
                {**vars(node), "joules": node.joules, "runs_as_dense": node.runs_as_dense}
                for node in self.nodes
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        step = f"{self.batch} x {self.new_tokens} tokens after {self.context}"
        lines = [
            f"{self.configuration}: {step}: {self.cycles:,.0f} cycles, "
            f"{self.seconds * 1e3:.4g} ms, {self.joules * 1e3:.4g} mJ; "
            f"{self.vector_share:.0%} of the time in digital logic"
        ]
        rows = [("node", "runs as", "a", "tiles", "waves", "U", "cycles", "uJ")]
        rows += [_row(node) for node in self.nodes if node.unit == "macros"]
        rows.append(
            (
                "digital logic", "", "", "", "", "",
                f"{sum(n.cycles for n in self.nodes if n.unit == 'vector'):,.0f}",
                f"{sum(n.joules for n in self.nodes if n.unit == 'vector') * 1e6:.4g}",
            )
        )  # fmt: skip
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.notes])


def _row(node: NodeCost) -> tuple[str, ...]:
    pattern = f"{node.wanted} as dense" if node.runs_as_dense else node.pattern
    return (
        node.module or node.name, pattern, str(node.merge), str(node.tiles), str(node.waves),
        f"{node.utilisation:.3f}", f"{node.cycles:,.0f}", f"{node.joules * 1e6:.4g}",
    )  # fmt: skip


def _grouped(pairs: Iterable[tuple[str, NodeCost]]) -> dict[str, tuple[float, float]]:
    groups: dict[str, tuple[float, float]] = {}
    for name, node in pairs:
        seconds, joules = groups.get(name, (0.0, 0.0))
        groups[name] = (seconds + node.seconds, joules + node.joules)
    return groups
