"""From the price of nodes to a step-cost table: parts on knots, memory, identity, error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.fx import Node

from fxgraft.cost_table import (
    Energy,
    Growing,
    HeldOut,
    Identity,
    Memory,
    Origin,
    Part,
    StepCostTable,
    Validity,
)
from fxgraft.cost_table_fit import fit
from fxgraft.cost_table_grid import Array
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError
from fxgraft.program import Program
from fxgraft.step_costs import Scope, StepGraph, Work
from fxgraft.step_memory import activation_bytes, state_memory, weight_bytes
from fxgraft.version import __version__

Priced = tuple[Array, Array | None]
"""Seconds and joules (None where unknown) of each node, [nodes, points]."""
Price = Callable[[Work], Priced]
_STEPS = 256


@dataclass(frozen=True)
class Ranges:
    """The largest steps that a table answers for.

    Attributes:
        tokens: new tokens of a step.
        sequences: of a step.
        new_tokens: of one prefill.
        context: tokens cached before a prefill, and keys of a decode.
    """

    tokens: int = 8192
    sequences: int = 256
    new_tokens: int = 8192
    context: int = 32768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"the largest {name} is {value}", "give at least 1")

    def validity(self, has_past: bool) -> Validity:
        """As a record; without steps nothing is cached and nothing decoded."""
        return Validity(
            tokens=(1, max(self.tokens, self.new_tokens)),
            sequences=(1, self.sequences),
            new_tokens=(1, self.new_tokens),
            context=(0, self.context if has_past else 0),
        )


@dataclass(frozen=True)
class Setting:
    """What a table says about itself.

    Attributes:
        backend, device, configuration: see ``Identity``.
        method: see ``Origin``.
        notes: assumptions.
        energy: what joules mean.
        capacity: bytes of the device's memory, None if unknown.
        weight_bytes: of all weights; None: by their number and type.
        launch_seconds: overhead per step, as a part of its own and in ``Origin``.
    """

    backend: str
    device: str
    configuration: str = ""
    method: Literal["formula", "roofline"] = "formula"
    notes: tuple[str, ...] = ()
    energy: Energy = field(default_factory=Energy)
    capacity: int | None = None
    weight_bytes: int | None = None
    launch_seconds: float = 0.0


def step_table(
    graph: StepGraph,
    price: Price,
    setting: Setting,
    ranges: Ranges | None = None,
    *,
    tolerance: float = 1e-3,
) -> StepCostTable:
    """Make a table.

    Args:
        graph: the step's nodes.
        price: of their work.
        setting: what the table says about itself.
        ranges: the largest steps.
        tolerance: error of interpolation that more knots are made for, relative to a part's price;
            or to a tenth of the cheapest step's, where that is more.

    Raises:
        InputError: the Program takes no tokens.
    """
    if not graph.has_tokens:
        raise InputError("the Program takes no tokens, so it has no steps", "cost it per call")
    ranges = ranges or Ranges()
    validity = ranges.validity(bool(graph.states))
    least = [float(v.sum()) for v in price(graph.work(1, 1, 0)) if v is not None]
    accuracy = {"tolerance": tolerance, "floor": [0.1 * value for value in least]}
    parts = [
        part
        for scope in ("tokens", "sequences", "context")
        for part in _parts(graph, price, scope, validity, accuracy)
    ]
    if setting.launch_seconds:
        joules = (0.0,) if setting.energy.source != "none" else None
        parts.append(Part(name="launch", per="step", axes={}, seconds=(setting.launch_seconds,),
                          joules=joules))  # fmt: skip
    table = StepCostTable(
        identity=identity(
            graph.model, graph.types, setting.backend, setting.device, setting.configuration
        ),
        memory=_memory(graph, setting, ranges),
        energy=setting.energy,
        origin=Origin(
            method=setting.method,
            points=sum(len(part.seconds) for part in parts),
            launch_seconds=setting.launch_seconds,
            notes=setting.notes,
        ),
        validity=validity,
        parts=tuple(parts),
    )
    error = _held_out(graph, price, table, setting.launch_seconds)
    return table.model_copy(update={"origin": table.origin.model_copy(update={"held_out": error})})


def _parts(
    graph: StepGraph, price: Price, scope: Scope, validity: Validity, accuracy: dict[str, Any]
) -> list[Part]:
    """Parts of all nodes of a scope, one per kind and phase."""
    kinds = dict.fromkeys(node.kind for node in graph.nodes if node.scope == scope)
    found: list[Part] = []
    for kind in kinds:
        chosen = [p for p, n in enumerate(graph.nodes) if (n.kind, n.scope) == (kind, scope)]
        for per, axes, at in _axes(scope, validity, bool(graph.states)):
            function = partial(_summed, graph, price, chosen, at)
            knots, values = fit(function, list(axes.values()), **accuracy)
            if values.any():
                found.append(
                    Part(
                        name=f"{kind} by {'sequences' if scope == 'sequences' else per}",
                        per=per,
                        axes=dict(zip(axes, knots, strict=True)),
                        seconds=tuple(values[0].ravel().tolist()),
                        joules=tuple(values[1].ravel().tolist()) if len(values) > 1 else None,
                    )
                )
    return found


_Sizes = Callable[[list[Array]], tuple[Any, Any, Any]]
_Axes = tuple[Literal["step", "prefill", "decode"], dict[str, tuple[int, int]], _Sizes]


def _axes(scope: Scope, validity: Validity, has_past: bool) -> list[_Axes]:
    """Where a scope's parts are looked up: per, range by axis, and batch, new, past at a point."""
    if scope == "tokens":
        return [("step", {"tokens": validity.tokens}, lambda p: (1, p[0], 0))]
    if scope == "sequences":
        return [("step", {"sequences": validity.sequences}, lambda p: (p[0], 1, 0))]
    new = {"new_tokens": validity.new_tokens}
    if not has_past:
        return [("prefill", new, lambda p: (1, p[0], 0))]
    context = {"context": validity.context}
    keys = {"context": (1, validity.context[1])}
    return [
        ("prefill", new | context, lambda p: (1, p[0], p[1])),
        ("decode", {"batch": validity.sequences} | keys, lambda p: (p[0], 1, p[1] - 1)),
    ]


