"""Cycles, energy and utilisation of one matrix product in one layout on the macros.

Specification, sections 3 to 5. Every formula takes the number of tokens as an integer, an array
of floats, or a sympy symbol, and gives the same kind back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import sympy  # pyright: ignore[reportMissingTypeStubs]

from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.patterns import DENSE, Pattern
from fxgraft.errors import InputError

Size = Any
"""An int, a float64 array, or a sympy expression."""

PARTS = (
    "multiply", "select", "trees", "accumulate", "merge", "partial_sums", "distribution",
    "activations", "outputs", "load", "dram", "leakage",
)  # fmt: skip
FEMTO = 1e-15


@dataclass(frozen=True)
class Gemm:
    """``Y[T, O] = X[T, K] W[O, K]^T``.

    Attributes:
        reduction: K.
        outputs: O.
        pattern: N:M along K.
        replays: phi, for the pair cell.
        copies: matrices of this size, each with its own T tokens (experts).
        fresh: weights are activations: loaded every time, without index bits.
    """

    reduction: int
    outputs: int
    pattern: Pattern = DENSE
    replays: int = 1
    copies: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        for name in ("reduction", "outputs", "replays", "copies"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"field {name!r} is {value}", "give at least 1")


def ceil_divide(amount: Size, unit: Size) -> Size:
    """Division rounded up, for integers, arrays and expressions."""
    return -(-amount // unit)


@dataclass(frozen=True)
class Layout:
    """A matrix product cut into tiles.

    Attributes:
        hardware: the macros.
        gemm: what is computed.
        pattern: how it is stored: the gemm's own pattern, or dense with its zeros.
        merge: a, sub-macros that serve the same outputs and are added up.
        streamed: weights and activations come from and go to off-chip memory.
    """

    hardware: Hardware
    gemm: Gemm
    pattern: Pattern
    merge: int
    streamed: bool = False

    @cached_property
    def compressed(self) -> int:
        """K_c, stored rows."""
        return self.pattern.compressed(self.gemm.reduction)

    @cached_property
    def row_tiles(self) -> int:
        """n_r."""
        return ceil_divide(self.compressed, self.hardware.rows * self.merge)

    @cached_property
    def column_tiles(self) -> int:
        """n_c."""
        width = self.hardware.columns * self.hardware.sub_macros // self.merge
        return ceil_divide(self.gemm.outputs, width)

    @cached_property
    def tiles(self) -> int:
        """Macros' worth of weights, all copies together."""
        return self.row_tiles * self.column_tiles * self.gemm.copies

    @cached_property
    def waves(self) -> int:
        """W, how often all macros are filled."""
        return 1 if self.pinned else ceil_divide(self.tiles, self.hardware.macros)

    @property
    def pinned(self) -> bool:
        """Whether the weights stay in macros of their own."""
        return self.hardware.resident and not self.gemm.fresh

    @property
    def utilisation(self) -> float:
        """Share of the tiles' cells that hold a weight of the product."""
        cells = self.compressed * self.gemm.outputs * self.gemm.copies
        return cells / (self.tiles * self.hardware.cells)

    @property
    def occupancy(self) -> float:
        """Share of the macros that have a tile, over all waves."""
        return self.tiles / (self.waves * self.hardware.macros)

    @property
    def runs_as_dense(self) -> bool:
        """Whether zeros are stored because selecting would cost more."""
        return self.gemm.pattern.is_sparse and not self.pattern.is_sparse

    @property
    def index_bits(self) -> int:
        """b, bits beside each weight."""
        return 0 if self.gemm.fresh else self.pattern.index_bits(self.hardware.cell)

    @property
    def weight_bits(self) -> int:
        """Bits of all stored weights with their indices."""
        stored = self.compressed * self.gemm.outputs * self.gemm.copies
        return stored * (self.hardware.weight_bits + self.index_bits)

    @property
    def replays(self) -> int:
        """How often the inputs are sent for one pass over the stored weights."""
        return self.gemm.replays if self.hardware.cell == "pair" and self.pattern.is_sparse else 1

    @property
    def fill(self) -> int:
        """L, cycles from the last input to the last output."""
        merging = 1 + int(math.log2(self.merge)) if self.merge > 1 else 0
        return int(math.log2(self.hardware.rows)) + 1 + merging

    def macro_cycles(self, tokens: Size) -> Size:
        """Cycles of loading and computing (section 4)."""
        load = 0 if self.pinned else self.hardware.columns
        compute = tokens * self.hardware.token_cycles * self.replays
        if not self.hardware.double_buffered:
            return self.waves * (load + compute) + self.fill
        hidden = (self.waves - 1) * _largest(load, compute)
        return load + hidden + compute + self.fill

    def off_chip_bytes(self, tokens: Size) -> Size:
        """Bytes to and from off-chip memory: weights once, activations in and out once."""
        if not self.streamed:
            return tokens * 0
        moved = tokens * (self.gemm.reduction + self.gemm.outputs) * self.gemm.copies
        return self.weight_bits / 8 + moved * self.hardware.activation_bits / 8

    def cycles(self, tokens: Size) -> Size:
        """All cycles, off-chip traffic included."""
        macro = self.macro_cycles(tokens)
        if not self.streamed:
            return macro
        memory = ceil_divide(self.off_chip_bytes(tokens), self.hardware.dram_bytes_per_cycle)
        return _largest(macro, memory) if self.hardware.dram_overlaps else macro + memory

    def energy(self, tokens: Size) -> dict[str, Size]:
        """Joules by part (section 5)."""
        parts = {**self._compute_energy(tokens), **self._data_energy(tokens)}
        scaled = {name: value * self.gemm.copies * FEMTO for name, value in parts.items()}
        unit, watts = self.hardware.energies, self.hardware.energies.leakage * self.hardware.macros
        scaled["dram"] = self.off_chip_bytes(tokens) * 8 * unit.dram_bit * FEMTO
        scaled["leakage"] = watts * self.cycles(tokens) / self.hardware.clock
        return {name: scaled[name] for name in PARTS}

    def _compute_energy(self, tokens: Size) -> dict[str, Size]:
        """Femtojoules of one copy that recur with every input bit, and of adding up."""
        hardware, unit = self.hardware, self.hardware.energies
        beats = tokens * hardware.token_cycles * self.replays
        weights = self.compressed * self.gemm.outputs
        add_and_keep = unit.full_adder + unit.register_bit
        width = self.accumulator_width
        serial = int(hardware.bits_per_cycle < hardware.activation_bits)
        sums = tokens * self.gemm.outputs
        return {
            "multiply": beats * weights * self._multiplier * unit.activity,
            "select": beats * weights * self._selectors * unit.multiplexer_2 * unit.activity,
            "trees": beats * weights / hardware.rows * self.tree_adders
            * unit.full_adder * unit.activity,
            "accumulate": beats * weights / hardware.rows * width * add_and_keep * serial,
            "merge": sums * self.row_tiles * (self.merge - 1) * (width + 1) * add_and_keep,
            "partial_sums": sums * (self.row_tiles - 1) * hardware.accumulator_bits * add_and_keep,
            "distribution": beats * self.column_tiles * self.compressed * 4
            * unit.multiplexer_4 * unit.activity * int(self.pattern != DENSE),
        }  # fmt: skip

    def _data_energy(self, tokens: Size) -> dict[str, Size]:
        """Femtojoules of one copy for reading, writing and loading."""
        hardware, unit = self.hardware, self.hardware.energies
        read = tokens * self.gemm.reduction * hardware.activation_bits * self.column_tiles
        load = 0 if self.pinned else self.weight_bits / self.gemm.copies
        return {
            "activations": read * unit.memory_bit,
            "outputs": tokens * self.gemm.outputs * hardware.accumulator_bits * unit.memory_bit,
            "load": load * (unit.cell_write + unit.memory_bit) + tokens * 0,
        }

    @property
    def _selectors(self) -> int:
        """Two-to-one multiplexers per weight."""
        if not self.pattern.is_sparse:
            return 0
        return 1 if self.hardware.cell == "pair" else self.pattern.m - 1

    @property
    def _multiplier(self) -> float:
        """Energy of one cell's multiplier: a bit of each, and the adders of an array of them."""
        hardware, unit = self.hardware, self.hardware.energies
        bits, width = hardware.bits_per_cycle, hardware.weight_bits
        return width * (bits * unit.bit_multiply + (bits - 1) * unit.full_adder)

    @property
    def tree_adders(self) -> int:
        """FA, full adders of a column's tree."""
        return tree_adders(self.hardware)

    @property
    def accumulator_width(self) -> int:
        """w, bits of a column's accumulator."""
        hardware = self.hardware
        return hardware.weight_bits + hardware.activation_bits + int(math.log2(hardware.rows))


def tree_adders(hardware: Hardware) -> int:
    """Full adders of one column's tree: ``R (B + 1) - (B + log2 R + 1)`` for products of B bits.

    B is B_w if activations come bit by bit (the specification's formula), B_w + b_c else.
    """
    depth = int(math.log2(hardware.rows))
    bits = hardware.bits_per_cycle
    width = hardware.weight_bits + (bits if bits > 1 else 0)
    return hardware.rows * (width + 1) - (width + depth + 1)


def total(parts: Mapping[str, Size]) -> Size:
    """Sum of energy parts."""
    return sum(parts.values())


def _largest(one: Size, other: Size) -> Size:
    """The larger of two numbers, elementwise for arrays, as an expression for expressions."""
    if any(isinstance(value, sympy.Expr) for value in (one, other)):
        return cast(Any, sympy.Max)(one, other)
    if any(isinstance(value, np.ndarray) for value in (one, other)):
        return np.maximum(one, other)
    return max(one, other)
