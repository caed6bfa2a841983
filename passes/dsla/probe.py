"""A graph that computes, for chosen layers, what the teacher's attention and the student's give."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.layers import find_layers
from fxgraft.passes.dsla.form import Form, stored
from fxgraft.passes.dsla.rewrite import Branch, add_branch, replace_attention
from fxgraft.passes.dsla.sites import Site, find_sites
from fxgraft.program import Program

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What one layer computes for a batch.

    Attributes:
        teacher, student: output of the attention block, [B, S, hidden].
        heads: output of the softmax attention [B, Hq, S, Dv].
        gate: gate logits [B, S, H, N, D].
    """

    teacher: Tensor
    student: Tensor
    heads: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Probe:
    """A student whose chosen layers also compute the teacher's attention.

    Attributes:
        program: its outputs are those of ``Seen`` for each layer, then the logits if wanted.
        layers: the chosen layers.
        names: for each, names of its weights in the Program by their own name.
        dtype: of the model.
    """

    program: Program
    layers: tuple[int, ...]
    names: tuple[dict[str, str], ...]
    dtype: torch.dtype

    def __call__(
        self, ids: Tensor, parameters: Sequence[dict[str, Tensor]]
    ) -> tuple[list[Seen], Tensor | None]:
        """Run a batch with these parameters of the chosen layers; differentiable in them.

        Args:
            ids: tokens int64 [B, S].
            parameters: of each chosen layer.

        Returns:
            What each layer computes, and the logits if the probe has them.
        """
        weights: dict[str, Tensor] = {}
        for names, values in zip(self.names, parameters, strict=True):
            ready = stored(dict(values), self.dtype)
            weights |= {names[name]: value for name, value in ready.items()}
        inputs = self.program.bind(ids)
        outputs = cast(
            "tuple[Tensor, ...]",
            torch.func.functional_call(self.program.graph_module, weights, tuple(inputs)),  # pyright: ignore[reportUnknownMemberType]
        )
        seen = [Seen(*outputs[4 * n : 4 * n + 4]) for n in range(len(self.layers))]
        return seen, outputs[-1] if len(outputs) % 4 else None


def student_of(program: Program, form: Form, trained: Sequence[tuple[int, Parameters]]) -> Program:
    """A copy of a Program with trained layers in the place of their softmax attention."""
    student = program.copy()
    by_layer = _sites(student)
    for layer, parameters in trained:
        replace_attention(add_branch(student, by_layer[layer], form, parameters))
    graphs.finish(student.graph_module)
    return student


def probe_of(
    program: Program,
    form: Form,
    trained: Sequence[tuple[int, Parameters]],
    new: Sequence[tuple[int, Parameters]],
    *,
    logits: bool = False,
) -> Probe:
    """A probe of the layers ``new`` in a student whose ``trained`` layers are converted.

    Args:
        program: the teacher.
        form: of converted layers.
        trained: layers and parameters that stay as they are.
        new: layers and first parameters that are to be trained.
        logits: whether to compute the logits too.
    """
    student = student_of(program, form, trained)
    _freeze(student)
    by_layer = _sites(student)
    outputs: list[Node] = []
    names: list[dict[str, str]] = []
    dtype = torch.float32
    for layer, parameters in new:
        site = by_layer[layer]
        branch = add_branch(student, site, form, parameters)
        teacher, result = _fork(student, branch)
        outputs += [teacher, result, site.mixer, branch.gate]
        names.append(branch.weights)
        dtype = site.key.meta["val"].dtype
    if logits:
        outputs.append(student.output_nodes["logits"])
    _set_outputs(student, outputs)
    return Probe(student, tuple(layer for layer, _ in new), tuple(names), dtype)


def taps(program: Program, layers: Sequence[int], *, logits: bool = False) -> Program:
    """A copy whose outputs are the attention blocks' outputs of some layers of the teacher."""
    copy = program.copy()
    by_layer = _sites(copy)
    outputs = [_end(copy, by_layer[layer].mixer) for layer in layers]
    if logits:
        outputs.append(copy.output_nodes["logits"])
    _set_outputs(copy, outputs)
    return copy


def attention_inputs(program: Program, sites: Collection[int]) -> Program:
    """A copy whose outputs are queries and keys, as the attention gets them, of some layers."""
    copy = program.copy()
    by_layer = _sites(copy)
    chosen = [by_layer[layer] for layer in sites]
    _set_outputs(copy, [node for site in chosen for node in (site.query, site.key)])
    return copy


def _sites(program: Program) -> dict[int, Site]:
    return {site.layer: site for site in find_sites(program)[0]}


def _freeze(program: Program) -> None:
    """Weights take no gradient; they still share memory with the teacher's."""
    for name, weight in list(program.weights()):
        if weight.requires_grad:
            graphs.set_weight(program.graph_module, name, weight.detach())


def _end(program: Program, mixer: Node) -> Node:
    """The output of the attention block: its output projection, or the attention itself."""
    layer = next(layer for layer in find_layers(program) if mixer in layer.mixers)
    return layer.projections_of(mixer).get("output", mixer)


def _fork(program: Program, branch: Branch) -> tuple[Node, Node]:
    """Give the branch an output projection of its own; later layers read the student's."""
    mixer = branch.site.mixer
    end = _end(program, mixer)
    copies: dict[Node, Node] = {mixer: branch.output}
    users = list(end.users)
    for node in _between(mixer, end):
        with program.graph.inserting_before(end if node is not end else end.next):
            copy = program.graph.node_copy(node, lambda n: copies.get(n, n))
        copy.meta = dict(node.meta)
        copies[node] = copy
    for user in users:
        user.replace_input_with(end, copies[end])
    return end, copies[end]


def _between(start: Node, end: Node) -> list[Node]:
    """Nodes on the way from one to the other, the last one included, in graph order."""
    reached = {start}
    for node in start.graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    needed, pending = set[Node](), [end]
    while pending:
        node = pending.pop()
        if node in reached and node is not start and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in start.graph.nodes if node in needed]


def _set_outputs(program: Program, outputs: Sequence[Node]) -> None:
    program.graph.output_node().args = (tuple(outputs),)
    program.outputs = tuple(f"seen_{number}" for number in range(len(outputs)))
    graphs.finish(program.graph_module)


def hidden_size(site: Site) -> int:
    """Width of what a layer's gates may read."""
    value: Any = site.hidden.meta["val"]
    return int(value.shape[2])