def _summed(
    graph: StepGraph, price: Price, chosen: list[int], sizes: _Sizes, points: list[Array]
) -> Array:
    """Seconds and joules of some nodes together, [1 or 2, points]."""
    seconds, joules = price(graph.work(*sizes(points)).of(chosen))
    both = [seconds] if joules is None else [seconds, joules]
    return np.stack([values.sum(0) for values in both])


def _held_out(
    graph: StepGraph, price: Price, table: StepCostTable, launch: float
) -> HeldOut | None:
    """How far the table is from the price itself, at steps of one kind that are no knots."""
    rng = np.random.default_rng(0)
    valid = table.validity

    def draw(low: int, high: int, size: int = _STEPS) -> Array:
        found = np.exp(rng.uniform(np.log(max(low, 1)), np.log(max(high, 1)), size))
        return np.floor(found)

    news = draw(1, valid.new_tokens[1])
    pasts = draw(1, valid.context[1]) if graph.states else np.zeros(_STEPS)
    wanted = [price(graph.work(1, news, pasts))[0].sum(0)]
    found = [table.lookup("prefill", batch=1, new_tokens=news, context=pasts).seconds]
    if graph.states:
        batches, keys = draw(1, valid.sequences[1]), draw(1, valid.context[1])
        wanted.append(price(graph.work(batches, 1, keys - 1))[0].sum(0))
        found.append(table.lookup("decode", batch=batches, context=keys).seconds)
    exact = np.concatenate(wanted) + launch
    errors = np.abs(np.concatenate(found) - exact) / exact
    return HeldOut(
        mean=float(errors.mean()), p90=float(np.quantile(errors, 0.9)),
        maximum=float(errors.max()), steps=len(errors),
    )  # fmt: skip


def _memory(graph: StepGraph, setting: Setting, ranges: Ranges) -> Memory:
    types = graph.types
    growing, fixed = state_memory(graph.states, types)
    constant, per_token = activation_bytes(graph.program, types, min(ranges.new_tokens, 1024))
    weights = setting.weight_bytes
    return Memory(
        weights=weight_bytes(graph.program, types) if weights is None else weights,
        growing=tuple(Growing(bytes_per_token=size, limit=limit) for limit, size in growing),
        fixed_state=fixed,
        activations=constant,
        activations_per_token=per_token,
        capacity=setting.capacity,
    )


def identity(
    program: Program, types: ElementTypes, backend: str, device: str, configuration: str = ""
) -> Identity:
    """Which model, rewritten how, runs on what."""
    from fxgraft.collectives import share_of

    share = share_of(program)
    return Identity(
        model=str(program.origin.get("source") or program.origin.get("class") or "module"),
        graph=graph_hash(program),
        passes=tuple({"name": record.name, **record.config} for record in program.history),
        backend=backend,
        device=device,
        configuration=configuration,
        weights=types.weights,
        activations=types.activations,
        state=types.state,
        tensor_parallel=share.size if share else 1,
        versions={"fxgraft": __version__, "torch": str(torch.__version__)},
    )


def graph_hash(program: Program) -> str:
    """Hash of a graph: operators, arguments, and shapes of weights; not their values."""
    places: dict[Node, int] = {}
    digest = hashlib.sha256()
    for place, node in enumerate(program.graph.nodes):
        places[node] = place
        arguments = _spell((node.args, node.kwargs), places)
        target = str(node.target) if node.op != "placeholder" else str(node.name)
        digest.update(f"{node.op} {target} {arguments}\n".encode())
    for name, weight in sorted(program.weights(), key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
    return digest.hexdigest()[:16]


def _spell(value: Any, places: dict[Node, int]) -> str:
    if isinstance(value, Node):
        return f"%{places[value]}"
    if isinstance(value, dict):
        return str({str(key): _spell(item, places) for key, item in value.items()})  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_spell(item, places) for item in value)}]"  # pyright: ignore[reportUnknownVariableType]
    return repr(value)
