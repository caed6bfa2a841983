"""Steps whose sequences are at different levels: how many layers were converted for each.

A table that carries levels prices two models: that of level 0, and that with all offered layers
converted. What lies between is interpolated per sequence: at level k of n a sequence costs
``1 - k/n`` of what it costs at level 0, and ``k/n`` of what it costs at level n. Exact where the
offered layers are alike, for sequences of one level at any price, and for mixed ones as far as the
price of decodes is a constant and a sum over them. What a step costs once, weights above all, goes
by the mean level of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from fxgraft.cost_table_prices import DecodeLine, Price, Pricer
from fxgraft.cost_table_records import Growing, Memory, Part, Positive, Record
from fxgraft.errors import InputError

if TYPE_CHECKING:
    from fxgraft.cost_table import StepCostTable

_NOTHING = "nothing"


class Levels(Record):
    """What a table says of the model with every offered layer converted.

    Attributes:
        layers: of the model, alike in the state that they keep per token.
        offered: of them that can be converted, the highest level.
        memory: with all offered layers converted.
        parts: of the price, the same.
    """

    layers: Positive
    offered: Positive
    memory: Memory
    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_more(self) -> Levels:
        if self.offered > self.layers:
            raise ValueError(f"{self.offered} of {self.layers} layers are offered")
        return self


def parts_between(low: Sequence[Part], high: Sequence[Part], share: float) -> tuple[Part, ...]:
    """Parts of a price that lies between two; ``share`` is that of the second."""
    found = [_scaled(part, 1.0 - share, "level 0") for part in low if share < 1.0]
    found += [_scaled(part, share, "converted") for part in high if share > 0.0]
    return tuple(found)


def _scaled(part: Part, factor: float, of: str) -> Part:
    joules = part.joules
    return part.model_copy(
        update={
            "name": f"{of}: {part.name}",
            "seconds": tuple(factor * value for value in part.seconds),
            "joules": None if joules is None else tuple(factor * value for value in joules),
        }
    )


def memory_between(low: Memory, high: Memory, share: float) -> Memory:
    """Memory of a model that lies between two, with the weights of both."""
    limits = dict.fromkeys(state.limit for state in (*low.growing, *high.growing))
    growing = [
        Growing(limit=limit, bytes_per_token=_between(_kept(low, limit), _kept(high, limit), share))
        for limit in limits
    ]
    return low.model_copy(
        update={
            "weights": max(low.weights, high.weights),
            "growing": tuple(state for state in growing if state.bytes_per_token),
            "fixed_state": _between(low.fixed_state, high.fixed_state, share),
            "activations": max(low.activations, high.activations),
            "activations_per_token": max(low.activations_per_token, high.activations_per_token),
        }
    )


def _kept(memory: Memory, limit: int | None) -> int:
    return sum(state.bytes_per_token for state in memory.growing if state.limit == limit)


def _between(low: int, high: int, share: float) -> int:
    return round(low + (high - low) * share)


class LevelPricer:
    """Prices steps by a table with levels.

    Args:
        table: with levels.
        outside: see ``StepCostTable.pricer``.

    Attributes:
        offered: the highest level.
        has_energy: whether prices have joules.
        once, each: prices at level 0 and at the highest, of what a step costs once and of what it
            costs for its sequences.

    Raises:
        InputError: the table has no levels.
    """

    def __init__(self, table: StepCostTable, outside: Literal["error", "mark"] = "error") -> None:
        levels = table.levels
        if levels is None:
            raise InputError("the step-cost table has no levels", "add them: table.with_levels")
        self.offered = levels.offered
        self.has_energy = table.has_energy
        ends = table.parts, levels.parts
        self.once = [_pricer(table, parts, outside, once=True) for parts in ends]
        self.each = [_pricer(table, parts, outside, once=False) for parts in ends]

    def mixed(
        self, prefill_levels: Sequence[int] = (), decode_levels: int = 0, decode_keys: int = 0
    ) -> MixedCost:
        """Prices of steps with sequences at these levels.

        Args:
            prefill_levels: of each prefill, in order.
            decode_levels: of all decodes, added up.
            decode_keys: level times keys of each decode, added up.
        """
        share = 1.0 / self.offered
        return MixedCost(
            self, tuple(level * share for level in prefill_levels), decode_levels * share,
            decode_keys * share,
        )  # fmt: skip


def _pricer(
    table: StepCostTable, parts: Sequence[Part], outside: Literal["error", "mark"], *, once: bool
) -> Pricer:
    """Prices of what a step costs once, or of what it costs for each sequence."""
    joules = (0.0,) if table.has_energy else None
    chosen = [part for part in parts if (part.per == "step") == once]
    chosen.append(Part(name=_NOTHING, per="step", axes={}, seconds=(0.0,), joules=joules))
    return table.model_copy(update={"parts": tuple(chosen), "levels": None}).pricer(outside)


@dataclass(frozen=True, slots=True)
class MixedCost:
    """Prices of steps of sequences at given levels, see ``LevelPricer.mixed``.

    Attributes:
        pricer: of the table.
        prefills: share of the offered layers that is converted, by prefill.
        rows: the same of decodes, added up.
        keys: share times keys, added up.
    """

    pricer: LevelPricer
    prefills: tuple[float, ...]
    rows: float
    keys: float

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of a step; see ``StepCostTable.price``."""
        pairs = list(zip(prefills, self.prefills, strict=True))
        tokens = decodes + sum(new for new, _ in prefills)
        linear = self.rows + sum(new * share for (new, _), share in pairs)
        sums = _Sum()
        once, each = self.pricer.once, self.pricer.each
        for pricer, share in zip(once, _shares(linear, tokens), strict=True):
            if share:
                sums.add(share, pricer.price(prefills, decodes, decode_context))
        for prefill, converted in pairs:
            for pricer, share in zip(each, _shares(converted, 1), strict=True):
                if share:
                    sums.add(share, pricer.price([prefill]))
        for pricer, share, keys in self._decodes(decodes, decode_context):
            sums.add(share, pricer.price((), decodes, keys))
        joules = sums.joules if self.pricer.has_energy else None
        return Price(sums.seconds, joules, sums.extrapolated)

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """The line in the summed context, while every decode gets one key more per step."""
        here = self.price((), decodes, decode_context)
        slope = energy_slope = 0.0
        left = math.inf
        for pricer, share, keys in self._decodes(decodes, decode_context):
            line = pricer.decode_line(decodes, keys)
            slope += share * line.seconds_per_key
            energy_slope += share * line.joules_per_key
            left = min(left, line.last - keys)
        last = decode_context + math.floor(left)
        return DecodeLine(
            decode_context, last, here.seconds, slope, here.joules or 0.0, energy_slope
        )

    def _decodes(self, decodes: int, context: int) -> list[tuple[Pricer, float, int]]:
        """Pricers of both ends that count, their shares, and the keys that decodes have there.

        Each end has all decodes, with the mean keys of the layers that are as at this end.
        """
        if not decodes:
            return []
        ends = zip(self.pricer.each, _shares(self.rows, decodes), strict=True)
        keys = context - self.keys, self.keys
        # Keys of a mean are no integer; pricers take any number.
        return [
            (pricer, share, found / share)  # pyright: ignore[reportReturnType]
            for (pricer, share), found in zip(ends, keys, strict=True)
            if share
        ]


def _shares(converted: float, all_of_them: int) -> tuple[float, float]:
    """Shares of level 0 and of the highest level; a rounded one is 0 or 1."""
    share = converted / all_of_them if all_of_them else 0.0
    if share > 1.0 - 1e-12:
        share = 1.0
    return 1.0 - share, share


@dataclass(slots=True)
class _Sum:
    """A weighted sum of prices."""

    seconds: float = 0.0
    joules: float = 0.0
    extrapolated: bool = False

    def add(self, share: float, price: Price) -> None:
        self.seconds += share * price.seconds
        self.joules += share * (price.joules or 0.0)
        self.extrapolated |= price.extrapolated
