"""Work of one ``mlstm`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims

_PER_STATE = 5  # forget 1, write 2, read 2
_GATE_FLOPS = 12  # logsigmoid 3, stabiliser 2, two exponentials 5, bound 2


def flops(node: Node) -> Expr:
    """The recurrence for each token and head: memory, normaliser, gates and division."""
    batch, length, heads, value_dim = dims(argument(node, "value"))
    key_dim = dims(argument(node, "key"))[3]
    memory = _PER_STATE * key_dim * value_dim
    normalizer = 6 * key_dim
    return batch * length * heads * (memory + normalizer + value_dim + _GATE_FLOPS)
