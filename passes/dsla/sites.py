"""Which attentions can become linear attention, and the nodes that such a layer reads.

Nothing is recognised by architecture: the keys before rotation are the last value that all keys
pass through before the graph brings in positions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import PassError
from fxgraft.kernels.spec import argument, dims, spec_of
from fxgraft.layers import Layer, is_linear
from fxgraft.program import Program

aten = torch.ops.aten
_RULES = {
    "window": "it attends to a sliding window",
    "chunk": "it attends within chunks",
    "bias": "it adds a bias or a mask with a row per query to its scores",
    "sinks": "it has attention sinks",
}


@dataclass(frozen=True)
class Site:
    """One softmax attention that can become linear attention.

    Attributes:
        layer: index of its block.
        path: module path of its block.
        mixer: the attention node.
        query, key: [B, H, S, D] as the attention gets them.
        plain_query, plain_key: the same before rotation; [B, S, H, D] where the model rotates
            in that layout; None where no such value exists.
        value: [B, Hkv, S, Dv].
        hidden: what the projections read, [B, S, hidden].
        key_mask: bool [B, S], or None.
        query_heads, kv_heads, head_dim, value_dim: sizes.
        scale: factor of the scores.
    """

    layer: int
    path: str
    mixer: Node
    query: Node
    key: Node
    plain_query: Node | None
    plain_key: Node | None
    value: Node
    hidden: Node
    key_mask: Node | None
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float

    @property
    def rotates(self) -> bool:
        """Whether positions enter the keys."""
        return self.plain_key is not self.key


def find_sites(program: Program) -> tuple[list[Site], dict[int, str]]:
    """Every attention that can be converted, and why each other layer cannot.

    Returns:
        The sites in graph order, and by layer index the reason for the rest.
    """
    content = content_nodes(program)
    found: list[Site] = []
    reasons: dict[int, str] = {}
    for layer in program.layers:
        reason = _reason(program, layer)
        if reason is None:
            try:
                found.append(_site(program, layer, content))
            except PassError as error:
                reason = error.problem
        if reason is not None:
            reasons[layer.index] = reason
    return found, reasons


def _reason(program: Program, layer: Layer) -> str | None:
    """Why a layer cannot be converted; None if it can."""
    names = [spec.name for node in layer.mixers if (spec := spec_of(node))]
    if names != ["attention"]:
        return f"it mixes tokens by {'+'.join(names) or 'nothing'}, not by one softmax attention"
    node = layer.mixers[0]
    for name, text in _RULES.items():
        if argument(node, name) is not None:
            return text
    if argument(node, "softcap"):
        return "it caps its scores"
    if not argument(node, "is_causal"):
        return "it is not causal"
    query, key = argument(node, "query"), argument(node, "key")
    if dims(query)[2] != dims(key)[2]:
        return "it attends to another sequence"
    return None


def _site(program: Program, layer: Layer, content: Collection[Node]) -> Site:
    mixer = layer.mixers[0]
    query, key, value = (_node(mixer, name) for name in ("query", "key", "value"))
    mask, scale = argument(mixer, "key_mask"), argument(mixer, "scale")
    assert isinstance(scale, float)
    return Site(
        layer=layer.index,
        path=layer.path,
        mixer=mixer,
        query=query,
        key=key,
        plain_query=plain(program, query, content),
        plain_key=plain(program, key, content),
        value=value,
        hidden=_hidden(query),
        key_mask=mask if isinstance(mask, Node) else None,
        query_heads=size(query, 1),
        kv_heads=size(key, 1),
        head_dim=size(key, 3),
        value_dim=size(value, 3),
        scale=scale,
    )


def size(node: Node, axis: int) -> int:
    """A size that does not depend on the inputs.

    Raises:
        PassError: it does.
    """
    found = dims(node)[axis]
    if not found.is_Integer:
        raise PassError(
            f"node {node.name!r} has the size {found} in dimension {axis}",
            "capture the model with a fixed number of heads and channels",
        )
    return int(found)  # pyright: ignore[reportArgumentType]


def _node(mixer: Node, name: str) -> Node:
    value = argument(mixer, name)
    assert isinstance(value, Node)
    return value


def content_nodes(program: Program) -> frozenset[Node]:
    """Nodes whose values depend on the tokens themselves, not on positions and masks alone."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in ("attention_mask", "position_ids"):
                found.add(node)
        elif _is_tensor(node) and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def plain(
    program: Program, goal: Node, content: Collection[Node], also: Collection[Node] = ()
) -> Node | None:
    """The value that ``goal`` was before positions entered it; None if there is no single one.

    Args:
        program: that holds the node.
        goal: queries or keys [B, H, S, D].
        content: nodes whose values depend on tokens.
        also: further nodes that must depend on tokens through that value alone.

    Returns:
        A node of the goal's shape, or [B, S, H, D]; the goal itself where no positions enter.
    """
    region = _region(goal, content)
    readers = [node for node in region if _reads_positions(program, node, content)]
    if not readers and not also:
        return goal
    tainted = _descendants(readers, region)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    shape = dims(goal)
    layouts = (shape, (shape[0], shape[2], shape[1], shape[3]))
    candidates = [
        node
        for node in region
        if node not in tainted
        and isinstance(node.meta.get("val"), torch.Tensor)
        and dims(node) in layouts
        and all(_passes_through(one, node, content) for one in (goal, *also))
    ]
    return max(candidates, key=lambda node: order[node], default=None)


