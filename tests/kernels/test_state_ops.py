"""``append_pages``, ``read_slots``, ``write_slots`` and ``choose_rows`` against loops over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.append_pages.op import SPEC as APPEND_PAGES
from fxgraft.kernels.choose_rows.op import SPEC as CHOOSE_ROWS
from fxgraft.kernels.read_slots.op import SPEC as READ_SLOTS
from fxgraft.kernels.write_slots.op import SPEC as WRITE_SLOTS
from tests.kernels._helpers import op_of, opcheck, randn

append_pages, choose_rows = op_of(APPEND_PAGES), op_of(CHOOSE_ROWS)
read_slots, write_slots = op_of(READ_SLOTS), op_of(WRITE_SLOTS)
BLOCK = 4


@pytest.mark.parametrize(("dim", "shape"), [(1, (6,)), (2, (3, 5)), (2, (3,))])
@pytest.mark.parametrize("new", [1, 5])
def test_pages_hold_what_was_written(dim: int, shape: tuple[int, ...], new: int) -> None:
    """Two calls; the second reads what the first wrote, through blocks in any order."""
    before, after = shape[: dim - 1], shape[dim - 1 :]
    pool = randn(12, *before, BLOCK, *after)
    table = (torch.randperm(11)[:9] + 1).view(3, 3).to(torch.int32)
    first, second = (randn(3, *before, n, *after, seed=n) for n in (3, new))
    append_pages(first, pool, table, torch.zeros(3, dtype=torch.int32), dim=dim, total=3)
    # Row 1 begins again: its old entries are overwritten and not read.
    past = torch.tensor([3, 0, 3], dtype=torch.int32)
    result = append_pages(second, pool, table, past, dim=dim, total=3 + new)
    whole = torch.cat([first, second], dim)
    assert torch.equal(result[0], whole[0])
    assert torch.equal(result[2], whole[2])
    padding = result[1].narrow(dim - 1, 0, 3)
    assert not padding.any()
    assert torch.equal(result[1].narrow(dim - 1, 3, new), second[1])


def test_slots_of_new_requests_read_as_zero() -> None:
    pool = randn(5, 2, 3)
    slots, past = torch.tensor([3, 1, 4]), torch.tensor([2, 0, 7], dtype=torch.int32)
    found = read_slots(pool, slots, past)
    assert torch.equal(found[0], pool[3])
    assert not found[1].any()
    assert torch.equal(found[2], pool[4])


def test_slots_are_written_in_place() -> None:
    pool = randn(5, 2, 3)
    value, before = randn(2, 2, 3, seed=1), pool.clone()
    write_slots(pool, torch.tensor([4, 2]), value)
    assert torch.equal(pool[[4, 2]], value)
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("count", [1, 3])
def test_rows_choose(count: int) -> None:
    options = [randn(4, 2, 3, seed=number) for number in range(count)]
    choice = torch.tensor([0, 2, 1, 2]) % count
    result: Tensor = choose_rows(choice, options)
    for row, number in enumerate(choice.tolist()):
        assert torch.equal(result[row], options[number][row])


def test_schemas_are_true() -> None:
    table = torch.arange(1, 7, dtype=torch.int32).view(2, 3)
    past, slots = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 2])
    opcheck(APPEND_PAGES, randn(2, 3, 1, 4), randn(7, 3, 4, 4), table, past, dim=2, total=3)
    opcheck(READ_SLOTS, randn(3, 4), slots, past)
    opcheck(WRITE_SLOTS, randn(3, 4), slots, randn(2, 4))
    opcheck(CHOOSE_ROWS, torch.tensor([0, 1]), [randn(2, 3), randn(2, 3, seed=1)])
