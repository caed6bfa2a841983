"""Activations that are spelled out, and the products they gate, become one op.

1. ``x * sigmoid(x)`` becomes ``aten.silu``.
2. ``x/2 * (1 + tanh(√(2/π) (x + 0.044715 x³)))`` (Hendrycks and Gimpel, arXiv 1606.08415), however
   its terms are arranged, becomes ``aten.gelu`` by tanh.
3. ``activation(gate) * up``, both of one shape, becomes ``fxgraft::gated_activation``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch.fx import Graph, Node

from fxgraft import graph as graphs
from fxgraft.kernels.gated_activation.op import SPEC
from fxgraft.kernels.spec import argument
from fxgraft.passes.optimize import effects, layouts
from fxgraft.passes.optimize.matching import (
    aten,
    calls,
    dtype_of,
    is_call,
    is_tensor,
    number,
    products,
    same_size,
    single_user,
    source,
    sums,
)
from fxgraft.program import Program

_NAMES = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}
_SLOPE = math.sqrt(2 / math.pi)
_INNER = {1: _SLOPE, 3: _SLOPE * 0.044715}

Polynomial = Mapping[int, float]


def rewrite(program: Program) -> int:
    """Fuse activations, then the products that they gate.

    Returns:
        How many there were of both.
    """
    graph = program.graph
    written = effects.written(graph)
    plain = _fuse_silu(graph, written) + _fuse_gelu(graph, written)
    count = plain + _fuse_gates(graph, written)
    if count:
        effects.drop_unread(graph)
    return count


def _fuse_silu(graph: Graph, written: frozenset[Node]) -> int:
    count = 0
    for sigmoid in calls(graph, aten.sigmoid.default):
        x, user = source(sigmoid), single_user(sigmoid)
        if user is None or not effects.untouched(sigmoid, written):
            continue
        if any(a is sigmoid and b is x for a, b in products(user)):
            layouts.replace(user, graphs.insert(user, aten.silu.default, (x,)))
            count += 1
    return count


def _fuse_gelu(graph: Graph, written: frozenset[Node]) -> int:
    count = 0
    for tanh in calls(graph, aten.tanh.default):
        for x in _variables(tanh):
            result = _gelu_result(tanh, x)
            if result is not None and x not in written and effects.untouched(tanh, written):
                fused = graphs.insert(result, aten.gelu.default, (x,), {"approximate": "tanh"})
                layouts.replace(result, fused)
                count += 1
    return count


def _variables(node: Node) -> Iterator[Node]:
    """What the arithmetic in front of a node may be a function of, nearest first."""
    found = source(node)
    arithmetic = (aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.add.Scalar)
    while is_call(found, *arithmetic, aten.pow.Tensor_Scalar):
        found = next((a for a in found.args if isinstance(a, Node)), None)
        if found is not None:
            yield found


def _gelu_result(tanh: Node, x: Node) -> Node | None:
    """The product at the end of a GELU of x around this tanh."""
    if not _is_close(_polynomial(source(tanh), x), _INNER):
        return None
    shifted = single_user(tanh)
    if shifted is None or not any(a is tanh and number(b) == 1 for a, b in sums(shifted)):
        return None
    result, scale = shifted, {0: 1.0}
    while not _is_close(scale, {1: 0.5}):
        user = single_user(result)
        others = [b for a, b in products(user) if a is result]
        factor = _polynomial(others[0], x) if others else None
        if user is None or factor is None or max(scale) + max(factor) > 1:
            return None
        result, scale = user, _multiply(scale, factor)
    return result


def _polynomial(node: object, x: Node) -> Polynomial | None:
    """Coefficients by power of a node that is a polynomial in x, else None."""
    constant = number(node)
    if constant is not None:
        return {0: constant}
    if node is x:
        return {1: 1.0}
    if is_call(node, aten.pow.Tensor_Scalar):
        base, power = _polynomial(node.args[0], x), number(node.args[1])
        return {3: 1.0} if base == {1: 1.0} and power == 3 else None
    for combine, pairs in ((_multiply, products(node)), (_add, sums(node))):
        first = next(pairs, None)
        if first is not None:
            a, b = _polynomial(first[0], x), _polynomial(first[1], x)
            return combine(a, b) if a is not None and b is not None else None
    return None


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    product: dict[int, float] = {}
    for i, p in a.items():
        for j, q in b.items():
            product[i + j] = product.get(i + j, 0.0) + p * q
    return product


def _add(a: Polynomial, b: Polynomial) -> Polynomial:
    return {power: a.get(power, 0.0) + b.get(power, 0.0) for power in {**a, **b}}


def _is_close(found: Polynomial | None, wanted: Polynomial) -> bool:
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(math.isclose(found[power], wanted[power], rel_tol=1e-7) for power in wanted)
    )


def _fuse_gates(graph: Graph, written: frozenset[Node]) -> int:
    count = 0
    for activation in calls(graph, *_NAMES):
        user, gate = single_user(activation), source(activation)
        up = _gated(activation, user)
        if user is None or gate is None or up is None:
            continue
        if not effects.untouched(activation, written) or not effects.untouched(user, written):
            continue
        keywords = {"activation": _name(activation)}
        layouts.replace(user, graphs.insert(user, SPEC.overload, (gate, up), keywords))
        count += 1
    return count


def _gated(activation: Node, user: Node | None) -> Node | None:
    """The other factor where an activation gates a tensor of its own shape and dtype."""
    for a, b in products(user):
        if a is activation and b is not activation and is_tensor(b):
            fits = same_size(activation, b) and dtype_of(activation) == dtype_of(b)
            return b if fits else None
    return None


def _name(activation: Node) -> str:
    is_gelu = is_call(activation, aten.gelu.default)
    by_tanh = is_gelu and argument(activation, "approximate") == "tanh"
    return "gelu_tanh" if by_tanh else _NAMES[activation.target]  # pyright: ignore[reportArgumentType]
