"""``fxgraft::greedy_step``: choose the likeliest tokens, and get ready to go on from them.

One kernel on CUDA: after a step of a small batch a dozen tiny ones would take as long as a layer.

Args:
    logits: [B, V].
    input_ids: int64 [B], gets the chosen tokens, and 0 where none could be chosen.
    past: int32 [B], counted up in place where it is not negative.
    chosen: int64 [B], gets the first of the largest logits, or -1 where a logit is NaN or the
        largest is not finite.
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.greedy_step import cost, reference
from fxgraft.kernels.spec import OpSpec


def _fake(logits: Tensor, input_ids: Tensor, past: Tensor, chosen: Tensor) -> None:
    return None


def _cuda(logits: Tensor, input_ids: Tensor, past: Tensor, chosen: Tensor) -> None:
    from fxgraft.kernels.greedy_step import triton

    if not triton.supports(logits, input_ids, past, chosen):
        return reference.greedy_step(logits, input_ids, past, chosen)
    return triton.greedy_step(logits, input_ids, past, chosen)


SPEC = define(
    OpSpec(name="greedy_step", kind="state", reference=reference.greedy_step, flops=cost.flops),
    "(Tensor logits, Tensor(a!) input_ids, Tensor(b!) past, Tensor(c!) chosen) -> ()",
    _fake,
)
on_cuda(SPEC, _cuda, reference.greedy_step)
