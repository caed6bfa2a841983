"""Cut a graph into one region per layer, so that equal layers are compiled once.

A region is a run of consecutive nodes. Everything it reads from outside, weights included,
becomes an argument; two regions with the same text and the same argument shapes are the same
region and share one compiled function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxgraft import graph as graphs

_LAYER = re.compile(r"^(?:.*?\.)?\w+\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Region:
    """One piece of a graph.

    Attributes:
        module: the piece as a graph of its own.
        reads: outer nodes that its placeholders stand for, in order.
        writes: outer nodes that its outputs stand for, in order.
        key: equal for regions that may share compiled code.
    """

    module: GraphModule
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    key: str


def split(module: GraphModule) -> list[Region]:
    """Cut ``module`` into regions, in execution order."""
    runs: list[list[Node]] = []
    previous: str | None = None
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        layer = _layer_of(node, previous)
        if not runs or layer != previous:
            runs.append([])
        runs[-1].append(node)
        previous = layer
    return [_region(run, module) for run in runs]


def _layer_of(node: Node, previous: str | None) -> str:
    path = node.meta.get("module")
    if not path:
        return previous or ""
    match = _LAYER.match(path)
    return match[0].rstrip(".") if match else ""


def _region(run: list[Node], owner: GraphModule) -> Region:
    inside = set(run)
    reads = list(dict.fromkeys(s for n in run for s in n.all_input_nodes if s not in inside))
    writes = [n for n in run if any(user not in inside for user in n.users)]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for index, source in enumerate(reads):
        copies[source] = graph.placeholder(f"arg_{index}")
        copies[source].meta = {"val": source.meta["val"]}
    for index, node in enumerate(run):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].name = f"node_{index}"
    graph.output(tuple(copies[node] for node in writes))
    module = GraphModule(torch.nn.Module(), graph, class_name="Region")
    return Region(module, tuple(reads), tuple(writes), _key(graph))


def _key(graph: Graph) -> str:
    lines: list[str] = []
    number: dict[Node, int] = {}
    for node in graph.nodes:
        number[node] = len(number)
        args = map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        value = node.meta.get("val")
        shape = graphs.signature(value) if node.op == "placeholder" else ""
        lines.append(f"{node.op} {node.target if node.op != 'placeholder' else ''} {args} {shape}")
    return "\n".join(lines)


class RegionRunner:
    """Runs a graph region by region.

    Args:
        module: the graph.
        compile_region: makes a callable from a region's graph and its example arguments;
            called once per distinct region.
    """

    def __init__(
        self, module: GraphModule, compile_region: Callable[[GraphModule], Callable[..., Any]]
    ) -> None:
        self.regions = split(module)
        compiled: dict[str, Callable[..., Any]] = {}
        self._weights: dict[Node, torch.Tensor] = {
            node: graphs.weight_of(module, str(node.target)).detach()
            for node in module.graph.nodes
            if node.op == "get_attr"
        }
        self._placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._results = module.graph.output_node().args[0]
        self._plan: list[tuple[Callable[..., Any], list[int], list[int]]] = []
        self._slots: dict[Node, int] = {}
        for node in (*self._placeholders, *self._weights):
            self._slot(node)
        for region in self.regions:
            if region.key not in compiled:
                compiled[region.key] = compile_region(region.module)
            reads = [self._slot(node) for node in region.reads]
            writes = [self._slot(node) for node in region.writes]
            self._plan.append((compiled[region.key], reads, writes))
        self.distinct = len(compiled)
        self._outputs = [self._slots[node] for node in self._results]  # pyright: ignore

    def _slot(self, node: Node) -> int:
        return self._slots.setdefault(node, len(self._slots))

    def __call__(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        slots: list[Any] = [None] * len(self._slots)
        slots[: len(values)] = values
        for node, weight in self._weights.items():
            slots[self._slots[node]] = weight
        for function, reads, writes in self._plan:
            results = function(*[slots[index] for index in reads])
            for index, result in zip(writes, results, strict=True):
                slots[index] = result
        return [slots[index] for index in self._outputs]
