"""Which node of one Program is which node of another.

Nodes are the same if they come from the same module, call the same op, and stand at the same
place among their equals there. Within a module:

1. Nodes computed from the same things by the same operations are the same, in any order.
2. Then those in the same neighbourhood of the graph, then those that read the same weights.
3. What is left is aligned in order, so that one insertion does not shift the rest.
4. Nodes that were moved past others, which no alignment keeps, are paired op by op.

Node names and numbers play no role. Swapping the two Programs swaps the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from fxgraft.describe import Describer, Pieces, module_of
from fxgraft.graph import short_target

_STEPS_UP = 3
# Modules in which more pairs than this are left over are paired op by op: 2,000 x 2,000 pairs
# take about three seconds.
_MOST_PAIRS = 4_000_000
Pairs = list[tuple[Node, Node]]
Constants = tuple[tuple[str, tuple[str | None, ...]], ...]


@dataclass(frozen=True)
class _Traits:
    """What a node can be recognised by.

    Attributes:
        op: the operator.
        weights: names of the weights it reads.
        constants: its arguments without the nodes in them.
        value: its shape and dtype.
        made_by: the pass that inserted it.
        upstream: numbers of its neighbourhoods of 1, 2, … steps against the data flow.
        downstream: number of the set of its readers.
        cone: number of everything that it is computed from.
    """

    op: str
    weights: tuple[str, ...]
    constants: Constants
    value: str
    made_by: str
    upstream: tuple[int, ...]
    downstream: int
    cone: int

    @cached_property
    def words(self) -> tuple[Hashable, ...]:
        """The traits that are text, and so sort alike in every process."""
        return (self.op, self.weights, repr(self.constants), self.value, self.made_by)


def match(before: Describer, after: Describer) -> dict[Node, Node]:
    """The nodes of ``before`` that are also in ``after``, each with its counterpart there."""
    number: dict[Hashable, int] = {}
    traits = _traits(before, number) | _traits(after, number)
    pairs: Pairs = []
    for module, nodes in before.modules.items():
        pairs += _match_module(nodes, after.modules.get(module, []), traits)
    return dict(pairs)


def _match_module(
    left: Sequence[Node], right: Sequence[Node], traits: dict[Node, _Traits]
) -> Pairs:
    pairs: Pairs = []
    for key in _KEYS:
        found = _join(left, right, lambda node, key=key: key(traits[node]))
        pairs += found
        left = _without(left, {a for a, _ in found})
        right = _without(right, {b for _, b in found})
    found = _align(left, right, traits)
    left = _without(left, {a for a, _ in found})
    right = _without(right, {b for _, b in found})
    return pairs + found + _rank_by_op(left, right)


_KEYS: tuple[Callable[[_Traits], Hashable], ...] = (
    lambda t: t.cone,
    lambda t: (t.op, t.weights, t.made_by, t.upstream[-1]),
    lambda t: (t.op, t.weights) if t.weights else None,
)


def _without(nodes: Sequence[Node], gone: set[Node]) -> list[Node]:
    return [node for node in nodes if node not in gone]


def _join(left: Sequence[Node], right: Sequence[Node], key: Callable[[Node], Hashable]) -> Pairs:
    """Nodes with equal keys, in order, where both sides have as many of them."""
    lefts, rights = _grouped(left, key), _grouped(right, key)
    return [
        pair
        for value, nodes in lefts.items()
        if value is not None and len(nodes) == len(rights.get(value, ()))
        for pair in zip(nodes, rights[value], strict=True)
    ]


def _grouped(nodes: Sequence[Node], key: Callable[[Node], Hashable]) -> dict[Hashable, list[Node]]:
    groups: defaultdict[Hashable, list[Node]] = defaultdict(list)
    for node in nodes:
        groups[key(node)].append(node)
    return groups


def _align(left: Sequence[Node], right: Sequence[Node], traits: dict[Node, _Traits]) -> Pairs:
    """The order-preserving pairing of nodes with equal ops that makes the most alike pairs."""
    lefts, rights = [traits[n] for n in left], [traits[n] for n in right]
    order = [t.words for t in lefts], [t.words for t in rights]
    if order[0] == order[1]:
        return list(zip(left, right, strict=True))
    if order[0] > order[1]:  # ties are broken alike whichever Program comes first
        return [(a, b) for b, a in _align(right, left, traits)]
    if len(left) * len(right) > _MOST_PAIRS:
        return []
    score = {
        (i, j): _likeness(a, b)
        for i, a in enumerate(lefts)
        for j, b in enumerate(rights)
        if a.op == b.op
    }
    best = _best_scores(len(left), len(right), score)
    pairs: Pairs = []
    i = j = 0
    while i < len(left) and j < len(right):
        if (i, j) in score and best[i][j] == best[i + 1][j + 1] + score[i, j]:
            pairs.append((left[i], right[j]))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _rank_by_op(left: Sequence[Node], right: Sequence[Node]) -> Pairs:
    rights = _grouped(right, short_target)
    return [
        pair
        for op, nodes in _grouped(left, short_target).items()
        for pair in zip(nodes, rights.get(op, ()), strict=False)
    ]


def _best_scores(rows: int, columns: int, score: dict[tuple[int, int], int]) -> list[list[int]]:
    """Best total score of an alignment of what follows each pair of places."""
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        row, below = best[i], best[i + 1]
        for j in reversed(range(columns)):
            skip = max(below[j], row[j + 1])
            row[j] = max(skip, below[j + 1] + score[i, j]) if (i, j) in score else skip
    return best


def _likeness(a: _Traits, b: _Traits) -> int:
    """How alike two nodes with the same op are; what a rewrite seldom changes counts most."""
    return (
        4
        + 4 * (a.weights == b.weights)
        + 2 * (a.constants == b.constants)
        + 2 * (a.value == b.value)
        + 2 * (a.made_by == b.made_by)
        + 2 * sum(x == y for x, y in zip(a.upstream, b.upstream, strict=True))
        + 2 * (a.downstream == b.downstream)
    )


def _traits(describer: Describer, number: dict[Hashable, int]) -> dict[Node, _Traits]:
    """Traits of all call nodes; ``number`` gives equal things equal numbers in both Programs."""
    calls = [node for nodes in describer.modules.values() for node in nodes]
    arguments = {node: describer.arguments(node) for node in calls}
    constants = {node: _constants(found) for node, found in arguments.items()}
    nodes = list(describer.program.graph.nodes)
    inputs = {node: _inputs(arguments.get(node, {})) for node in nodes}
    kinds = {node: _number(number, _kind(node)) for node in nodes}
    rings = [kinds]
    for _ in range(_STEPS_UP):
        inner = rings[-1]
        rings.append(
            {
                node: _number(number, (kinds[node], *(inner[source] for source in inputs[node])))
                for node in nodes
            }
        )
    cones: dict[Node, int] = {}
    for node in nodes:
        own = (kinds[node], constants.get(node), describer.values[node])
        sources = tuple(cones[source] for source in inputs[node])
        cones[node] = _number(number, ("cone", own, sources))
    return {
        node: _Traits(
            op=short_target(node),
            weights=_weights(node),
            constants=constants[node],
            value=describer.values[node],
            made_by=str(node.meta.get("made_by", "")),
            upstream=tuple(ring[node] for ring in rings[1:]),
            downstream=_number(number, ("readers", *sorted(kinds[user] for user in node.users))),
            cone=cones[node],
        )
        for node in calls
    }


def _number(number: dict[Hashable, int], thing: Hashable) -> int:
    return number.setdefault(thing, len(number))


def _weights(node: Node) -> tuple[str, ...]:
    return tuple(str(n.target) for n in node.all_input_nodes if n.op == "get_attr")


def _kind(node: Node) -> Hashable:
    if node.op in ("placeholder", "get_attr", "output"):
        return (node.op, str(node.target))
    return (module_of(node), short_target(node), _weights(node))


def _inputs(arguments: dict[str, Pieces]) -> list[Node]:
    return [
        piece for pieces in arguments.values() for piece in pieces if not isinstance(piece, str)
    ]


def _constants(arguments: dict[str, Pieces]) -> Constants:
    """Arguments with None in place of nodes."""
    return tuple(
        (name, tuple(piece if isinstance(piece, str) else None for piece in pieces))
        for name, pieces in arguments.items()
    )
