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


def _check(*tensors: Tensor) -> None:
    batch = tensors[0].shape[0]
    for name, tensor in zip(("slots", "past"), tensors[4:6], strict=True):
        if tuple(tensor.shape) != (batch,):
            raise InputError(
                f"token_automaton_slots's {name} is {list(tensor.shape)} for a batch of {batch}",
                "pass one number per row",
            )


def _fake(*tensors: Tensor) -> Tensor:
    _check(*tensors)
    return tensors[0].new_empty(tensors[0].shape, dtype=torch.bool)


def _general(*tensors: Tensor) -> Tensor:
    _check(*tensors)
    check_ids(tensors[0], tensors[1], tensors[6] if len(tensors) > 6 else None)
    return reference.token_automaton_slots(*tensors)


def _cuda(*tensors: Tensor) -> Tensor:
    from fxgraft.kernels.token_automaton import triton

    if not triton.supports(tensors[1], tensors[2]):
        return _general(*tensors)
    _check(*tensors)
    return triton.token_automaton_slots(*tensors)


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
