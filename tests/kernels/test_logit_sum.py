"""``fxgraft::logit_sum``: sums of logits that never exist, over any cut of the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.logit_sum.op import SPEC
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

logit_sum = op_of(SPEC)
HEADS, KV_HEADS, LENGTH, WIDTH, SCALE = 6, 2, 9, 5, 0.3


def arguments(length: int = LENGTH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    query = randn(3, HEADS, length, WIDTH, dtype=dtype)
    key = randn(3, KV_HEADS, length, WIDTH, dtype=dtype, seed=1)
    return query, key, randn(3, length, seed=2) > 0


def explicit(query: Tensor, key: Tensor, chosen: Tensor) -> Tensor:
    """Logit by logit."""
    batch, heads, length, _ = query.shape
    sums = torch.zeros(batch, heads, length, dtype=torch.float64)
    group = heads // key.shape[1]
    for h in range(heads):
        for i in range(length):
            for j in range(i + 1):
                dot = (query[:, h, i].double() * key[:, h // group, j].double()).sum(-1)
                sums[:, h, i] += SCALE * dot * chosen[:, j]
    return sums


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)],
)
def test_equals_the_explicit_sum(dtype: torch.dtype, tolerance: float) -> None:
    """In half precision as well: products and sums are made in float32."""
    query, key, chosen = arguments(dtype=dtype)
    sums, total = logit_sum(query, key, chosen, scale=SCALE)
    expected = explicit(query, key, chosen)
    torch.testing.assert_close(sums.double(), expected, atol=tolerance, rtol=tolerance)
    assert sums.dtype == total.dtype == torch.promote_types(dtype, torch.float32)
    counted = torch.where(chosen[:, None, :, None], key.to(total.dtype), 0).sum(2)
    torch.testing.assert_close(total, counted)


@pytest.mark.parametrize("cuts", [(1,), (4,), (8,), (2, 3, 7), tuple(range(1, LENGTH))])
def test_any_cut_gives_the_same(cuts: tuple[int, ...]) -> None:
    query, key, chosen = arguments()
    whole, total = logit_sum(query, key, chosen, scale=SCALE)
    parts: list[Tensor] = []
    state: Tensor | None = None
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        part, state = logit_sum(
            query[:, :, start:end], key[:, :, start:end], chosen[:, start:end], state, scale=SCALE
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, total, atol=1e-12, rtol=1e-12)


def test_rows_of_the_state_follow_a_reorder() -> None:
    """Beams are copied and moved by their state alone."""
    query, key, chosen = arguments()
    beams = torch.tensor([2, 0, 0])
    _, state = logit_sum(query[:, :, :5], key[:, :, :5], chosen[:, :5], scale=SCALE)
    later = [value[beams][..., 5:, :] for value in (query, key)]
    moved, _ = logit_sum(*later, chosen[beams][:, 5:], state[beams], scale=SCALE)
    whole, _ = logit_sum(query[beams], key[beams], chosen[beams], scale=SCALE)
    torch.testing.assert_close(moved, whole[:, :, 5:], atol=1e-12, rtol=1e-12)


def test_keys_that_are_not_chosen_are_not_read() -> None:
    query, key, chosen = arguments()
    poisoned = torch.where(chosen[:, None, :, None], key, torch.nan)
    expected = logit_sum(query, key, chosen, scale=SCALE)
    found = logit_sum(query, poisoned, chosen, scale=SCALE)
    assert all(map(torch.equal, found, expected))


def test_nothing_chosen_sums_to_nothing() -> None:
    query, key, chosen = arguments()
    sums, total = logit_sum(query, key, torch.zeros_like(chosen), scale=SCALE)
    assert not sums.any()
    assert not total.any()


def test_grouped_heads_equal_repeated_keys() -> None:
    query, key, chosen = arguments()
    grouped, _ = logit_sum(query, key, chosen, scale=SCALE)
    repeated = key.repeat_interleave(HEADS // KV_HEADS, 1)
    assert torch.equal(grouped, logit_sum(query, repeated, chosen, scale=SCALE)[0])


def test_a_constant_offset_of_a_heads_logits_counts() -> None:
    """A key channel of ones lets a query add a constant to all its logits."""
    query, key, chosen = arguments()
    key[..., 0] = 1
    shifted = query.clone()
    shifted[:, 0, :, 0] += 2
    difference = logit_sum(shifted, key, chosen, scale=SCALE)[0]
    difference = difference - logit_sum(query, key, chosen, scale=SCALE)[0]
    torch.testing.assert_close(difference[:, 0], 2 * SCALE * chosen.cumsum(1).double())
    assert not difference[:, 1:].any()


def test_gradient() -> None:
    query, key, chosen = arguments(4)

    def call(query: Tensor, key: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return logit_sum(query, key, chosen, state, scale=SCALE)

    gradcheck(call, query, key, randn(3, KV_HEADS, WIDTH, seed=3))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_opcheck(length: int, trains: bool) -> None:
    query, key, chosen = arguments(length)
    state = randn(3, KV_HEADS, WIDTH, seed=3) if trains else None
    opcheck(SPEC, query.requires_grad_(trains), key, chosen, state, scale=SCALE)


def test_export() -> None:
    batch, length = Dim("batch"), Dim("length")
    sizes = {0: batch, 2: length}
    query, key, chosen = arguments()
    check_export(
        (op_of(SPEC), SPEC.reference),
        (query, key, chosen),
        (query[:2, :, :4], key[:2, :, :4], chosen[:2, :4]),
        (sizes, sizes, {0: batch, 1: length}),
        scale=SCALE,
    )


def test_heads_must_divide() -> None:
    query, key, chosen = arguments()
    with pytest.raises(InputError, match="5 query heads for 2"):
        logit_sum(query[:, :5], key, chosen, scale=SCALE)


def test_flops() -> None:
    node = call_node(SPEC, *arguments(), scale=SCALE)
    assert SPEC.flops(node) == 3 * LENGTH * WIDTH * (2 * HEADS + KV_HEADS)
