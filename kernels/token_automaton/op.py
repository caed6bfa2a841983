"""``fxgraft::token_automaton``: a finite automaton over token ids.

At each position, fired = fire[state, column], then state = next_state[state, column]. SEAL
(arXiv 2504.07986) needs one to know whether it is inside a thinking section.

Most tokens of a vocabulary do the same to the automaton, so its tables have one column for each
kind of token, and ``classes`` says of which kind a token is.

Args:
    input_ids: int64 or int32 [B, S], each in 0..V-1.
    next_state: int64 or uint8 [K, C], each in 0..K-1.
    fire: bool [K, C].
    state: int64 [B], the state after the tokens before these.
    classes: int64, int32 or int16 [V], the column of each token, in 0..C-1; None: a token is its
        own column, and V = C.
    initial: the state at the start of a sequence, used if ``state`` is None. The engine's pools
        start from 0.

Returns:
    fired bool [B, S], and the last state int64 [B].

Raises:
    InputError: a token id is negative or not below V (on the CPU; a GPU raises its own device-side
        error, since asking would stall it).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import InPlace, OpSpec, State, argument
from fxgraft.kernels.token_automaton import cost, reference


def _fake(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    state: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    initial: int = 0,
) -> tuple[Tensor, Tensor]:
    return (
        input_ids.new_empty(input_ids.shape, dtype=torch.bool),
        input_ids.new_empty(input_ids.shape[:1], dtype=torch.int64),
    )


def _token_automaton(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    state: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    initial: int = 0,
) -> tuple[Tensor, Tensor]:
    check_ids(input_ids, next_state, classes)
    return reference.token_automaton(input_ids, next_state, fire, state, classes, initial=initial)


def _cuda(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    state: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    initial: int = 0,
) -> tuple[Tensor, Tensor]:
    from fxgraft.kernels.token_automaton import triton

    if not triton.supports(next_state, fire):
        return _token_automaton(input_ids, next_state, fire, state, classes, initial=initial)
    return triton.token_automaton(input_ids, next_state, fire, state, classes, initial=initial)


def check_ids(input_ids: Tensor, next_state: Tensor, classes: Tensor | None) -> None:
    """Refuse token ids on the CPU that the tables have no column for.

    Raises:
        InputError: an id is out of range.
    """
    if input_ids.device.type != "cpu":
        return
    vocabulary = next_state.shape[1] if classes is None else classes.shape[0]
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    if bool(wrong.any()):
        raise InputError(
            f"token_automaton got token id {int(input_ids[wrong][0])}, but its tables are for ids "
            f"from 0 to {vocabulary - 1}",
            "build the tables for the model's whole vocabulary",
        )


def _in_place(node: Node, masks: Collection[Node]) -> InPlace:
    names = ("input_ids", "next_state", "fire", "classes")
    target = torch.ops.fxgraft.token_automaton_slots.default
    return InPlace(target, {name: argument(node, name) for name in names})


SPEC = define(
    OpSpec(
        name="token_automaton",
        kind="intervention",
        reference=reference.token_automaton,
        flops=cost.flops,
        states=(State("automaton", "state", "fixed", output=1),),
        in_place=_in_place,
    ),
    "(Tensor input_ids, Tensor next_state, Tensor fire, Tensor? state=None, "
    "Tensor? classes=None, *, int initial=0) -> (Tensor, Tensor)",
    _fake,
    _token_automaton,
)
on_cuda(SPEC, _cuda, _token_automaton)
