"""Running a Program block by block over many inputs, holding only what crosses between blocks.

A Program is cut where its blocks begin. Each part is run on all inputs before the next one, so
weights can be measured and replaced part by part, and memory stays at the values that cross.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxgraft.errors import Error, GraphError
from fxgraft.interpreter import describe_node
from fxgraft.layers import Layer
from fxgraft.program import Program

Values = dict[Node, Any]
"""Values of nodes that are still to be read."""

Watch = Callable[[tuple[Any, ...], Any], None]
"""Called with the arguments and the value of a node when it has run."""


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive nodes of a Program.

    Attributes:
        nodes: in graph order, without inputs and outputs.
        layer: the block that they belong to, None before the first one and after the last.
        reads: nodes of earlier parts that it reads.
        crossing: nodes, up to the end of this part, that later parts or the outputs read.
    """

    nodes: tuple[Node, ...]
    layer: Layer | None
    reads: tuple[Node, ...]
    crossing: frozenset[Node]


def parts_of(program: Program) -> list[Part]:
    """Cut a Program where its blocks begin, and after the last one."""
    nodes = [node for node in program.graph.nodes if node.op in ("call_function", "get_attr")]
    place = {node: index for index, node in enumerate(nodes)}
    layers = program.layers
    starts: list[tuple[int, Layer | None]] = [(place[layer.nodes[0]], layer) for layer in layers]
    if layers:
        starts.append((max(place[layer.nodes[-1]] for layer in layers) + 1, None))
    starts = [(0, None), *sorted(starts, key=lambda start: start[0])]
    ends = [start for start, _ in starts[1:]] + [len(nodes)]
    cuts = [
        (tuple(nodes[start:end]), layer) for (start, layer), end in zip(starts, ends, strict=True)
    ]
    # The last part is what follows the blocks, if only the outputs.
    kept = [index for index, cut in enumerate(cuts) if cut[0] or index == len(cuts) - 1]
    return [_part(program, index, cuts) for index in kept]


def _part(program: Program, index: int, cuts: list[tuple[tuple[Node, ...], Layer | None]]) -> Part:
    nodes, layer = cuts[index]
    inside = set(nodes)
    sources = (source for node in nodes for source in node.all_input_nodes)
    reads = tuple(dict.fromkeys(s for s in sources if s not in inside and s.op != "get_attr"))
    later = {node for following, _ in cuts[index + 1 :] for node in following}
    seen = (node for earlier, _ in cuts[: index + 1] for node in earlier)
    placeholders = program.graph.find_nodes(op="placeholder")
    crossing = frozenset(
        node
        for node in (*placeholders, *seen)
        if node.op != "get_attr" and any(u in later or u.op == "output" for u in node.users)
    )
    return Part(nodes, layer, reads, crossing)


def start(program: Program, inputs: Mapping[str, Tensor]) -> Values:
    """The values of the input nodes."""
    return dict(zip(program.placeholders, program.bind(**inputs), strict=True))


def run(
    part: Part,
    program: Program,
    values: Values,
    *,
    weights: Mapping[str, Tensor] | None = None,
    watch: Mapping[Node, Watch] | None = None,
) -> Values:
    """Run one part on one set of inputs.

    Args:
        part: of ``program``.
        program: whose weights are read.
        values: what crosses into the part; it is not changed.
        weights: values in place of the Program's weights, by name.
        watch: called when a node has run.

    Returns:
        What crosses to the next part; after the last one, the outputs' values.

    Raises:
        GraphError: an operator fails; names the node.
    """
    weights, watch = weights or {}, watch or {}
    known: Values = dict(values)
    last_reads = _last_reads(part)

    def value_of(node: Node) -> Any:
        if node.op != "get_attr":
            return known[node]
        name = str(node.target)
        return weights[name] if name in weights else program.weight(name)

    for node in part.nodes:
        if node.op == "get_attr":
            continue
        args = cast("tuple[Any, ...]", map_arg(node.args, value_of))
        kwargs = cast("dict[str, Any]", map_arg(node.kwargs, value_of))
        known[node] = _call(node, args, kwargs)
        if node in watch:
            watch[node](args, known[node])
        del args, kwargs
        for source in last_reads.get(node, ()):
            known.pop(source, None)
    return {node: value for node, value in known.items() if node in part.crossing}


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = cast(Callable[..., Any], node.target)
    try:
        return target(*args, **kwargs)
    except Error:
        raise
    except Exception as error:
        raise GraphError(
            f"{describe_node(node)} fails when it is run: {error}",
            "check the inputs that the model was given",
        ) from error


def _last_reads(part: Part) -> dict[Node, list[Node]]:
    """Values that nothing reads after a node of the part has."""
    last: dict[Node, Node] = {}
    for node in part.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[Node, list[Node]] = {}
    for source, node in last.items():
        if source not in part.crossing:
            found.setdefault(node, []).append(source)
    return found


def run_all(
    part: Part,
    program: Program,
    batches: list[Values],
    *,
    weights: Mapping[str, Tensor] | None = None,
    watch: Mapping[Node, Watch] | None = None,
) -> list[Values]:
    """``run`` on several sets of inputs, without gradients."""
    with torch.no_grad():
        return [run(part, program, batch, weights=weights, watch=watch) for batch in batches]


def outputs_of(program: Program, values: Values) -> dict[str, Tensor]:
    """The tensor outputs by name, from what crosses after the last part."""
    return {
        name: values[node]
        for name, node in program.output_nodes.items()
        if isinstance(values[node], Tensor)
    }
