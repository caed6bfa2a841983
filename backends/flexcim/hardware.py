"""The hardware configuration: every constant of the cost model, its unit and its source.

Sources: ``P`` abstract and introduction of arXiv 2504.14365; ``R`` the authors' published Verilog;
``G`` our mapping of its blocks to CMOS gates; ``Z`` a public cost model of digital
compute-in-memory fitted to seven 22-28 nm chips (28 nm, 0.9 V); ``A`` our assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fxgraft.errors import InputError
from fxgraft.validation import nowhere, readable
from fxgraft.yaml_source import YamlSource

Cell = Literal["gather", "pair", "dense"]
MOST_POSITIONS: Mapping[str, int] = {"gather": 256, "pair": 32, "dense": 1}
"""Widest group of each cell: 8 index bits beside 8 weight bits; S groups of 4 pairs."""


def _count(default: int, unit: str, source: str, meaning: str) -> Any:
    extra: dict[str, Any] = {"unit": unit, "source": source}
    return Field(default, ge=1, strict=True, description=meaning, json_schema_extra=extra)


def _constant(
    default: float,
    unit: str,
    source: str,
    meaning: str,
    *,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """A field of at least 0, or of more than ``gt``."""
    extra: dict[str, Any] = {"unit": unit, "source": source}
    return Field(
        default, ge=0 if gt is None else None, gt=gt, le=le, allow_inf_nan=False,
        description=meaning, json_schema_extra=extra,
    )  # fmt: skip


class Structure(BaseModel):
    """How macros are built, and how many there are."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(
        default="flexcim", description="of this configuration", json_schema_extra={"source": "A"}
    )
    cell: Cell = Field(
        default="gather",
        description="gather selects among M activations, pair among two, dense selects nothing",
        json_schema_extra={"source": "A"},
    )
    sub_macros: int = _count(4, "", "R", "S, sub-macros of a macro")
    rows: int = _count(32, "", "R", "R, rows of a sub-macro")
    columns: int = _count(32, "", "R", "C, columns of a sub-macro")
    macros: int = _count(64, "", "A", "A, macros")
    weight_bits: int = _count(8, "bit", "R", "B_w")
    activation_bits: int = _count(8, "bit", "R", "B_a")
    bits_per_cycle: int = _count(1, "bit", "A", "b_c, activation bits per cycle; 8 in R")
    accumulator_bits: int = _count(32, "bit", "A", "of sums over tiles and of outputs")
    clock: float = _constant(500e6, "Hz", "A", "f", gt=0)
    double_buffered: bool = Field(
        default=False,
        description="load the next tile while computing",
        json_schema_extra={"source": "A"},
    )
    resident: bool = Field(
        default=False,
        description="every tile has its macro; weights are loaded once, before the first token",
        json_schema_extra={"source": "A"},
    )
    weight_memory: int | None = Field(
        default=None,
        ge=1,
        description="bytes of on-chip memory for weights; null: as much as needed (P)",
        json_schema_extra={"unit": "byte", "source": "P"},
    )
    memory: int | None = Field(
        default=None,
        ge=1,
        description="bytes for weights and state, on and off chip together; null: unknown",
        json_schema_extra={"unit": "byte", "source": "A"},
    )
    dram_bytes_per_cycle: float = _constant(51.2, "byte", "A", "25.6 GB/s at 500 MHz", gt=0)
    dram_overlaps: bool = Field(
        default=True,
        description="off-chip traffic runs beside computing",
        json_schema_extra={"source": "A"},
    )
    vector_operations: float = _constant(
        1024, "operation", "A", "of the vector unit per cycle", gt=0
    )
    vector_bytes: float = _constant(256, "byte", "A", "moved by the vector unit per cycle", gt=0)


