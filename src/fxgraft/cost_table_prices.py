"""Pricing one step at a time, fast: a step-cost table as look-ups and straight lines.

The parts of one kind are added up on common knots, which is exact. A look-up then takes two or
three dictionary hits and one bisection. What is remembered is a pure function of its key, so the
same step has the same price in any order and in any process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from fxgraft.cost_table_grid import Array, common_knots, on_knots
from fxgraft.errors import InputError

if TYPE_CHECKING:
    from fxgraft.cost_table import Part, StepCostTable

# A line per prompt length; more are forgotten and made again.
_MOST_LINES = 4096
Pair = tuple[float, float]


class Price(NamedTuple):
    """Price of one step.

    Attributes:
        seconds: time of the step.
        joules: energy of the step, None if the table has none.
        extrapolated: whether the step lies outside the table's validity.
    """

    seconds: float
    joules: float | None
    extrapolated: bool = False


class DecodeLine(NamedTuple):
    """Prices of decode steps of a fixed number of sequences, linear in their summed context.

    For ``first <= K <= last`` a step takes ``seconds + seconds_per_key * (K - first)`` seconds and
    ``joules + joules_per_key * (K - first)`` joules (0 if the table has none).
    """

    first: int
    last: int
    seconds: float
    seconds_per_key: float
    joules: float
    joules_per_key: float


class Pricer:
    """Prices steps by one table; see ``StepCostTable.pricer``.

    Attributes:
        outside: ``"error"`` or ``"mark"``.
    """

    def __init__(self, table: StepCostTable, outside: Literal["error", "mark"]) -> None:
        if outside not in ("error", "mark"):
            raise InputError(f"argument 'outside' is {outside!r}", "give 'error' or 'mark'")
        self.outside = outside
        self._energy = table.has_energy
        valid = table.validity
        self._low_tokens, self._high_tokens = valid.tokens
        self._low_sequences, self._high_sequences = valid.sequences
        self._low_new, self._high_new = valid.new_tokens
        self._low_context, self._high_context = valid.context
        step = [part for part in table.parts if part.per == "step"]
        self._tokens = _Values([p for p in step if "tokens" in p.axes], "tokens", valid.tokens)
        rest = [part for part in step if "tokens" not in part.axes]
        self._sequences = _Values(rest, "sequences", valid.sequences)
        self._low_keys = max(self._low_context, 1)
        context = (self._low_keys, valid.context[1])
        self._prefill = _Lines(
            table.parts, "prefill", "new_tokens", valid.new_tokens, valid.context
        )
        self._decode = _Lines(table.parts, "decode", "batch", valid.sequences, context)

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of one step; see ``StepCostTable.price``."""
        tokens = decodes
        seconds = joules = 0.0
        marked = False
        for new, cached in prefills:
            if not (
                self._low_new <= new <= self._high_new
                and self._low_context <= cached <= self._high_context
            ):
                marked = self._outside_prefill(new, cached)
            tokens += new
            more, energy = self._prefill.at(new, cached)
            seconds += more
            joules += energy
        count = decodes + len(prefills)
        if count == 0:
            return Price(0.0, 0.0 if self._energy else None)
        if decodes:
            if not self._low_keys * decodes <= decode_context <= self._high_context * decodes:
                marked |= self._outside_decode(decodes, decode_context)
            more, energy = self._decode.at(decodes, decode_context, decodes)
            seconds += more
            joules += energy
        if not (
            self._low_tokens <= tokens <= self._high_tokens
            and self._low_sequences <= count <= self._high_sequences
        ):
            marked |= self._outside_step(tokens, count)
        by_tokens, by_sequences = self._tokens[tokens], self._sequences[count]
        seconds += by_tokens[0] + by_sequences[0]
        joules += by_tokens[1] + by_sequences[1]
        return Price(seconds, joules if self._energy else None, marked)

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """The line that holds around a decode-only step.

        Args:
            decodes: sequences, at least 1.
            decode_context: their summed context; the line begins there.

        Raises:
            InputError: the step is outside the validity and may not be extrapolated.
        """
        here = self.price((), decodes, decode_context)
        slope, energy_slope, last = self._decode.slope(decodes, decode_context, decodes)
        if self.outside == "error":
            last = min(last, self._high_context * decodes)
        joules = here.joules or 0.0
        return DecodeLine(decode_context, last, here.seconds, slope, joules, energy_slope)

    def _outside_prefill(self, new: int, cached: int) -> bool:
        if new < 1 or cached < 0:
            raise InputError(f"a prefill of {new} new and {cached} cached tokens is impossible",
                             "give at least one new token and no negative number")  # fmt: skip
        self._refuse("new_tokens", new, self._low_new, self._high_new)
        self._refuse("context", cached, self._low_context, self._high_context)
        return True

    def _outside_decode(self, decodes: int, context: int) -> bool:
        if decodes < 1 or context < decodes:
            raise InputError(f"{decodes} decodes with {context} keys in sum are impossible",
                             "each decode attends at least to its own token")  # fmt: skip
        self._refuse("context", context / decodes, self._low_keys, self._high_context)
        return True

    def _outside_step(self, tokens: int, count: int) -> bool:
        if count < 1:
            raise InputError(
                f"a step of {count} sequences is impossible", "give no negative number"
            )
        self._refuse("tokens", tokens, self._low_tokens, self._high_tokens)
        self._refuse("sequences", count, self._low_sequences, self._high_sequences)
        return True

    def _refuse(self, name: str, value: float, low: int, high: int) -> None:
        if self.outside == "error" and not low <= value <= high:
            raise outside_error(name, value, low, high)


