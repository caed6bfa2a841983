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
    columns, next_state, fire, state, classes, slots, past, fired, last, length, width,
    row_stride, token_stride, initial,
    PDL: tl.constexpr,
):  # fmt: skip
    """Walk over the tokens of one row.

    Args:
        slots, past: of ``token_automaton_slots``, whose states lie in ``state`` and ``last``, or
            None: then they hold a state for each row.
    """
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    place, is_active = row, row >= 0
    current = tl.zeros((), tl.int64) + initial
    if slots is not None:
        place, seen = tl.load(slots + row), tl.load(past + row)
        is_active = (place >= 0) & (seen >= 0)
        current = tl.load(state + place, mask=is_active & (seen > 0), other=0)
    elif state is not None:
        current = tl.load(state + row)
    for number in range(length):
        column = tl.load(columns + row * row_stride + number * token_stride).to(tl.int64)
        if classes is not None:
            column = tl.load(classes + column).to(tl.int64)
        entry = current * width + column
        tl.store(fired + row * length + number, tl.load(fire + entry))
        current = tl.load(next_state + entry).to(tl.int64)
    tl.store(last + place, current, mask=is_active)


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
    """Run; arguments and results are those of ``fxgraft.kernels.token_automaton.op``."""
    state = None if state is None else state.contiguous()
    last = torch.empty(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    fired = _run(input_ids, (next_state, fire, classes), (state, None, None), last, initial)
    return fired, last


def token_automaton_slots(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    automaton_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    """Run; arguments and result are those of ``fxgraft.kernels.token_automaton_slots.op``."""
    place = (automaton_cache, slots.contiguous(), past.contiguous())
    return _run(input_ids, (next_state, fire, classes), place, automaton_cache, 0)


def _run(
    input_ids: Tensor,
    tables: tuple[Tensor, Tensor, Tensor | None],
    place: tuple[Tensor | None, Tensor | None, Tensor | None],
    last: Tensor,
    initial: int,
) -> Tensor:
    """One launch while decoding.

    With several tokens their columns are looked up all at once before, so that the walk waits for
    two small tables only.

    Args:
        input_ids: of the op.
        tables: next_state, fire and classes.
        place: states before the tokens, slots and past.
        last: where the states after them go.
        initial: of the op.
    """
    batch, length = input_ids.shape
    fired = torch.empty(batch, length, dtype=torch.bool, device=input_ids.device)
    if not batch:
        return fired
    next_state, fire, classes = tables
    columns = input_ids
    if classes is not None and length > 1:
        columns, classes = classes[input_ids.to(torch.int64)], None
    state, slots, past = place
    over(token_automaton_kernel, batch)(
        columns, next_state, fire.view(torch.uint8), state, classes, slots, past,
        fired.view(torch.uint8), last, length, next_state.shape[1],
        columns.stride(0), columns.stride(1), initial,
        num_warps=1,
        **launch_options(input_ids.device),
    )  # fmt: skip
    return fired
