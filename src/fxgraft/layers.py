"""The layer view: the blocks of a model, found in the graph by module path and data flow.

A block is one element of a numbered list of modules (``model.layers.3``, ``encoder.block.0``).
Nothing is recognised by model name: mixers are ops whose ``OpSpec`` says so, projections are the
linear nodes nearest to a mixer, and the residual stream is what one block hands to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxgraft.kernels.spec import argument, dims, spec_of
from fxgraft.operators import aliases_input, argument_names, qualified_name
from fxgraft.program import Program

NO_MIXER = "none"
# Ops that mix a few neighbouring tokens ahead of the op that gives the layer its kind.
_AUXILIARY = frozenset({"causal_conv1d", "causal_pad"})
_ATTENTION_ROLES = ("query", "key", "value")
_MATMULS = frozenset({
    "aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::matmul",
    "aten::einsum", "aten::_grouped_mm", "transformers::grouped_mm_fallback",
})  # fmt: skip
_REARRANGEMENTS = frozenset({"aten::index", "aten::index_select", "aten::clone", "aten::_to_copy"})


@dataclass(frozen=True, eq=False)
class Layer:
    """One block of a model.

    Attributes:
        index: position among all layers, in graph order.
        path: the block's module path, for example ``"model.layers.3"``.
        stack: path of the module that owns the list, for example ``"model.decoder"``.
        kind: op name of the mixer, joined by ``"+"`` for parallel mixers, or ``"none"``.
        mixers: ops that mix tokens, in graph order; a short convolution only if there is no other.
        projections: linear nodes of the first mixer by role. Attention: ``"query"``, ``"key"``,
            ``"value"``, or ``"qkv"`` and ``"key_value"`` where one node gives several. Other
            mixers: ``"input"``, and argument names for further ones. All: ``"output"``.
        mlp: the other linear nodes, routers and experts included, in graph order.
        residual: the residual stream after the block.
        residual_in: the residual stream that enters the block.
        nodes: all nodes of the block, in graph order.
    """

    index: int
    path: str
    stack: str
    kind: str
    mixers: tuple[Node, ...]
    projections: dict[str, Node]
    mlp: tuple[Node, ...]
    residual: Node
    residual_in: Node
    nodes: tuple[Node, ...]

    @property
    def mixer(self) -> Node | None:
        """The first mixer (of a decoder with cross-attention, its self-attention)."""
        return self.mixers[0] if self.mixers else None

    def projections_of(self, mixer: Node) -> dict[str, Node]:
        """Linear nodes by role of any one of ``mixers``."""
        return _projections(mixer, frozenset(self.nodes))


def find_layers(program: Program) -> list[Layer]:
    """The model's blocks in graph order; empty if no module list is numbered."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    blocks = _blocks(order)
    found: list[Layer] = []
    for path, nodes in blocks.items():
        layer = _describe(len(found), path, nodes, found[-1] if found else None, order)
        if layer is not None:
            found.append(layer)
    return found


def is_linear(node: Node) -> bool:
    """Whether a node multiplies by a weight: linear, matrix products with a weight, experts."""
    spec = spec_of(node)
    if spec is not None:
        return spec.kind == "linear"
    return qualified_name(node) in _MATMULS and any(map(_is_weight, node.all_input_nodes))


def _is_weight(node: Node) -> bool:
    """A weight, or one that was only cast, viewed or indexed."""
    while node.op == "call_function" and _is_rearrangement(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _is_rearrangement(node: Node) -> bool:
    return aliases_input(node) or qualified_name(node) in _REARRANGEMENTS


def _blocks(order: Mapping[Node, int]) -> dict[str, list[Node]]:
    """Nodes of each block by path, ordered by first node."""
    lists: dict[str, dict[str, list[Node]]] = {}
    for node in order:
        if node.op != "call_function":
            continue
        parts = str(node.meta.get("module", "")).split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                owner, path = ".".join(parts[:place]), ".".join(parts[: place + 1])
                lists.setdefault(owner, {}).setdefault(path, []).append(node)
    outer = [owner for owner in lists if not any(part.isdigit() for part in owner.split("."))]
    blocks = [lists[name] for owner in outer for name in _split(owner, lists)]
    mixing = [block for block in blocks if any(map(_mixers, block.values()))]
    if not mixing:
        mixing = sorted(blocks, key=len)[-1:]
    pairs = [pair for block in mixing for pair in block.items()]
    return dict(sorted(pairs, key=lambda pair: order[pair[1][0]]))


def _split(owner: str, lists: dict[str, dict[str, list[Node]]]) -> list[str]:
    """The list itself, or the lists inside it if every element of those mixes tokens.

    The stages of a hierarchical vision model are split into blocks; the sublayers of T5, of which
    the last one is an MLP, are not.
    """
    inner = [name for name in lists if any(name.startswith(f"{path}.") for path in lists[owner])]
    inner = [name for name in inner if any(map(_mixers, lists[name].values()))]
    uniform = all(all(map(_mixers, lists[name].values())) for name in inner)
    longest = max((len(lists[name]) for name in inner), default=0)
    return inner if uniform and longest > 1 else [owner]


def _mixers(nodes: Sequence[Node]) -> tuple[Node, ...]:
    specs = [
        (node, spec.name) for node in nodes if (spec := spec_of(node)) and spec.kind == "mixer"
    ]
    main = [node for node, name in specs if name not in _AUXILIARY]
    return tuple(main or [node for node, _ in specs])


def _describe(
    index: int, path: str, nodes: list[Node], previous: Layer | None, order: Mapping[Node, int]
) -> Layer | None:
    inside = frozenset(nodes)
    residual = _residual(nodes, inside)
    if residual is None:
        return None
    stack = ".".join(path.split(".")[:-2])
    candidates = _entering(nodes, inside)
    if previous is not None and previous.stack == stack and previous.residual in candidates:
        candidates = [previous.residual]
    residual_in = _most_alike(candidates, residual, order)
    if residual_in is None:
        return None
    mixers = _mixers(nodes)
    roles = [_projections(mixer, inside) for mixer in mixers]
    names = dict.fromkeys(str(node.target).split(".")[1] for node in mixers)
    taken = {node for projections in roles for node in projections.values()}
    homes = [_home(mixer, linears) for mixer, linears in zip(mixers, roles, strict=True)]
    return Layer(
        index=index,
        path=path,
        stack=stack,
        kind="+".join(names) or NO_MIXER,
        mixers=mixers,
        projections=roles[0] if roles else {},
        mlp=tuple(
            node
            for node in nodes
            if node not in taken and is_linear(node) and not _is_under(node, homes, path)
        ),
        residual=residual,
        residual_in=residual_in,
        nodes=tuple(nodes),
    )


def _home(mixer: Node, projections: dict[str, Node]) -> str:
    """Path of the innermost module that holds a mixer and its projections."""
    paths = [str(node.meta.get("module", "")).split(".") for node in projections.values()]
    common = str(mixer.meta.get("module", "")).split(".")
    for parts in paths:
        # A projection's own module counts as part of the module that holds it.
        pairs = zip(common, parts, strict=False)
        length = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(common), len(parts)))
        common = common[:length]
    return ".".join(common)


