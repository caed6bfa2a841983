"""The mapper: which layout runs a matrix product, by cycles, energy or their product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.macro import PARTS, Gemm, Layout, total
from fxgraft.backends.flexcim.patterns import DENSE
from fxgraft.errors import InputError

Objective = Literal["latency", "energy", "edp"]
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_KEYS: dict[str, Callable[[Array, Array], list[Array]]] = {
    "latency": lambda cycles, joules: [cycles, joules],
    "energy": lambda cycles, joules: [joules, cycles],
    "edp": lambda cycles, joules: [cycles * joules, cycles],
}


@dataclass(frozen=True)
class Mapped:
    """A matrix product on the macros, for one or many numbers of tokens.

    Attributes:
        layouts: the chosen layout per number of tokens.
        cycles: float64 [points], whole numbers.
        energy: joules by part, float64 [points].
        off_chip_bytes: float64 [points].
    """

    layouts: tuple[Layout, ...]
    cycles: Array
    energy: dict[str, Array]
    off_chip_bytes: Array

    @property
    def joules(self) -> Array:
        """Energy of all parts."""
        return np.sum(list(self.energy.values()), axis=0)


def layouts(hardware: Hardware, gemm: Gemm, *, streamed: bool = False) -> list[Layout]:
    """All layouts of a product, larger merge factors first.

    A sparse product may also be stored dense; hardware without selectors stores everything so.
    Weights that stay in their macros are stored in as few of them as possible.
    """
    patterns = [DENSE] if hardware.cell == "dense" else [gemm.pattern]
    if gemm.pattern.is_sparse and hardware.cell != "dense":
        patterns.append(DENSE)
    found = [
        Layout(hardware, gemm, pattern, merge, streamed)
        for pattern in patterns
        for merge in reversed(hardware.merge_factors)
    ]
    if found[0].pinned:
        fewest = min(layout.tiles for layout in found)
        found = [layout for layout in found if layout.tiles == fewest]
    return found


def check_objective(objective: str) -> None:
    """Refuse an unknown objective.

    Raises:
        InputError: lists the known ones.
    """
    if objective not in _KEYS:
        raise InputError(f"objective {objective!r} is unknown", f"give one of: {', '.join(_KEYS)}")


def map_gemm(
    hardware: Hardware,
    gemm: Gemm,
    tokens: int | Sequence[int] | Array,
    objective: Objective = "latency",
    *,
    streamed: bool = False,
) -> Mapped:
    """Choose a layout for each number of tokens.

    Args:
        hardware: the macros.
        gemm: what is computed.
        tokens: T, one or many.
        objective: ``"latency"``: fewest cycles, ties by energy; ``"energy"``: least energy, ties
            by cycles; ``"edp"``: least product of both. Last ties go to the larger merge factor.
        streamed: weights and activations are off chip.

    Raises:
        InputError: a number of tokens is below 1, or the objective is unknown.
    """
    points = np.atleast_1d(np.asarray(tokens, np.float64))
    if not (points >= 1).all():
        raise InputError(f"field 'tokens' is {points.min():g}", "give at least 1 token")
    check_objective(objective)
    found = layouts(hardware, gemm, streamed=streamed)
    energies = [layout.energy(points) for layout in found]
    cycles = _stack((layout.cycles(points) for layout in found), points)
    joules = _stack((total(energy) for energy in energies), points)
    chosen = _first_least(_KEYS[objective](cycles, joules))
    every = np.arange(len(points))
    return Mapped(
        tuple(found[int(index)] for index in cast("list[int]", chosen.tolist())),
        cycles[chosen, every],
        {part: _stack((e[part] for e in energies), points)[chosen, every] for part in PARTS},
        _stack((layout.off_chip_bytes(points) for layout in found), points)[chosen, every],
    )


def _stack(values: Iterable[Any], points: Array) -> Array:
    """[candidates, points] of numbers or arrays."""
    return np.stack([np.broadcast_to(value, points.shape) for value in values])


def _first_least(
    keys: Sequence[Array],
) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    """Index of the first candidate with the least keys, in order of importance.

    Args:
        keys: [candidates, points] each.
    """
    alive = np.ones(keys[0].shape, np.bool_)
    for key in keys:
        masked = np.where(alive, key, np.inf)
        alive &= masked <= masked.min(0)
    return alive.argmax(0)
