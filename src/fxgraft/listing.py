"""A Program as Python-like text that a person can read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.fx import Node

from fxgraft.describe import Describer, Pieces, module_of
from fxgraft.graph import short_target

if TYPE_CHECKING:
    from fxgraft.history import Record
    from fxgraft.program import Program

_INDENT = "    "


def as_text(program: Program) -> str:
    """One line per op, ``name = op(arguments)  # dtype[shape]``, in graph order.

    Above it stand the module's path where it changes, and the user's source line where that
    changes. Weights are read by name. The header names the model, its inputs and outputs, and
    the passes that ran.
    """
    return "\n".join([*_header(program), *_body(Describer(program))])


def headline(program: Program) -> str:
    """What the Program is: the model's class and where it came from."""
    source, name = program.origin.get("source"), program.origin.get("class", "Program")
    return f"{name} from {source}" if source else str(name)


def subtitle(program: Program) -> str:
    """The Program's size, and the passes that ran."""
    passes = ", ".join(record.name for record in program.history)
    size = f"{program.count_parameters():,} parameters in {program.count_bytes():,} bytes"
    return f"{size}; passes: {passes}" if passes else size


def _header(program: Program) -> Iterator[str]:
    yield f"# {headline(program)}"
    yield f"# {program.count_parameters():,} parameters in {program.count_bytes():,} bytes"
    for dimension, allowed in program.dimensions.items():
        yield f"# {dimension}: {allowed.minimum} to {allowed.maximum or 'any size'}"
    for record in program.history:
        yield f"# pass {_record(record)}"


def _record(record: Record) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in record.config.items())
    error = "" if record.error is None else f", error {record.error:.1e}"
    return f"{record.name}({fields}): {record.effect}{error}"


def _body(describer: Describer) -> Iterator[str]:
    program = describer.program
    inputs = [f"{node.target}: {describer.values[node]}" for node in program.placeholders]
    yield f"def {program.origin.get('class', 'program')}({', '.join(inputs)}):"
    module, source = "", ""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if module_of(node) != module:
            module = module_of(node)
            yield f"\n{_INDENT}# {module or '(top level)'}"
        if node.meta.get("source", "") != source:
            source = str(node.meta.get("source", ""))
            yield from [f"{_INDENT}# {source}"] if source else []
        yield _INDENT + _line(describer, node)
    yield ""
    yield textwrap.indent(_returned(describer), _INDENT)


def _line(describer: Describer, node: Node) -> str:
    made_by = node.meta.get("made_by")
    provenance = f"  made by {made_by}" if made_by else ""
    return f"{node.name} = {call_text(describer, node)}  # {describer.values[node]}{provenance}"


def call_text(describer: Describer, node: Node) -> str:
    """``aten.add.Tensor(embedding, linear, alpha=2)``, with the graph's own node names."""
    arguments = [_spoken(describer.pieces(value)) for value in node.args]
    arguments += [f"{name}={_spoken(describer.pieces(v))}" for name, v in node.kwargs.items()]
    return f"{short_target(node)}({', '.join(arguments)})"


def _spoken(pieces: Pieces) -> str:
    return "".join(piece if isinstance(piece, str) else _name(piece) for piece in pieces)


def _name(node: Node) -> str:
    return str(node.target) if node.op in ("get_attr", "placeholder") else node.name


def _returned(describer: Describer) -> str:
    lines = [
        f'    "{name}": {_name(node)},  # {describer.values[node]}'
        for name, node in describer.program.output_nodes.items()
    ]
    return "\n".join(["return {", *lines, "}"])