def _is_under(node: Node, homes: Sequence[str], block: str) -> bool:
    """Whether a linear node belongs to a mixer's module, such as a low-rank projection."""
    module = str(node.meta.get("module", ""))
    inner = [home for home in homes if len(home) > len(block)]
    return any(module == home or module.startswith(f"{home}.") for home in inner)


def _residual(nodes: Sequence[Node], inside: frozenset[Node]) -> Node | None:
    """The last tensor of the block that is read outside it."""
    for node in reversed(nodes):
        if _is_hidden(node) and any(user not in inside and _reads(user) for user in node.users):
            return node
    return None


def _is_hidden(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1


def _reads(user: Node) -> bool:
    """Whether a user takes the node's values: not its size, and not only to check it."""
    return user.op == "output" or isinstance(user.meta.get("val"), (torch.Tensor, tuple, list))


def _entering(nodes: Sequence[Node], inside: frozenset[Node]) -> list[Node]:
    """Tensors from outside the block that it reads, weights aside."""
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
    return [s for s in sources if s not in inside and s.op != "get_attr" and _is_hidden(s)]


def _most_alike(nodes: Sequence[Node], residual: Node, order: Mapping[Node, int]) -> Node | None:
    """The latest node of the residual stream's shape, or the latest at all."""
    alike = [node for node in nodes if dims(node) == dims(residual)]
    return max(alike or nodes, key=lambda node: order[node], default=None)


def _projections(mixer: Node, inside: frozenset[Node]) -> dict[str, Node]:
    spec = spec_of(mixer)
    assert spec is not None
    names = argument_names(mixer)
    is_attention = spec.name == "attention"
    nearest = {
        name: linear
        for name in (_ATTENTION_ROLES if is_attention else names)
        if (linear := _linear_before(argument(mixer, name), inside)) is not None
    }
    roles = _merge(nearest) if is_attention else _distinct(nearest, names[0])
    output = _linear_after(mixer, inside)
    return roles if output is None else {**roles, "output": output}


def _merge(nearest: dict[str, Node]) -> dict[str, Node]:
    """Give one name to a linear node that makes several of query, key and value."""
    query, key, value = (nearest.get(role) for role in _ATTENTION_ROLES)
    if key is None or key is not value:
        return nearest
    if query is key:
        return {"qkv": key}
    return {**({"query": query} if query is not None else {}), "key_value": key}


def _distinct(nearest: dict[str, Node], first: str) -> dict[str, Node]:
    """Name the projection of the first argument ``input``, the others by their argument."""
    found: dict[str, Node] = {}
    for name, linear in nearest.items():
        if linear not in found.values():
            found["input" if name == first else name] = linear
    return found


def _linear_before(value: object, inside: frozenset[Node]) -> Node | None:
    level: list[Node] = [value] if isinstance(value, Node) else []
    seen: set[Node] = set()
    while level:
        for node in level:
            if is_linear(node) and node in inside:
                return node
        seen.update(level)
        sources = [s for node in level if node in inside for s in node.all_input_nodes]
        level = list(dict.fromkeys(s for s in sources if s in inside and s not in seen))
    return None


def _linear_after(node: Node, inside: frozenset[Node]) -> Node | None:
    level: list[Node] = [node]
    seen: set[Node] = set()
    while level:
        users = [user for n in level for user in n.users if user in inside and user not in seen]
        level = list(dict.fromkeys(users))
        for user in level:
            if is_linear(user):
                return user
        seen.update(level)
    return None
