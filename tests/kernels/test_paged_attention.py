"""``fxgraft::paged_attention`` on a CPU: against whole sequences, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.attention import reference as dense
from fxgraft.kernels.paged_attention import reference
from fxgraft.kernels.paged_attention.op import SPEC
from fxgraft.kernels.rotary import reference as rotary
from tests.kernels._helpers import op_of, opcheck, randn

paged_attention = op_of(SPEC)
HEADS, KV_HEADS, DIM, BLOCK, ROWS, PAGES = 4, 2, 6, 4, 3, 5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 3},
    {"window": 5, "softcap": 2.0},
    {"softcap": 1.5},
]


class Cache:
    """Sequences in blocks in any order; everything that was not written is NaN."""

    def __init__(self) -> None:
        self.key = torch.full((ROWS * PAGES + 1, KV_HEADS, BLOCK, DIM), math.nan).double()
        self.value = self.key.clone()
        order = torch.randperm(ROWS * PAGES, generator=torch.Generator().manual_seed(1)) + 1
        self.table = order.view(ROWS, PAGES).to(torch.int32)


def sequences(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value of whole sequences, and angles."""
    query = randn(ROWS, HEADS, length, DIM)
    key, value = (randn(ROWS, KV_HEADS, length, DIM, seed=seed) for seed in (1, 2))
    return query, key, value, randn(ROWS, 1, length, 4, seed=3)


@pytest.mark.parametrize("implementation", [paged_attention, reference.paged_attention])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_pieces_equal_the_whole(
    implementation: Any, options: dict[str, Any], has_sinks: bool
) -> None:
    query, key, value, angle = sequences(13)
    sinks = randn(HEADS, seed=4) if has_sinks else None
    cos, sin = angle.cos(), angle.sin()
    turned = rotary.rotary(query, cos, sin), rotary.rotary(key, cos, sin)
    whole = dense.attention(*turned, value, sinks=sinks, scale=0.4, **options)
    cache = Cache()
    past = torch.zeros(ROWS, dtype=torch.int32)
    for count in (5, 1, 3, 1, 1, 2):
        start = int(past[0])
        piece = slice(start, start + count)
        result = implementation(
            *(x[:, :, piece] for x in (query, key, value)), cache.key, cache.value, cache.table,
            past, cos[:, :, piece], sin[:, :, piece], sinks, scale=0.4, **options,
        )  # fmt: skip
        torch.testing.assert_close(result, whole[:, :, piece])
        assert result.transpose(1, 2).is_contiguous()
        past += count


@pytest.mark.parametrize("new", [1, 3])
def test_rows_without_a_request_are_zero_and_write_nothing(new: int) -> None:
    query, key, value, _ = sequences(new)
    cache = Cache()
    past = torch.tensor([-1, 0, -5], dtype=torch.int32)
    result = paged_attention(
        query, key, value, cache.key, cache.value, cache.table, past, scale=1.0
    )
    assert not result[[0, 2]].any()
    assert result[1].isfinite().all()
    written = (~cache.key.isnan()).flatten(1).any(1).nonzero().flatten()
    assert written.tolist() == [int(cache.table[1, 0])]


def test_schema_is_true() -> None:
    query, key, value, angle = sequences(2)
    cache = Cache()
    past = torch.zeros(ROWS, dtype=torch.int32)
    caches = [pool.nan_to_num() for pool in (cache.key, cache.value)]
    opcheck(
        SPEC, query, key, value, *caches, cache.table, past, angle.cos(), angle.sin(), scale=1.0
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, randn(ROWS, KV_HEADS, 2, DIM), "key is"),
        (3, torch.zeros(16, KV_HEADS, BLOCK, DIM), "cast them to one dtype"),
        (4, randn(16, KV_HEADS, BLOCK + 1, DIM), "value_cache is"),
        (5, torch.zeros(ROWS, PAGES, dtype=torch.int64), "pass int32"),
        (6, torch.zeros(2, dtype=torch.int32), r"past is \[2\]"),
    ],
    ids=str,
)
def test_wrong_arguments(place: int, value: Tensor, message: str) -> None:
    cache = Cache()
    past = torch.zeros(ROWS, dtype=torch.int32)
    given = [*sequences(1)[:3], cache.key, cache.value, cache.table, past]
    given[place] = value
    with pytest.raises(InputError, match=message):
        paged_attention(*given, scale=1.0)
    with pytest.raises(InputError, match="window"):
        paged_attention(*sequences(1)[:3], cache.key, cache.value, cache.table, past,
                        scale=1.0, window=0)  # fmt: skip
