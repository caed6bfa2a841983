"""The Triton kernels of ``fxgraft::fused_linear`` against the reference in float64."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.fused_linear import reference
from fxgraft.kernels.fused_linear.config import BUCKETS, Config, bucket_of, rule
from tests.kernels._helpers import randn
from tests.kernels._interpreter import DEVICE, RUNS_KERNELS, prepare

prepare()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS_KERNELS, reason="there is no GPU, and this is no interpreter"),
]
kernels: Any = (
    importlib.import_module("fxgraft.kernels.fused_linear.triton") if RUNS_KERNELS else None
)

ERRORS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VECTOR = Config("vector", block_n=8, block_k=64)
MATRIX = Config("matrix", block_n=32, block_k=64, stages=2)
SPLIT = Config("matrix", block_n=16, block_k=32, split_k=4, stages=2, prefetch=64)


def check(
    rows: int,
    features: int,
    inner: int,
    config: Config,
    dtype: torch.dtype = torch.float32,
    *,
    parts: tuple[str, ...] = (),
    **options: Any,
) -> Tensor:
    """Compare with the reference; ``parts`` are those of bias, norm_weight and residual to add."""
    width = features if options.get("activation") is None else features // 2
    shapes = {"bias": (features,), "norm_weight": (inner,), "residual": (rows, width)}
    x = randn(rows, inner, dtype=dtype)
    weight = randn(features, inner, dtype=dtype, seed=1) / inner**0.5
    others = [
        randn(*shape, dtype=dtype, seed=2) if name in parts else None
        for name, shape in shapes.items()
    ]
    given = [None if t is None else t.to(DEVICE) for t in (x, weight, *others)]
    wide = [None if t is None else t.double() for t in (x, weight, *others)]
    arguments: Any = given
    output = kernels.fused_linear(*arguments, config=config, **options)
    expected: Any = reference.fused_linear(*wide, **options)  # pyright: ignore[reportArgumentType]
    assert output.dtype == dtype
    assert output.shape == expected.shape
    difference = (output.cpu().double() - expected).norm() / expected.norm()
    assert difference < ERRORS[dtype], f"relative error {float(difference):.2e}"
    return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "config"),
    [(1, VECTOR), (1, SPLIT), (3, MATRIX), (3, SPLIT), (17, SPLIT), (33, MATRIX)],
    ids=str,
)
def test_product(rows: int, config: Config, dtype: torch.dtype) -> None:
    check(rows, 70, 200, config, dtype)


@pytest.mark.parametrize(
    ("rows", "config", "dtype"),
    [
        (1, VECTOR, torch.bfloat16),
        (1, VECTOR, torch.float16),
        (5, MATRIX, torch.float32),
        (5, SPLIT, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (("bias", "residual"), {}),
        ((), {"eps": 1e-5}),
        (("norm_weight", "residual"), {"eps": 1e-5, "norm_offset": 1.0}),
        (("norm_weight", "bias", "residual"), {"eps": 1e-2, "activation": "silu"}),
    ],
    ids=str,
)
def test_what_stands_around(
    rows: int, config: Config, parts: tuple[str, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    check(rows, 44, 130, config, dtype, parts=parts, **options)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_activations(activation: str) -> None:
    check(1, 24, 64, VECTOR, activation=activation)
    check(2, 24, 64, SPLIT, activation=activation)


@pytest.mark.parametrize("rows", [1, 2, 16, 20, 64])
def test_the_rules_configuration(rows: int) -> None:
    for dtype in DTYPES:
        check(rows, 64, 256, rule(dtype, 64, 256, rows), dtype, parts=("residual",), eps=1e-6)


def test_rows_on_the_tensor_cores_are_normalised_before() -> None:
    check(40, 32, 64, MATRIX, torch.bfloat16, parts=("norm_weight",), eps=1e-6)
    check(2, 32, 64, MATRIX, torch.float16, parts=("norm_weight",), eps=1e-6)


def test_float16_does_not_overflow_before_it_is_normalised() -> None:
    x = torch.full((1, 64), 3e4, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(8, 64, dtype=torch.float16, device=DEVICE)
    y = kernels.fused_linear(x, weight, config=VECTOR, eps=1e-6)
    torch.testing.assert_close(y, torch.full_like(y, 64.0))


def test_counters_are_left_at_zero() -> None:
    """The second call of a split kernel gives what the first gave."""
    assert torch.equal(check(3, 40, 256, SPLIT), check(3, 40, 256, SPLIT))


def test_which_inputs_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(x: Tensor, weight: Tensor) -> Config | None:
        return kernels.config_for(x, weight)

    monkeypatch.setenv("FXGRAFT_CACHE", "/nonexistent")
    weight = torch.empty(8, 16, device=DEVICE)
    assert chosen(torch.empty(2, 1, 16, device=DEVICE), weight) == rule(torch.float32, 8, 16, 2)
    assert chosen(torch.empty(65, 16, device=DEVICE), weight) is None
    assert chosen(torch.empty(0, 16, device=DEVICE), weight) is None
    assert chosen(torch.empty(1, 8, device=DEVICE), weight.t()) is None
    assert chosen(torch.empty(1, 16, device=DEVICE).double(), weight.double()) is None


def test_buckets() -> None:
    assert [bucket_of(rows) for rows in (1, 2, 3, 9, 33, 64)] == [1, 2, 4, 16, 64, 64]
    assert [bucket_of(bucket) for bucket in BUCKETS] == list(BUCKETS)
