"""Defines ``fxgraft::`` operators from a schema, an implementation and a fake kernel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, cast

import torch

from fxgraft.kernels.spec import OpSpec, register

# torch.library is only partly typed.
LIBRARY: Any = torch.library.Library("fxgraft", "DEF")
_library: Any = torch.library


def define(
    spec: OpSpec,
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
    differentiable: Callable[..., Any] | None = None,
) -> OpSpec:
    """Define ``fxgraft::<spec.name>`` and register its spec.

    The backward pass differentiates ``spec.reference``, or a faster form of the same; it needs no
    code of its own. An op whose schema says that it changes an argument has none.

    Args:
        spec: the op's registration.
        schema: the schema after the name, for example ``"(Tensor x) -> Tensor"``.
        fake: computes output shapes and dtypes from fake tensors, without data.
        implementation: what runs on real tensors of any device; the reference if not given.
        differentiable: what the backward pass differentiates; the reference if not given.

    Raises:
        Error: an op of that name is registered already.
    """
    register(spec)
    qualified = f"fxgraft::{spec.name}"
    LIBRARY.define(spec.name + schema)
    LIBRARY.impl(spec.name, implementation or spec.reference, "CompositeExplicitAutograd")
    _library.register_fake(qualified, fake, lib=LIBRARY)
    if not spec.overload._schema.is_mutable:  # pyright: ignore[reportPrivateUsage]
        _library.register_autograd(
            qualified,
            _backward(differentiable or spec.reference),
            setup_context=_setup_context,
            lib=LIBRARY,
        )
    return spec


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: Any,
    keyword_only_inputs: dict[str, Any] | None = None,
) -> None:
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
    ctx.constants = [value for value in inputs if not isinstance(value, torch.Tensor)]
    ctx.keywords = keyword_only_inputs or {}


def _backward(reference: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *output_gradients: torch.Tensor | None) -> tuple[Any, ...]:
        tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
        with torch.enable_grad():
            inputs = [
                next(tensors).detach().requires_grad_(needed) if is_tensor else next(constants)
                for is_tensor, needed in zip_longest(
                    ctx.is_tensor, ctx.needs_input_grad, fillvalue=False
                )
            ]
            outputs = reference(*inputs, **ctx.keywords)
        outputs = cast(
            "tuple[torch.Tensor, ...]", outputs if isinstance(outputs, tuple) else (outputs,)
        )
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, output_gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [
            value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        gradients = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [gradient for _, gradient in pairs],
                allow_unused=True,
            )
        )
        # the dispatcher drops trailing arguments equal to their defaults: they take no gradient
        return tuple(
            next(gradients) if isinstance(value, torch.Tensor) and value.requires_grad else None
            for value in inputs[: len(ctx.needs_input_grad)]
        )

    return backward
