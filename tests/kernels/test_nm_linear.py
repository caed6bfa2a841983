"""``fxgraft::nm_linear`` on a CPU, its packed form, its cost, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.nm_linear import reference
from fxgraft.kernels.nm_linear.layout import Layout
from fxgraft.kernels.nm_linear.op import SPEC
from fxgraft.kernels.nm_linear.packing import kept_mask, pack, unpack
from tests.kernels._helpers import (
    call_node,
    check_export,
    gradcheck,
    op_of,
    opcheck,
    randn,
)
from tests.kernels._nm import mask_of

nm_linear = op_of(SPEC)
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PATTERNS = [(n, m) for m in (2, 4, 8, 16, 32) for n in range(1, m + 1)]


def arguments(
    n: int = 2, m: int = 4, groups: int = 6, rows: int = 5, dtype: torch.dtype = torch.float64
) -> list[Any]:
    weight = randn(rows, groups * m, seed=1).to(dtype)
    return [
        randn(2, 3, groups * m, dtype=dtype),
        *pack(weight, mask_of(rows, groups * m, n, m), n, m),
    ]


@given(
    m=st.integers(1, 32),
    share=st.floats(0, 1),
    groups=st.integers(1, 24),
    rows=st.integers(0, 5),
    dtype=st.sampled_from([*EXACT, torch.int8]),
    seed=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_packing_keeps_every_bit(
    m: int, share: float, groups: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    n = max(1, round(share * m))
    weight = (10 * randn(rows, groups * m, seed=seed)).to(dtype)
    mask = mask_of(rows, groups * m, n, m, seed)
    values, indices = pack(weight, mask, n, m)
    layout = Layout(n, m, groups)
    assert tuple(values.shape) == layout.values_shape(rows)
    assert tuple(indices.shape) == layout.indices_shape(rows)
    assert (values.dtype, indices.dtype) == (dtype, layout.word_dtype)
    assert torch.equal(unpack(values, indices, n, m), torch.where(mask, weight, 0))
    assert torch.equal(kept_mask(values, indices, n, m), mask)


def test_groups_that_keep_less_are_filled_up() -> None:
    weight, mask = randn(3, 16), torch.zeros(3, 16, dtype=torch.bool)
    mask[0, 3] = mask[1, 8] = True
    values, indices = pack(weight, mask, 2, 8)
    assert torch.equal(unpack(values, indices, 2, 8), weight * mask)
    kept = kept_mask(values, indices, 2, 8)
    assert (kept.view(3, 2, 8).sum(-1) == 2).all()
    assert kept[0].nonzero().flatten().tolist() == [0, 3, 8, 9]


def test_infinities_and_nans_that_are_pruned_do_not_come_back() -> None:
    weight = torch.tensor([[1.0, float("nan"), float("inf"), 2.0]])
    mask = torch.tensor([[True, False, False, True]])
    assert unpack(*pack(weight, mask, 2, 4), 2, 4).tolist() == [[1, 0, 0, 2]]


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [((2, 4), 1.0), ((4, 8), 1.0), ((8, 16), 1.0), ((2, 8), 1.0), ((1, 4), 0.5), ((1, 8), 0.5),
     ((1, 16), 0.25), ((2, 16), 0.5), ((16, 32), 1.0), ((2, 32), 0.5), ((1, 2), 0.5)],
    ids=str,
)  # fmt: skip
def test_index_bits_per_weight(pattern: tuple[int, int], bits: float) -> None:
    n, m = pattern
    weight = randn(4, 16 * m)
    values, indices = pack(weight, mask_of(4, 16 * m, n, m), n, m)
    assert indices.nbytes * 8 / weight.numel() == bits
    assert values.numel() / weight.numel() == n / m


@pytest.mark.parametrize("dtype", EXACT)
def test_every_pattern_equals_the_dense_layer(dtype: torch.dtype) -> None:
    for n, m in PATTERNS:
        weight, mask = randn(5, 6 * m, seed=1, dtype=dtype), mask_of(5, 6 * m, n, m)
        x = randn(3, 6 * m, dtype=dtype)
        expected = x.double() @ torch.where(mask, weight, 0).double().T
        packed = pack(weight, mask, n, m)
        for function in (nm_linear, reference.nm_linear):
            found = function(x, *packed, n=n, m=m)
            assert found.dtype == dtype
            error = (found.double() - expected).norm() / expected.norm()
            assert error < EXACT[dtype], f"{n}:{m} {float(error):.1e}"


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_parts_in_their_order(activation: str | None) -> None:
    x, values, indices = arguments(rows=6)
    bias, residual = randn(6, seed=4), randn(2, 3, 3 if activation else 6, seed=5)
    y = x @ unpack(values, indices, 2, 4).T + bias
    if activation is not None:
        gate, up = y.chunk(2, -1)
        functional = torch.nn.functional
        y = up * (
            functional.silu(gate)
            if activation == "silu"
            else functional.gelu(gate, approximate="tanh")
        )
    for function in (nm_linear, reference.nm_linear):
        found = function(x, values, indices, bias, residual, n=2, m=4, activation=activation)
        torch.testing.assert_close(found, y + residual)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_comes_first(offset: float) -> None:
    x, values, indices = arguments()
    gain = randn(24, seed=7)
    h = x * (x.square().mean(-1, keepdim=True) + 1e-2).rsqrt()
    dense = unpack(values, indices, 2, 4)
    options: dict[str, Any] = {"n": 2, "m": 4, "eps": 1e-2, "norm_offset": offset}
    for function in (nm_linear, reference.nm_linear):
        found = function(x, values, indices, None, None, gain, **options)
        torch.testing.assert_close(found, (h * (gain + offset)) @ dense.T)
        torch.testing.assert_close(function(x, values, indices, **options), h @ dense.T)


def stack(
    ends: list[int], n: int = 2, m: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Any]]:
    """Dense weights [E, 6, 24] with zeros; x, values, indices and ends."""
    count = len(ends)
    mask = mask_of(count * 6, 24, n, m).view(count, 6, 24)
    weight = torch.where(mask, randn(count, 6, 24, seed=1).to(dtype), 0)
    return weight, [randn(7, 24, dtype=dtype), *pack(weight, mask, n, m), torch.tensor(ends)]


def with_ends(function: Any, given: list[Any], *parts: Tensor | None, **options: Any) -> Tensor:
    places = (*parts, None, None, None)[:3]
    return function(*given[:3], *places, given[3], **({"n": 2, "m": 4} | options))


@pytest.mark.parametrize("ends", [[2, 2, 5, 7], [0, 0, 0, 7], [7], [3, 5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_row_meets_the_weight_of_its_expert(ends: list[int], dtype: torch.dtype) -> None:
    weight, given = stack(ends, dtype=dtype)
    assert torch.equal(unpack(given[1], given[2], 2, 4), weight)
    assert given[1].shape[0] == given[2].shape[0] == len(ends)
    x, expected, first = given[0], torch.zeros(7, 6, dtype=dtype), 0
    for matrix, end in zip(weight, ends, strict=True):
        expected[first:end] = x[first:end] @ matrix.T
        first = end
    for function in (nm_linear, reference.nm_linear):
        found = with_ends(function, given)
        torch.testing.assert_close(found, expected)
        folded = with_ends(function, [x.view(7, 1, 24), *given[1:]])
        torch.testing.assert_close(folded, expected.view(7, 1, 6))


def test_experts_with_all_parts() -> None:
    _, given = stack([2, 2, 5, 7])
    bias, residual, gain = randn(6, seed=2), randn(7, 3, seed=3), randn(24, seed=4)
    options: dict[str, Any] = {"activation": "silu", "eps": 1e-3, "norm_offset": 1.0}
    found, expected = (
        with_ends(function, given, bias, residual, gain, **options)
        for function in (nm_linear, reference.nm_linear)
    )
    torch.testing.assert_close(found, expected)


def test_experts_without_rows_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = stack([0, 3, 3, 7])
    seen: list[Tensor] = []

    def note(values: Tensor, *others: Any) -> Tensor:
        seen.append(values)
        return unpack(values, *others)

    monkeypatch.setattr("fxgraft.kernels.nm_linear.op.unpack", note)
    with_ends(nm_linear, given)
    assert [values.data_ptr() for values in seen] == [given[1][e].data_ptr() for e in (1, 3)]


def test_schema_of_experts_and_norm() -> None:
    _, given = stack([2, 2, 5, 7])
    gain = randn(24, seed=4)
    opcheck(SPEC, *given[:3], None, None, gain, given[3], n=2, m=4, eps=1e-3)


def test_gradients_of_experts_and_norm() -> None:
    _, given = stack([2, 2, 5, 7])

    def call(x: Tensor, values: Tensor, gain: Tensor) -> Tensor:
        return nm_linear(x, values, given[2], None, None, gain, given[3], n=2, m=4, eps=1e-2)

    gradcheck(call, *given[:2], randn(24, seed=4))


def test_slices_of_rows_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(rows=7)
    expected = nm_linear(*given, randn(7), n=2, m=4)
    monkeypatch.setattr("fxgraft.kernels.nm_linear.op._SLICE", 50)
    torch.testing.assert_close(nm_linear(*given, randn(7), n=2, m=4), expected)


@pytest.mark.parametrize("shape", [(0, 24), (24,), (2, 0, 24), (7, 24)], ids=str)
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    _, values, indices = arguments()
    x = randn(*shape)
    found = nm_linear(x, values, indices, n=2, m=4)
    torch.testing.assert_close(found, x @ unpack(values, indices, 2, 4).T)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (5, 16), (9, 32)], ids=str)
def test_schema_is_true(pattern: tuple[int, int]) -> None:
    given = arguments(*pattern)
    opcheck(SPEC, *given, randn(5), randn(2, 3, 5), n=pattern[0], m=pattern[1])


def test_schema_is_true_of_what_trains() -> None:
    x, values, indices = arguments()
    opcheck(SPEC, x.requires_grad_(), values.requires_grad_(), indices, n=2, m=4)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (5, 16)], ids=str)
def test_gradients(pattern: tuple[int, int]) -> None:
    x, values, indices = arguments(*pattern)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return nm_linear(x, values, indices, bias, n=pattern[0], m=pattern[1])

    gradcheck(call, x, values, randn(5))


def test_gradients_are_those_of_the_masked_dense_layer() -> None:
    x, values, indices = arguments(4, 8)
    values.requires_grad_()
    dense = unpack(values.detach(), indices, 4, 8).requires_grad_()
    target = randn(2, 3, 5, seed=6)
    (nm_linear(x, values, indices, n=4, m=8) * target).sum().backward()
    ((x @ dense.T) * target).sum().backward()
    mask = kept_mask(values, indices, 4, 8)
    assert dense.grad is not None
    assert values.grad is not None
    torch.testing.assert_close(unpack(values.grad, indices, 4, 8), dense.grad * mask)


def test_a_step_of_training_keeps_the_mask() -> None:
    x, values, indices = arguments()
    before = kept_mask(values, indices, 2, 4)
    values.requires_grad_()
    optimizer = torch.optim.SGD([values], lr=0.1)
    nm_linear(x, values, indices, n=2, m=4).pow(2).sum().backward()
    optimizer.step()
    assert ((unpack(values, indices, 2, 4) != 0) <= before).all()


def test_export() -> None:
    x, values, indices = arguments()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    check_export(
        (nm_linear, reference.nm_linear), (x, values, indices),
        (randn(3, 7, 24), values, indices), (sizes, None, None), n=2, m=4,
    )  # fmt: skip


def test_work_and_memory_depend_on_the_pattern() -> None:
    dense = 2 * 6 * 5 * 24
    for n, m in ((2, 4), (1, 8), (3, 8)):
        given = arguments(n, m, groups=24 // m)
        node = call_node(SPEC, *given, n=n, m=m)
        assert SPEC.flops(node) == dense * n // m
        assert given[1].numel() == 5 * 24 * n // m
    node = call_node(SPEC, *arguments(), randn(5), randn(2, 3, 5), n=2, m=4)
    # The bias and the residual.
    assert SPEC.flops(node) == dense // 2 + 30 + 30
    given = arguments(rows=6)
    node = call_node(SPEC, *given, n=2, m=4, activation="silu")
    assert SPEC.flops(node) == 6 * 6 * 24 + 2 * 6 * 3


def test_work_of_norm_and_experts() -> None:
    _, given = stack([2, 2, 5, 7])
    node = call_node(SPEC, *given[:3], None, None, randn(24), given[3], n=2, m=4, eps=1e-3)
    # Each row meets one weight; four operations per input for the norm.
    assert SPEC.flops(node) == 7 * 6 * 24 + 4 * 7 * 24


def test_wrong_experts() -> None:
    _, given = stack([2, 2, 5, 7])
    for ends in (given[3][:3], given[3].double(), given[3][None]):
        with pytest.raises(InputError, match="nm_linear's ends are"):
            with_ends(nm_linear, [*given[:3], ends])
    with pytest.raises(InputError, match=r"values are \[4, 3, 2, 6, 2\]"):
        nm_linear(*given[:3], n=2, m=4)
    _, single = stack([7])
    with pytest.raises(InputError, match="nm_linear's ends are"):
        with_ends(nm_linear, [single[0], single[1][0], single[2][0], single[3]])


ALL = torch.ones(4, 12, dtype=torch.bool)
WRONG: list[tuple[dict[int, Any], dict[str, Any], str]] = [
    ({}, {"n": 5}, "pattern is 5:4"),
    ({}, {"n": 0}, "pattern is 0:4"),
    ({}, {"n": 1, "m": 33}, "pattern is 1:33"),
    ({}, {"n": 1}, r"values are \[3, 2, 5, 2\] for the pattern 1:4"),
    ({1: torch.zeros(6, 2, 5, 2)}, {}, r"values are \[6, 2, 5, 2\]"),
    ({1: torch.zeros(10, 5)}, {}, r"values are \[10, 5\]"),
    ({2: torch.zeros(3, 1, 4, dtype=torch.uint8)}, {}, r"indices are torch.uint8 \[3, 1, 4\]"),
    ({2: torch.zeros(3, 1, 5, dtype=torch.int32)}, {}, r"torch.uint8 \[3, 1, 5\] belong"),
    ({}, {"m": 8}, r"indices are torch.uint8"),
    ({0: randn(2, 3, 20)}, {}, r"x is \[2, 3, 20\] for a weight \[5, 24\]"),
    ({0: randn(2, 3, 24, dtype=torch.float32)}, {}, "dtypes torch.float32, torch.float64"),
    ({3: randn(4)}, {}, r"bias is \[4\]"),
    ({3: None, 4: randn(3, 5)}, {}, r"residual is \[3, 5\]"),
    ({}, {"activation": "silu"}, "'silu' and 5 outputs"),
    ({}, {"activation": "swish"}, "'swish'"),
    ({3: None, 4: None, 5: randn(24)}, {}, "norm_weight but no eps"),
    ({3: None, 4: None, 5: randn(5)}, {"eps": 1e-5}, r"norm_weight is \[5\]"),
]


@pytest.mark.parametrize(("change", "options", "message"), WRONG, ids=str)
def test_wrong_arguments(change: dict[int, Any], options: dict[str, Any], message: str) -> None:
    given: dict[int, Any] = dict(enumerate(arguments())) | change
    ordered = [given[place] for place in sorted(given)]
    with pytest.raises(InputError, match=message):
        nm_linear(*ordered, **({"n": 2, "m": 4} | options))


@pytest.mark.parametrize(
    ("weight", "mask", "pattern", "message"),
    [
        (randn(4, 12), ALL, (2, 4), "keeps 4 of 4 weights in group 0"),
        (randn(4, 12), ALL, (5, 4), "pattern is 5:4"),
        (randn(4, 12), ALL, (2, 8), "12 columns .* m = 8\n.* 2, 4"),
        (randn(4, 7), torch.ones(4, 7, dtype=torch.bool), (2, 8), "none of 2 to 32 does"),
        (randn(4, 12), torch.ones(4, 8, dtype=torch.bool), (2, 4), r"mask torch.bool \[4, 8\]"),
        (randn(4, 12), torch.ones(4, 12), (2, 4), r"mask torch.float32"),
    ],
    ids=["keeps too much", "n > m", "m", "no m", "shape", "dtype"],
)  # fmt: skip
def test_wrong_masks(weight: Tensor, mask: Tensor, pattern: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(weight, mask, *pattern)
