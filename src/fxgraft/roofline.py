"""Step-cost tables from a Program and a device's peak rates.

The time of a node is the larger of its operations by the peak rate and its bytes by the bandwidth,
each scaled by an efficiency, plus the launch of its kernel. Elementwise work, norms and the like
are taken as fused into the kernels around them: they cost their operations, but no traffic and no
launch. Collectives follow the formulas of arXiv 2504.09775. Energy is the device's power over
that time: 30 % always, 40 % by the use of its arithmetic, 20 % by that of its memory, 10 % by that
of its links (ibid.).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxgraft import cost_rules
from fxgraft.collectives import share_of
from fxgraft.cost_table import Energy, StepCostTable
from fxgraft.cost_table_grid import Array
from fxgraft.devices import Device, device
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError
from fxgraft.operators import operator_of, qualified_name
from fxgraft.program import Program
from fxgraft.step_costs import KINDS, Kind, StepGraph, StepNode, Work
from fxgraft.step_tables import Priced, Ranges, Setting, step_table

_COLLECTIVE_START = 5e-6
_STATIC, _COMPUTE, _MEMORY, _LINKS = 0.30, 0.40, 0.20, 0.10


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that kernels reach.

    Attributes:
        compute, memory, links: above 0, at most 1.
    """

    compute: float = 0.75
    memory: float = 0.75
    links: float = 0.75

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise InputError(
                    f"efficiency {name!r} is {value}", "give a share above 0 and at most 1"
                )


def roofline_table(
    program: Program,
    on: Device | Mapping[str, Any] | str,
    types: ElementTypes | str,
    *,
    efficiency: Efficiency | Mapping[Kind, Efficiency] | None = None,
    ranges: Ranges | None = None,
) -> StepCostTable:
    """A step-cost table from peak rates.

    Args:
        program: a language model, or an encoder (its table prices whole sequences as prefills).
        on: a device, its fields, or its name in ``devices.yaml``.
        types: data types that the model is served in; required, as a factor of two hangs on it.
        efficiency: one for all kinds of nodes, or by kind; default 0.75 throughout.
        ranges: the largest steps that the table answers for.

    Raises:
        InputError: the device or type is unknown, or the Program takes no tokens.
        LoweringError: a node's operations are unknown; names it.
    """
    chosen, parsed = device(on), ElementTypes.parse(types)
    graph = StepGraph(program, parsed)
    graph.require_known()
    roofline = Roofline(chosen, parsed, _by_kind(efficiency), _size(program))
    notes = ["elementwise work is fused: operations, but no traffic and no launch"]
    if graph.without_steps:
        notes.append(f"whole sequences only: {graph.without_steps}")
    setting = Setting(
        backend="roofline", device=chosen.name, method="roofline", notes=tuple(notes),
        energy=Energy(source="formula", idle_watts=_STATIC * chosen.watts),
        capacity=int(chosen.memory), launch_seconds=chosen.step,
    )  # fmt: skip
    return step_table(graph, roofline.price, setting, ranges)


def _by_kind(value: Efficiency | Mapping[Kind, Efficiency] | None) -> Mapping[Kind, Efficiency]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(KINDS, value or Efficiency())
    unknown = sorted(set(value) - set(KINDS))
    if unknown:
        raise InputError(
            f"there is no kind of node {unknown[0]!r}", f"the kinds are: {', '.join(KINDS)}"
        )
    return {kind: value.get(kind, Efficiency()) for kind in KINDS}


def _size(program: Program) -> int:
    share = share_of(program)
    return share.size if share else 1


class Roofline:
    """Prices work on a device.

    Args:
        on: the device.
        types: of the model.
        efficiency: by kind of node.
        devices: that share the model.
    """

    def __init__(
        self, on: Device, types: ElementTypes, efficiency: Mapping[Kind, Efficiency], devices: int
    ) -> None:
        self.device, self.efficiency, self.devices = on, efficiency, devices
        self._peak = on.peak(types.products)
        if devices > 1 and on.link is None:
            raise InputError(
                f"device {on.name!r} has no link, and the Program is one of {devices} shares",
                "give the device a link",
            )

    def price(self, work: Work) -> Priced:
        """Seconds and joules of each node, [nodes, points]."""
        found = [self._node(node, work, place) for place, node in enumerate(work.nodes)]
        seconds = np.stack([pair[0] for pair in found]) if found else np.zeros((0, 0))
        joules = np.stack([pair[1] for pair in found]) if found else np.zeros((0, 0))
        return seconds, joules

    def _node(self, node: StepNode, work: Work, place: int) -> tuple[Array, Array]:
        flops, moved = work.flops[place], work.bytes[place]
        share = self.efficiency[node.kind]
        if node.kind == "collective":
            ideal = self._collective(node, work.bytes_written[place])
            return self._spend(ideal / share.links, links=ideal)
        is_matrix = node.kind in ("linear", "attention") or _is_matrix(node)
        compute = flops / (self._peak if is_matrix else self.device.vector)
        if node.kind == "other" and not is_matrix and not _gathers(node):
            moved = np.zeros_like(moved)
        memory = moved / self.device.bandwidth
        launch = self.device.launch * ((moved > 0) | (is_matrix & (flops > 0)))
        actual = np.maximum(compute / share.compute, memory / share.memory) + launch
        return self._spend(actual, compute=compute, memory=memory)

    def _spend(
        self, seconds: Array, *, compute: Any = 0.0, memory: Any = 0.0, links: Any = 0.0
    ) -> tuple[Array, Array]:
        """Time with its energy, given the ideal times of each unit."""
        used = _COMPUTE * compute + _MEMORY * memory + _LINKS * links
        return seconds, self.device.watts * (_STATIC * seconds + used)

    def _collective(self, node: StepNode, size: Array) -> Array:
        name = qualified_name(node.node)
        link, others = self.device.link, self.devices - 1
        if "wait_tensor" in name or link is None or not others:
            return np.zeros_like(size)
        rounds = 2 if "all_reduce" in name else 1
        moved = rounds * others / self.devices * size / link.bandwidth
        return np.where(size > 0, _COLLECTIVE_START + rounds * others * link.latency + moved, 0.0)


def _is_matrix(node: StepNode) -> bool:
    """Whether a node without a weight multiplies matrices."""
    return operator_of(node.node) is not None and cost_rules.is_product(node.node)


def _gathers(node: StepNode) -> bool:
    return cost_rules.base_name(node.node) in cost_rules.GATHERS
