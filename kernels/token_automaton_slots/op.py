"""``fxgraft::token_automaton_slots``: a token automaton that updates states in a pool of slots.

The form of ``fxgraft::token_automaton`` for the engine and for decoding in place; one kernel on
CUDA.

Args:
    input_ids: int64 or int32 [B, S]; this, the next two and ``classes`` as in
        ``fxgraft.kernels.token_automaton.op``.
    next_state: int64 or uint8 [K, C].
    fire: bool [K, C].
    automaton_cache: int64 [N], a state for each slot, changed in place.
    slots: int64 [B], the slot of each row: different ones, but for rows without a request. -1 is
        no slot.
    past: int32 [B], number of tokens before the new ones: at 0 the state starts from 0 whatever
        the slot holds; a negative number marks a row without a request, which changes no slot.
    classes: int64, int32 or int16 [V], or None.

Returns:
    fired bool [B, S].

Raises:
    InputError: a token id is out of range (on the CPU), or slots or past is not one number per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec
from fxgraft.kernels.token_automaton.op import check_ids
from fxgraft.kernels.token_automaton_slots import cost, reference


def _check(input_ids: Tensor, slots: Tensor, past: Tensor) -> None:
    for name, tensor in {"slots": slots, "past": past}.items():
        if tuple(tensor.shape) != (input_ids.shape[0],):
            raise InputError(
                f"token_automaton_slots's {name} is {list(tensor.shape)} for a batch of "
                f"{input_ids.shape[0]}",
                "pass one number per row",
            )


def _fake(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    automaton_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    _check(input_ids, slots, past)
    return input_ids.new_empty(input_ids.shape, dtype=torch.bool)


def _general(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    automaton_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    _check(input_ids, slots, past)
    check_ids(input_ids, next_state, classes)
    return reference.token_automaton_slots(
        input_ids, next_state, fire, automaton_cache, slots, past, classes
    )


def _cuda(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    automaton_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    from fxgraft.kernels.token_automaton import triton

    given = (input_ids, next_state, fire, automaton_cache, slots, past, classes)
    _check(input_ids, slots, past)
    if not triton.supports(next_state, fire):
        return _general(*given)
    return triton.token_automaton_slots(*given)


SPEC = define(
    OpSpec(
        name="token_automaton_slots",
        kind="intervention",
        reference=reference.token_automaton_slots,
        flops=cost.flops,
    ),
    "(Tensor input_ids, Tensor next_state, Tensor fire, Tensor(a!) automaton_cache, "
    "Tensor slots, Tensor past, Tensor? classes=None) -> Tensor",
    _fake,
    _general,
)
on_cuda(SPEC, _cuda, _general)
