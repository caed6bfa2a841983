"""Which constants the headline gains hang on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxgraft.backends.flexcim.baselines import MIXTURE, TOKENS, headline_layers, headlines
from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.errors import InputError

_NOT_VARIED = ("memory", "weight_memory")


@dataclass(frozen=True)
class Effect:
    """What one constant does to the gains over ``fixed:2:4``.

    Attributes:
        constant: its name.
        values: that it was given.
        latency, energy: gains at each value.
        source: of the constant, as in ``Hardware.constants``.
    """

    constant: str
    values: tuple[float, ...]
    latency: tuple[float, ...]
    energy: tuple[float, ...]
    source: str

    @property
    def latency_span(self) -> float:
        """Largest less smallest gain in latency."""
        return max(self.latency) - min(self.latency)

    @property
    def energy_span(self) -> float:
        """Largest less smallest gain in energy."""
        return max(self.energy) - min(self.energy)


def sensitivity(hardware: Hardware, factors: Sequence[float] = (0.5, 1.0, 2.0)) -> list[Effect]:
    """Vary every numeric constant and the workload, each on its own; take the headline gains.

    Args:
        hardware: where all other constants stay.
        factors: that a constant is multiplied with; whole numbers are rounded. A value that a
            constant cannot have is left out.

    Returns:
        The constants that matter, the largest effect on energy first; areas are not varied.
    """
    effects = _of_workload(hardware)
    for name, value, _, source, _ in hardware.constants():
        field = name.removeprefix("energies.")
        if name.startswith("transistors.") or field in _NOT_VARIED or not _is_number(value):
            continue
        found = [gains for factor in factors if (gains := _gains(hardware, field, value, factor))]
        values, latency, energy = zip(*found, strict=True)
        effect = Effect(field, values, latency, energy, source)
        if effect.latency_span > 1e-9 or effect.energy_span > 1e-9:
            effects.append(effect)
    return sorted(effects, key=lambda effect: -effect.energy_span)


def _of_workload(hardware: Hardware) -> list[Effect]:
    varied = {
        "2:8 layers of 7": [(n, headline_layers(sparse=n)) for n in (0, 3, MIXTURE, 7)],
        "tokens": [(n, headline_layers(tokens=n)) for n in (1, 32, TOKENS, 4096)],
    }
    found: list[Effect] = []
    for name, workloads in varied.items():
        gains = [headlines(hardware, layers) for _, layers in workloads]
        latency, energy = zip(*gains, strict=True)
        values = tuple(float(value) for value, _ in workloads)
        found.append(Effect(name, values, latency, energy, "A"))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _gains(
    hardware: Hardware, field: str, value: float, factor: float
) -> tuple[float, float, float] | None:
    changed = round(value * factor) if isinstance(value, int) else value * factor
    try:
        return (changed, *headlines(hardware.changed(**{field: changed})))
    except InputError:
        return None
