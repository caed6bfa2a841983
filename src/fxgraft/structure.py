"""The rules that every Program's graph keeps, and its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Node

from fxgraft.errors import GraphError, PassError
from fxgraft.history import Size
from fxgraft.kernels.spec import dims
from fxgraft.program import Program

_KINDS = frozenset({"placeholder", "get_attr", "call_function", "output"})


def verify(program: Program) -> None:
    """Check the rules of a Program's structure.

    1. Nodes are inputs, weight reads, calls of functions, and one output.
    2. Inputs and outputs are as many as the Program names.
    3. Every node has its value's shape in ``meta["val"]``.
    4. Dynamic dimensions are symbolic.

    Raises:
        GraphError: names the node or dimension, and the pass that inserted the node.
    """
    for node in program.graph.nodes:
        _verify_node(node)
    _verify_interface(program)
    _verify_dynamic(program)


def verify_outputs_kept(before: Program, after: Program) -> None:
    """Check that a rewrite removed no output.

    Raises:
        GraphError: names the output that is gone.
    """
    for name in before.outputs:
        if name not in after.outputs:
            raise GraphError(
                f"the output {name!r} is gone", "a pass may add outputs, not remove or rename them"
            )


def _verify_node(node: Node) -> None:
    maker = node.meta.get("made_by")
    where = f"node {node.name!r}" + (f", inserted by pass {maker!r}," if maker else "")
    if node.op not in _KINDS:
        raise GraphError(
            f"{where} is a {node.op}, which a Program may not hold",
            "insert calls of operators with fxgraft.graph.insert",
        )
    if node.op != "output" and "val" not in node.meta:
        raise GraphError(
            f"{where} has no shape", "insert nodes with fxgraft.graph.insert, which gives them one"
        )


def _verify_interface(program: Program) -> None:
    found, named = len(program.placeholders), len(program.inputs)
    if found != named:
        raise GraphError(
            f"the graph has {found} inputs, the Program names {named}",
            "change `program.inputs` together with the placeholders",
        )
    values = program.graph.output_node().args[0]
    count = len(values) if isinstance(values, (tuple, list)) else 1
    if count != len(program.outputs):
        raise GraphError(
            f"the graph has {count} outputs, the Program names {len(program.outputs)}",
            "change `program.outputs` together with the output node",
        )


def _verify_dynamic(program: Program) -> None:
    for spec, node in zip(program.inputs, program.placeholders, strict=True):
        for name, size in zip(spec.shape, dims(node), strict=True):
            if isinstance(name, str) and not size.free_symbols:
                raise GraphError(
                    f"dimension {name!r} of input {spec.name!r} was frozen to {size}",
                    "a rewrite compared this dimension with a number; use sizes that are symbolic",
                )


@dataclass
class WeightGuard:
    """Notices weights that were changed in place, which would change the caller's model."""

    versions: dict[str, tuple[torch.Tensor, int]] = field(
        default_factory=dict[str, tuple[torch.Tensor, int]]
    )

    @classmethod
    def watch(cls, program: Program) -> WeightGuard:
        """Remember the weights as they are."""
        tracked = ((name, w) for name, w in program.weights() if not w.is_inference())
        return cls({name: (weight, weight._version) for name, weight in tracked})

    def verify(self, owner: str) -> None:
        """Check that no weight was changed in place since.

        Raises:
            PassError: names the weight and the pass.
        """
        for name, (weight, version) in self.versions.items():
            if weight._version != version:
                raise PassError(
                    f"pass {owner!r} changed the weight {name!r} in place, and with it the model "
                    "it came from",
                    "make a new tensor and store it with program.set_weight; reload the model",
                )


def measure(program: Program, sizes: Mapping[str, int]) -> Size:
    """How large a Program is, its operations counted at the given sizes of its dimensions.

    A size that depends on data, such as the number of tokens of an expert, counts as 1.
    """
    flops = program.cost(**sizes).total.flops
    unknown = dict.fromkeys(flops.free_symbols, 1)
    return Size(
        nodes=len(program.graph.nodes),
        parameters=program.count_parameters(),
        bytes=program.count_bytes(),
        flops=int(cast(Any, flops).subs(unknown)),
    )
