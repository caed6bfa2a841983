"""Saving a Program to a folder and loading it again.

``program.json`` holds everything but the weights; they are in safetensors files beside it.
Loading executes nothing from the folder: the graph's operators are looked up by name among those
that are registered, and its shapes are computed again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.fx import GraphModule

from fxgraft import atomic, weight_files
from fxgraft import graph as graphs
from fxgraft.argument_json import dtype_name, dtype_of
from fxgraft.errors import SerializationError
from fxgraft.graph_json import check_weight_name, decode_graph, encode_graph
from fxgraft.history import Record, Size
from fxgraft.program import Default, Input, Program, Range
from fxgraft.strict_json import fields, parse, plain, typed, unplain
from fxgraft.symbolic import check_dynamic, derived_dimensions, fake_inputs, hints_of
from fxgraft.symbolic_json import decode_size, encode_size
from fxgraft.weight_files import Entry

FORMAT = "fxgraft.program"
VERSION = 1
FILE = "program.json"
_OPTIONAL_INT = (int, type(None))
_DOCUMENT: dict[str, type | tuple[type, ...]] = {
    "format": str, "version": int, "inputs": list, "outputs": list, "dimensions": dict,
    "origin": dict, "history": list, "weights": dict, "nodes": list,
}  # fmt: skip


def save(program: Program, folder: Path) -> Path:
    """Write a Program to a folder.

    A Program that was saved there before is replaced in one step, and is left as it was if
    anything fails; other files in the folder are kept.

    Args:
        program: with all weights present.
        folder: new, empty, or one that holds a saved Program.

    Returns:
        The folder.

    Raises:
        SerializationError: a node or weight cannot be stored, the folder holds something else, or
            the disk is full.
    """
    entries, tensors = weight_files.describe(program)
    document = _encode(program, entries)
    with atomic.replaced(folder, FILE, _is_ours) as temporary:
        weight_files.write(temporary, tensors)
        atomic.write_file(temporary / FILE, _dump(document))
    return folder


def load(folder: Path) -> Program:
    """Read a Program that ``save`` wrote; its weights stay memory-mapped, on the CPU.

    Raises:
        SerializationError: the folder holds no Program, a file is damaged, the Program comes from
            a newer version, or its graph holds something that is not allowed.
    """
    found = atomic.find(folder.expanduser())
    document = _read(found)
    entries = {
        check_weight_name(name): _decode_entry(record, f"weight {name!r}")
        for name, record in document["weights"].items()
    }
    graph = decode_graph(document["nodes"])
    weights = weight_files.read(found, entries)
    inputs = tuple(_decode_input(record, i) for i, record in enumerate(document["inputs"]))
    dimensions = _decode_dimensions(document["dimensions"])
    program = Program(
        _module(graph, weights),
        inputs,
        tuple(typed(name, "an output's name", str) for name in document["outputs"]),
        {name: dimension.range for name, dimension in dimensions.items()},
        unplain(document["origin"]),
        [_decode_record(record, index) for index, record in enumerate(document["history"])],
    )
    _check_interface(program)
    _compute_shapes(program, dimensions)
    return program


def _is_ours(name: str) -> bool:
    return name == FILE or weight_files.is_weight_file(name)


def _encode(program: Program, entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "inputs": [_encode_input(spec) for spec in program.inputs],
        "outputs": list(program.outputs),
        "dimensions": _encode_dimensions(program),
        "origin": plain(program.origin, "origin"),
        "history": [
            plain(dataclasses.asdict(record), f"history[{index}]")
            for index, record in enumerate(program.history)
        ],
        "weights": {name: dataclasses.asdict(entry) for name, entry in entries.items()},
        "nodes": encode_graph(program.graph, program.device),
    }


def _dump(document: Mapping[str, Any]) -> str:
    """One line per list item or dictionary entry, so that text tools can compare files."""
    parts: list[str] = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            items = cast("list[object]", value)
            text = "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise SerializationError(
            f"{folder} is no saved Program: it holds no {FILE}", "give a folder written by save"
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SerializationError(f"{file} cannot be read: {error}", "check the file") from error
    document = typed(parse(content, str(file)), str(file), dict)
    if document.get("format") != FORMAT:
        raise SerializationError(
            f"{file} is no saved Program: its format is {document.get('format')!r}",
            "give a folder written by save",
        )
    version = typed(document.get("version"), f"field 'version' of {file}", int)
    if version > VERSION:
        raise SerializationError(
            f"{file} has version {version}, this fxgraft reads up to {VERSION}", "upgrade fxgraft"
        )
    return fields(document, str(file), _DOCUMENT)


def _encode_input(spec: Input) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": dtype_name(spec.dtype),
        "shape": list(spec.shape),
        "default": spec.default,
        "high": spec.high,
        **({"names": list(spec.names)} if spec.names else {}),
        **({"fixed": list(spec.fixed)} if spec.fixed else {}),
    }


def _decode_input(record: object, index: int) -> Input:
    where = f"input {index}"
    kinds = {"name": str, "dtype": str, "shape": list, "default": str, "high": int}
    raw = fields(record, where, kinds, {"names": list, "fixed": list})
    if raw["default"] not in get_args(Default):
        raise SerializationError(
            f"{where} has the default {raw['default']!r}", "restore program.json"
        )
    shape = tuple(typed(size, f"a size of {where}", (int, str)) for size in raw["shape"])
    names = tuple(typed(name, f"a name of {where}", str) for name in raw.get("names", []))
    fixed = tuple(typed(value, f"a fixed value of {where}", int) for value in raw.get("fixed", []))
    sizes = [size for size in shape if isinstance(size, int)]
    if fixed and (len(sizes) < len(shape) or len(fixed) != math.prod(sizes)):
        raise SerializationError(
            f"{where} of shape {list(shape)} has {len(fixed)} fixed values", "restore program.json"
        )
    dtype = dtype_of(raw["dtype"], where)
    return Input(raw["name"], dtype, shape, raw["default"], raw["high"], names, fixed)


@dataclasses.dataclass(frozen=True)
class _Dimension:
    range: Range
    hint: int | None
    derived: sympy.Expr | None


def _encode_dimensions(program: Program) -> dict[str, Any]:
    hints, derived = hints_of(program), derived_dimensions(program)
    return {
        name: {
            "minimum": allowed.minimum,
            "maximum": allowed.maximum,
            "hint": hints.get(name),
            "derived": encode_size(derived[name]) if name in derived else None,
        }
        for name, allowed in program.dimensions.items()
    }


def _decode_dimensions(records: Mapping[str, object]) -> dict[str, _Dimension]:
    found: dict[str, _Dimension] = {}
    for name, record in records.items():
        where = f"dimension {name!r}"
        raw = fields(
            record,
            where,
            {"minimum": int, "maximum": _OPTIONAL_INT, "hint": _OPTIONAL_INT,
             "derived": (dict, str, int, type(None))},
        )  # fmt: skip
        derived = None if raw["derived"] is None else decode_size(raw["derived"], where)
        allowed = Range(raw["minimum"], raw["maximum"])
        found[name] = _Dimension(allowed, raw["hint"], derived)
    return found


def _decode_entry(record: object, where: str) -> Entry:
    kinds = {"tensor": str, "parameter": bool, "requires_grad": bool, "order": list}
    return Entry(**fields(record, where, kinds))


def _decode_record(record: object, index: int) -> Record:
    where = f"history[{index}]"
    number = (int, float)
    raw = fields(
        unplain(record),
        where,
        {"name": str, "config": dict, "effect": str, "seconds": number, "check_seconds": number,
         "before": dict, "after": dict, "error": (*number, type(None)), "check": str,
         "summary": list, "diff": dict},
    )  # fmt: skip
    sizes = {field.name: int for field in dataclasses.fields(Size)}
    for name in ("before", "after"):
        raw[name] = Size(**fields(raw[name], f"{name} of {where}", sizes))
    return Record(**raw)


def _module(graph: torch.fx.Graph, weights: Mapping[str, torch.Tensor]) -> GraphModule:
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in weights:
            raise SerializationError(
                f"node {node.name!r} reads the weight {node.target!r}, which is not stored",
                "restore program.json",
            )
    try:
        module = GraphModule(dict(weights), graph, class_name="Program")
        for name, weight in weights.items():
            graphs.set_weight(module, name, weight)
        graph.lint()
    except Exception as error:  # whatever torch.fx raises on a graph that makes no sense
        raise SerializationError(
            f"the graph in {FILE} cannot be rebuilt: {error}", "restore the file"
        ) from error
    return module


def _check_interface(program: Program) -> None:
    """The graph takes the described inputs and returns the described outputs."""
    names = [str(node.target) for node in program.placeholders]
    if names != [spec.name for spec in program.inputs]:
        raise SerializationError(
            f"{FILE} describes other inputs than its graph takes: {', '.join(names)}",
            "restore the file",
        )
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    values: Any = outputs[0].args[0] if len(outputs) == 1 and outputs[0].args else None
    if not isinstance(values, (tuple, list)) or len(cast(Any, values)) != len(program.outputs):
        raise SerializationError(
            f"{FILE} describes other outputs than its graph returns", "restore the file"
        )


def _compute_shapes(program: Program, dimensions: Mapping[str, _Dimension]) -> None:
    try:
        values = fake_inputs(
            program.inputs,
            program.dimensions,
            hints={n: d.hint for n, d in dimensions.items() if d.hint is not None},
            derived={n: d.derived for n, d in dimensions.items() if d.derived is not None},
        )
        for node, value in zip(program.placeholders, values, strict=True):
            node.meta["val"] = value
        graphs.propagate(program.graph_module)
        check_dynamic(values)
    except Exception as error:  # whatever an operator raises on inputs that do not fit it
        raise SerializationError(
            f"the shapes of the graph in {FILE} cannot be computed: {error}",
            "restore the folder; program.json and the weights must come from one save",
        ) from error
