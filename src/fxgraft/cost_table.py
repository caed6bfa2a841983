"""The step-cost table: what one forward pass of a served model takes, in seconds and joules.

One file format for all sources: formulas of a backend, a roofline, or measurements on a device.
``docs/cost_table.md`` describes it. The simulator reads nothing else of a compiled model.

A step is some prefills, each with its new and its cached tokens, and some decodes. Its price is
the sum of the table's *parts*. Each part is a grid of seconds (and joules) over quantities of the
step, linear between its knots:

=============  =====================================================================
``per``        looked up, and over which axes
=============  =====================================================================
``"step"``     once per step: no axis, ``tokens`` (all new tokens) or ``sequences``
``"prefill"``  per prefill and summed: ``new_tokens``, ``context`` (cached before)
``"decode"``   once per step: ``batch`` (decodes), ``context`` (mean keys per decode)
=============  =====================================================================

So weights that are read once per step are counted once in a step that mixes prefills and decodes.

A table may carry *levels*: the same model with layers converted, per sequence and while it runs
(pass ``dsla``); see ``cost_table_levels``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fxgraft import strict_json
from fxgraft.atomic import write_file
from fxgraft.cost_table_grid import Array
from fxgraft.cost_table_levels import LevelPricer, Levels, memory_between, parts_between
from fxgraft.cost_table_prices import Price, Pricer, outside_error
from fxgraft.cost_table_records import (
    Energy,
    Growing,
    HeldOut,
    Identity,
    Memory,
    Origin,
    Part,
    Record,
    Validity,
)
from fxgraft.errors import InputError, SerializationError
from fxgraft.validation import nowhere, readable

__all__ = [
    "Energy", "Growing", "HeldOut", "Identity", "LevelPricer", "Levels", "Memory", "Origin", "Part",
    "Price", "Pricer", "Prices", "StepCostTable", "Validity",
]  # fmt: skip
VERSION = 1
Phase = Literal["prefill", "decode"]


class Prices(NamedTuple):
    """Prices of many steps: float64 arrays; joules None if the table has none."""

    seconds: Array
    joules: Array | None


class StepCostTable(Record):
    """Seconds and joules of the steps of one model on one device.

    Attributes:
        identity, memory, energy, origin, validity: see their classes.
        parts: summands of the price.
        levels: the model with layers converted, None where requests convert none.

    Example:
        >>> table = StepCostTable.load("llama-h100.json")
        >>> table.price(prefills=[(512, 0)], decodes=8, decode_context=8 * 1000).seconds
    """

    kind: ClassVar[str] = "fxgraft.step_costs"
    identity: Identity
    memory: Memory
    energy: Energy = Energy()
    origin: Origin
    validity: Validity
    parts: tuple[Part, ...] = Field(min_length=1)
    levels: Levels | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StepCostTable:
        for parts in (self.parts, self.levels.parts if self.levels else ()):
            self._check_parts(parts)
        return self

    def _check_parts(self, parts: Sequence[Part]) -> None:
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError("two parts have one name")
        if any((part.joules is None) != (self.energy.source == "none") for part in parts):
            raise ValueError("joules must be in every part, or in none where energy is 'none'")
        for part in parts:
            for axis, knots in part.axes.items():
                _check_cover(part.name, axis, knots, *self._range(part.per, axis))

    def _range(self, per: str, axis: str) -> tuple[int, int]:
        """What an axis must cover."""
        name = "sequences" if axis == "batch" else axis
        low, high = getattr(self.validity, name)
        least = 0 if (per, axis) == ("prefill", "context") else 1
        return max(low, least), high

    @property
    def has_energy(self) -> bool:
        """Whether prices have joules."""
        return self.energy.source != "none"

    def pricer(self, outside: Literal["error", "mark"] = "error") -> Pricer:
        """A fast object that prices one step at a time.

        Args:
            outside: what happens to a step outside the validity: an ``InputError``, or a price
                that is extrapolated linearly and marked.
        """
        return Pricer(self, outside)

    def with_levels(self, converted: StepCostTable, *, layers: int, offered: int) -> StepCostTable:
        """This table, of level 0, with that of the highest level.

        Args:
            converted: the same model with every offered layer converted.
            layers: of the model.
            offered: of them that can be converted.

        Raises:
            InputError: the tables are of different models, devices or ranges.
        """
        for what, one, other in (
            ("model", self.identity.model, converted.identity.model),
            ("device", self.identity.device, converted.identity.device),
            ("data type of weights", self.identity.weights, converted.identity.weights),
            ("validity", self.validity, converted.validity),
            ("energy", self.energy.source, converted.energy.source),
        ):
            if one != other:
                raise InputError(f"the {what} of level 0 is {one}, that of converted layers "
                                 f"{other}", "make both tables in the same way")  # fmt: skip
        levels = Levels(
            layers=layers, offered=offered, memory=converted.memory, parts=converted.parts
        )
        return self._with(levels=levels)

    def at_level(self, level: int) -> StepCostTable:
        """The table of sequences that are all at one level.

        Raises:
            InputError: there is no such level.
        """
        offered = self.levels.offered if self.levels else 0
        if not 0 <= level <= offered:
            raise InputError(f"the step-cost table has no level {level}",
                             f"give a level from 0 to {offered}")  # fmt: skip
        if self.levels is None or level == 0:
            return self._with(levels=None)
        share = level / offered
        return self._with(
            parts=parts_between(self.parts, self.levels.parts, share),
            memory=memory_between(self.memory, self.levels.memory, share),
            levels=None,
        )

    def _with(self, **changes: Any) -> StepCostTable:
        """A table of its own: a copy would keep the pricer of this one."""
        fields = {name: getattr(self, name) for name in StepCostTable.model_fields}
        return StepCostTable(**(fields | changes))

    @cached_property
    def _pricer(self) -> Pricer:
        return self.pricer()

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of one step.

        Args:
            prefills: new and cached tokens of each prefill.
            decodes: number of sequences that each get one token.
            decode_context: keys that they attend to, added up, each's own new token included.

        Raises:
            InputError: the step is outside the validity; names the quantity and its range.
        """
        return self._pricer.price(prefills, decodes, decode_context)

    def lookup(self, phase: Phase, *, batch: Any, new_tokens: Any = 1, context: Any) -> Prices:
        """Prices of steps of equal sequences, for arrays of sizes, which broadcast.

        Args:
            phase: ``"prefill"`` or ``"decode"``.
            batch: sequences in the step.
            new_tokens: per sequence; 1 in decode.
            context: tokens cached before a prefill; keys per sequence of a decode.

        Raises:
            InputError: a size is outside the validity; names it.
        """
        sizes = (batch, new_tokens, context)
        arrays = np.broadcast_arrays(*(np.asarray(size, np.float64) for size in sizes))
        batches, news, contexts = arrays
        if phase == "decode" and (news != 1).any():
            raise InputError("argument 'new_tokens' is not 1 in decode", "use phase 'prefill'")
        least = 1 if phase == "decode" else 0
        for name, values, low in (
            ("tokens", batches * news, 1), ("sequences", batches, 1),
            ("new_tokens", news, 1), ("context", contexts, least),
        ):  # fmt: skip
            if name != "new_tokens" or phase == "prefill":
                self._check_inside(name, values, low)
        seconds = self._sum(phase, "seconds", batches, news, contexts)
        joules = self._sum(phase, "joules", batches, news, contexts) if self.has_energy else None
        return Prices(seconds, joules)

    def _check_inside(self, name: str, values: Array, least: int) -> None:
        low, high = getattr(self.validity, name)
        low = max(low, least)
        wrong = ~((values >= low) & (values <= high))
        if wrong.any():
            raise outside_error(name, values[wrong].flat[0], low, high)

    def _sum(
        self,
        phase: Phase,
        field: Literal["seconds", "joules"],
        batch: Array,
        new: Array,
        ctx: Array,
    ) -> Array:
        total = np.zeros(batch.shape)
        for part in self.parts:
            if part.per == "step":
                total += part.at(field, tokens=batch * new, sequences=batch)
            elif part.per == phase:
                times = batch if phase == "prefill" else 1.0
                total += times * part.at(field, batch=batch, new_tokens=new, context=ctx)
        return total

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        content = self.model_dump(mode="json")
        if self.levels is None:
            del content["levels"]
        return {"format": self.kind, "version": VERSION, **content}

    def save(self, path: str | Path) -> Path:
        """Write the table as one JSON file; loading it gives the same numbers bit for bit."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, _text(self.to_json()))
        return path

    @staticmethod
    def load(path: str | Path) -> StepCostTable:
        """Read a table.

        Raises:
            SerializationError: the file is missing, damaged, of another format or version, or a
                field is missing, unknown or impossible (NaN and negative prices included).
        """
        path = Path(path)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise SerializationError(f"{path} cannot be read: {error.strerror}",
                                     "give the path of a step-cost table") from error  # fmt: skip
        return StepCostTable.from_json(strict_json.parse(text, str(path)), str(path))

    @staticmethod
    def from_json(value: Any, where: str = "the step-cost table") -> StepCostTable:
        """Check and take over what ``to_json`` gives.

        Raises:
            SerializationError: see ``load``.
        """
        content = dict(strict_json.typed(value, where, dict))
        if content.pop("format", None) != StepCostTable.kind:
            raise SerializationError(
                f"{where} is no step-cost table",
                f"its field 'format' must be {StepCostTable.kind!r}",
            )
        version = content.pop("version", None)
        if version != VERSION:
            raise SerializationError(
                f"{where} has version {version!r}", f"this fxgraft reads version {VERSION}"
            )
        try:
            return StepCostTable.model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            found = readable(error, StepCostTable, where, nowhere)
            raise SerializationError(found.problem, found.remedy) from error


def _text(content: Mapping[str, Any]) -> str:
    """JSON with one line per entry and per part; floats in full precision."""
    parts = [json.dumps(part, allow_nan=False) for part in content["parts"]]
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}"
        for name, value in content.items()
        if name != "parts"
    ]
    lines.append('"parts": [\n' + ",\n".join(parts) + "\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_cover(part: str, axis: str, knots: Sequence[int], low: int, high: int) -> None:
    if knots[0] > low or knots[-1] < high:
        raise ValueError(
            f"part {part!r}: axis {axis!r} has knots from {knots[0]} to {knots[-1]}, "
            f"the validity needs {low} to {high}"
        )
