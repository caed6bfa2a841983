"""``fxgraft::paged_attention``: attention of new tokens over a cache in blocks, which it extends.

Rotates query and key, writes the new keys and values behind those that a row has, and attends.
Source of blocks and tables: Kwon et al., arXiv 2309.06180, section 4.1.

Args:
    query: [B, Hq, S, D] of the S new tokens; Hq = Hkv · G, and G consecutive query heads share a
        kv head. Any strides with a contiguous last dimension, as key and value.
    key: [B, Hkv, S, D].
    value: [B, Hkv, S, Dv].
    key_cache: [N, Hkv, block_size, D], changed in place; holds rotated keys. The N blocks are
        shared by all rows.
    value_cache: [N, Hkv, block_size, Dv], changed in place.
    table: int32 [B, P]; entry p of a row is the block that holds its tokens from p · block_size.
        Entries for past..past+S-1 are blocks of the row alone. Blocks that no query sees are never
        read.
    past: int32 [B], number of tokens before the new ones. A negative number marks a row without a
        request: its output is 0, and nothing is written for it.
    cos, sin: [B|1, 1, S, R] of ``fxgraft::rotary``, or None for no rotation.
    sinks: [Hq], one more logit per head that joins the softmax's denominator only (gpt-oss).
    scale: factor of the scores.
    window: number of most recent keys that a query sees, itself included.
    softcap: if positive, scores become softcap · tanh(scores / softcap) after scaling (Gemma 2).
    interleaved: pairing of channels of ``fxgraft::rotary``.
    longest_past: the largest of ``past`` where the caller knows it, else -1. 0 says that the new
        tokens are all there are.
    chosen: bool [B, S], the tokens that heads are scored by; with the next ones, heads are
        suppressed as by ``fxgraft::head_gate``.
    gated: bool [B, S], the tokens whose heads are ranked. A chosen token is not gated.
    key_sum_cache: float [slots, Hkv, D], changed in place: the sum of a request's chosen keys.
        With it, heads are scored as by ``fxgraft::logit_sum``.
    slots: int64 [B], the slot of each row; different ones, but for rows without a request.
    chosen_cache: bool [N, block_size], changed in place: ``chosen`` of past tokens, in the blocks
        that ``table`` names. With it, heads are scored as by ``fxgraft::attention_mass``. Either
        this or ``key_sum_cache`` is given.
    keep: number of heads that stay in a gated row.
    factor: what the outputs of the others are multiplied by. With 0 and ``key_sum_cache`` one new
        token costs nothing for kv heads none of whose query heads stays.

Returns:
    [B, Hq, S, Dv] in the query's dtype, laid out so that ``.transpose(1, 2)`` is contiguous.

Raises:
    InputError: dtypes differ, shapes do not fit, the window is below 1, or only some of what
        suppresses heads is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.attention.mask import check_rules
from fxgraft.kernels.define import define
from fxgraft.kernels.paged_attention import cost, reference
from fxgraft.kernels.paged_attention.gate import Gate
from fxgraft.kernels.paged_attention.general import paged_attention as general
from fxgraft.kernels.spec import OpSpec


def _check_dtypes(query: Tensor, others: tuple[Tensor, ...], table: Tensor, past: Tensor) -> None:
    if any(tensor.dtype != query.dtype for tensor in others):
        raise InputError(
            f"paged_attention's query is {query.dtype}, but key, value and caches are "
            f"{', '.join(str(tensor.dtype) for tensor in others)}",
            "cast them to one dtype",
        )
    if table.dtype != torch.int32 or past.dtype != torch.int32:
        raise InputError(
            f"paged_attention's table and past are {table.dtype} and {past.dtype}", "pass int32"
        )


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    past: Tensor,
) -> None:
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    expected = {
        "key": (key, (batch, kv_heads, length, head_dim)),
        "value": (value, (batch, kv_heads, length, value.shape[-1])),
        "key_cache": (key_cache, (*key_cache.shape[:1], kv_heads, key_cache.shape[2], head_dim)),
        "value_cache": (value_cache, (*key_cache.shape[:3], value.shape[-1])),
        "table": (table, (batch, table.shape[-1])),
        "past": (past, (batch,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"paged_attention's {name} is {list(tensor.shape)} for a query of "
                f"{list(query.shape)}",
                f"pass {list(shape)}",
            )
    if heads % kv_heads:
        raise InputError(
            f"paged_attention has {heads} query heads for {kv_heads} key heads",
            "the number of query heads is a multiple of the number of key heads",
        )


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    past: Tensor,
    *angles: Tensor | None,
    window: int | None = None,
    **_: Any,
) -> Tensor:
    _check_dtypes(query, (key, value, key_cache, value_cache), table, past)
    check_rules(True, window, None)
    return reference.empty_output(query, value)


def _checked(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation that refuses wrong arguments first."""

    def call(*tensors: Any, window: int | None = None, **options: Any) -> Tensor:
        query, key, value, key_cache, value_cache, table, past = tensors[:7]
        _check_dtypes(query, (key, value, key_cache, value_cache), table, past)
        _check_shapes(query, key, value, key_cache, value_cache, table, past)
        check_rules(True, window, None)
        gate = _gate(tensors, options)
        if gate is not None:
            gate.check(query, key, key_cache)
        return attend(*tensors, window=window, **options)

    return call


def _gate(tensors: tuple[Any, ...], options: dict[str, Any]) -> Gate | None:
    """The gate of a call; arguments may be given by position or by name."""
    names = ("chosen", "gated", "key_sum_cache", "slots", "chosen_cache")
    given = dict(zip(names, tensors[10:], strict=False))
    values = {name: given.get(name, options.get(name)) for name in names}
    return Gate.of(
        values["chosen"], values["gated"], values["key_sum_cache"], values["slots"],
        values["chosen_cache"], options.get("keep", 0), options.get("factor", 1.0),
    )  # fmt: skip


def _by_kernels(*tensors: Any, **options: Any) -> Tensor:
    from fxgraft.kernels.paged_attention import triton

    query, key, value = tensors[:3]
    cos = tensors[7] if len(tensors) > 7 else options.get("cos")
    is_taken = triton.supports(query, key, value, cos, _gate(tensors, options))
    attend = triton.paged_attention if is_taken else general
    return attend(*tensors, **options)


SPEC = define(
    OpSpec(
        name="paged_attention",
        kind="mixer",
        reference=reference.paged_attention,
        flops=cost.flops,
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor table, Tensor past, Tensor? cos=None, Tensor? sin=None, Tensor? sinks=None, "
    "Tensor? chosen=None, Tensor? gated=None, Tensor(c!)? key_sum_cache=None, "
    "Tensor? slots=None, Tensor(d!)? chosen_cache=None, *, float scale, int? window=None, "
    "float softcap=0.0, bool interleaved=False, int longest_past=-1, int keep=0, "
    "float factor=1.0) -> Tensor",
    _fake,
    _checked(general),
)
on_cuda(SPEC, _checked(_by_kernels), _checked(general))