def _region(goal: Node, content: Collection[Node]) -> list[Node]:
    """Content nodes from the nearest projections to ``goal``."""
    pending, seen = [goal], dict[Node, None]()
    while pending:
        node = pending.pop()
        if node in seen or node not in content:
            continue
        seen[node] = None
        if not is_linear(node):
            pending.extend(node.all_input_nodes)
    return list(seen)


def _passes_through(goal: Node, node: Node, content: Collection[Node]) -> bool:
    """Whether ``goal`` depends on tokens through ``node`` alone."""
    pending, seen = [goal], {node}
    while pending:
        one = pending.pop()
        if one in seen or one not in content:
            continue
        if one.op == "placeholder":
            return False
        seen.add(one)
        pending.extend(one.all_input_nodes)
    return True


def _reads_positions(program: Program, node: Node, content: Collection[Node]) -> bool:
    """Whether something that spans the sequence and is no content meets the tokens here."""
    if is_linear(node):
        return False
    sequence = program.symbols["sequence"]
    return any(
        source not in content
        and isinstance(source.meta.get("val"), torch.Tensor)
        and any(sequence in one.free_symbols for one in dims(source))
        for source in node.all_input_nodes
    )


def _descendants(starts: Collection[Node], region: Collection[Node]) -> set[Node]:
    inside = set(region)
    pending, seen = list(starts), set[Node]()
    while pending:
        node = pending.pop()
        if node not in seen and node in inside:
            seen.add(node)
            pending.extend(node.users)
    return seen


def _hidden(query: Node) -> Node:
    """What the projection of the queries reads, as [B, S, hidden].

    Raises:
        PassError: it is not laid out so.
    """
    pending, seen = [query], set[Node]()
    while pending:
        node = pending.pop(0)
        if node in seen or not _is_tensor(node):
            continue
        seen.add(node)
        if is_linear(node):
            return _tokens(node)
        pending.extend(node.all_input_nodes)
    raise PassError(
        f"no projection leads to the queries of node {query.name!r}", "leave this layer out"
    )


def _tokens(linear: Node) -> Node:
    """The input of a linear node before it is flattened over batch and sequence."""
    sources = [n for n in linear.all_input_nodes if n.op != "get_attr"]
    source = sources[0]
    while len(dims(source)) == 2 and source.target in (aten.view.default, aten.reshape.default):
        source = source.all_input_nodes[0]
    if len(dims(source)) != 3:
        raise PassError(
            f"node {linear.name!r} ({graphs.short_target(linear)}) does not read "
            "[batch, sequence, features]",
            "leave this layer out",
        )
    return source
