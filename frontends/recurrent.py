"""Capture the recurrences of transformers models as ops.

transformers runs a recurrence through a module-level function that it would replace by a fast
kernel where one is installed. During capture that function, found by the kernel's name in the
globals of the modeling module, emits one fxgraft op instead. Models that keep their recurrence in
a method are in ``recurrent_modules``.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Generator, Iterable, MutableMapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import nn

from fxgraft.errors import CaptureError
from fxgraft.frontends.recurrent_modules import replacements

_LOCK = threading.RLock()
_MISSING = object()


@contextmanager
def emit_recurrent_ops(model: nn.Module) -> Generator[None]:
    """While active, the recurrences of a transformers model emit fxgraft ops.

    Only the calling thread sees the difference, and one thread at a time can be inside. A function
    that no op stands for is left alone; models without recurrence are not changed.

    Args:
        model: in eval mode, called without a cache.
    """
    with _LOCK, ExitStack() as stack:
        for module in _modeling_modules(model):
            for name, function in list(vars(module).items()):
                hook = _HOOKS.get(_kernel_name(function, module))
                if hook is not None:
                    hook = _in_this_thread(hook, function)
                    stack.enter_context(_replaced(vars(module), name, hook))
        for submodule in model.modules():
            for part in replacements(submodule):
                stack.enter_context(
                    _replaced(vars(part.owner), part.name, part.function, part.afterwards)
                )
        yield


def _modeling_modules(model: nn.Module) -> Iterable[ModuleType]:
    """The Python modules of transformers that define the classes of the model's submodules."""
    classes = {parent for module in model.modules() for parent in type(module).__mro__}
    names = {parent.__module__ for parent in classes}
    return [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]


def _kernel_name(function: object, module: ModuleType) -> str:
    """The name of the fast kernel that may stand in for a function, or the function's own name."""
    with_kernels_installed = getattr(function, "kernel_layer_name", None)
    if isinstance(with_kernels_installed, str):
        return with_kernels_installed
    if not isinstance(function, FunctionType) or function.__module__ != module.__name__:
        return ""
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        if variable == "func_name":
            return str(cell.cell_contents)
    return function.__name__


def _in_this_thread(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        function = hook if threading.get_ident() == thread else original
        return function(*args, **kwargs)

    return dispatch


@contextmanager
def _replaced(
    attributes: MutableMapping[str, Any], name: str, value: object, afterwards: object = None
) -> Generator[None]:
    previous = attributes.get(name, _MISSING) if afterwards is None else afterwards
    attributes[name] = value
    try:
        yield
    finally:
        if previous is _MISSING:
            del attributes[name]
        else:
            attributes[name] = previous


def _causal_conv1d(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """``causal_conv1d_fn``: [B, C, S] to [B, C, S]."""
    _refuse_packing(kwargs)
    known = {None: "", "silu": "silu", "swish": "silu"}
    output = torch.ops.fxgraft.causal_conv1d(
        hidden_states, weight, bias, activation=known.get(activation, "")
    )[0]
    if activation in known:
        return output
    from transformers.activations import ACT2FN

    return cast(Callable[..., torch.Tensor], ACT2FN[activation])(output)


def _selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``selective_scan_fn``: the layout of the op."""
    _refuse_packing(kwargs)
    output, state = torch.ops.fxgraft.selective_scan(
        hidden_states, dt, A, B, C, D, z, delta_bias, softplus=delta_softplus
    )
    return (output, state) if return_last_state else output


def _ssd(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``mamba_chunk_scan_combined``: the layout of the op, which chooses its own chunk size."""
    _refuse_packing(kwargs)
    shortest, longest = (float(limit) for limit in dt_limit)
    output, state = torch.ops.fxgraft.ssd(
        hidden_states, dt, A, B, C, D, dt_bias, z, initial_states,
        softplus=dt_softplus, dt_min=shortest, dt_max=None if math.isinf(longest) else longest,
    )  # fmt: skip
    return (output, state) if return_final_states else output


def _gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``chunk_gated_delta_rule`` and ``chunk_kda``: the layout of the op."""
    _refuse_packing(kwargs)
    output, state = torch.ops.fxgraft.gated_delta_rule(
        query, key, value, g, beta, initial_state,
        scale=float(query.shape[-1]) ** -0.5, l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip
    return output, state if output_final_state else None


def _wkv(
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: object = None,
    return_state: bool = False,
) -> tuple[torch.Tensor, None]:
    """``rwkv_linear_attention``: [B, S, C] to [B, S, C]."""
    if state is not None or return_state:
        raise CaptureError("RWKV was called with a state", "capture with use_cache=False")
    return torch.ops.fxgraft.wkv(key, value, -torch.exp(time_decay), time_first)[0], None


def _refuse_packing(kwargs: dict[str, Any]) -> None:
    for name in ("seq_idx", "cu_seqlens"):
        if kwargs.get(name) is not None:
            raise CaptureError(
                f"the model packs several sequences into one row (argument {name!r})",
                "capture with one sequence per row and an attention_mask",
            )


_HOOKS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d,
    "selective_scan_fn": _selective_scan,
    "mamba_chunk_scan_combined": _ssd,
    "chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kda": _gated_delta_rule,
    "rwkv_linear_attention": _wkv,
}
