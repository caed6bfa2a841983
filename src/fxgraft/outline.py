"""A Program in outline: a row per layer and per module around the layers, alike layers folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxgraft.describe import Describer, block_of, module_of
from fxgraft.diff import view_of
from fxgraft.diff_text import collapse, shorten
from fxgraft.layers import NO_MIXER, Layer
from fxgraft.program import Program


@dataclass(frozen=True)
class Op:
    """One node, with references relative to its module.

    Attributes:
        label: short name, unique within the module.
        call: ``aten.linear(input=norm.mul, weight=weight)``; ``residual`` is the residual
            stream that enters the layer.
        value: dtype and shape.
        source: the user's source line.
        made_by: the pass that made it, or empty.
    """

    label: str
    call: str
    value: str
    source: str
    made_by: str


@dataclass(frozen=True)
class Row:
    """A layer, or a module outside the layers, or several alike layers in a row.

    Attributes:
        title: module path; ``model.layers.{0..29}`` where several are folded.
        members: the paths that are folded.
        is_layer: whether it is a layer.
        mixer: what mixes tokens, empty if nothing does: ``attention [batch, 9, sequence, 64]``.
        mlp: the other linear layers, empty if there are none: ``3 linear, 1536 wide``.
        on_stream: whether the residual stream runs through it.
        stream: dtype and shape of the residual stream behind it, if it is a layer.
        modules: ops by module path relative to the row.
    """

    title: str
    members: tuple[str, ...]
    is_layer: bool
    mixer: str
    mlp: str
    on_stream: bool
    stream: str
    modules: tuple[tuple[str, tuple[Op, ...]], ...]

    @property
    def num_ops(self) -> int:
        """Number of ops in one member."""
        return sum(len(ops) for _, ops in self.modules)

    @property
    def size(self) -> str:
        """:attr:`num_ops` in words."""
        return "1 op" if self.num_ops == 1 else f"{self.num_ops} ops"

    @property
    def made_by(self) -> dict[str, int]:
        """How many ops each pass made in one member."""
        return dict(Counter(op.made_by for _, ops in self.modules for op in ops if op.made_by))


def outline(program: Program) -> list[Row]:
    """The rows of a Program in graph order."""
    describer = Describer(program)
    layers = {layer.path: layer for layer in program.layers}
    row_of = {node: layer.path for layer in layers.values() for node in layer.nodes}
    nodes: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            nodes.setdefault(row_of.get(node, block_of(module_of(node))), []).append(node)
    stream = _stream(program, layers.values())
    rows = [_row(describer, path, found, layers.get(path), stream) for path, found in nodes.items()]
    return _folded(rows)


def passes_of(rows: Iterable[Row]) -> list[str]:
    """The passes that made ops, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.made_by))


def _stream(program: Program, layers: Iterable[Layer]) -> set[Node] | None:
    """What the residual stream enters by or flows into; None if there are no layers."""
    entries = {layer.residual_in for layer in layers}
    if not entries:
        return None
    reached = {layer.residual for layer in layers}
    for node in program.graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return entries | reached


def _row(
    describer: Describer,
    path: str,
    nodes: list[Node],
    layer: Layer | None,
    stream: set[Node] | None,
) -> Row:
    modules: dict[str, list[Op]] = {}
    entry = describer.reference(layer.residual_in) if layer else ""
    for node in nodes:
        module = module_of(node)
        inner = module[len(path) :].lstrip(".") if module.startswith(path) else module
        modules.setdefault(inner, []).append(_op(describer, node, entry))
    return Row(
        title=path,
        members=(path,),
        is_layer=layer is not None,
        mixer=_mixer(describer, layer) if layer else "",
        mlp=_mlp(layer) if layer else "",
        on_stream=stream is None or layer is not None or any(node in stream for node in nodes),
        stream=describer.values[layer.residual] if layer else "",
        modules=tuple((name, tuple(ops)) for name, ops in modules.items()),
    )


def _op(describer: Describer, node: Node, entry: str) -> Op:
    """The node in words; ``entry`` is where the layer's residual stream comes from."""
    view = view_of(describer, node)
    module = module_of(node)
    arguments = ", ".join(
        f"{name}={''.join(_part(place, part, module, entry) for place, part in enumerate(text))}"
        for name, text in view.arguments
    )
    return Op(view.label, f"{view.op}({arguments})", view.value, view.source, view.made_by)


def _part(place: int, part: str, module: str, entry: str) -> str:
    if place % 2 == 0:
        return part
    return "residual" if part == entry else shorten(part, module)


def _mixer(describer: Describer, layer: Layer) -> str:
    if layer.kind == NO_MIXER:
        return ""
    shape = describer.values[layer.mixers[0]].partition("[")[2].partition("]")[0]
    return f"{layer.kind} [{shape}]"


def _mlp(layer: Layer) -> str:
    values = [node.meta["val"] for node in layer.mlp]
    widths = [value.shape[-1] for value in values if isinstance(value, torch.Tensor)]
    return f"{len(values)} linear, {max(widths)} wide" if widths else ""


def _folded(rows: list[Row]) -> list[Row]:
    """Neighbouring layers that differ in their path only, as one row."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and row.is_layer and _blank(groups[-1][0]) == _blank(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_fold(group) for group in groups]


def _blank(row: Row) -> Row:
    """The row without its number."""
    return replace(row, title=row.title.rpartition(".")[0], members=())


def _fold(group: list[Row]) -> Row:
    members = tuple(row.title for row in group)
    title = collapse((name, None) for name in members)[0][0]
    return replace(group[0], title=title or "(top level)", members=members)
