"""``fxgraft::logit_sum``: per head, the sum of a query's attention logits over chosen keys.

A sum of dot products is a dot product with a sum: Σ_j q·k_j = q·(Σ_j k_j). The running sum of the
chosen keys is a state of one vector per key head, so that a step reads no past keys. Keys that
come after a query do not count for it.

Source: the head score of SPIN, arXiv 2505.16411, before the softmax.

Args:
    query: [B, Hq, S, D].
    key: [B, Hkv, S, D], of the same tokens; Hq = Hkv · G, and G consecutive query heads share a
        key head.
    chosen: bool [B, S], the tokens whose keys count.
    key_sum: float [B, Hkv, D], the sum over the tokens before these.
    scale: factor of the logits.

Returns:
    The sums [B, Hq, S], 0 where no chosen key precedes, and the new ``key_sum`` [B, Hkv, D]; both
    in at least float32.

Raises:
    InputError: the heads do not divide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.define import define
from fxgraft.kernels.logit_sum import cost, reference
from fxgraft.kernels.spec import OpSpec, State


def _check(query: Tensor, key: Tensor) -> None:
    if query.shape[1] % key.shape[1]:
        raise InputError(
            f"logit_sum has {query.shape[1]} query heads for {key.shape[1]} key heads",
            "the number of query heads is a multiple of the number of key heads",
        )


def _fake(
    query: Tensor, key: Tensor, chosen: Tensor, key_sum: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    _check(query, key)
    compute = torch.promote_types(query.dtype, torch.float32)
    sums = query.new_empty(query.shape[:3], dtype=compute)
    return sums, key.new_empty((*key.shape[:2], key.shape[3]), dtype=compute)


def _logit_sum(
    query: Tensor, key: Tensor, chosen: Tensor, key_sum: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    _check(query, key)
    return reference.logit_sum(query, key, chosen, key_sum, scale=scale)


SPEC = define(
    OpSpec(
        name="logit_sum",
        kind="intervention",
        reference=reference.logit_sum,
        flops=cost.flops,
        states=(State("key_sum", "key_sum", "fixed", output=1),),
    ),
    "(Tensor query, Tensor key, Tensor chosen, Tensor? key_sum=None, *, float scale) "
    "-> (Tensor, Tensor)",
    _fake,
    _logit_sum,
)
