"""Small modules for the tests of ``optimize``, and what the pass makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.frontends.exporting import export
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Input, Program
from fxgraft.transform import apply

HEADS, WIDTH, HIDDEN = 3, 8, 12
Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]


class Wrapped(nn.Module):
    """A function of x, and of a weight ``w`` if there is one, as a module."""

    def __init__(self, function: Unary | Binary, weight: Tensor | None = None) -> None:
        super().__init__()
        self.function: Any = function
        self.w = None if weight is None else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.w is None else self.function(x, self.w)


def trace(function: Unary, *shape: int | str, dtype: torch.dtype = torch.float32) -> Program:
    """A Program of one input ``x``; by default [batch, sequence, HIDDEN]."""
    return trace_module(Wrapped(function), *shape, dtype=dtype)


def trace_module(
    module: nn.Module, *shape: int | str, dtype: torch.dtype = torch.float32
) -> Program:
    """The same of a module."""
    shape = shape or ("batch", "sequence", HIDDEN)
    sizes = [{"batch": 2, "sequence": 5}[size] if isinstance(size, str) else size for size in shape]
    value = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return export(module, (Input("x", dtype, tuple(shape)),), {"x": value})


def trace_with(
    weight: Tensor, function: Binary, *shape: int | str, dtype: torch.dtype = torch.float32
) -> Program:
    """The same with a weight ``w`` as the function's second argument."""
    return trace_module(Wrapped(function, weight), *shape, dtype=dtype)


def optimize(program: Program) -> Counter[str]:
    """How often each operator is called after the pass."""
    after = optimized(program)
    return Counter(kind(node) for node in after.graph.nodes if node.op == "call_function")


def kind(node: Node) -> str:
    """The operator without its overload."""
    return ".".join(graphs.short_target(node).split(".")[:2])


def optimized(program: Program) -> Program:
    """The Program after the pass, which is checked to be exact and complete."""
    after = apply(program, Optimize())
    assert after.history[-1].error is not None
    assert Optimize().run(after.copy()) == []
    return after
