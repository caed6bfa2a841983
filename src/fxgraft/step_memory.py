"""Memory that a step needs: weights, state per token and sequence, activations."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from fxgraft import cost_traffic as traffic
from fxgraft.cost_rules import is_view
from fxgraft.element_types import ElementTypes
from fxgraft.operators import operator_of
from fxgraft.program import Program
from fxgraft.state import StateTensor


def weight_bytes(program: Program, types: ElementTypes) -> int:
    """Bytes of all weights, a shared one once, if floating ones had the given type."""
    seen: set[int] = set()
    bits = 0
    for _, weight in program.weights():
        if id(weight) not in seen:
            seen.add(id(weight))
            is_float = weight.is_floating_point()
            width = types.bits("weights") if is_float else 8 * weight.element_size()
            bits += weight.numel() * width
    return -(-bits // 8)


def state_memory(
    states: Sequence[StateTensor], types: ElementTypes
) -> tuple[list[tuple[int | None, int]], int]:
    """State of one sequence.

    Returns:
        For each bound on the number of tokens (None: none) the bytes per token, and the bytes of
        what does not grow. A bound is one more than the past tokens that are kept, as the newest
        token is kept too while a step runs.
    """
    growing: dict[int | None, int] = defaultdict(int)
    fixed = 0
    for state in states:
        width = types.bits("state") if state.dtype.is_floating_point else 8 * state.dtype.itemsize
        count = math.prod(size for size in state.shape if isinstance(size, int))
        size = -(-count * width // 8)
        if state.grows is None:
            fixed += size
        else:
            growing[None if state.limit is None else state.limit + 1] += size
    return list(growing.items()), fixed


def activation_bytes(program: Program, types: ElementTypes, tokens: int) -> tuple[int, int]:
    """Most bytes of activations that are alive at once: a constant, and per new token.

    Every value lives from the node that makes it to the last one that reads it or a view of it.
    Weights and state are not counted. The peak is taken at a prefill of ``tokens`` tokens without
    a past.
    """
    one, many = _peak(program, types, 1), _peak(program, types, max(tokens, 2))
    per_token = max(many - one, 0) / (max(tokens, 2) - 1)
    return max(math.ceil(one - per_token), 0), math.ceil(per_token)


def _peak(program: Program, types: ElementTypes, tokens: int) -> float:
    known = {"batch": 1, "sequence": tokens, "past": 0, "total": tokens}
    given = {name: size for name, size in known.items() if name in program.dimensions}
    sizes = traffic.Sizes(program, given, types)
    owners = _owners(program, sizes)
    last: dict[Node, Node] = {}
    for node in program.graph.nodes:
        last.update((owners[source], node) for source in node.all_input_nodes if source in owners)
    ending: dict[Node, list[Node]] = defaultdict(list)
    for value, reader in last.items():
        ending[reader].append(value)
    made: dict[Node, float] = {}
    alive = peak = 0.0
    for node in program.graph.nodes:
        if owners.get(node) is node:
            made[node] = _bytes(node, sizes)
            alive += made[node]
            peak = max(peak, alive)
        alive -= sum(made[value] for value in ending[node])
    return peak


def _owners(program: Program, sizes: traffic.Sizes) -> dict[Node, Node]:
    """For each node that holds activations, the one that made their memory."""
    owners: dict[Node, Node] = {}
    for node in program.graph.nodes:
        first = owners.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if operator_of(node) is None:
            if node.op == "call_function" and first is not None:
                owners[node] = first
        elif sizes.role(node) == "activations":
            owners[node] = first if first is not None and is_view(node, sizes) else node
    return owners


def _bytes(node: Node, sizes: traffic.Sizes) -> float:
    total: Any = sum(
        sizes.bytes_of(value, "activations") for value in traffic.tensors(node.meta.get("val"))
    )
    free = dict.fromkeys(getattr(total, "free_symbols", ()), 1)
    return float(total.subs(free)) if free else float(total)
