"""Programs of one operator, and running them in onnxruntime."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxgraft import graph as graphs
from fxgraft.backends.onnx.graph_model import translate
from fxgraft.backends.onnx.options import OnnxOptions
from fxgraft.backends.onnx.session import Session, to_ort, to_torch
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.program import Input, Program, Range
from fxgraft.symbolic import fake_inputs

Shapes = Mapping[str, Sequence[int | str]]


def program_of(
    target: Any, values: Mapping[str, Tensor], shapes: Shapes, options: Mapping[str, Any]
) -> Program:
    """A Program of one node that gets its tensors as inputs.

    Args:
        target: the operator.
        values: its tensor arguments; they give the element types.
        shapes: their shapes, dynamic sizes by name.
        options: its other arguments.
    """
    graph = Graph()
    inputs = tuple(Input(name, v.dtype, tuple(shapes[name])) for name, v in values.items())
    placeholders = {name: graph.placeholder(name) for name in values}
    node = graph.call_function(target, (), {**placeholders, **options})
    count = len(target._schema.returns)
    graph.output(
        (node,)
        if count == 1
        else tuple(graph.call_function(operator.getitem, (node, n)) for n in range(count))
    )
    names = {name for spec in inputs for name in spec.shape if isinstance(name, str)}
    dimensions = {name: Range() for name in sorted(names)}
    for placeholder, fake in zip(
        placeholders.values(), fake_inputs(inputs, dimensions), strict=True
    ):
        placeholder.meta["val"] = fake
    module = GraphModule(nn.Module(), graph)
    graphs.propagate(module)
    outputs = tuple(f"out_{place}" for place in range(count))
    return Program(module, inputs, outputs, dimensions)


class Runner:
    """A Program in onnxruntime."""

    def __init__(
        self, program: Program, folder: Path, opset: int = 18, *, is_decode: bool = False
    ) -> None:
        graph = translate(program, opset, is_decode=is_decode)
        graph.write(folder / "model.onnx", WeightFile(folder))
        names = (graph.input_names, graph.output_names)
        self._session = Session(folder / "model.onnx", *names, OnnxOptions())
        self.operators = [node.op for node in graph.builder.nodes]

    def __call__(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        given = [to_ort(values[name]) for name in self._session.inputs]
        return [to_torch(value) for value in self._session.run(given)]
