"""``fxgraft::attention_mass``: per head, the attention that a query pays to chosen keys.

mass = Σ_j p_j over the chosen keys j, with p the weights of ``fxgraft::attention`` for the same
arguments, so 0 ≤ mass ≤ 1, and masses over a partition of the keys sum to 1 (with sinks, to less).
With ``normalize=False`` it is Σ_j s_j over the chosen keys that the query sees, with s the logits
that the softmax is taken of: after soft cap and bias. ``fxgraft::logit_sum`` gives the same at a
fraction of the cost where neither cap, bias nor window comes between.

Source: the head score of SPIN, arXiv 2505.16411.

Args:
    query: [B, Hq, S, D].
    key: [B, Hkv, T, D] with T >= S.
    chosen: bool [B, T], the keys that count.
    key_mask, bias, sinks, scale, is_causal, window, chunk, softcap: as of ``fxgraft::attention``.
    normalize: weights instead of logits.

Returns:
    [B, Hq, S] in at least float32; 0 in rows that see no chosen key.

Raises:
    InputError: as ``fxgraft::attention``.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.errors import InputError
from fxgraft.kernels.attention import op as attention
from fxgraft.kernels.attention.mask import check_lengths, check_rules
from fxgraft.kernels.attention_mass import cost, reference
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import InPlace, OpSpec, State, argument


def _check(
    query: Tensor, key: Tensor, is_causal: bool, window: int | None, chunk: int | None
) -> None:
    if query.shape[1] % key.shape[1]:
        raise InputError(
            f"attention_mass has {query.shape[1]} query heads for {key.shape[1]} key heads",
            "the number of query heads is a multiple of the number of key heads",
        )
    check_rules(is_causal, window, chunk)


def _fake(
    query: Tensor,
    key: Tensor,
    chosen: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    _check(query, key, is_causal, window, chunk)
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


def _attention_mass(
    query: Tensor,
    key: Tensor,
    chosen: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    _check(query, key, is_causal, window, chunk)
    check_lengths(query.shape[2], key.shape[2], is_causal, chunk)
    return reference.attention_mass(
        query,
        key,
        chosen,
        key_mask,
        bias,
        sinks,
        scale=scale,
        is_causal=is_causal,
        window=window,
        chunk=chunk,
        softcap=softcap,
        normalize=normalize,
    )


def _in_place(node: Node, masks: Collection[Node]) -> InPlace | None:
    """Over blocks, where no rule but causality and a window hides keys, as ``attention`` is."""
    mask = argument(node, "key_mask")
    if argument(node, "bias") is not None or argument(node, "chunk") is not None:
        return None
    if not argument(node, "is_causal") or (mask is not None and mask not in masks):
        return None
    names = ("query", "key", "chosen", "sinks", "scale", "window", "softcap", "normalize")
    target = torch.ops.fxgraft.paged_attention_mass.default
    return InPlace(target, {name: argument(node, name) for name in names})


SPEC = define(
    OpSpec(
        name="attention_mass",
        kind="intervention",
        reference=reference.attention_mass,
        flops=cost.flops,
        states=(
            State("key", "key", "grows", dim=2, limit="window"),
            State("chosen", "chosen", "grows", dim=1, limit="window"),
        ),
        total_dims=attention.SPEC.total_dims,
        causal=attention.SPEC.causal,
        in_place=_in_place,
    ),
    "(Tensor query, Tensor key, Tensor chosen, Tensor? key_mask=None, Tensor? bias=None, "
    "Tensor? sinks=None, *, float scale, bool is_causal=True, int? window=None, int? chunk=None, "
    "float softcap=0.0, bool normalize=True) -> Tensor",
    _fake,
    _attention_mass,
)
