"""Work of one ``causal_conv1d`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims

_SILU_FLOPS = 4


def flops(node: Node) -> Expr:
    """A multiply-add for each tap and output, plus bias and activation."""
    batch, channels, length = dims(argument(node, "x"))
    width = dims(argument(node, "weight"))[1]
    per_output = 2 * width
    if argument(node, "bias") is not None:
        per_output += 1
    if argument(node, "activation") == "silu":
        per_output += _SILU_FLOPS
    return batch * channels * length * per_output
