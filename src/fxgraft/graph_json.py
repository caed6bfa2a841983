"""A graph as JSON, and back without executing anything that the JSON says.

torch's own deserialiser hands strings from the file to ``sympy.sympify``, which evaluates them.
Here shapes are not stored at all (they are computed again), and a target is only ever looked up
among registered operators and a fixed table of functions.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from fxgraft.argument_json import decode_argument, encode_argument
from fxgraft.errors import SerializationError
from fxgraft.operators import qualified_name
from fxgraft.strict_json import fields

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# FX writes weight names into the code it generates, so nothing that could end a string.
_WEIGHT_NAME = re.compile(r"[A-Za-z0-9_+\-]+(\.[A-Za-z0-9_+\-]+)*")
_META = ("module", "source", "made_by")
_NAMESPACES = ("aten", "prims", "fxgraft")
# Operators outside those namespaces that capture or a pass leaves in a graph, and where they are
# defined.
_FOREIGN = {
    "transformers.grouped_mm_fallback.default": "transformers.integrations.moe",
    **dict.fromkeys(
        (
            "_c10d_functional.all_reduce.default",
            "_c10d_functional.all_gather_into_tensor.default",
            "_c10d_functional.wait_tensor.default",
        ),
        "torch.distributed",
    ),
}
# These reach outside the graph even when they are given fake tensors.
_REFUSED = ("aten.from_file", "aten._print")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "abs",
            "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "invert",
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in (
            "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt",
            "sym_sum",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}  # fmt: skip
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def encode_graph(graph: Graph, device: torch.device) -> list[dict[str, Any]]:
    """The nodes in order.

    Args:
        graph: to encode.
        device: the Program's own; arguments that name it follow the weights on loading.

    Raises:
        SerializationError: a node cannot be stored; names it.
    """
    return [_encode_node(node, device) for node in graph.nodes]


def decode_graph(nodes: list[Any]) -> Graph:
    """Build a graph (without shapes) from ``encode_graph``'s result.

    Raises:
        SerializationError: a node is malformed or calls something that is not allowed.
    """
    graph = Graph()
    known: dict[str, Node] = {}
    for index, record in enumerate(nodes):
        _decode_node(graph, known, record, f"node {index}")
    return graph


def check_weight_name(name: str) -> str:
    """The name, if it can stand in generated code.

    Raises:
        SerializationError: it cannot.
    """
    if _WEIGHT_NAME.fullmatch(name) is None:
        raise SerializationError(
            f"{name!r} is not allowed as the name of a weight",
            "use letters, digits, '_', '-' and '+' with '.' between them",
        )
    return name


def _encode_node(node: Node, device: torch.device) -> dict[str, Any]:
    where = f"node {node.name!r}"
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        raise SerializationError(
            f"{where} has the kind {node.op!r}", "store graphs of operator calls only"
        )
    return {
        "name": node.name,
        "op": node.op,
        "target": _encode_target(node, where),
        "args": [encode_argument(value, device, where) for value in node.args],
        "kwargs": {
            key: encode_argument(value, device, where) for key, value in node.kwargs.items()
        },
        "meta": {key: str(node.meta[key]) for key in _META if key in node.meta},
    }


def _decode_node(graph: Graph, known: dict[str, Node], record: object, where: str) -> None:
    raw = fields(
        record,
        where,
        {"name": str, "op": str, "target": str, "args": list, "kwargs": dict, "meta": dict},
    )
    name = _identifier(raw["name"], where)
    where = f"node {name!r}"
    if name in known:
        raise SerializationError(f"{where} occurs twice", "restore the file")
    target = _decode_target(raw["op"], raw["target"], where)
    args = tuple(decode_argument(value, known, where) for value in raw["args"])
    kwargs = {
        _identifier(key, where): decode_argument(value, known, where)
        for key, value in raw["kwargs"].items()
    }
    known[name] = graph.create_node(raw["op"], target, args, kwargs, name)
    known[name].meta.update(fields(raw["meta"], f"meta of {where}", {}, dict.fromkeys(_META, str)))


def _identifier(text: str, where: str) -> str:
    if _IDENTIFIER.fullmatch(text) is None or keyword.iskeyword(text):
        raise SerializationError(f"{where} uses {text!r} as a name", "restore the file")
    return text


def _encode_target(node: Node, where: str) -> str:
    if isinstance(node.target, str):
        return check_weight_name(node.target) if node.op == "get_attr" else node.target
    target = node.target
    if isinstance(target, OpOverload):
        name = f"{qualified_name(node).replace('::', '.')}.{cast(Any, target)._overloadname}"
    else:
        name = _FUNCTION_NAMES.get(target, "")
    if not name or _operator(name, where) is not target:
        raise SerializationError(
            f"{where} calls {target}, which a saved Program cannot hold",
            f"use operators of {', '.join(_NAMESPACES)}",
        )
    return name


def _decode_target(op: str, target: str, where: str) -> Any:
    if op == "call_function":
        return _operator(target, where)
    if op == "get_attr":
        return check_weight_name(target)
    if op not in ("placeholder", "output"):
        raise SerializationError(f"{where} has the kind {op!r}", "restore the file")
    return _identifier(target, where)


def _operator(name: str, where: str) -> Callable[..., Any]:
    try:
        return _find(name)
    except LookupError as error:
        raise SerializationError(
            f"{where} calls {name!r}, which is not allowed in a saved Program",
            "it may hold operators of aten, prims and fxgraft; a newer fxgraft may know more",
        ) from error


@cache
def _find(name: str) -> Callable[..., Any]:
    """Look an operator up by name; nothing but operators is found."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if name in _FOREIGN:
        importlib.import_module(_FOREIGN[name])
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.rpartition(".")
    allowed = namespace in _NAMESPACES or name in _FOREIGN
    if not allowed or f"{namespace}.{base}" in _REFUSED or not _IDENTIFIER.fullmatch(base):
        raise LookupError(name)
    packet: object = getattr(getattr(torch.ops, namespace), base, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        raise LookupError(name)
    found = getattr(cast(Any, packet), overload)
    # TorchScript adds operators of its own to aten (even one that writes files).
    if not cast(Any, torch._C)._dispatch_has_kernel(found.name()):  # pyright: ignore[reportPrivateUsage]
        raise LookupError(name)
    return found