class _Values(dict[int, Pair]):
    """Seconds and joules by one integer, computed when first asked for."""

    def __init__(self, parts: Sequence[Part], axis: str, valid: tuple[int, int]) -> None:
        super().__init__()
        self._line = _Line(*_on_line(parts, axis, max(valid[0], 1), valid[1]))

    def __missing__(self, key: int) -> Pair:
        self[key] = found = self._line.at(key)
        return found


def _on_line(
    parts: Sequence[Part], axis: str, low: int, high: int
) -> tuple[list[int], list[float], list[float]]:
    """Knots, seconds and joules of the sum of parts with one axis or none."""
    knots = common_knots([part.axes[axis] for part in parts if part.axes], low, max(high, low))
    found: list[list[float]] = []
    for field in ("seconds", "joules"):
        total = np.zeros(len(knots))
        for part in parts:
            values = part.values(field)
            total += on_knots([part.axes[axis]], values, [knots]) if part.axes else values
        found.append(total.tolist())
    return list(knots), found[0], found[1]


class _Line:
    """Two functions on common knots, linear between them and beyond the last one."""

    __slots__ = ("_energy_slopes", "_joules", "_knots", "_seconds", "_slopes")

    def __init__(self, knots: list[int], seconds: list[float], joules: list[float]) -> None:
        self._knots, self._seconds, self._joules = knots, seconds, joules
        self._slopes, self._energy_slopes = _slopes(knots, seconds), _slopes(knots, joules)

    def at(self, point: int) -> Pair:
        place = bisect_right(self._knots, point) - 1
        if place < 0:
            return self._seconds[0], self._joules[0]
        far = point - self._knots[place]
        return (
            self._seconds[place] + self._slopes[place] * far,
            self._joules[place] + self._energy_slopes[place] * far,
        )

    def slope(self, point: int) -> tuple[float, float, int | None]:
        """Slopes at and above a point, and the knot up to which they hold (None: for ever)."""
        place = bisect_right(self._knots, point) - 1
        if place < 0:
            return 0.0, 0.0, self._knots[0]
        ends = self._knots[place + 1] if place + 1 < len(self._knots) else None
        return self._slopes[place], self._energy_slopes[place], ends


def _slopes(knots: Sequence[int], values: Sequence[float]) -> list[float]:
    """Slope of each piece; beyond the last knot values do not fall."""
    slopes = [
        (values[i + 1] - values[i]) / (knots[i + 1] - knots[i]) for i in range(len(knots) - 1)
    ]
    return [*slopes, max(slopes[-1], 0.0) if slopes else 0.0]


class _Lines:
    """Two functions of an integer and a context: for each integer, a line in the context."""

    def __init__(
        self,
        parts: Sequence[Part],
        per: str,
        axis: str,
        valid: tuple[int, int],
        context: tuple[int, int],
    ) -> None:
        chosen = [part for part in parts if part.per == per]
        low = max(valid[0], 1)
        self._outer = common_knots([p.axes.get(axis, ()) for p in chosen], low, max(valid[1], low))
        inner = [p.axes.get("context", ()) for p in chosen]
        self._context = common_knots(inner, context[0], max(context))
        self._grids = [self._add(chosen, axis, field) for field in ("seconds", "joules")]
        self._lines: dict[int, _Line] = {}

    def _add(self, parts: Sequence[Part], axis: str, field: Literal["seconds", "joules"]) -> Array:
        total = np.zeros((len(self._outer), len(self._context)))
        for part in parts:
            values = part.values(field)
            if list(part.axes) == ["context", axis]:
                values = values.T
            ordered = [name for name in (axis, "context") if name in part.axes]
            others = [self._outer if name == axis else self._context for name in ordered]
            if ordered:
                values = on_knots([part.axes[name] for name in ordered], values, others)
            total += values[:, None] if ordered == [axis] else values
        return total

    def at(self, outer: int, context: int, times: int = 1) -> Pair:
        """Values at a context that is the sum of ``times`` contexts."""
        line = self._lines.get(outer)
        return (line or self._line(outer, times)).at(context)

    def slope(self, outer: int, context: int, times: int = 1) -> tuple[float, float, int]:
        """Slopes per unit of summed context, and up to where they hold."""
        line = self._lines.get(outer) or self._line(outer, times)
        slope, energy, last = line.slope(context)
        return slope, energy, last if last is not None else 2**62

    def _line(self, outer: int, times: int) -> _Line:
        if len(self._lines) >= _MOST_LINES:
            self._lines.clear()
        knots = [knot * times for knot in self._context]
        rows = [_row(self._outer, grid, outer) for grid in self._grids]
        self._lines[outer] = line = _Line(knots, *rows)
        return line


def _row(knots: Sequence[int], grid: Array, point: int) -> list[float]:
    """The grid's row at a point between, or beyond, its knots."""
    place = max(min(bisect_right(knots, point) - 1, len(knots) - 2), 0)
    if len(knots) == 1 or point <= knots[0]:
        return grid[0].tolist()
    fraction = (point - knots[place]) / (knots[place + 1] - knots[place])
    row = grid[place] * (1.0 - fraction) + grid[place + 1] * fraction
    return (np.maximum(row, grid[-1]) if fraction > 1.0 else row).tolist()


def outside_error(name: str, value: float, low: int, high: int) -> InputError:
    """The error for a step that a table does not answer for."""
    return InputError(
        f"{name} {value:g} is outside the step-cost table, which is valid from {low} to {high}",
        "make a table for that range, or ask for marked extrapolation: pricer(outside='mark')",
    )
