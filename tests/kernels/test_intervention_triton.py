"""The Triton kernels of ``fxgraft::steer`` and ``fxgraft::token_automaton``."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.steer import reference as steer_reference
from fxgraft.kernels.token_automaton import reference as automaton_reference
from fxgraft.kernels.token_automaton_slots import reference as slots_reference
from tests.kernels._helpers import randn
from tests.kernels._interpreter import DEVICE, RUNS_KERNELS, prepare

prepare()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS_KERNELS, reason="there is no GPU, and this is no interpreter"),
]
steering: Any = importlib.import_module("fxgraft.kernels.steer.triton") if RUNS_KERNELS else None
automata: Any = (
    importlib.import_module("fxgraft.kernels.token_automaton.triton") if RUNS_KERNELS else None
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def device(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 6), (3, 1, 33), (2, 5, 64)])
@pytest.mark.parametrize("kind", ["one", "rows", "table"])
@pytest.mark.parametrize("per_row", [False, True])
def test_steer(
    kind: str, per_row: bool, batch: int, length: int, width: int, dtype: torch.dtype
) -> None:
    """Bit for bit the reference, vectors in another type than x included."""
    x, fire = device(batch, length, width, dtype=dtype), device(batch, length) > 0
    shape = {"one": (width,), "rows": (batch, width), "table": (4, width)}[kind]
    vector, slot = device(*shape, seed=1), None
    if kind == "table":
        vector[0] = 0
        slot = torch.tensor([3, 0, 1][:batch], device=DEVICE)
    coefficient = device(*([batch] if per_row else []), seed=2)
    y = steering.steer(x, fire, vector, coefficient, slot)
    expected = steer_reference.steer(x, fire, vector, coefficient, slot)
    assert torch.equal(bits(y), bits(expected))
    assert torch.equal(bits(y)[~fire], bits(x)[~fire])


def test_neutral_rows_keep_their_bits() -> None:
    special = torch.tensor([-0.0, 0.0, 1e-40, float("nan"), float("inf"), -1.5], device=DEVICE)
    x, fire = special.expand(3, 1, 6).contiguous(), torch.ones(3, 1, device=DEVICE) > 0
    table = torch.zeros(2, 6, device=DEVICE)
    table[1] = 1.0
    slot, strength = (
        torch.tensor([0, 1, 1], device=DEVICE),
        torch.tensor([1.0, 0.0, 2.0]).to(DEVICE),
    )
    y = steering.steer(x, fire, table, strength, slot)
    assert torch.equal(bits(y[:2]), bits(x[:2]))
    assert torch.equal(y[2, 0, :2], torch.full((2,), 2.0, device=DEVICE))


def test_a_vector_with_nan_stays_where_it_fires() -> None:
    x = device(1, 3, 8)
    fire = torch.tensor([[False, True, False]], device=DEVICE)
    y = steering.steer(x, fire, torch.full((8,), float("nan"), device=DEVICE), device())
    assert y[0, 1].isnan().all()
    assert torch.equal(y[0, ::2], x[0, ::2])


def test_which_inputs_are_taken() -> None:
    x, vector, one = torch.empty(2, 3, 8), torch.empty(8), torch.tensor(1.0)
    assert steering.supports(x, vector, one)
    assert not steering.supports(x.double(), vector, one)
    assert not steering.supports(x, vector, one.double())
    assert not steering.supports(x.transpose(0, 1), vector, one)
    assert not steering.supports(x, torch.empty(16)[::2], one)
    assert not steering.supports(x[:0], vector, one)
    assert automata.supports(torch.empty(2, 3), torch.empty(2, 3))
    assert not automata.supports(torch.empty(3, 2).t(), torch.empty(2, 3))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("table_dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("classes_dtype", [None, torch.int64, torch.int16])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (2, 19), (2, 0), (0, 3)])
def test_token_automaton(
    batch: int,
    length: int,
    stateful: bool,
    classes_dtype: torch.dtype | None,
    table_dtype: torch.dtype,
    ids_dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(batch + length)
    columns, states = 7, 5
    next_state = torch.randint(states, (states, columns), generator=generator).to(table_dtype)
    fire = torch.rand(states, columns, generator=generator) < 0.4
    classes = None
    if classes_dtype is not None:
        classes = torch.randint(columns, (11,), generator=generator).to(classes_dtype)
    high = columns if classes is None else 11
    ids = torch.randint(high, (length, batch), generator=generator).to(ids_dtype).t()
    state = torch.randint(states, (batch,), generator=generator) if stateful else None
    given = [None if t is None else t.to(DEVICE) for t in (ids, next_state, fire, state, classes)]
    found = automata.token_automaton(*given, initial=2)
    arguments: Any = given
    expected = automaton_reference.token_automaton(*arguments, initial=2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("with_classes", [False, True])
def test_token_automaton_slots(with_classes: bool, length: int) -> None:
    """Fresh, running and absent rows; slots of no row keep what they hold."""
    generator = torch.Generator().manual_seed(length)
    next_state = torch.randint(5, (5, 7), generator=generator)
    fire = torch.rand(5, 7, generator=generator) < 0.4
    classes = torch.randint(7, (7,), generator=generator) if with_classes else None
    ids = torch.randint(7, (4, length), generator=generator)
    pool = torch.randint(5, (6,), generator=generator)
    slots, past = torch.tensor([4, 2, -1, 5]), torch.tensor([3, 0, 3, -1], dtype=torch.int32)
    here = [t.to(DEVICE) for t in (ids, next_state, fire)]
    place = [pool.clone().to(DEVICE), slots.to(DEVICE), past.to(DEVICE)]
    where = None if classes is None else classes.to(DEVICE)
    found = automata.token_automaton_slots(*here, *place, where)
    expected = slots_reference.token_automaton_slots(
        ids, next_state, fire, pool, slots, past, classes
    )
    assert torch.equal(found.cpu()[[0, 1]], expected[[0, 1]])
    assert torch.equal(place[0].cpu(), pool)
