"""The records of a step-cost table: identity, memory, energy, origin, validity, parts.

All refuse unknown fields, wrong types, NaN and negative numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fxgraft.cost_table_grid import Array, interpolate

AXES: Mapping[str, tuple[str, ...]] = {
    "step": ("tokens", "sequences"),
    "prefill": ("new_tokens", "context"),
    "decode": ("batch", "context"),
}
Per = Literal["step", "prefill", "decode"]
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Record):
    """Which model, rewritten how, runs on what.

    Attributes:
        model: name or hub id.
        graph: hash of the rewritten graph, see ``step_costs.graph_hash``.
        passes: ordered, each with its settings.
        backend: that made the table.
        device: name of the device or of its description.
        configuration: name of the hardware configuration, empty if there is only one.
        weights, activations, state: data types, for example ``"bfloat16"``.
        tensor_parallel, pipeline_parallel: degrees.
        versions: of the packages that made the table.
        seed: of what was random in making it.
    """

    model: str
    graph: str = ""
    passes: tuple[dict[str, Any], ...] = ()
    backend: str
    device: str
    configuration: str = ""
    weights: str
    activations: str
    state: str
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    versions: dict[str, str] = {}
    seed: int = 0


class Growing(Record):
    """State that grows with the tokens of a sequence.

    Attributes:
        bytes_per_token: per token and device.
        limit: most tokens kept (a sliding window), None for all.
    """

    bytes_per_token: Count
    limit: Positive | None = None


class Memory(Record):
    """What a model needs of one device's memory, in bytes.

    Attributes:
        weights: of weights, indices included.
        growing: keys and values, one entry per limit.
        fixed_state: per sequence, whatever its length.
        activations: peak that does not depend on the step.
        activations_per_token: peak per new token of a step.
        capacity: memory of the device, None if unknown.
        block_tokens: tokens that are allocated together.
    """

    weights: Count
    growing: tuple[Growing, ...] = ()
    fixed_state: Count = 0
    activations: Count = 0
    activations_per_token: Count = 0
    capacity: Positive | None = None
    block_tokens: Positive = 16

    @property
    def bytes_per_token(self) -> int:
        """Bytes of state that one more token needs while no limit is reached."""
        return sum(state.bytes_per_token for state in self.growing)

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes of state of a sequence of ``tokens`` tokens."""
        kept = (
            state.bytes_per_token * min(tokens, state.limit or tokens) for state in self.growing
        )
        return self.fixed_state + sum(kept)


class Energy(Record):
    """What the joules of a table mean.

    Attributes:
        source: ``"formula"``, ``"measured"``, or ``"none"`` for a table without joules.
        idle_watts: drawn between steps, None if unknown.
    """

    source: Literal["formula", "measured", "none"] = "none"
    idle_watts: Seconds | None = None


class HeldOut(Record):
    """Relative error on steps that the table was not made from."""

    mean: Seconds
    p90: Seconds
    maximum: Seconds
    steps: Positive


class Origin(Record):
    """How the figures came about.

    Attributes:
        method: ``"formula"``, ``"roofline"``, ``"device events"`` or ``"wall clock"``.
        points: number of steps that were evaluated or measured.
        held_out: error on other steps, None for formulas.
        launch_seconds: overhead per step that is in the parts already.
        notes: assumptions, one sentence each.
    """

    method: Literal["formula", "roofline", "device events", "wall clock"]
    points: Positive
    held_out: HeldOut | None = None
    launch_seconds: Seconds = 0.0
    notes: tuple[str, ...] = ()


class Validity(Record):
    """Inclusive ranges inside which the table answers.

    Attributes:
        tokens: new tokens of a step, prefills and decodes together.
        sequences: prefills and decodes of a step.
        new_tokens: of one prefill.
        context: cached tokens of one prefill, and mean keys of the decodes.
    """

    tokens: tuple[Count, Count]
    sequences: tuple[Count, Count]
    new_tokens: tuple[Count, Count]
    context: tuple[Count, Count]

    @model_validator(mode="after")
    def _ordered(self) -> Validity:
        for name in Validity.model_fields:
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"the range of {name} is empty: {low} to {high}")
        return self


class Part(Record):
    """One summand of the price.

    Attributes:
        name: what it stands for, for example ``"linear"``.
        per: see the module.
        axes: knots by axis, strictly increasing, in the order of the values' dimensions.
        seconds: at the knots, the last axis running fastest.
        joules: the same, or None where energy is unknown.
    """

    name: str
    per: Per
    axes: dict[str, tuple[Count, ...]]
    seconds: tuple[Seconds, ...]
    joules: tuple[Seconds, ...] | None = None

    @field_validator("axes")
    @classmethod
    def _knots(cls, axes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for name, knots in axes.items():
            if not knots or any(b <= a for a, b in itertools.pairwise(knots)):
                raise ValueError(f"the knots of axis {name!r} do not increase")
        return axes

    @model_validator(mode="after")
    def _shapes(self) -> Part:
        allowed = AXES[self.per]
        for name in self.axes:
            if name not in allowed:
                raise ValueError(f"part {self.name!r} per {self.per} has axis {name!r}, "
                                 f"it may have: {', '.join(allowed)}")  # fmt: skip
        if self.per == "step" and len(self.axes) > 1:
            raise ValueError(f"part {self.name!r} per step has more than one axis")
        size = math.prod(self.shape)
        for field in ("seconds", "joules"):
            values = getattr(self, field)
            if values is not None and len(values) != size:
                raise ValueError(f"part {self.name!r} has {len(values)} {field} for {size} knots")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of knots per axis."""
        return tuple(len(knots) for knots in self.axes.values())

    def values(self, field: Literal["seconds", "joules"]) -> Array:
        """The grid as an array; zeros for joules that are unknown."""
        flat = self.seconds if field == "seconds" else self.joules
        return np.zeros(self.shape) if flat is None else np.reshape(flat, self.shape)

    def at(self, field: Literal["seconds", "joules"], **points: Array) -> Array:
        """Interpolated values at arrays of points, given for every axis of ``per``."""
        if not self.axes:
            return np.full(next(iter(points.values())).shape, self.values(field))
        found = [points[name] for name in self.axes]
        return interpolate(list(self.axes.values()), self.values(field), found)
