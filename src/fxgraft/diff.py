"""What differs between two Programs, by module path and op instead of node number."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch.fx import Node

from fxgraft.describe import Describer, Pieces, Text, constant
from fxgraft.diff_match import match
from fxgraft.errors import SerializationError
from fxgraft.graph import short_target
from fxgraft.program import Input, Program, Range

NodeKind = Literal["added", "removed", "rewired", "changed"]
NamedKind = Literal["added", "removed", "rewired", "reshaped", "changed"]
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class NodeView:
    """How one node reads in its Program.

    Attributes:
        op: the operator: ``aten.linear``.
        label: its short name, unique within its module: ``linear`` or ``add#2``.
        arguments: by schema name, as text that alternates between literals and references
            (``module:label`` of a node, or the name of a weight or input).
        value: dtype and shape: ``float32[batch, sequence, 576]``.
        source: the user's source line.
        made_by: the pass that inserted it, empty for a captured node.
    """

    op: str
    label: str
    arguments: tuple[tuple[str, Text], ...]
    value: str
    source: str = ""
    made_by: str = ""


@dataclass(frozen=True)
class Detail:
    """One thing that differs about a node that is in both Programs.

    Attributes:
        kind: ``"rewired"`` if the argument ``name`` comes from another node, weight or input;
            ``"changed"`` if it is another constant, or if the node's value differs.
        name: the argument, or ``"value"`` for the node's own shape and dtype.
        before, after: text as in :attr:`NodeView.arguments`.
    """

    kind: Literal["rewired", "changed"]
    name: str
    before: Text
    after: Text


@dataclass(frozen=True)
class NodeChange:
    """A node that is in one Program only, or that differs between them.

    Attributes:
        module: path of its module, empty at the top level.
        before, after: the node in each Program, None where it is missing.
        details: what differs, empty for a node that is in one Program only.
    """

    module: str
    before: NodeView | None
    after: NodeView | None
    details: tuple[Detail, ...] = ()

    @property
    def kinds(self) -> tuple[NodeKind, ...]:
        """The categories it falls into, most visible first; empty for an unchanged node."""
        if self.before is None:
            return ("added",)
        if self.after is None:
            return ("removed",)
        found = {detail.kind for detail in self.details}
        return tuple(kind for kind in ("rewired", "changed") if kind in found)

    @property
    def view(self) -> NodeView:
        """The node after, or before if it was removed."""
        view = self.after or self.before
        assert view is not None
        return view


@dataclass(frozen=True)
class NamedChange:
    """A weight, input, output or dynamic dimension that differs.

    Attributes:
        kind: ``"rewired"`` for an output from another node, ``"reshaped"`` for a weight of
            another shape or dtype, ``"changed"`` for other values of a weight or another
            description of an input, output or dimension.
        name: its name.
        before, after: its description, empty where it is missing.
    """

    kind: NamedKind
    name: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class GraphDiff:
    """What differs between two Programs; false if nothing does.

    ``str(diff)`` is readable text that depends on neither node names nor symbol names, fit for
    golden tests.

    Attributes:
        nodes: changed nodes, by module in graph order.
        weights, inputs, outputs: changes by name; ``inputs`` also has the dynamic dimensions.
        context: all nodes of both Programs, the unchanged ones included, for the HTML page.
            Not part of the JSON form.
    """

    nodes: tuple[NodeChange, ...] = ()
    weights: tuple[NamedChange, ...] = ()
    inputs: tuple[NamedChange, ...] = ()
    outputs: tuple[NamedChange, ...] = ()
    context: tuple[NodeChange, ...] = field(default=(), compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.nodes or self.weights or self.inputs or self.outputs)

    def of_kind(self, kind: NodeKind) -> list[NodeChange]:
        """The node changes of one category; a node may be both rewired and changed."""
        return [change for change in self.nodes if kind in change.kinds]

    @property
    def added(self) -> list[NodeChange]:
        """Nodes that only the Program after has."""
        return self.of_kind("added")

    @property
    def removed(self) -> list[NodeChange]:
        """Nodes that only the Program before has."""
        return self.of_kind("removed")

    @property
    def rewired(self) -> list[NodeChange]:
        """Nodes whose inputs come from other nodes, weights or inputs."""
        return self.of_kind("rewired")

    @property
    def changed(self) -> list[NodeChange]:
        """Nodes with other constant arguments, or another output shape or dtype."""
        return self.of_kind("changed")

    def __str__(self) -> str:
        from fxgraft.diff_text import as_text

        return as_text(self)

    def summary(self) -> str:
        """The counts on one line."""
        from fxgraft.diff_text import summary

        return summary(self)

    def to_json(self) -> dict[str, Any]:
        """The changes as JSON values."""
        return _ADAPTER.dump_python(self, mode="json", exclude={"context"}, exclude_defaults=True)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> GraphDiff:
        """The diff that :meth:`to_json` wrote.

        Raises:
            SerializationError: the data is something else.
        """
        try:
            return _ADAPTER.validate_python(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise SerializationError(
                f"this is no graph diff: {place}: {first['msg']}",
                "give what GraphDiff.to_json or `fxgraft diff --json` wrote",
            ) from error

    def to_html(self, path: str | Path, title: str = "Graph diff") -> Path:
        """Write the diff as one self-contained page, side by side.

        A diff read by :meth:`from_json` has no unchanged nodes, so its page shows none.

        Raises:
            InputError: the path cannot be written.
        """
        from fxgraft.diff_html import write

        return write(self, Path(path), title)


_ADAPTER = TypeAdapter(GraphDiff)


def diff(before: Program, after: Program) -> GraphDiff:
    """What differs in ``after`` from ``before``.

    ``diff(a, b)`` and ``diff(b, a)`` are mirror images, and a Program does not differ from its
    copy. Weights are compared by identity first and by value only where that fails; weights on
    the meta device have no values, so there two objects count as different.
    """
    comparison = _Comparison(Describer(before), Describer(after))
    rows = tuple(comparison.rows())
    return GraphDiff(
        nodes=tuple(row for row in rows if row.kinds),
        weights=tuple(_weight_changes(before, after)),
        inputs=tuple(_input_changes(before, after)),
        outputs=tuple(comparison.output_changes()),
        context=rows,
    )


class _Comparison:
    """Compares the nodes of two Programs, given which are the same."""

    def __init__(self, before: Describer, after: Describer) -> None:
        self._before = before
        self._after = after
        self._after_of = match(before, after)
        self._before_of = {new: old for old, new in self._after_of.items()}

    def rows(self) -> Iterator[NodeChange]:
        """All nodes of both Programs, module by module, removed ones where they were."""
        same = {name: name for name in self._before.modules if name in self._after.modules}
        for old, new in _merged(list(self._before.modules), list(self._after.modules), same, same):
            module = old if new is None else new
            assert module is not None
            nodes = _merged(
                self._before.modules.get(module, []),
                self._after.modules.get(module, []),
                self._after_of,
                self._before_of,
            )
            for left, right in nodes:
                yield self._row(module, left, right)

    def _row(self, module: str, left: Node | None, right: Node | None) -> NodeChange:
        return NodeChange(
            module,
            view_of(self._before, left) if left else None,
            view_of(self._after, right) if right else None,
            tuple(self._details(left, right)) if left and right else (),
        )

    def _details(self, left: Node, right: Node) -> Iterator[Detail]:
        old = self._before.arguments(left, defaults=True)
        new = self._after.arguments(right, defaults=True)
        for name in dict.fromkeys([*old, *new]):
            kind = self._compare(old.get(name, ()), new.get(name, ()))
            if kind is not None:
                texts = self._before.text(old.get(name, ())), self._after.text(new.get(name, ()))
                yield Detail(kind, name, *texts)
        values = self._before.values[left], self._after.values[right]
        if values[0] != values[1]:
            yield Detail("changed", "value", (values[0],), (values[1],))

    def _compare(self, old: Pieces, new: Pieces) -> Literal["rewired", "changed"] | None:
        sources = [p for p in old if isinstance(p, Node)], [p for p in new if isinstance(p, Node)]
        if len(sources[0]) != len(sources[1]) or not all(map(self._same, *sources)):
            return "rewired"
        literals = [p for p in old if isinstance(p, str)], [p for p in new if isinstance(p, str)]
        return "changed" if literals[0] != literals[1] else None

    def _same(self, left: Node, right: Node) -> bool:
        if left.op in ("get_attr", "placeholder"):
            return left.op == right.op and left.target == right.target
        return self._after_of.get(left) is right

    def output_changes(self) -> Iterator[NamedChange]:
        """Changes of the outputs."""
        old = self._before.program.output_nodes
        new = self._after.program.output_nodes
        for name in dict.fromkeys([*old, *new]):
            before = _output(self._before, old.get(name))
            after = _output(self._after, new.get(name))
            if name not in old or name not in new:
                yield NamedChange("added" if name in new else "removed", name, before, after)
            elif not self._same(old[name], new[name]):
                yield NamedChange("rewired", name, before, after)
            elif self._before.values[old[name]] != self._after.values[new[name]]:
                yield NamedChange("changed", name, before, after)


def view_of(describer: Describer, node: Node) -> NodeView:
    """How a call node reads."""
    return NodeView(
        op=short_target(node),
        label=describer.labels[node],
        arguments=tuple(
            (name, describer.text(pieces)) for name, pieces in describer.arguments(node).items()
        ),
        value=describer.values[node],
        source=str(node.meta.get("source", "")),
        made_by=str(node.meta.get("made_by", "")),
    )


def _output(describer: Describer, node: Node | None) -> str:
    if node is None:
        return ""
    source = describer.reference(node).removeprefix(":").replace(":", ".")
    return f"{describer.values[node]} from {source}"


def _merged(
    left: Sequence[T], right: Sequence[T], right_of: Mapping[T, T], left_of: Mapping[T, T]
) -> list[tuple[T | None, T | None]]:
    """Both sequences as one: in the order of ``right``, lone lefts after their predecessors."""
    lone: dict[T | None, list[T]] = {}
    previous: T | None = None
    for item in left:
        if item in right_of:
            previous = right_of[item]
        else:
            lone.setdefault(previous, []).append(item)
    rows: list[tuple[T | None, T | None]] = [(item, None) for item in lone.get(None, [])]
    for item in right:
        rows.append((left_of.get(item), item))
        rows += [(gone, None) for gone in lone.get(item, [])]
    return rows


def _named_changes(
    old: Mapping[str, T], new: Mapping[str, T], words: Callable[[T], str]
) -> Iterator[NamedChange]:
    for name in dict.fromkeys([*old, *new]):
        before = words(old[name]) if name in old else ""
        after = words(new[name]) if name in new else ""
        if name not in old or name not in new:
            yield NamedChange("added" if name in new else "removed", name, before, after)
        elif old[name] != new[name]:
            yield NamedChange("changed", name, before, after)


def _weight_changes(before: Program, after: Program) -> Iterator[NamedChange]:
    old, new = dict(before.weights()), dict(after.weights())
    for name in dict.fromkeys([*old, *new]):
        texts = _weight_text(old.get(name)), _weight_text(new.get(name))
        if name not in old or name not in new:
            yield NamedChange("added" if name in new else "removed", name, *texts)
        elif texts[0] != texts[1]:
            yield NamedChange("reshaped", name, *texts)
        elif not _equal(old[name], new[name]):
            yield NamedChange("changed", name, *texts)


def _weight_text(weight: torch.Tensor | None) -> str:
    return "" if weight is None else f"{constant(weight.dtype)}{list(weight.shape)}"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights of equal shape and dtype hold the same bits."""
    if a is b:
        return True
    if a.is_meta or b.is_meta:
        return False
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(_bits(a), _bits(b.to(a.device)))


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of a weight: comparable for every dtype, and NaN equals itself."""
    return weight.detach().contiguous().reshape(-1).view(torch.uint8)


def _input_changes(before: Program, after: Program) -> Iterator[NamedChange]:
    old = {spec.name: spec for spec in before.inputs}
    new = {spec.name: spec for spec in after.inputs}
    yield from _named_changes(old, new, _input_text)
    shared = [name for name in old if name in new], [name for name in new if name in old]
    if shared[0] != shared[1]:
        yield NamedChange("changed", "order", ", ".join(shared[0]), ", ".join(shared[1]))
    yield from _named_changes(before.dimensions, after.dimensions, _range_text)


def _input_text(spec: Input) -> str:
    shape = ", ".join(str(size) for size in spec.shape)
    bound = f", values below {spec.high}" if spec.high else ""
    default = "" if spec.default == "required" else f", default {spec.default}"
    return f"{constant(spec.dtype)}[{shape}]{default}{bound}"


def _range_text(allowed: Range) -> str:
    return f"dimension of {allowed.minimum} to {allowed.maximum or 'any size'}"
