"""Calls operators on fake tensors, once per signature.

The layers of a model repeat the same calls with the same shapes, and a fake call costs
milliseconds. So results are kept, per fake tensor mode, by what alone they depend on: operator,
shapes, strides, dtypes, devices and constants. Nodes may therefore share one fake tensor as their
value; nothing may change a value in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxgraft.kernels.spec import expr

_DATA_DEPENDENT = frozenset({
    "data_dependent_output", "dynamic_output_shape", "inplace_view",
    "maybe_aliasing_or_mutating",
})  # fmt: skip


def call(
    mode: FakeTensorMode,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The result of ``target(*args, **kwargs)`` on values of ``mode``.

    Raises:
        Exception: whatever the operator raises; failures are not kept.
    """
    key = None
    if _depends_on_signature(target) and not _holds_constants((args, kwargs)):
        key = (target, _signature(args), _signature(kwargs))
        known = _results(mode)
        if key in known:
            return known[key]
    # Composite kernels in C++ would fix symbolic sizes; tracing also uses those in Python.
    with enable_python_dispatcher(), mode:
        result = target(*args, **kwargs)
    if key is not None and not free_unbacked_symbols(result):
        _results(mode)[key] = result
    return result


def weight(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """The fake tensor of ``mode`` that stands for a weight."""
    known = _results(mode)
    key = ("weight", _signature(value))
    if key not in known:
        known[key] = mode.from_tensor(value.detach(), static_shapes=True)
    return known[key]


def _results(mode: FakeTensorMode) -> dict[object, Any]:
    # Kept on the mode, so that both are freed together.
    return cast("dict[object, Any]", mode.__dict__.setdefault("fxgraft_results", {}))


@cache
def _depends_on_signature(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target._schema.is_mutable:  # pyright: ignore[reportPrivateUsage]
        return False
    return _DATA_DEPENDENT.isdisjoint(tag.name for tag in target.tags)


def _holds_constants(value: Any) -> bool:
    """Whether some fake tensor knows its data, on which a result could depend."""
    if isinstance(value, FakeTensor):
        return value.constant is not None
    if isinstance(value, (list, tuple)):
        return any(_holds_constants(item) for item in cast("list[Any]", value))
    if isinstance(value, Mapping):
        return any(_holds_constants(item) for item in cast("Mapping[str, Any]", value).values())
    return False


def _signature(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        layout = (value.shape, value.stride(), (value.storage_offset(),))
        sizes = tuple(tuple(expr(size) for size in part) for part in layout)
        return (sizes, value.dtype, value.device, type(value) is torch.nn.Parameter)
    if isinstance(value, (list, tuple)):
        return tuple(_signature(item) for item in cast("list[Any]", value))
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return tuple((key, _signature(item)) for key, item in items)
    if isinstance(value, slice):
        bounds = cast(Any, value)
        return ("slice", _signature((bounds.start, bounds.stop, bounds.step)))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbol", value.__class__.__name__, cast(Any, value).node.expr)
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    return (type(value), repr(value)) if isinstance(value, (int, float, complex)) else value
