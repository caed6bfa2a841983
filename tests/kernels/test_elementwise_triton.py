"""The Triton kernels of ``rms_norm``, ``gated_activation`` and ``greedy_step``."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.gated_activation import reference as gated_reference
from fxgraft.kernels.greedy_step import reference as greedy_reference
from fxgraft.kernels.greedy_step.op import SPEC as GREEDY_STEP
from fxgraft.kernels.launch import row_layout
from fxgraft.kernels.rms_norm import reference as norm_reference
from tests.kernels._helpers import opcheck, randn
from tests.kernels._interpreter import DEVICE, RUNS_KERNELS, prepare

prepare()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS_KERNELS, reason="there is no GPU, and this is no interpreter"),
]
gated: Any = (
    importlib.import_module("fxgraft.kernels.gated_activation.triton") if RUNS_KERNELS else None
)
greedy: Any = (
    importlib.import_module("fxgraft.kernels.greedy_step.triton") if RUNS_KERNELS else None
)
norm: Any = importlib.import_module("fxgraft.kernels.rms_norm.triton") if RUNS_KERNELS else None

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _device(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (2, 3, 576), (1, 1, 4096), (300, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    """The order of casts is the reference's, so that at most the last bit differs."""
    x, weight = _device(*shape, dtype=dtype), _device(shape[-1], dtype=dtype, seed=1)
    for gain in (weight, None):
        y = norm.rms_norm(x, gain, eps=1e-5, offset=offset)
        expected = norm_reference.rms_norm(x, gain, eps=1e-5, offset=offset)
        torch.testing.assert_close(y, expected)
    wide = norm_reference.rms_norm(x.double(), weight.double(), eps=1e-5, offset=offset)
    y = norm.rms_norm(x, weight, eps=1e-5, offset=offset)
    assert (y.double() - wide).norm() / wide.norm() < 10 * torch.finfo(dtype).eps


def test_rms_norm_of_mixed_dtypes() -> None:
    x, weight = _device(5, 40, dtype=torch.bfloat16), _device(40, dtype=torch.float32, seed=1)
    y = norm.rms_norm(x, weight, eps=1e-5)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, norm_reference.rms_norm(x, weight, eps=1e-5))


def test_rms_norm_of_heads_inside_a_projection() -> None:
    """Rows that do not lie one behind the other: queries in a merged projection."""
    projected = _device(2, 5, 6 * 16, dtype=torch.float32)
    x = projected[..., 16:64].unflatten(-1, (3, 16))
    assert row_layout(x) == (3, 96, 16)
    y = norm.rms_norm(x, eps=1e-6)
    torch.testing.assert_close(y, norm_reference.rms_norm(x, eps=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", gated_reference.ACTIVATIONS)
def test_gated_activation(activation: str, dtype: torch.dtype) -> None:
    merged = _device(3, 2, 2 * 1100, dtype=dtype)
    merged[0, 0, :4] = torch.tensor([100.0, -100.0, 20.0, -20.0])
    gate, up = merged.chunk(2, -1)
    y = gated.gated_activation(gate, up, activation=activation)
    expected = gated_reference.gated_activation(gate, up, activation=activation)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


def test_which_inputs_are_taken() -> None:
    x = torch.empty(4, 8)
    assert norm.supports(x, torch.empty(8))
    assert not norm.supports(x.double(), None)
    assert not norm.supports(x, torch.empty(16)[::2])
    assert not norm.supports(x.t(), None)
    assert not norm.supports(torch.empty(1, 1 << 16), None)
    assert gated.supports(x, x, "silu")
    assert not gated.supports(x, x, "swish")
    assert not gated.supports(x, x.half(), "silu")
    assert not gated.supports(x.t(), x.t(), "silu")


@pytest.mark.parametrize(
    ("x", "layout"),
    [
        (torch.empty(3, 4), (3, 0, 4)),
        (torch.empty(2, 3, 4), (6, 0, 4)),
        (torch.empty(5, 2, 3, 4)[:, :, 0], (10, 0, 12)),
        (torch.empty(5, 7, 3, 4)[:, 2:4, 1], (2, 84, 12)),
        (torch.empty(5, 7, 3, 4)[:, 2:4, 1:], None),
        (torch.empty(4, 3).t(), None),
        (torch.empty(3, 4).transpose(0, 1)[None], None),
        (torch.empty(2, 3, 4).transpose(0, 1), None),
        (torch.empty(4).expand(3, 4), None),
        (torch.empty(4), (1, 0, 0)),
        (torch.empty(0, 4), None),
    ],
)
def test_row_layout(x: Tensor, layout: tuple[int, int, int] | None) -> None:
    assert row_layout(x) == layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (3, 8200), (4, 33)])
def test_greedy_step(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Ties take the first; rows with NaN or inf take none; rows without a request do not count."""
    logits = _device(rows, vocabulary, dtype=dtype).round()
    for row, value in enumerate((None, float("nan"), float("inf"))[:rows]):
        if value is not None:
            logits[row, vocabulary // 2] = value
    found, expected = (
        (
            torch.full((rows, 2), 9, device=DEVICE)[:, 0],
            torch.arange(rows, dtype=torch.int32, device=DEVICE) - 1,
            torch.full((rows,), 9, device=DEVICE),
        )
        for _ in range(2)
    )
    greedy.greedy_step(logits, *found)
    greedy_reference.greedy_step(logits, *expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[1][0] == -1
    assert (found[2] == -1).tolist() == [False, True, True, False][:rows]


def test_greedy_step_is_an_op() -> None:
    logits = _device(2, 11, dtype=torch.float32)
    past = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    ids, chosen = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    opcheck(GREEDY_STEP, logits, ids, past, chosen)
    torch.ops.fxgraft.greedy_step(logits, ids, past, chosen)
    assert torch.equal(ids, logits.argmax(-1))
    assert past.tolist() == [1, 1]
