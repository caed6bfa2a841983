"""Linear layers on prepacked weights, for steps over few rows on a CPU.

oneDNN keeps a packed copy of each weight. Over eight rows a product then takes a third of the
time of ``aten.linear``, which packs anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import argument
from fxgraft.paged_model import RunPages

aten = torch.ops.aten
# The rows that weights are packed for; any other number is computed too.
_ROWS = 8


def packed_runner(module: GraphModule) -> RunPages:
    """A function that runs a graph of one output with packed weights; the graph is changed."""
    if torch.backends.mkldnn.is_available():
        for node in list(module.graph.nodes):
            if node.target is aten.linear.default and _is_packable(module, node):
                _pack(module, node)
        graphs.finish(module)

    def run(values: Sequence[Tensor], *, fresh: bool) -> Tensor:
        return module(*values)[0]

    return run


def _is_packable(module: GraphModule, node: Node) -> bool:
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return False
    value = graphs.weight_of(module, str(weight.target))
    return value.device.type == "cpu" and value.dtype == torch.float32 and value.dim() == 2


def _pack(module: GraphModule, node: Node) -> None:
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    name = f"{weight.target}".replace(".", "_") + "_packed"
    if not hasattr(module, name):
        value = graphs.weight_of(module, str(weight.target)).detach()
        packed = cast(Any, torch.ops.mkldnn)._reorder_linear_weight(value, _ROWS)
        module.register_buffer(name, packed, persistent=False)
    with module.graph.inserting_before(node):
        read = module.graph.get_attr(name)
        args: Any = (x, read, argument(node, "bias"), "none", [], "")
        call = module.graph.call_function(torch.ops.mkldnn._linear_pointwise.default, args)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)
