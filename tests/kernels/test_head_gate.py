"""``fxgraft::head_gate``: the heads ahead stay, and other rows keep every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.head_gate.op import SPEC
from fxgraft.kernels.head_gate.reference import kept_heads
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

head_gate = op_of(SPEC)
HEADS, LENGTH, WIDTH = 6, 5, 3
KEEPS = [0, 1, 4, HEADS, HEADS + 3]
FACTORS = [0.0, 0.08, 1.0, 2.5]


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(2, HEADS, LENGTH, WIDTH, dtype=dtype)
    return x, randn(2, HEADS, LENGTH, seed=1), randn(2, LENGTH, seed=2) > 0


def best(scores: list[float], keep: int) -> set[int]:
    """By sorting: highest first, ties to the lower index, NaN last."""
    order = sorted(
        range(len(scores)), key=lambda h: (-scores[h] if scores[h] == scores[h] else 9e9, h)
    )
    return set(order[:keep])


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_oracle(dtype: torch.dtype, factor: float, keep: int) -> None:
    x, score, rows = arguments(dtype)
    y = head_gate(x, score, rows, keep=keep, factor=factor)
    expected = x.clone()
    for b in range(2):
        for s in range(LENGTH):
            for h in range(HEADS):
                if rows[b, s] and h not in best(score[b, :, s].tolist(), keep):
                    expected[b, h, s] = x[b, h, s] * factor
    assert torch.equal(y, expected)
    assert y.dtype == dtype


@given(
    st.lists(st.sampled_from([-1.0, 0.0, -0.0, 2.0, float("nan"), float("inf"), -3.0]), min_size=1,
             max_size=9),
    st.integers(0, 10),
)  # fmt: skip
def test_ties_and_nan(scores: list[float], keep: int) -> None:
    kept = kept_heads(torch.tensor(scores)[None, :, None], keep)[0, :, 0]
    assert {h for h, stays in enumerate(kept.tolist()) if stays} == best(scores, keep)


def test_removed_heads_are_zero_whatever_they_held() -> None:
    x, score, rows = arguments()
    x[:, 0] = torch.nan
    score[:, 0] = -99
    y = head_gate(x, score, torch.ones_like(rows), keep=HEADS - 1, factor=0.0)
    assert torch.equal(y[:, 0], torch.zeros_like(y[:, 0]))
    assert torch.equal(y[:, 1:], x[:, 1:])


def test_a_row_with_nan_scores_leaves_the_others_alone() -> None:
    x, score, rows = arguments()
    rows[:] = True
    expected = head_gate(x, score, rows, keep=2, factor=0.5)
    score[0, :, 1] = torch.nan
    y = head_gate(x, score, rows, keep=2, factor=0.5)
    same = torch.ones_like(rows)
    same[0, 1] = False
    moved = y.movedim(1, 2), expected.movedim(1, 2)
    assert torch.equal(moved[0][same], moved[1][same])
    assert torch.equal(y[0, :2, 1], x[0, :2, 1])


@pytest.mark.parametrize(("keep", "factor"), [(HEADS, 0.0), (2, 1.0)])
def test_neutral_settings_keep_every_bit(keep: int, factor: float) -> None:
    x, score, rows = arguments(torch.float32)
    x[0, 0, 0] = torch.tensor([-0.0, float("nan"), float("inf")])
    y = head_gate(x, score, torch.ones_like(rows), keep=keep, factor=factor)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_rows_that_are_not_gated_keep_every_bit() -> None:
    x, score, rows = arguments(torch.float32)
    x[..., 0] = -0.0
    y = head_gate(x, score, rows, keep=1, factor=0.0)
    bits = [value.movedim(1, 2)[~rows].contiguous().view(torch.int32) for value in (y, x)]
    assert torch.equal(*bits)


def test_scaling_columns_of_the_projection_is_the_same() -> None:
    x, score, rows = arguments()
    weight = randn(7, HEADS * WIDTH, seed=3)
    rows[:] = True
    gated = head_gate(x, score, rows, keep=3, factor=0.3).transpose(1, 2).flatten(2) @ weight.T
    gate = torch.where(kept_heads(score, 3), 1.0, 0.3).transpose(1, 2)
    columns = weight * gate.repeat_interleave(WIDTH, -1)[..., None, :]
    direct = (columns @ x.transpose(1, 2).flatten(2)[..., None])[..., 0]
    torch.testing.assert_close(gated, direct)


def test_permuted_heads_permute_the_gate() -> None:
    x, score, rows = arguments()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    y = head_gate(x, score, rows, keep=3, factor=0.2)
    assert torch.equal(
        head_gate(x[:, order], score[:, order], rows, keep=3, factor=0.2), y[:, order]
    )


def test_one_score_for_all_rows() -> None:
    x, score, rows = arguments()
    one = score[:1, :, :1]
    every = one.expand(2, HEADS, LENGTH)
    found = head_gate(x, one, rows, keep=3, factor=0.2)
    assert torch.equal(found, head_gate(x, every, rows, keep=3, factor=0.2))


def test_gradient() -> None:
    x, score, rows = arguments()
    gradcheck(lambda x: head_gate(x, score, rows, keep=3, factor=0.2), x)


@pytest.mark.parametrize("trains", [False, True])
def test_opcheck(trains: bool) -> None:
    x, score, rows = arguments()
    x = x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(trains)
    opcheck(SPEC, x, score, rows, keep=3, factor=0.2)


def test_export() -> None:
    x, score, rows = arguments()
    batch, length = Dim("batch"), Dim("length")
    sizes = {0: batch, 2: length}
    check_export(
        (op_of(SPEC), SPEC.reference),
        (x, score, rows),
        (x[:1, :, :4], score[:1, :, :4], rows[:1, :4]),
        (sizes, sizes, {0: batch, 1: length}),
        keep=3,
        factor=0.2,
    )


def test_bad_arguments() -> None:
    x, score, rows = arguments()
    with pytest.raises(InputError, match="keeps -1 heads"):
        head_gate(x, score, rows, keep=-1, factor=0.0)
    with pytest.raises(InputError, match="6 heads and scores of 5"):
        head_gate(x, score[:, :5], rows, keep=1, factor=0.0)


def test_flops() -> None:
    node = call_node(SPEC, *arguments(), keep=3, factor=0.2)
    assert SPEC.flops(node) == 2 * HEADS * LENGTH * (HEADS + WIDTH)
