"""A Program as an ONNX model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.fx import Node

from fxgraft.backends.onnx.assembler import Assembler
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.functional import functional
from fxgraft.backends.onnx.model_file import Port, to_model
from fxgraft.backends.onnx.naming import DimensionNames
from fxgraft.backends.onnx.translate import Shared, Translation
from fxgraft.backends.onnx.types import ELEMENT_TYPES, stored_dtype
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.errors import LoweringError
from fxgraft.kernels.spec import dims
from fxgraft.program import Program


@dataclass(frozen=True)
class GraphModel:
    """A Program translated to an ONNX graph.

    Attributes:
        builder: the graph.
        inputs: in the order of the Program's.
        outputs: in the order of the Program's.
        counts: how many nodes of each operator the Program has.
        used: the ONNX operators that they became.
    """

    builder: Assembler
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    counts: Counter[str]
    used: dict[str, set[str]]

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs in order."""
        return [port.value.name for port in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs in order."""
        return [port.value.name for port in self.outputs]

    def write(self, path: Path, weights: WeightFile) -> None:
        """Write the model, and its large weights to their file.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        proto = to_model(self.builder, self.inputs, self.outputs, weights, path.stem)
        path.write_bytes(proto.SerializeToString())


def translate(
    program: Program,
    opset: int,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    is_decode: bool = False,
) -> GraphModel:
    """Translate a Program.

    Args:
        program: with weight values.
        opset: ONNX opset.
        inputs: names of the inputs, default the Program's.
        outputs: names of the outputs, default the Program's.
        is_decode: whether it is a step graph for one new token per row.

    Raises:
        LoweringError: a node has no ONNX form; names it.
    """
    _check_weights(program)
    program = functional(program)
    b = Assembler(opset)
    output_names = list(outputs or program.outputs)
    for name in output_names:
        b.reserve(name)
    given = [
        b.input(_checked(node.meta["val"].dtype, node.name), name)
        for node, name in zip(
            program.placeholders, inputs or [spec.name for spec in program.inputs], strict=True
        )
    ]
    shared = Shared(is_decode=is_decode, maxima=_maxima(program))
    results = Translation(program.graph_module, b, shared).run(given)
    names = DimensionNames(program)
    return GraphModel(
        b,
        _ports(given, program.placeholders, names),
        _ports(b.outputs(results, output_names), _output_nodes(program), names),
        shared.counts,
        dict(shared.used),
    )


def _ports(
    values: Sequence[Value], nodes: Sequence[Node], names: DimensionNames
) -> tuple[Port, ...]:
    pairs = zip(values, nodes, strict=True)
    return tuple(Port(value, names.shape(node)) for value, node in pairs)


def _output_nodes(program: Program) -> list[Node]:
    return list(program.graph.output_node().args[0])  # pyright: ignore


def _check_weights(program: Program) -> None:
    for name, weight in program.weights():
        if weight.device.type != "cpu":
            raise LoweringError(
                f"weight {name!r} is on device {weight.device.type!r} and cannot be written",
                "load the weights on the CPU, for example capture(model.cpu())",
            )
        if stored_dtype(weight.dtype) not in ELEMENT_TYPES:
            raise LoweringError(
                f"weight {name!r} has the element type {weight.dtype}, which ONNX files here "
                "cannot hold",
                "convert it to float32 or float16",
            )


def _checked(dtype: torch.dtype, name: str) -> torch.dtype:
    if stored_dtype(dtype) not in ELEMENT_TYPES:
        raise LoweringError(
            f"input {name!r} has the element type {dtype}, which ONNX runtimes do not take",
            "convert the model to float32 or float16",
        )
    return dtype


def _maxima(program: Program) -> dict[sympy.Symbol, int]:
    found: dict[sympy.Symbol, int] = {}
    for spec, node in zip(program.inputs, program.placeholders, strict=True):
        for name, size in zip(spec.shape, dims(node), strict=True):
            if isinstance(name, str) and isinstance(size, sympy.Symbol):
                limit = program.dimensions[name].maximum
                if limit is not None:
                    found[size] = limit
    return found
