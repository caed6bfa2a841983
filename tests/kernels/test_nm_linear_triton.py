"""The Triton kernels of ``fxgraft::nm_linear`` against the reference in float64."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.nm_linear import reference
from fxgraft.kernels.nm_linear.arguments import Parts
from fxgraft.kernels.nm_linear.config import Config, has_tiles, rule
from fxgraft.kernels.nm_linear.layout import Layout, layout_of
from fxgraft.kernels.nm_linear.op import SPEC
from fxgraft.kernels.nm_linear.packing import pack, unpack
from tests.kernels._helpers import op_of, randn
from tests.kernels._interpreter import DEVICE, RUNS_KERNELS, prepare
from tests.kernels._nm import mask_of

prepare()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS_KERNELS, reason="there is no GPU, and this is no interpreter"),
]
kernels: Any = importlib.import_module("fxgraft.kernels.nm_linear.triton") if RUNS_KERNELS else None

ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VECTOR = Config("vector", block_n=32, block_c=2, warps=2)
VECTOR_SPLIT = Config("vector", block_n=32, block_c=4, split_k=2, prefetch=1)
MATRIX = Config("matrix", block_n=32, block_c=2, block_r=16, warps=2)
MATRIX_SPLIT = Config("matrix", block_n=64, block_c=1, split_k=2, block_r=16, warps=2)
MMA = Config("mma", block_n=16, block_c=4, warps=1, prefetch=1)
MMA_SPLIT = Config("mma", block_n=32, block_c=8, split_k=2, warps=2)
PATTERNS = [(1, 4), (2, 4), (4, 8), (2, 8), (8, 16)]


def check(
    rows: int,
    features: int,
    groups: int,
    pattern: tuple[int, int],
    config: Config,
    dtype: torch.dtype = torch.bfloat16,
    *,
    parts: tuple[str, ...] = (),
    **options: Any,
) -> Tensor:
    """Compare with the reference.

    ``parts`` are those of bias, residual and norm_weight to add, ``options`` the numbers of a call.
    """
    n, m = pattern
    inner = groups * m
    weight = randn(features, inner, dtype=dtype, seed=1) / (inner * n / m) ** 0.5
    values, indices = pack(weight, mask_of(features, inner, n, m), n, m)
    width = features if options.get("activation") is None else features // 2
    x = randn(rows, inner, dtype=dtype)
    shapes = {"bias": (features,), "residual": (rows, width), "norm_weight": (inner,)}
    others = {name: randn(*shapes[name], dtype=dtype, seed=2) for name in parts}
    asked = Parts(**{name: other.to(DEVICE) for name, other in others.items()}, **options)
    layout = layout_of(values, indices, n, m)
    given = (tensor.to(DEVICE) for tensor in (x, values, indices))
    output = kernels.nm_linear(*given, asked, layout=layout, config=config)
    wide: dict[str, Any] = {name: other.double() for name, other in others.items()}
    expected = reference.nm_linear(
        x.double(), values.double(), indices, n=n, m=m, **wide, **options
    )
    assert output.dtype == dtype
    assert output.shape == expected.shape
    difference = (output.cpu().double() - expected).norm() / expected.norm()
    assert difference < ERRORS[dtype], f"relative error {float(difference):.2e}"
    return output


@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
def test_every_n(m: int) -> None:
    for n in range(1, m + 1):
        check(1, 9, 2, (n, m), replace(VECTOR, block_c=1, warps=1), torch.float32)
    for n in sorted({1, 2, m // 2, m - 1, m}):
        check(2, 9, 8, (n, m), replace(MATRIX, block_c=1))


@pytest.mark.parametrize("m", [3, 5, 12])
def test_groups_of_any_width(m: int) -> None:
    for n in (1, 2, m - 1, m):
        check(2, 9, 6, (n, m), VECTOR, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_few_rows(rows: int, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    # No size is a multiple of a block.
    check(rows, 40, 24, pattern, VECTOR_SPLIT, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("rows", "config"), [(5, MATRIX), (20, MATRIX_SPLIT)], ids=str)
def test_tiles(rows: int, config: Config, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    check(rows, 70, 24, pattern, config, dtype)


@pytest.mark.parametrize("pattern", [*PATTERNS, (1, 8), (4, 4), (3, 8), (5, 16)], ids=str)
def test_fragments(pattern: tuple[int, int]) -> None:
    # No size is a multiple of a block.
    check(1, 20, 24, pattern, MMA)
    check(7, 40, 72, pattern, MMA_SPLIT, torch.float16)


@pytest.mark.parametrize("lane", [1, 2, 4, 8])
@pytest.mark.parametrize("pattern", [(1, 16), (3, 32), (2, 4)], ids=str)
def test_chunks_of_any_length(lane: int, pattern: tuple[int, int]) -> None:
    check(2, 33, 3 * lane, pattern, VECTOR)
    if lane > 1:
        check(2, 33, 3 * lane, pattern, replace(MATRIX, block_c=2))


@pytest.mark.parametrize(
    ("rows", "config"),
    [(1, VECTOR), (4, VECTOR_SPLIT), (3, MATRIX), (20, MATRIX_SPLIT), (1, MMA), (8, MMA_SPLIT)],
    ids=str,
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_what_stands_behind(rows: int, config: Config, activation: str | None) -> None:
    check(rows, 70, 16, (4, 8), config, parts=("bias", "residual"), activation=activation)
    check(rows, 70, 16, (2, 4), config, torch.float16, parts=("bias",), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config", [VECTOR, VECTOR_SPLIT, replace(VECTOR_SPLIT, split_k=4)], ids=str
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_one_row_is_normalised_as_it_is_read(
    dtype: torch.dtype, config: Config, offset: float
) -> None:
    # 24 and 40 groups of 8, and 1100 columns: less and more than a block of the norm's sum.
    for pattern, groups, parts in (
        ((4, 8), 24, ("norm_weight",)),
        ((2, 8), 40, ()),
        ((3, 20), 55, ("norm_weight", "bias", "residual")),
    ):
        check(1, 41, groups, pattern, config, dtype, parts=parts, eps=1e-2, norm_offset=offset)


def test_norm_gate_and_residual_together() -> None:
    parts = ("bias", "residual", "norm_weight")
    for config in (VECTOR, VECTOR_SPLIT, MMA):
        check(1, 70, 16, (4, 8), config, parts=parts, activation="silu", eps=1e-5)


def test_the_norm_counts_inputs_that_are_not_kept() -> None:
    weight = torch.ones(9, 16)
    mask = torch.zeros(9, 16, dtype=torch.bool)
    mask[:, ::8] = True
    values, indices = (t.to(DEVICE) for t in pack(weight, mask, 1, 8))
    x = torch.full((1, 16), 3.0, device=DEVICE)
    output = kernels.nm_linear(
        x, values, indices, Parts(eps=0.0), layout=Layout(1, 8, 2), config=VECTOR
    )
    torch.testing.assert_close(output.cpu(), torch.full((1, 9), 2.0))


@pytest.mark.parametrize(("rows", "config"), [(1, VECTOR), (2, VECTOR), (1, MATRIX)], ids=str)
def test_only_one_row_is_normalised_by_the_kernel(rows: int, config: Config) -> None:
    x = randn(rows, 16)
    assert kernels.takes_norm(x, config) == (rows == 1 and config is VECTOR)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fragments_of_a_row_that_is_normalised(offset: float) -> None:
    for pattern in ((2, 4), (1, 4)):
        check(1, 41, 40, pattern, MMA, parts=("norm_weight",), eps=1e-2, norm_offset=offset)
    check(1, 41, 40, (4, 8), replace(MMA, block_n=32), eps=1e-2)


@pytest.mark.parametrize("pattern", [*PATTERNS, (1, 16), (7, 32), (4, 4)], ids=str)
def test_unpacking(pattern: tuple[int, int]) -> None:
    n, m = pattern
    weight = randn(37, 6 * m, dtype=torch.bfloat16)
    values, indices = pack(weight, mask_of(37, 6 * m, n, m), n, m)
    dense = kernels.unpack(values.to(DEVICE), indices.to(DEVICE), layout_of(values, indices, n, m))
    assert torch.equal(dense.cpu(), unpack(values, indices, n, m))


def test_programs_need_not_be_equally_long() -> None:
    # 5 chunks over 2 splits of 4 chunks at a time: one of them has a single chunk.
    check(2, 40, 40, (4, 8), VECTOR_SPLIT)
    # The last split has none at all.
    check(2, 40, 8, (4, 8), replace(VECTOR_SPLIT, split_k=4))
    check(2, 40, 8, (4, 8), replace(MATRIX_SPLIT, split_k=4))


def test_inputs_of_what_is_not_kept_do_not_count() -> None:
    weight = randn(9, 24, dtype=torch.float32)
    mask = torch.zeros(9, 24, dtype=torch.bool)
    mask[:, ::8] = True
    values, indices = (t.to(DEVICE) for t in pack(weight, mask, 1, 8))
    x = torch.full((1, 24), float("nan"))
    x[:, ::8] = 1.0
    layout = Layout(1, 8, 3)
    output = kernels.nm_linear(x.to(DEVICE), values, indices, layout=layout, config=VECTOR)
    torch.testing.assert_close(output.cpu(), weight[:, ::8].sum(-1)[None])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 64, 100, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules_fit(rows: int, dtype: torch.dtype) -> None:
    for pattern in (*PATTERNS, (3, 5)):
        for columns in (576, 4096):
            layout = Layout(*pattern, columns // pattern[1])
            config = rule(dtype, 4096, layout, rows)
            if config.kernel == "mma":
                assert rows <= 8
                assert config.block_c == 4 * config.warps
            elif config.kernel == "vector":
                assert rows <= 8
                assert config.block_n * config.block_c == 32 * config.warps
            elif config.kernel == "matrix":
                assert has_tiles(dtype, layout)
                assert config.block_n * config.block_c >= 32 * config.warps
                assert config.block_c * layout.lane * layout.m >= 16


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 5, 17, 70, 600])
def test_the_op_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    for n, m in (*PATTERNS, (3, 5), (5, 32)):
        inner = 6 * m
        weight = randn(70, inner, dtype=dtype, seed=1) / inner**0.5
        values, indices = pack(weight, mask_of(70, inner, n, m), n, m)
        x = randn(rows, inner, dtype=dtype)
        given = (x, values, indices)
        output = op_of(SPEC)(*(t.to(DEVICE) for t in given), n=n, m=m).cpu().double()
        expected = reference.nm_linear(x.double(), values.double(), indices, n=n, m=m)
        error = ERRORS.get(dtype, 1e-12)
        assert (output - expected).norm() <= error * expected.norm()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_norm_and_experts_of_the_op_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    weight = randn(3, 70, 48, dtype=dtype, seed=1) / 48**0.5
    mask = mask_of(3 * 70, 48, 4, 8).view(3, 70, 48)
    values, indices = pack(weight, mask, 4, 8)
    x, gain = randn(rows, 48, dtype=dtype), randn(48, dtype=dtype, seed=2)
    ends = torch.tensor([rows // 2, rows // 2, rows])
    for given, options in (
        ((x, values[0], indices[0], None, None, gain), {"eps": 1e-5}),
        ((x, values, indices, None, None, None, ends), {}),
    ):
        moved = (t if t is None else t.to(DEVICE) for t in given)
        output = op_of(SPEC)(*moved, n=4, m=8, **options).cpu().double()
        wide: Any = [t.double() if t is not None and t.is_floating_point() else t for t in given]
        expected = reference.nm_linear(*wide, n=4, m=8, **options)
        assert (output - expected).norm() <= ERRORS[dtype] * expected.norm()
