"""Checks that hold for every op, and single nodes to read costs from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxgraft.kernels.spec import OpSpec

Op = Callable[..., Any]
DynamicShapes = tuple[dict[int, Any] | None, ...]


def op_of(spec: OpSpec) -> Op:
    """The op as a caller sees it, ``torch.ops.fxgraft.<name>``."""
    return cast(Op, spec.overload)


def opcheck(spec: OpSpec, *args: Any, **kwargs: Any) -> None:
    """Check schema, fake kernel, autograd registration and tracing of an op.

    Traces with dynamic shapes, but with static ones if an argument requires a gradient: the
    dynamic trace of a backward takes seconds.
    """
    trains = any(isinstance(value, Tensor) and value.requires_grad for value in args)
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static" if trains else "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(  # pyright: ignore[reportUnknownMemberType]
        spec.overload, args, kwargs, test_utils=checks
    )


def gradcheck(function: Op, *inputs: Tensor, **kwargs: Any) -> None:
    """Compare gradients with finite differences in float64."""

    def call(*leaves: Tensor) -> Any:
        return function(*leaves, **kwargs)

    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    assert all(leaf.dtype == torch.float64 for leaf in leaves)
    assert torch.autograd.gradcheck(  # pyright: ignore[reportUnknownMemberType]
        call, leaves, fast_mode=True
    )


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers; each shape and seed always gives the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def values(x: Tensor) -> Any:
    """A tensor as nested lists of Python numbers."""
    return cast(Any, x.tolist())  # pyright: ignore[reportUnknownMemberType]


class _Call(nn.Module):
    def __init__(self, function: Op, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.kwargs = dict(kwargs)

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **self.kwargs)


def check_export(
    functions: tuple[Op, ...],
    args: tuple[Any, ...],
    other_args: tuple[Any, ...],
    dynamic_shapes: DynamicShapes,
    **kwargs: Any,
) -> None:
    """Export functions that compute the same at ``args``; compare them at sizes not exported.

    The first function, called eagerly, says what is right.
    """
    expected = functions[0](*other_args, **kwargs)
    for function in functions:
        call = _Call(function, kwargs)
        program = torch.export.export(call, args, dynamic_shapes=(dynamic_shapes,))
        torch.testing.assert_close(program.module()(*other_args), expected)


def call_node(spec: OpSpec, *args: Any, **kwargs: Any) -> Node:
    """A graph node that calls the op, with one placeholder for each tensor."""
    graph = Graph()

    def lift(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        placeholder = graph.placeholder(f"argument_{len(graph.nodes)}")
        placeholder.meta["val"] = value
        return placeholder

    lifted_args = tuple(lift(value) for value in args)
    lifted_kwargs = {name: lift(value) for name, value in kwargs.items()}
    return graph.call_function(spec.overload, lifted_args, lifted_kwargs)
