"""Raise captured nodes to fxgraft ops, and fold mask ops into the attention that uses them."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import argument, dims, set_argument
from fxgraft.program import Program

aten = torch.ops.aten
# What they return is what they take, unless it has another dtype.
_SAME = (aten.to.dtype, aten.detach.default, aten.detach_.default, aten.alias.default)


def raise_ops(program: Program) -> Program:
    """Rewrite, in place and before anyone else sees it:

    1. what export adds for its own checks, and casts to the dtype at hand, are dropped;
    2. ``aten.scaled_dot_product_attention`` becomes ``fxgraft::attention``;
    3. a ``causal_mask`` that an attention reads becomes arguments of the attention.
    """
    for node in list(program.graph.nodes):
        _drop_noise(node)
    for node in list(program.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _raise_sdpa(node)
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.fxgraft.attention.default
    ):
        _fold_mask(node)
    graphs.finish(program.graph_module)
    return program


def has_loose_masks(program: Program) -> bool:
    """Whether a mask op is read by anything but an attention."""
    mask = torch.ops.fxgraft.causal_mask.default
    return bool(program.graph.find_nodes(op="call_function", target=mask))


def _drop_noise(node: Node) -> None:
    if node.target is aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
    elif node.target in _SAME:
        source = node.args[0]
        assert isinstance(source, Node)
        if source.meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)


def _raise_sdpa(node: Node) -> None:
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    if not all(isinstance(x, Node) and len(dims(x)) == 4 for x in (query, key, value)):
        return
    assert isinstance(query, Node)
    if float(argument(node, "dropout_p")) != 0.0:  # pyright: ignore[reportArgumentType]
        return
    scale = argument(node, "scale")
    head_dim = int(dims(query)[-1])  # pyright: ignore[reportArgumentType]
    raised = graphs.insert(
        node,
        torch.ops.fxgraft.attention.default,
        (query, key, value, None, argument(node, "attn_mask")),
        {
            "scale": float(head_dim**-0.5 if scale is None else scale),  # pyright: ignore[reportArgumentType]
            "is_causal": bool(argument(node, "is_causal")),
        },
    )
    node.replace_all_uses_with(raised)
    node.graph.erase_node(node)


def _fold_mask(node: Node) -> None:
    mask = _skip_identities(argument(node, "bias"))
    if mask is None or mask.target is not torch.ops.fxgraft.causal_mask.default:
        return
    key_mask = argument(mask, "key_mask")
    assert isinstance(key_mask, Node)
    set_argument(node, "bias", None)
    set_argument(node, "key_mask", None if _is_ones(key_mask) else key_mask)
    for name in ("is_causal", "window", "chunk"):
        set_argument(node, name, argument(mask, name))


def _is_ones(node: Node) -> bool:
    while node.target in (aten._to_copy.default, aten.to.dtype):
        node = node.all_input_nodes[0]
    return node.target is aten.ones.default


def _skip_identities(value: object) -> Node | None:
    """Look through slices, expansions and copies that keep the shape."""
    if not isinstance(value, Node):
        return None
    transparent = (
        aten.slice.Tensor,
        aten.expand.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.clone.default,
    )
    while value.target in transparent:
        source = value.args[0]
        assert isinstance(source, Node)
        if dims(source) != dims(value):
            return None
        value = source
    return value
