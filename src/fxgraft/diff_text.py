"""A graph diff as text: grouped by module, layers that changed alike on one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from fxgraft.describe import Text
from fxgraft.diff import Detail, GraphDiff, NamedChange, NodeChange, NodeView

T = TypeVar("T")
SIGNS = {"added": "+", "removed": "-", "rewired": "~", "changed": "*", "reshaped": "*"}
_NODE_KINDS = ("added", "removed", "rewired", "changed")


def as_text(diff: GraphDiff) -> str:
    """See :meth:`GraphDiff.__str__`."""
    if not diff:
        return "no differences"
    lines: list[str] = []
    modules: dict[str, list[str]] = {}
    for change in diff.nodes:
        modules.setdefault(change.module, []).append(node_line(change))
    for module, found in collapse((name, tuple(found)) for name, found in modules.items()):
        lines += [module or "(top level)", *(f"  {line}" for line in found)]
    for title, changes in named_sections(diff):
        lines += [title, *(f"  {line}" for line in _named_lines(changes))]
    return "\n".join([*lines, summary(diff)])


def named_sections(diff: GraphDiff) -> list[tuple[str, tuple[NamedChange, ...]]]:
    """Weights, inputs and outputs, those of them that changed."""
    sections = [("weights", diff.weights), ("inputs", diff.inputs), ("outputs", diff.outputs)]
    return [(title, changes) for title, changes in sections if changes]


def summary(diff: GraphDiff) -> str:
    """See :meth:`GraphDiff.summary`."""
    if not diff:
        return "no differences"
    nodes = Counter(kind for change in diff.nodes for kind in change.kinds)
    parts = [f"nodes: {_counts(nodes, _NODE_KINDS)}"] if diff.nodes else []
    for title, changes in named_sections(diff):
        kinds = Counter(change.kind for change in changes)
        parts.append(f"{title}: {_counts(kinds, tuple(kinds))}")
    return "; ".join(parts)


def _counts(found: Counter[str], order: Sequence[str]) -> str:
    return ", ".join(f"{found[kind]} {kind}" for kind in order if found[kind])


def node_line(change: NodeChange) -> str:
    """One node change on one line, without its module."""
    sign = SIGNS[change.kinds[0]]
    view = change.view
    ordinal = view.label.partition("#")[2]
    name = f"{view.op} #{ordinal}" if ordinal else view.op
    if change.details:
        details = "; ".join(detail_text(detail, change.module) for detail in change.details)
        what = f"{name} -> {view.value}  {details}"
    else:
        what = f"{name}({arguments_text(view, change.module)}) -> {view.value}"
    made_by = f"  (made by {view.made_by})" if view.made_by else ""
    return f"{sign} {what}{made_by}"


def detail_text(detail: Detail, module: str) -> str:
    """``input: mlp.add → steer``, with references relative to ``module``."""
    before, after = sides(detail, module)
    return f"was {before}" if detail.name == "value" else f"{detail.name}: {before} → {after}"


def sides(detail: Detail, module: str) -> tuple[str, str]:
    """Both texts of a detail; two different nodes that read alike are told apart."""
    before, after = relative(detail.before, module), relative(detail.after, module)
    return before or "nothing", f"another {after}" if before == after else after or "nothing"


def arguments_text(view: NodeView, module: str) -> str:
    """``input=mlp.add, dim=1``, with references relative to ``module``."""
    return ", ".join(f"{name}={relative(text, module)}" for name, text in view.arguments)


def relative(text: Text, module: str) -> str:
    """Text whose references are shortened to what a reader of ``module`` needs."""
    return "".join(shorten(part, module) if place % 2 else part for place, part in enumerate(text))


def shorten(reference: str, module: str) -> str:
    """A reference as seen from a module.

    Inside the module its path is left out; inside the same layer the path of the layer; a
    neighbouring layer is written with ``{i-1}`` or ``{i+1}``.
    """
    path = reference.replace(":", ".").split(".") if reference[0] != ":" else [reference[1:]]
    own = module.split(".") if module else []
    if path[: len(own)] == own:
        return ".".join(path[len(own) :])
    common = 0
    while common < min(len(path), len(own)) and path[common] == own[common]:
        common += 1
    numbers = [place for place in range(common) if own[place].isdigit()]
    start = numbers[-1] + 1 if numbers else 0
    if common < min(len(path), len(own)) and path[common].isdigit() and own[common].isdigit():
        distance = int(path[common]) - int(own[common])
        if abs(distance) > 1:  # many layers may read one and the same layer
            return ".".join(path)
        path[common] = f"{{i{distance:+d}}}"
    return ".".join(path[start:])


def _named_lines(changes: Sequence[NamedChange]) -> list[str]:
    texts = ((change.name, (change.kind, _named_text(change))) for change in changes)
    return [f"{SIGNS.get(kind, '~')} {name}  {text}" for name, (kind, text) in collapse(texts)]


def _named_text(change: NamedChange) -> str:
    if change.before and change.after and change.before != change.after:
        return f"{change.before} → {change.after}"
    text = change.before or change.after
    return f"{text}  other values" if change.kind == "changed" else text


def collapse(items: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Items that differ in one number of their path only, as one: ``layers.{0..29}.mlp``."""
    rows = [(tuple(path.split(".")), value) for path, value in items]
    deepest = max((len(parts) for parts, _ in rows), default=0)
    for place in reversed(range(deepest)):
        rows = _collapse_at(rows, place)
    return [(".".join(parts), value) for parts, value in rows]


def _collapse_at(
    rows: list[tuple[tuple[str, ...], T]], place: int
) -> list[tuple[tuple[str, ...], T]]:
    groups: dict[object, tuple[list[str], tuple[str, ...], T]] = {}
    for parts, value in rows:
        number = parts[place] if place < len(parts) and parts[place].isdigit() else ""
        rest = (*parts[:place], "", *parts[place + 1 :]) if number else parts
        numbers, _, _ = groups.setdefault((rest, value), ([], parts, value))
        numbers += [number] if number else []
    return [
        ((*parts[:place], spans(numbers), *parts[place + 1 :]) if len(numbers) > 1 else parts, v)
        for numbers, parts, v in groups.values()
    ]


def spans(numbers: Iterable[str]) -> str:
    """``{0..3, 5, 6}`` for 0, 1, 2, 3, 5, 6."""
    found: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in found]
    return f"{{{', '.join(texts)}}}"
