"""From a Builder to an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from fxgraft.backends.onnx.builder import Attribute, Body, Builder, OnnxNode, Value
from fxgraft.backends.onnx.types import element_type
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.version import __version__

Shape = Sequence[int | str] | None


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        value: the tensor.
        shape: its sizes, dynamic ones by name; None if they are left open.
    """

    value: Value
    shape: Shape


def to_model(
    b: Builder, inputs: Sequence[Port], outputs: Sequence[Port], weights: WeightFile, name: str
) -> ModelProto:
    """Write a graph as an ONNX model.

    Args:
        b: the graph.
        inputs: in order.
        outputs: in order; each has a value of its own that is computed by a node.
        weights: where constants go.
        name: of the graph.
    """
    nodes, constants = _needed(b, [port.value for port in outputs])
    graph = helper.make_graph(
        [_node(node) for node in nodes],
        name,
        [_port(port) for port in inputs],
        [_port(port) for port in outputs],
        [weights.initializer(value) for value in constants],
    )
    opset = [helper.make_opsetid("", b.opset)]
    return helper.make_model(
        graph,
        opset_imports=opset,
        ir_version=helper.find_min_ir_version_for(opset),
        producer_name="fxgraft",
        producer_version=__version__,
    )


def _needed(b: Builder, outputs: Sequence[Value]) -> tuple[list[OnnxNode], list[Value]]:
    """The nodes and constants that the outputs depend on."""
    wanted: set[Value] = set(outputs)
    nodes: list[OnnxNode] = []
    for node in reversed(b.nodes):
        if wanted.isdisjoint(node.outputs):
            continue
        nodes.append(node)
        wanted.update(value for value in _reads(node) if value is not None)
    return nodes[::-1], [value for value in b.constants if value in wanted]


def _reads(node: OnnxNode) -> Sequence[Value | None]:
    inner = [
        value
        for body in node.attributes.values()
        if isinstance(body, Body)
        for nested in _needed(body.builder, body.outputs)[0]
        for value in _reads(nested)
    ]
    return [*node.inputs, *inner]


def _node(node: OnnxNode) -> NodeProto:
    proto = helper.make_node(
        node.op,
        ["" if value is None else value.name for value in node.inputs],
        [value.name for value in node.outputs],
        name=f"{node.origin}/{node.outputs[0].name}",
    )
    for name, value in node.attributes.items():
        proto.attribute.append(helper.make_attribute(name, _attribute(value)))
    return proto


def _attribute(value: Attribute) -> object:
    return _body(value) if isinstance(value, Body) else value


def _body(body: Body) -> GraphProto:
    nodes, _ = _needed(body.builder, body.outputs)
    return helper.make_graph(
        [_node(node) for node in nodes],
        "body",
        [_port(Port(value, value.shape)) for value in body.inputs],
        [_port(Port(value, None)) for value in body.outputs],
    )


def _port(port: Port) -> ValueInfoProto:
    dtype = port.value.dtype
    assert dtype is not None
    return helper.make_tensor_value_info(port.value.name, element_type(dtype), port.shape)
