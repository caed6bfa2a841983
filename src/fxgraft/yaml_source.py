"""Reads YAML as plain values and remembers the line of each.

The core schema of YAML 1.2 is used (``1e-3`` is a number, ``yes`` is text), duplicate keys,
anchors and tags are refused, and nothing in the file is executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from fxgraft.errors import InputError
from fxgraft.validation import Loc

_PREFIX = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _TEXT = (
    _PREFIX + kind for kind in ("null", "bool", "int", "float", "str")
)


class _Loader(yaml.SafeLoader):
    """Only composes; PyYAML's own rules for scalars are those of YAML 1.1."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012


_SCALARS = {
    _NULL: r"~|null|Null|NULL|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?[0-9]+",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _tag, _pattern in _SCALARS.items():
    cast(Any, _Loader).add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)


@dataclass
class YamlSource:
    """A YAML file's values with their places.

    Attributes:
        file: the file.
        value: mappings, lists, text, numbers, booleans and None.
        lines: line of each key and list item, by its path.
    """

    file: Path
    value: object = None
    lines: dict[Loc, int] = field(default_factory=dict[Loc, int])

    @staticmethod
    def read(file: Path) -> YamlSource:
        """Read a file.

        Raises:
            InputError: it cannot be read or is no YAML; names file, line and column.
        """
        try:
            root = cast(Any, yaml).compose(file.read_text(encoding="utf-8"), Loader=_Loader)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise InputError(f"{file} cannot be read: {reason}", "give a YAML file") from error
        except RecursionError as error:
            raise InputError(f"{file} is nested too deeply", "write a flat file") from error
        except yaml.MarkedYAMLError as error:
            raise _syntax_error(file, error) from error
        except yaml.YAMLError as error:
            raise InputError(f"{file} is no YAML: {error}", "remove these characters") from error
        source = YamlSource(file)
        source.value = None if root is None else source._convert(root, (), set())
        return source

    def where(self, loc: Loc) -> str:
        """Start of a message about the value at a path, or about the nearest around it."""
        for length in range(len(loc), -1, -1):
            if loc[:length] in self.lines:
                return f"{self.file}, line {self.lines[loc[:length]]}: "
        return f"{self.file}: "

    def _convert(self, node: yaml.Node, loc: Loc, seen: set[int]) -> object:
        line = cast(int, node.start_mark.line) + 1
        if id(node) in seen:
            raise InputError(
                f"{self.where(loc)}anchors and aliases (& and *) are not supported here",
                "write the value out",
            )
        seen.add(id(node))
        self.lines.setdefault(loc, line)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_PREFIX}map":
            return self._mapping(node, loc, seen)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_PREFIX}seq":
            items = cast("list[yaml.Node]", node.value)
            return [self._convert(item, (*loc, i), seen) for i, item in enumerate(items)]
        return self._scalar(node, line)

    def _mapping(self, node: yaml.MappingNode, loc: Loc, seen: set[int]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            line = cast(int, key_node.start_mark.line) + 1
            key = key_node.value if key_node.tag == _TEXT else None
            if not isinstance(key, str):
                raise InputError(
                    f"{self.file}, line {line}: the key {key_node.value!r} is no text",
                    "put it in quotes",
                )
            if key in result:
                first = self.lines[(*loc, key)]
                raise InputError(
                    f"{self.file}, line {line}: the key {key!r} is given twice, first in line "
                    f"{first}",
                    "keep one of them",
                )
            self.lines[(*loc, key)] = line
            result[key] = self._convert(value_node, (*loc, key), seen)
        return result

    def _scalar(self, node: yaml.Node, line: int) -> object:
        text = str(cast(object, node.value))
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return text.lower() == "true"
        if node.tag == _INT:
            return int(text)
        if node.tag == _FLOAT:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if node.tag == _TEXT:
            return text
        raise InputError(
            f"{self.file}, line {line}: the tag {node.tag.replace(_PREFIX, '!!')!r} is not "
            "supported",
            "give a plain value",
        )


def _syntax_error(file: Path, error: yaml.MarkedYAMLError) -> InputError:
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = ": ".join(part for part in (error.context, error.problem) if part)
    return InputError(f"{file}{place}: this is no YAML: {problem}", "correct the file there")
