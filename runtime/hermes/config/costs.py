"""Where a client's step prices come from, as a section of a system file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fxgraft.cost_table import LevelPricer, Levels, Memory, StepCostTable
from fxgraft.devices import device
from fxgraft.errors import InputError
from fxgraft.runtime.hermes.config.pipelines import Recipe, recipe, table_of
from fxgraft.runtime.hermes.costs import AffineCost, StepCost, WithWatts
from fxgraft.runtime.hermes.dense import MODELS, DenseCost, DenseModel, Efficiency
from fxgraft.runtime.hermes.section import File, Number, Positive, Section, default_kind, tagged
from fxgraft.validation import suggestion


@dataclass(frozen=True)
class Converted:
    """A model with layers that requests convert, as far as a client needs to know it.

    Attributes:
        levels: of its cost table.
        pricer: of steps at any levels.
        state_memory: as in ``Served``, with the states of all sequences set aside.
    """

    levels: Levels
    pricer: LevelPricer
    state_memory: float | None


@dataclass(frozen=True)
class Served:
    """A model on a device, as far as a client needs to know it.

    Attributes:
        cost: price of its steps.
        model: its name; empty if the cost does not say.
        dtype: of its weights; empty if the cost does not say.
        kv_bytes: of keys and values per token, on all devices together.
        state_memory: bytes for keys and values at full use of the memory, None if unknown.
        capacity: bytes of memory.
        block_tokens: tokens that are allocated together.
        idle_watts: drawn between steps.
        marks: whether steps outside the validity are counted instead of refused.
        has_energy: whether the cost has joules.
        converted: the model at other levels, None where no layer can be converted.
    """

    cost: StepCost
    model: str = ""
    dtype: str = ""
    kv_bytes: float = 0.0
    state_memory: float | None = None
    capacity: float = 0.0
    block_tokens: int = 16
    idle_watts: float = 0.0
    marks: bool = False
    has_energy: bool = True
    converted: Converted | None = None

    def with_watts(self, watts: float) -> StepCost:
        """The cost; where it has no joules, steps draw so many watts."""
        return self.cost if self.has_energy or not watts else WithWatts(self.cost, watts)


class TableCost(Section):
    """A step-cost table, see ``docs/cost_table.md``.

    Attributes:
        file: the table.
        outside: what happens to steps outside its validity: ``"error"``, or ``"mark"``: they are
            extrapolated and counted in the report.
    """

    kind: Literal["table"] = "table"
    file: File
    outside: Literal["error", "mark"] = "error"

    def serve(self, tokens: int, sequences: int) -> Served:
        """Load it, for steps of at most so many new tokens and sequences."""
        return served_by(StepCostTable.load(self.file), self.outside, tokens, sequences)


def served_by(
    table: StepCostTable, outside: Literal["error", "mark"], tokens: int, sequences: int
) -> Served:
    """What a table says about a model, for steps of at most so many tokens and sequences."""
    memory, identity = table.memory, table.identity
    devices = identity.tensor_parallel * identity.pipeline_parallel

    def left(of: Memory) -> float | None:
        if memory.capacity is None:
            return None
        peak = of.activations + of.activations_per_token * tokens
        return (memory.capacity - of.weights - peak - of.fixed_state * sequences) * devices

    levels = table.levels
    converted = levels and Converted(levels, LevelPricer(table, outside), left(levels.memory))
    return Served(
        table.pricer(outside),
        model=identity.model,
        dtype=identity.weights,
        kv_bytes=float(memory.bytes_per_token * devices),
        state_memory=left(memory),
        capacity=float(memory.capacity or 0) * devices,
        block_tokens=memory.block_tokens,
        idle_watts=(table.energy.idle_watts or 0.0) * devices,
        marks=outside == "mark",
        has_energy=table.has_energy,
        converted=converted,
    )


class PipelineCost(Section):
    """A model, rewritten by passes: its table is made when the system is read.

    Attributes:
        pipeline: a pipeline file, or its keys: ``model``, ``passes``, ``backend``, ``options``.
        device: name of ``fxgraft.devices`` whose peak rates price the model; None takes the prices
            of the pipeline's backend (``flexcim``).
        dtype: data type that the model is served in; needed beside ``device``, and only there.
        keep: file for the table; it is read again as long as the pipeline, and the files that it
            names, have not changed.
        outside: see ``TableCost``.
    """

    kind: Literal["pipeline"] = "pipeline"
    pipeline: Annotated[Recipe, BeforeValidator(recipe)]
    device: str | None = None
    dtype: str | None = None
    keep: File | None = None
    outside: Literal["error", "mark"] = "error"

    @model_validator(mode="after")
    def _priced(self) -> PipelineCost:
        if (self.device is None) != (self.dtype is None):
            raise ValueError("needs device and dtype for peak rates, or neither")
        return self

    def serve(self, tokens: int, sequences: int) -> Served:
        """Make the table, for steps of at most so many new tokens and sequences."""
        table = table_of(self.pipeline, on=self.device, dtype=self.dtype, keep=self.keep)
        return served_by(table, self.outside, tokens, sequences)


class AffineSection(Section):
    """A closed form in seconds per unit, see ``costs.AffineCost``."""

    kind: Literal["affine"] = "affine"
    base: Number = 0.0
    prefill_token: Number = 0.0
    sequence: Number = 0.0
    context: Number = 0.0
    cached_token: Number = 0.0
    attention: Number = 0.0
    watts: Number = 0.0

    def serve(self, tokens: int, sequences: int) -> Served:
        """The closed form."""
        return Served(AffineCost(**self.model_dump(exclude={"kind"})), has_energy=self.watts > 0)


class SizesSection(Section):
    """A dense transformer that has no name here, see ``dense.DenseModel``."""

    name: str = "dense"
    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    intermediate: Positive
    vocabulary: Positive

    def model(self) -> DenseModel:
        """Its sizes."""
        return DenseModel(**self.model_dump(exclude={"name"}))


class DenseSection(Section):
    """A dense transformer by its sizes, on a known device, see ``dense``.

    Attributes:
        model: name of ``dense.MODELS``, or sizes.
        device: name of ``fxgraft.devices``.
        weights, state: data types; required, as a factor of two hangs on them.
        devices: that share every layer.
        efficiency: share of the peaks that is reached.
    """

    kind: Literal["dense"] = "dense"
    model: str | SizesSection
    device: str
    weights: str
    state: str = "bfloat16"
    devices: Positive = 1
    efficiency: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.75

    def serve(self, tokens: int, sequences: int) -> Served:
        """The closed form for this model and device."""
        name, model = self._named()
        share, target = self.efficiency, device(self.device)
        cost = DenseCost(
            model, target, self.weights, self.state, devices=self.devices,
            efficiency=Efficiency(share, share, share, share, share, share,
                                  step_seconds=target.step),
        )  # fmt: skip
        return Served(
            cost,
            model=name,
            dtype=self.weights,
            kv_bytes=cost.model.kv_bytes(self.state),
            state_memory=cost.memory_for_state,
            capacity=target.memory * self.devices,
            idle_watts=cost.idle_watts,
        )

    def _named(self) -> tuple[str, DenseModel]:
        if isinstance(self.model, SizesSection):
            return self.model.name, self.model.model()
        if self.model not in MODELS:
            raise InputError(
                f"there is no model {self.model!r}{suggestion(self.model, MODELS)}",
                f"the models of a dense cost are: {', '.join(MODELS)}; or give its sizes",
            )
        return self.model, MODELS[self.model]


def _short(value: Any) -> Any:
    return default_kind(tagged(value, "table", "file"), "affine")


CostSection = Annotated[
    Annotated[TableCost | PipelineCost | AffineSection | DenseSection, Field(discriminator="kind")],
    BeforeValidator(_short),
]
"""A bare text is the file of a table, a mapping without ``kind`` the closed form."""
