"""What the op tests share: checks that hold for every op, and graphs to read costs from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fxgraft.kernels.spec import Expr, OpSpec, spec_of


def opcheck(spec: OpSpec, *args: Any, **kwargs: Any) -> None:
    """Check schema, fake kernel, autograd registration and tracing of an op."""
    torch.library.opcheck(spec.overload, args, kwargs)  # pyright: ignore[reportUnknownMemberType]


def gradcheck(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Compare gradients with finite differences in float64."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    assert all(leaf.dtype == torch.float64 for leaf in leaves)
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=1e-12)


def grads(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of an arbitrary weighted sum of an output."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.kwargs = dict(kwargs)

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **self.kwargs)


def export(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any] | None, ...],
    **kwargs: Any,
) -> ExportedProgram:
    """Export a call of ``function`` with dynamic dimensions, given for each argument."""
    return torch.export.export(_Call(function, kwargs), args, dynamic_shapes=(dynamic_shapes,))


def op_node(program: ExportedProgram, spec: OpSpec) -> Node:
    """The only node of an exported graph that calls the op."""
    (node,) = (node for node in program.graph.nodes if spec_of(node) is spec)
    return node


def evaluate(expression: Expr, **sizes: int) -> int:
    """Value of a cost at sizes, given by the name of the exported dimension."""
    names = {str(symbol): symbol for symbol in expression.free_symbols}
    assert names.keys() <= sizes.keys(), f"{expression} has symbols other than {list(sizes)}"
    return int(expression.subs({symbol: sizes[name] for name, symbol in names.items()}))
