"""What a step costs: the interface that LLM clients ask, and a closed form of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fxgraft.cost_table import Price
from fxgraft.cost_table_prices import DecodeLine
from fxgraft.errors import InputError

NO_LIMIT = 2**62


class StepCost(Protocol):
    """Prices one step; ``fxgraft.cost_table.Pricer`` is the usual one.

    A pure function: the same step has the same price in any order and any process.
    """

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of a step; see ``StepCostTable.price``."""
        ...

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """The line in the summed context that holds from ``decode_context`` on."""
        ...


@dataclass(frozen=True, slots=True)
class WithWatts:
    """A cost without energy, and the power that its steps draw."""

    cost: StepCost
    watts: float

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of a step."""
        price = self.cost.price(prefills, decodes, decode_context)
        return price._replace(joules=price.seconds * self.watts)

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """The same line, with joules."""
        line = self.cost.decode_line(decodes, decode_context)
        return line._replace(
            joules=line.seconds * self.watts, joules_per_key=line.seconds_per_key * self.watts
        )


@dataclass(frozen=True, slots=True)
class AffineCost:
    """A closed form, for tests and for first estimates; seconds per unit.

    ``base + prefill_token·Σ new + cached_token·Σ cached + attention·Σ new·(cached + new/2)
    + sequence·decodes + context·Σ decode context``; nothing for an empty step. Energy is
    ``watts`` times the time.
    """

    base: float = 0.0
    prefill_token: float = 0.0
    sequence: float = 0.0
    context: float = 0.0
    cached_token: float = 0.0
    attention: float = 0.0
    watts: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"cost {name!r} is {value!r}", "give a number that is 0 or more")

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of a step."""
        if not prefills and not decodes:
            return Price(0.0, 0.0)
        seconds = self.base + self.sequence * decodes + self.context * decode_context
        for new, cached in prefills:
            seconds += self.prefill_token * new + self.cached_token * cached
            seconds += self.attention * new * (cached + 0.5 * new)
        return Price(seconds, seconds * self.watts)

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """The line holds without end."""
        seconds = self.base + self.sequence * decodes + self.context * decode_context
        return DecodeLine(
            decode_context, NO_LIMIT, seconds, self.context, seconds * self.watts,
            self.context * self.watts,
        )  # fmt: skip
