"""The end of a greedy decode step as one Triton kernel: one program per row."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxgraft.kernels.launch import DTYPES, launch_options, over, power_of_2, wait_for_inputs

_BLOCK = 8192


@triton.jit
def greedy_step_kernel(
    logits, input_ids, past, chosen, logits_row, ids_row, past_row, chosen_row, vocabulary,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row; each lane keeps its first largest logit."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    logits += row * logits_row
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place, is_wrong = lane * 0, lane < 0
    for start in range(0, vocabulary, BLOCK):
        token = start + lane
        value = tl.load(logits + token, mask=token < vocabulary, other=float("-inf"))
        value = value.to(tl.float32)
        is_wrong = is_wrong | (value != value)
        place = tl.where(value > best, token, place)
        best = tl.maximum(best, value)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, place, vocabulary), axis=0)
    is_finite = (tl.abs(top) < float("inf")) & (tl.max(is_wrong.to(tl.int32), axis=0) == 0)
    token = tl.where(is_finite, token, -1).to(tl.int64)
    seen = tl.load(past + row * past_row)
    tl.store(chosen + row * chosen_row, token)
    tl.store(input_ids + row * ids_row, tl.maximum(token, 0))
    tl.store(past + row * past_row, seen + (seen >= 0).to(seen.dtype))


def supports(logits: Tensor, input_ids: Tensor, past: Tensor, chosen: Tensor) -> bool:
    """Whether ``greedy_step`` takes these: rows of logits that are contiguous."""
    rows = all(tensor.dim() == 1 for tensor in (input_ids, past, chosen))
    return logits.dtype in DTYPES and logits.numel() > 0 and logits.stride(-1) == 1 and rows


def greedy_step(logits: Tensor, input_ids: Tensor, past: Tensor, chosen: Tensor) -> None:
    """Run; the arguments are those of ``fxgraft.kernels.greedy_step.op``."""
    rows, vocabulary = logits.shape
    over(greedy_step_kernel, rows)(
        logits, input_ids, past, chosen,
        logits.stride(0), input_ids.stride(0), past.stride(0), chosen.stride(0), vocabulary,
        BLOCK=min(_BLOCK, power_of_2(vocabulary)),
        num_warps=16 if vocabulary >= _BLOCK else 4,
        **launch_options(logits.device),
    )  # fmt: skip
