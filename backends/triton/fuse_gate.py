"""Attention over blocks takes in the score and the gate of its heads.

The score is ``logit_sum`` over a state in slots, or ``paged_attention_mass``, of the attention's
own query and key, and nothing else reads it. Of a token that is chosen and gated at once, of which
``spin`` makes none, the attention gates nothing.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import Node

from fxgraft.kernels.spec import argument, set_argument

fx = torch.ops.fxgraft


def fuse_gate(attention: Node) -> None:
    """Let a ``paged_attention`` node gate its heads, if only a gate reads it."""
    gate = _only_user(attention)
    if gate is None or gate.target is not fx.head_gate.default:
        return
    score = argument(gate, "score")
    if argument(gate, "x") is not attention or not isinstance(score, Node):
        return
    if _only_user(score) is not gate or argument(attention, "chosen") is not None:
        return
    found = _by_sums(attention, score) or _by_shares(attention, score)
    if found is None:
        return
    for name in ("keep", "factor"):
        set_argument(attention, name, argument(gate, name))
    set_argument(attention, "gated", argument(gate, "rows"))
    arguments, replaced = found
    for name, value in arguments.items():
        set_argument(attention, name, value)
    latest = max(attention.all_input_nodes)
    if latest > attention:
        latest.append(attention)
    gate.replace_all_uses_with(attention)
    for node in (gate, *replaced):
        attention.graph.erase_node(node)


Found = tuple[dict[str, object], tuple[Node, ...]]


def _by_sums(attention: Node, score: Node) -> Found | None:
    """Arguments of the attention, and the nodes that it replaces, users first."""
    if score.target is not operator.getitem or score.args[1] != 0:
        return None
    sums = cast(Node, score.args[0])
    if sums.target is not fx.logit_sum.default or not _same(
        attention, sums, "query", "key", "scale"
    ):
        return None
    after = next((user for user in sums.users if user is not score), None)
    read = argument(sums, "key_sum")
    if after is None or len(sums.users) != 2 or not isinstance(read, Node):
        return None
    write = _only_user(after)
    if read.target is not fx.read_slots.default or _only_user(read) is not sums or write is None:
        return None
    places = ("pool", "slots")
    if write.target is not fx.write_slots.default or not _same(read, write, *places):
        return None
    if not _same(attention, read, "past"):
        return None
    arguments = {
        "chosen": argument(sums, "chosen"),
        "key_sum_cache": argument(read, "pool"),
        "slots": argument(read, "slots"),
    }
    return arguments, (write, after, score, sums, read)


def _by_shares(attention: Node, score: Node) -> Found | None:
    """As ``_by_sums``."""
    if score.target is not fx.paged_attention_mass.default or not argument(score, "normalize"):
        return None
    names = ("query", "key", "key_cache", "past", "sinks", "scale", "window", "softcap")
    tables = (argument(attention, "table"), argument(score, "table"))
    if not _same(attention, score, *names) or not _alike(*tables):
        return None
    names = ("chosen", "chosen_cache")
    return {name: argument(score, name) for name in names}, (score,)


def _same(one: Node, other: Node, *names: str) -> bool:
    return all(argument(one, name) == argument(other, name) for name in names)


def _alike(one: object, other: object) -> bool:
    """Whether two nodes are the same call of the same arguments."""
    if not (isinstance(one, Node) and isinstance(other, Node)):
        return False
    calls = ((node.target, node.args, node.kwargs) for node in (one, other))
    return one is other or next(calls) == next(calls)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