class Energies(BaseModel):
    """Unit energies in femtojoules and activity."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    full_adder: float = _constant(3.40, "fJ", "Z", "e_fa, 3 NAND2 and 2 XOR2")
    bit_multiply: float = _constant(0.28, "fJ", "Z", "e_and, weight constant")
    register_bit: float = _constant(1.70, "fJ", "Z", "e_ff")
    multiplexer_2: float = _constant(1.13, "fJ", "A", "e_mux2, per bit")
    multiplexer_4: float = _constant(3.4, "fJ", "A", "e_mux4, per bit")
    memory_bit: float = _constant(150.0, "fJ", "A", "e_sram, on-chip memory, per bit")
    cell_write: float = _constant(5.1, "fJ", "A", "e_write, per bit")
    dram_bit: float = _constant(3700.0, "fJ", "Z", "off-chip memory, per bit")
    vector_operation: float = _constant(500.0, "fJ", "A", "e_op, 16-bit operation")
    activity: float = _constant(0.5, "", "A", "alpha, share of input bits that are 1", le=1)
    leakage: float = _constant(0.0, "W", "A", "P_leak, per macro")
    idle: float = _constant(0.0, "W", "A", "drawn between steps, all macros together")


class Transistors(BaseModel):
    """Transistor counts of a bit-serial macro of 4 x 32 x 32 with 8 bits, and density."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    storage_bit: float = _constant(12, "", "G", "one stored bit")
    bit_multiplier: float = _constant(6, "", "G", "one AND")
    select_fixed: float = _constant(7, "", "G", "selector of a gather cell, constant part")
    select_input: float = _constant(9, "", "G", "selector of a gather cell, per input but one")
    select_pair: float = _constant(26, "", "G", "selector of a pair cell")
    tree_adder: float = _constant(11028 / 274, "", "G", "column tree, per full adder")
    accumulator_bit: float = _constant(1762 / 21, "", "G", "shift-accumulator, per bit")
    distribution_bit: float = _constant(222, "", "G", "distribution, per row and bit")
    merging_bit: float = _constant(4860 / 84, "", "G", "merging, per column, sub-macro and bit")
    per_mm2: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="density; null: areas stay transistor counts",
        json_schema_extra={"unit": "1/mm2", "source": "A"},
    )


class Hardware(Structure):
    """One hardware configuration.

    Lengths in bits, energies in femtojoules, frequencies in hertz; see each field's source with
    ``constants()``.
    """

    energies: Energies = Energies.model_validate({})
    transistors: Transistors = Transistors.model_validate({})

    @field_validator("sub_macros", "rows")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("it must be a power of two: adder trees are binary")
        return value

    @model_validator(mode="after")
    def _bits(self) -> Hardware:
        if self.bits_per_cycle > self.activation_bits:
            raise ValueError("bits_per_cycle is larger than activation_bits")
        return self

    @property
    def cells(self) -> int:
        """Weights that a macro holds."""
        return self.sub_macros * self.rows * self.columns

    @property
    def token_cycles(self) -> int:
        """beta, cycles per token."""
        return -(-self.activation_bits // self.bits_per_cycle)

    @property
    def merge_factors(self) -> tuple[int, ...]:
        """Possible numbers of sub-macros that serve the same outputs."""
        return tuple(2**n for n in range(int(math.log2(self.sub_macros)) + 1))

    def changed(self, **values: Any) -> Hardware:
        """This configuration with other values, checked.

        Args:
            values: fields; those of energies and transistors under their own names.
        """
        content = self.model_dump()
        for name, value in values.items():
            inner = [part for part in ("energies", "transistors") if name in content[part]]
            (content[inner[0]] if inner else content)[name] = value
        return parse(content)

    def constants(self) -> list[tuple[str, Any, str, str, str]]:
        """Name, value, unit, source and meaning of every constant."""
        rows: list[tuple[str, Any, str, str, str]] = []
        for prefix, record in (("", self), ("energies.", self.energies),
                               ("transistors.", self.transistors)):  # fmt: skip
            for name, field in type(record).model_fields.items():
                extra = cast("dict[str, Any] | None", field.json_schema_extra)
                if extra:
                    unit, source = str(extra.get("unit", "")), str(extra["source"])
                    meaning = field.description or ""
                    rows.append((prefix + name, getattr(record, name), unit, source, meaning))
        return rows


def parse(value: Hardware | Mapping[str, Any] | str | Path | None) -> Hardware:
    """A configuration from an object, a mapping or a YAML file; None is the default one.

    Raises:
        InputError: the file cannot be read, a key is unknown (suggests a near one) or a value is
            impossible; names it, and its line in a file.
    """
    if isinstance(value, Hardware):
        return value
    name, where = "the hardware configuration", nowhere
    if isinstance(value, (str, Path)):
        source = YamlSource.read(Path(value))
        value, where = cast(Any, source.value), source.where
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{where(())}{name} is no mapping", "give fields and their values")
    try:
        return Hardware.model_validate(dict(value or {}))
    except ValidationError as error:
        raise readable(error, Hardware, name, where) from error
