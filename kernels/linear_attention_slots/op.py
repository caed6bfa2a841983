"""``fxgraft::linear_attention_slots``: linear attention that updates states in a pool of slots.

The form of ``fxgraft::linear_attention`` for the engine and for decoding in place. On CUDA, few
tokens are one kernel launch, which reads and writes each state once.

Args:
    query: [B, S, Hq, Dk] of the S new tokens; this and the next four as in
        ``fxgraft.kernels.linear_attention.op``.
    key: [B, S, Hkv, Dk].
    value: [B, S, Hkv, Dv].
    gate: [B, S, Hs, N, Dk].
    mixing: [N] or [Hq, N].
    memory_cache: [slots, Hs, N, Dk, Dv], changed in place. Float32; of 16 bits only if ``dtype``
        says so too.
    slots: int64 [B], the slot of each row: different ones, but for rows without a request. -1 is
        no slot.
    past: int32 [B], number of tokens before the new ones: at 0 the state starts from zeros
        whatever the slot holds; a negative number marks a row without a request, for which the
        output is 0 and no slot changes.
    norm_weight: [Dv] or [Hq, Dv], or None.
    scale, temperature, floor, write_scale, eps, dtype: as in ``linear_attention``.

Returns:
    [B, S, Hq, Dv] in the query's dtype.

Raises:
    InputError: shapes do not fit, ``write_scale`` is unknown, or the pool has 16 bits unasked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.linear_attention import arguments, chunkwise
from fxgraft.kernels.linear_attention_slots import cost, reference
from fxgraft.kernels.spec import OpSpec


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    memory_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    norm_weight: Tensor | None = None,
    *,
    write_scale: str = "none",
    dtype: torch.dtype | None = None,
    **_: Any,
) -> None:
    arguments.check(query, key, value, gate, mixing, norm_weight, None, None, write_scale)
    count = memory_cache.shape[0]
    arguments.check_state(query, key, value, gate, count, memory_cache, dtype)
    for name, tensor in {"slots": slots, "past": past}.items():
        if tuple(tensor.shape) != (query.shape[0],):
            raise InputError(
                f"linear_attention_slots's {name} is {list(tensor.shape)} for a batch of "
                f"{query.shape[0]}",
                "pass one number per row",
            )


def _fake(*tensors: Any, **options: Any) -> Tensor:
    _check(*tensors, **options)
    query, value = tensors[0], tensors[2]
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _general(*tensors: Any, **options: Any) -> Tensor:
    _check(*tensors, **options)
    query, key, value, gate, mixing, pool, slots, past = tensors[:8]
    norm_weight = tensors[8] if len(tensors) > 8 else None
    given = (query, key, value, gate, mixing, norm_weight)
    return reference.over_slots(chunkwise.linear_attention, given, (pool, slots, past), options)


def _by_kernels(*tensors: Any, **options: Any) -> Tensor:
    from fxgraft.kernels.linear_attention import triton

    _check(*tensors, **options)
    if arguments.refusal(*tensors[:3]) is not None:
        return _general(*tensors, **options)
    return triton.over_slots(*tensors, **options)


SPEC = define(
    OpSpec(
        name="linear_attention_slots",
        kind="mixer",
        reference=reference.linear_attention_slots,
        flops=cost.flops,
        refusal=arguments.node_refusal,
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor gate, Tensor mixing, "
    "Tensor(a!) memory_cache, Tensor slots, Tensor past, Tensor? norm_weight=None, *, "
    'float scale, float? temperature=None, float? floor=None, str write_scale="none", '
    "float eps=1e-06, ScalarType? dtype=None) -> Tensor",
    fake=_fake,
    implementation=_general,
)
on_cuda(SPEC, _by_kernels, _general)
