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
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from fxgraft.errors import SerializationError
from fxgraft.strict_json import fields, typed

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# FX writes weight names into the code it generates, so nothing that could end a string.
_WEIGHT_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_META = ("module", "source", "made_by")
_NAMESPACES = ("aten", "prims", "fxgraft")
# Operators outside those namespaces that capture leaves in a graph, and where they are defined.
_FOREIGN = {"transformers.grouped_mm_fallback.default": "transformers.integrations.moe"}
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
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "meta")
OWN_DEVICE = "own"


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
            "use letters, digits, '_' and '-' with '.' between them",
        )
    return name


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, for example ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object, where: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        SerializationError: there is none.
    """
    return _lookup(_DTYPES, name, where, "dtype")


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
        "args": [_encode(value, device, where) for value in node.args],
        "kwargs": {key: _encode(value, device, where) for key, value in node.kwargs.items()},
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
    args = tuple(_decode(value, known, where) for value in raw["args"])
    kwargs = {
        _identifier(key, where): _decode(value, known, where)
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
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
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
    found = getattr(packet, overload)
    # TorchScript adds operators of its own to aten (even one that writes files).
    if not torch._C._dispatch_has_kernel(found.name()):
        raise LookupError(name)
    return found


def _encode(value: object, device: torch.device, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [_encode(item, device, where) for item in cast("list[object]", value)]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, device, where) for item in cast("tuple[Any]", value)]}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return {"slice": [_encode(part, device, where) for part in parts]}
    return _encode_leaf(value, device, where)


def _encode_leaf(value: object, device: torch.device, where: str) -> dict[str, Any]:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, float):
        return {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [str(value.real), str(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": OWN_DEVICE if value.type == device.type else str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    raise SerializationError(
        f"{where} has an argument of type {type(value).__name__}, which cannot be stored",
        "pass numbers, strings, dtypes, devices or nodes",
    )


def _decode(value: object, known: Mapping[str, Node], where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decode(item, known, where) for item in cast("list[object]", value)]
    entries = cast("dict[str, Any]", value)
    if len(entries) != 1:
        raise SerializationError(f"{where} has a malformed argument {entries}", "restore the file")
    ((tag, content),) = entries.items()
    if tag in ("tuple", "slice"):
        items = [_decode(i, known, where) for i in typed(content, f"a {tag} of {where}", list)]
        return tuple(items) if tag == "tuple" else _slice(items, where)
    return _decode_leaf(tag, content, known, where)


def _slice(parts: list[Any], where: str) -> slice:
    if len(parts) != 3:
        raise SerializationError(f"{where} has a malformed slice", "restore the file")
    return slice(*parts)


def _decode_leaf(tag: str, content: object, known: Mapping[str, Node], where: str) -> Any:
    if tag == "complex":
        parts = [_number(part, where) for part in typed(content, f"a number of {where}", list)]
        return complex(*parts[:2])
    if tag == "float":
        return _number(content, where)
    if tag == "device":
        return _device(typed(content, f"a device of {where}", str), where)
    tables: dict[str, Mapping[str, Any]] = {
        "node": known,
        "dtype": _DTYPES,
        "layout": _LAYOUTS,
        "memory_format": _MEMORY_FORMATS,
    }
    return _lookup(_lookup(tables, tag, where, "kind of argument"), content, where, tag)


def _number(text: object, where: str) -> float:
    try:
        return float(typed(text, f"a number of {where}", str))
    except ValueError:
        raise SerializationError(f"{where} has the number {text!r}", "restore the file") from None


def _device(name: str, where: str) -> torch.device:
    kind, _, index = name.partition(":")
    if name == OWN_DEVICE:
        return torch.device("cpu")
    if kind in _DEVICE_TYPES and (not index or index.isdecimal()):
        return torch.device(name)
    raise SerializationError(f"{where} has the device {name!r}", "restore the file")


def _lookup(table: Mapping[str, Any], name: object, where: str, kind: str) -> Any:
    if isinstance(name, str) and name in table:
        return table[name]
    raise SerializationError(f"{where} names the {kind} {name!r}, which does not exist here",
                             "restore the file, or use a newer fxgraft")  # fmt: skip
