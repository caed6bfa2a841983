"""``fxgraft::token_automaton`` against a loop, and split at every point."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.token_automaton.op import SPEC
from fxgraft.kernels.token_automaton_slots.op import SPEC as SLOTS
from tests.kernels._helpers import call_node, check_export, op_of, opcheck, values

token_automaton = op_of(SPEC)
token_automaton_slots = op_of(SLOTS)
VOCABULARY = 11


def _tables(num_states: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Random next_state and fire [K, V]."""
    generator = torch.Generator().manual_seed(num_states)
    next_state = torch.randint(num_states, (num_states, VOCABULARY), generator=generator)
    return next_state.to(dtype), torch.rand(num_states, VOCABULARY, generator=generator) < 0.3


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def _naive(
    input_ids: Tensor, next_state: Tensor, fire: Tensor, states: list[int]
) -> tuple[list[list[bool]], list[int]]:
    fired: list[list[bool]] = []
    last: list[int] = []
    for ids, state in zip(values(input_ids), states, strict=True):
        fired.append([])
        for token in ids:
            fired[-1].append(bool(fire[state, token]))
            state = int(next_state[state, token])
        last.append(state)
    return fired, last


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    num_states=st.integers(1, 5),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_oracle(batch: int, length: int, num_states: int, seed: int, data: st.DataObject) -> None:
    states = data.draw(st.lists(st.integers(0, num_states - 1), min_size=batch, max_size=batch))
    input_ids, (next_state, fire) = _ids(batch, length, seed), _tables(num_states)
    fired, last = token_automaton(input_ids, next_state, fire, torch.tensor(states))
    assert (values(fired), values(last)) == _naive(input_ids, next_state, fire, states)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(length=st.integers(0, 20), split=st.integers(0, 20), seed=st.integers(0, 99))
def test_split_equals_whole(length: int, split: int, seed: int) -> None:
    input_ids, tables = _ids(2, length, seed), _tables(3)
    whole, whole_last = token_automaton(input_ids, *tables, initial=2)
    head, state = token_automaton(input_ids[:, :split], *tables, initial=2)
    tail, last = token_automaton(input_ids[:, split:], *tables, state)
    assert torch.equal(torch.cat((head, tail), 1), whole)
    assert torch.equal(last, whole_last)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("table_dtype", [torch.int64, torch.uint8])
def test_dtypes(table_dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    next_state, fire = _tables(4, table_dtype)
    input_ids = _ids(2, 9)
    fired, last = token_automaton(input_ids.to(ids_dtype), next_state, fire)
    assert (fired.dtype, last.dtype) == (torch.bool, torch.int64)
    assert (values(fired), values(last)) == _naive(input_ids, next_state, fire, [0, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_tokens_of_one_kind_share_a_column(dtype: torch.dtype) -> None:
    classes = torch.tensor([3, 0, 10, 3, 3, 7, 0, 1], dtype=dtype)
    next_state, fire = _tables(4, torch.uint8)
    input_ids = _ids(2, 9) % 8
    wide = (next_state[:, classes.long()], fire[:, classes.long()])
    state = torch.tensor([3, 1])
    expected = token_automaton(input_ids, *wide, state)
    found = token_automaton(input_ids, next_state, fire, state, classes)
    assert all(map(torch.equal, found, expected))
    opcheck(SPEC, input_ids, next_state, fire, state, classes)
    with pytest.raises(InputError, match=r"token id 8,.* 0 to 7"):
        token_automaton(input_ids + 1, next_state, fire, state, classes)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_bad_ids(token: int) -> None:
    input_ids = torch.tensor([[0, token]])
    with pytest.raises(InputError, match=f"token id {token},.* 0 to {VOCABULARY - 1}"):
        token_automaton(input_ids, *_tables(2))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        SPEC.reference(input_ids, *_tables(2))


@pytest.mark.parametrize("state", [None, torch.tensor([1, 0])])
def test_opcheck(state: Tensor | None) -> None:
    opcheck(SPEC, _ids(2, 5), *_tables(2, torch.uint8), state, initial=1)


def test_export() -> None:
    batch, length = Dim("batch"), Dim("length")
    check_export(
        (op_of(SPEC), SPEC.reference),
        (_ids(2, 3), *_tables(3), torch.tensor([2, 0])),
        (_ids(3, 37), *_tables(3), torch.tensor([1, 2, 0])),
        ({0: batch, 1: length}, None, None, {0: batch}),
    )


def test_state_is_declared() -> None:
    (state,) = SPEC.states
    names = [argument.name for argument in SPEC.overload._schema.arguments]  # pyright: ignore[reportPrivateUsage]
    assert (state.kind, state.output) == ("fixed", 1)
    assert state.argument in names


def test_flops() -> None:
    assert SPEC.flops(call_node(SPEC, _ids(1, 2), *_tables(2))) == 0


@pytest.mark.parametrize("length", [1, 6])
def test_slots(length: int) -> None:
    """As the op on states that are read and written apart."""
    tables, ids = _tables(4), _ids(4, length)
    pool, slots = torch.tensor([0, 3, 2, 1, 3, 2]), torch.tensor([4, 2, 0, 5])
    past = torch.tensor([9, 0, -1, 1], dtype=torch.int32)
    fired, last = token_automaton(ids, *tables, torch.tensor([3, 0, 0, 2]))
    opcheck(SLOTS, ids, *tables, pool, slots, past)
    found = token_automaton_slots(ids, *tables, pool, slots, past)
    assert torch.equal(found[[0, 1, 3]], fired[[0, 1, 3]])
    assert values(pool) == [0, 3, int(last[1]), 1, int(last[0]), int(last[3])]


def test_slots_refuse_what_does_not_fit() -> None:
    tables, pool = _tables(4), torch.zeros(3, dtype=torch.int64)
    slots, past = torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"slots is \[1\] for a batch of 2"):
        token_automaton_slots(_ids(2, 1), *tables, pool, slots[:1], past)
    with pytest.raises(InputError, match="token id 11"):
        token_automaton_slots(_ids(2, 1) * 0 + VOCABULARY, *tables, pool, slots, past)
