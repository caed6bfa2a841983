"""``fxgraft::paged_attention_mass``: attention that heads pay to chosen tokens, over blocks.

The form of ``fxgraft::attention_mass`` for the engine and for decoding in place. The Triton backend
computes it as part of ``fxgraft::paged_attention`` where it only decides which heads stay.

Args:
    query: [B, Hq, S, D] of the S new tokens, rotated.
    key: [B, Hkv, S, D], rotated.
    chosen: bool [B, S], which of them count.
    key_cache: [N, Hkv, block_size, D], changed in place.
    chosen_cache: bool [N, block_size], changed in place.
    table: int32 [B, P], and past: int32 [B], as in ``fxgraft.kernels.paged_attention.op``.
    sinks, scale, window, softcap, normalize: as in ``fxgraft.kernels.attention_mass.op``.

Returns:
    [B, Hq, S] in at least float32; 0 in rows without a request.

Raises:
    InputError: the heads do not divide, or the window is below 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.attention.mask import check_rules
from fxgraft.kernels.define import define
from fxgraft.kernels.paged_attention_mass import cost, reference
from fxgraft.kernels.spec import OpSpec


def _check(query: Tensor, key: Tensor, window: int | None) -> None:
    if query.shape[1] % key.shape[1]:
        raise InputError(
            f"paged_attention_mass has {query.shape[1]} query heads for {key.shape[1]} key heads",
            "the number of query heads is a multiple of the number of key heads",
        )
    check_rules(True, window, None)


def _fake(query: Tensor, key: Tensor, *_: Any, window: int | None = None, **__: Any) -> Tensor:
    _check(query, key, window)
    return reference.empty_output(query)


def _paged_attention_mass(*tensors: Any, window: int | None = None, **options: Any) -> Tensor:
    _check(tensors[0], tensors[1], window)
    return reference.paged_attention_mass(*tensors, window=window, **options)


SPEC = define(
    OpSpec(
        name="paged_attention_mass",
        kind="intervention",
        reference=reference.paged_attention_mass,
        flops=cost.flops,
    ),
    "(Tensor query, Tensor key, Tensor chosen, Tensor(a!) key_cache, Tensor(b!) chosen_cache, "
    "Tensor table, Tensor past, Tensor? sinks=None, *, float scale, int? window=None, "
    "float softcap=0.0, bool normalize=True) -> Tensor",
    _fake,
    _paged_attention_mass,
)
