"""The token automaton as one Triton kernel: one program per row walks over its tokens."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxgraft.kernels.launch import launch_options, over, wait_for_inputs


@triton.jit
def token_automaton_kernel(
    columns,
    next_state,
    fire,
    state,
    classes,
    fired,
    last,
    length,
    width,
    row_stride,
    token_stride,
    initial,
    PDL: tl.constexpr,
):
    """Walk over the tokens of one row."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    current = tl.zeros((), tl.int64) + initial
    if state is not None:
        current = tl.load(state + row)
    for place in range(length):
        column = tl.load(columns + row * row_stride + place * token_stride).to(tl.int64)
        if classes is not None:
            column = tl.load(classes + column).to(tl.int64)
        entry = current * width + column
        tl.store(fired + row * length + place, tl.load(fire + entry))
        current = tl.load(next_state + entry).to(tl.int64)
    tl.store(last + row, current)


def supports(next_state: Tensor, fire: Tensor) -> bool:
    """Whether ``token_automaton`` takes these tables: contiguous ones."""
    return next_state.is_contiguous() and fire.is_contiguous()


def token_automaton(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    state: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    initial: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run; arguments and results are those of ``fxgraft.kernels.token_automaton.op``.

    One launch while decoding. With several tokens their columns are looked up all at once before,
    so that the walk waits for two small tables only.
    """
    batch, length = input_ids.shape
    fired = torch.empty(batch, length, dtype=torch.bool, device=input_ids.device)
    last = torch.empty(batch, dtype=torch.int64, device=input_ids.device)
    if not batch:
        return fired, last
    columns = input_ids
    if classes is not None and length > 1:
        columns, classes = classes[input_ids.to(torch.int64)], None
    over(token_automaton_kernel, batch)(
        columns,
        next_state,
        fire.view(torch.uint8),
        None if state is None else state.contiguous(),
        classes,
        fired.view(torch.uint8),
        last,
        length,
        next_state.shape[1],
        columns.stride(0),
        columns.stride(1),
        initial,
        num_warps=1,
        **launch_options(input_ids.device),
    )
    return fired, last
