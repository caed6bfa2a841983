"""What depends on weights alone is computed while translating, where the result is small.

Views of weights (transposes, slices) are folded whatever their size: they cost no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.types import stored_dtype
from fxgraft.operators import aliases_input, operator_of

_LARGEST = 1 << 20
_ENUMERATED = 1 << 16


def fold(node: Node, value_of: Callable[[Node], Value | None]) -> Tensor | None:
    """The node's result if it depends on constants alone and is worth keeping, else None.

    Args:
        node: calls an operator.
        value_of: the ONNX value of a tensor node.
    """
    result = node.meta["val"]
    if not isinstance(result, Tensor) or result.is_complex() or not _is_foldable(node):
        return None
    if any(isinstance(size, torch.SymInt) for size in result.shape):
        return None
    largest = _LARGEST if node.all_input_nodes else _ENUMERATED
    if not aliases_input(node) and result.numel() > largest:
        return None
    values = {source: value_of(source) for source in node.all_input_nodes}
    if any(value is None or value.constant is None for value in values.values()):
        return None
    if any(source.meta["val"].is_complex() for source in values):
        return None

    def data(source: Node) -> Tensor:
        value = values[source]
        assert value is not None
        assert value.constant is not None
        constant = value.constant
        return constant if aliases_input(node) else constant.to(stored_dtype(constant.dtype))

    args, kwargs = map_arg(node.args, data), map_arg(node.kwargs, data)
    with torch.no_grad():
        return node.target(*args, **{**kwargs, **_on_cpu(node)})  # pyright: ignore


def _on_cpu(node: Node) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if "device" in node.kwargs else {}


def _is_foldable(node: Node) -> bool:
    target = operator_of(node)
    if target is None or target._schema.is_mutable:
        return False
    return not (torch.Tag.nondeterministic_seeded in target.tags or target.namespace == "fxgraft")
