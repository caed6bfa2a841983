"""Area of a macro in transistors, by block (specification, section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.macro import tree_adders
from fxgraft.backends.flexcim.patterns import Pattern

_BUS_BITS = 2
"""Bits per pair of activations that the distribution unit of a bit-serial macro moves at once."""


@dataclass(frozen=True)
class Area:
    """Transistors of one macro.

    Attributes:
        cells: stored bits and multipliers.
        select: metadata bits and selectors in the cells.
        trees: column adder trees.
        accumulators: shift-accumulators; none where all input bits come at once.
        distribution: units that route activations to sub-macros.
        merging: adders and registers behind the sub-macros.
        per_mm2: transistors per square millimetre, None if unknown.
    """

    cells: float
    select: float
    trees: float
    accumulators: float
    distribution: float
    merging: float
    per_mm2: float | None = None

    @property
    def total(self) -> float:
        """All blocks."""
        blocks = (self.cells, self.select, self.trees, self.accumulators, self.distribution)
        return sum(blocks) + self.merging

    @property
    def mm2(self) -> float | None:
        """Square millimetres, if the configuration has a density."""
        return None if self.per_mm2 is None else self.total / self.per_mm2


def macro_area(hardware: Hardware, widest: int = 1, *, merging: bool | None = None) -> Area:
    """Transistors of one macro.

    Args:
        hardware: the configuration.
        widest: M of the widest pattern that its cells select among; 1 for none.
        merging: whether sub-macros can be added up; default where the cells select and there is
            more than one sub-macro.
    """
    unit = hardware.transistors
    columns = hardware.sub_macros * hardware.columns
    bits, serial = hardware.bits_per_cycle, hardware.bits_per_cycle < hardware.activation_bits
    selects = hardware.cell != "dense" and widest > 1
    pattern = Pattern(1, widest)
    adder = unit.tree_adder
    multiplier = hardware.weight_bits * (bits * unit.bit_multiplier + (bits - 1) * adder)
    cell = hardware.weight_bits * unit.storage_bit + multiplier
    index = pattern.index_bits(hardware.cell) * unit.storage_bit if selects else 0.0
    width = hardware.weight_bits + hardware.activation_bits + int(math.log2(hardware.rows))
    merges = selects and hardware.sub_macros > 1 if merging is None else merging
    return Area(
        cells=hardware.cells * cell,
        select=hardware.cells * (index + _selector(hardware, widest)) if selects else 0.0,
        trees=columns * tree_adders(hardware) * adder,
        accumulators=columns * width * unit.accumulator_bit if serial else 0.0,
        distribution=hardware.rows * _BUS_BITS * bits * unit.distribution_bit if selects else 0.0,
        merging=columns * width * unit.merging_bit if merges else 0.0,
        per_mm2=unit.per_mm2,
    )


def _selector(hardware: Hardware, widest: int) -> float:
    unit = hardware.transistors
    if hardware.cell == "pair":
        return unit.select_pair
    return unit.select_fixed + unit.select_input * (widest - 1)
