"""What an operator's schema says about a graph node."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Node


def operator_of(node: Node) -> Any:
    """The operator that a node calls (a ``torch._ops.OpOverload``), or None."""
    is_call = node.op == "call_function" and isinstance(node.target, OpOverload)
    return cast(Any, node).target if is_call else None


def qualified_name(node: Node) -> str:
    """Name with namespace and without overload, ``"aten::add"``; empty if it is no operator."""
    target = operator_of(node)
    return str(target._schema.name) if target is not None else ""


def argument_names(node: Node) -> list[str]:
    """Names of the operator's arguments."""
    return [str(argument.name) for argument in operator_of(node)._schema.arguments]


def writes(node: Node) -> bool:
    """Whether the operator changes some of its arguments."""
    target = operator_of(node)
    return target is not None and bool(target._schema.is_mutable)


def aliases_input(node: Node) -> bool:
    """Whether the operator may return its input's memory, unchanged."""
    target = operator_of(node)
    if target is None:
        return False
    if torch.Tag.inplace_view in target.tags:
        return True
    returned = target._schema.returns
    alias = returned[0].alias_info if returned else None
    return alias is not None and not alias.is_write
