"""``fxgraft::attention`` against loops over single numbers, and the laws of attention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.attention import reference
from fxgraft.kernels.attention.op import SPEC
from tests.kernels._attention_oracle import CASES, FAST, SLOW, Case, attend, make_case, padding
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

attention = op_of(SPEC)
CHECKED = ["causal", "decode", "padding_chunk", "bias_hides", "sinks_window", "everything"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAWS = settings(max_examples=40, deadline=None, derandomize=True)


def _run(case: Case) -> Tensor:
    return attention(*case.tensors, **case.options)


def _reference(case: Case) -> Tensor:
    output = SPEC.reference(*case.tensors, **case.options)
    assert isinstance(output, Tensor)
    return output


def _assert_near(output: Tensor, expected: Tensor) -> None:
    """Allow for the library's rounding of half-precision softmax weights."""
    tolerance = max(2 * torch.finfo(expected.dtype).eps, 2e-6)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_oracle(name: str) -> None:
    case = CASES[name]
    expected = attend(case)
    torch.testing.assert_close(_run(case), expected)
    torch.testing.assert_close(_reference(case), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_fast_equals_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name].to(dtype)
    output, expected = _run(case), _reference(case)
    _assert_near(output, expected)
    assert output.is_contiguous()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
def test_bias_wider_than_query(bias_dtype: torch.dtype) -> None:
    case = CASES["bias_hides"].to(torch.bfloat16)
    bias = CASES["bias_hides"].bias
    assert bias is not None
    query, key, value, *_ = case.tensors
    arguments = (query, key, value, None, bias.to(bias_dtype))
    expected = SPEC.reference(*arguments, **case.options)
    output = attention(*arguments, **case.options)
    assert isinstance(expected, Tensor)
    _assert_near(output, expected)


@pytest.mark.parametrize("name", CASES)
def test_library_is_used_where_it_can_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    slow = reference.attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(name)
        return slow(*args, **kwargs)

    monkeypatch.setattr(reference, "attention", spy)
    _run(CASES[name])
    assert bool(calls) == (name in SLOW)


@pytest.mark.parametrize("name", CHECKED)
def test_gradient(name: str) -> None:
    case = CASES[name]
    present = [x is not None and x.is_floating_point() for x in case.tensors]

    def call(*floating: Tensor) -> Tensor:
        given_tensors = iter(floating)
        arguments = [
            next(given_tensors) if is_floating else x
            for x, is_floating in zip(case.tensors, present, strict=True)
        ]
        return attention(*arguments, **case.options)

    # Finite differences of -inf are NaN, so a hiding bias stays a constant.
    if case.bias is not None and case.bias.isinf().any():
        present[4] = False
    leaves = [x for x, is_leaf in zip(case.tensors, present, strict=True) if is_leaf]
    gradcheck(call, *(leaf for leaf in leaves if leaf is not None))


ALL_HIDDEN = {
    "key_mask": make_case(key_mask=padding(".....", "....."), is_causal=False),
    "window": make_case(key_mask=padding("xxx..", "xxx.."), window=1),
    "keep": make_case(bias=torch.zeros(1, 1, 5, 5, dtype=torch.bool)),
    "bias": make_case(bias=torch.full((1, 1, 5, 5), -math.inf, dtype=torch.float64)),
    "sinks": make_case(key_mask=padding(".....", "....."), sinks=randn(4)),
    "softcap": make_case(key_mask=padding(".....", "....."), softcap=2.0),
}


@pytest.mark.parametrize("name", ALL_HIDDEN)
def test_rows_that_see_nothing(name: str) -> None:
    case = ALL_HIDDEN[name].to(torch.float32)
    query, key, value, key_mask, bias, sinks = case.tensors
    leaves = [
        x for x in (query, key, value, bias, sinks) if x is not None and x.dtype.is_floating_point
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    output = attention(query, key, value, key_mask, bias, sinks, **case.options)
    rows = slice(3, None) if name == "window" else slice(None)
    assert not output[:, :, rows].any()
    for gradient in torch.autograd.grad(output[:, :, rows].sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    output = attention(query, key, value, key_mask, bias, sinks, **case.options)
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert gradient.isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    case = make_case(scale=1e4, sinks=torch.full((4,), 1e4, dtype=torch.float64))
    assert _run(case.to(torch.float32)).isfinite().all()
    assert _reference(make_case(scale=1e4).to(torch.float32)).isfinite().all()


def test_lowest_finite_bias_is_not_a_mask() -> None:
    """A row whose keys all have transformers' lowest bias averages them, as transformers does."""
    bias = torch.full((1, 1, 1, 5), torch.finfo(torch.float32).min)
    case = make_case(bias=bias, is_causal=False).to(torch.float32)
    mean = case.value.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 5, 4)
    torch.testing.assert_close(_run(case), mean)
    torch.testing.assert_close(_reference(case), mean)


def test_padding_is_not_read() -> None:
    case = CASES["padding"]
    key, value = case.key.clone(), case.value.clone()
    key[0, :, :2], value[0, :, :2] = 1e30, -1e30
    output = attention(case.query, key, value, case.key_mask, **case.options)
    assert torch.equal(output, _run(case))


@pytest.mark.parametrize(("batch", "queries", "total"), [(0, 3, 3), (1, 0, 0), (2, 0, 4)])
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"softcap": 1.0}])
def test_empty(batch: int, queries: int, total: int, options: dict[str, Any]) -> None:
    case = make_case(batch=batch, queries=queries, total=total, **options)
    assert _run(case).shape == (batch, 4, queries, 4)


SIZES = {
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "past": st.integers(0, 6),
    "queries": st.integers(1, 6),
    "window": st.none() | st.integers(1, 8),
    "chunk": st.none() | st.integers(1, 8),
    "softcap": st.sampled_from([0.0, 1.0]),
    "left_padding": st.integers(0, 12),
}


def _random_case(past: int, queries: int, left_padding: int, batch: int, **options: Any) -> Case:
    total = past + queries
    key_mask = torch.ones(batch, total, dtype=torch.bool)
    key_mask[0, :left_padding] = False
    return make_case(
        batch, queries=queries, total=total, head_dim=2, value_dim=2, key_mask=key_mask, **options
    )


@LAWS
@given(**SIZES)
def test_oracle_on_random_arguments(**arguments: Any) -> None:
    case = _random_case(**arguments)
    torch.testing.assert_close(_run(case), attend(case))


@LAWS
@given(**SIZES)
def test_prefix_then_steps_equals_whole(past: int, queries: int, **arguments: Any) -> None:
    """Also if a step is given only the ``window - 1`` past keys that the state keeps."""
    case = _random_case(past=0, queries=past + queries, **arguments)
    whole = _run(case)
    bounds = [0, past, *range(past + 1, past + queries + 1)]
    pieces: list[Tensor] = []
    for start, stop in itertools.pairwise(bounds):
        # Chunks are counted from the first token, which a shortened state no longer has.
        shortened = case.window is not None and case.chunk is None
        first = max(0, start - (case.window or 0) + 1) if shortened else 0
        assert case.key_mask is not None
        step = attention(
            case.query[:, :, start:stop],
            case.key[:, :, first:stop],
            case.value[:, :, first:stop],
            case.key_mask[:, first:stop],
            **case.options,
        )
        pieces.append(step)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)


@LAWS
@given(**SIZES)
def test_left_padding_changes_nothing(left_padding: int, **arguments: Any) -> None:
    """A padded row computes what it computes without the padding."""
    case = _random_case(left_padding=0, **arguments)
    pad = (0, 0, left_padding, 0)
    key, value = (torch.nn.functional.pad(x, pad, value=3.0) for x in (case.key, case.value))
    assert case.key_mask is not None
    key_mask = torch.nn.functional.pad(case.key_mask, (left_padding, 0), value=False)
    padded = attention(case.query, key, value, key_mask, **case.options)
    torch.testing.assert_close(padded, _run(case))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str, trains: bool) -> None:
    case = CASES[name].to(torch.float32)
    case.query.requires_grad_(trains)
    opcheck(SPEC, *case.tensors, **case.options)


BAD: list[tuple[Case, str]] = [
    (make_case(queries=6, total=5), "6 queries but only 5 keys"),
    (make_case(window=2, is_causal=False), "window"),
    (make_case(window=0), "window is 0"),
    (make_case(chunk=0), "chunk is 0"),
    (Case(randn(1, 3, 2, 4), randn(1, 2, 2, 4), randn(1, 2, 2, 4)), "3 query heads for 2"),
    (Case(randn(1, 2, 2, 4).float(), randn(1, 2, 2, 4), randn(1, 2, 2, 4)), "float32.*float64"),
]


@pytest.mark.parametrize(("case", "message"), BAD)
def test_bad_input(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _run(case)


@pytest.mark.parametrize("name", ["no_padding", "everything"])
def test_export(name: str) -> None:
    case, other = (
        CASES[name],
        make_case(
            batch=3,
            queries=4,
            total=9,
            key_mask=padding("...xxxxxx", "xxxxxxxxx", "........."),
            bias=None if CASES[name].bias is None else randn(3, 4, 4, 9),
            sinks=CASES[name].sinks,
        ),
    )
    batch, length, total = Dim("batch"), Dim("length"), Dim("total")
    shapes = (
        {0: batch, 2: length},
        {0: batch, 2: total},
        {0: batch, 2: total},
        {0: batch, 1: total},
        None if case.bias is None else {0: batch, 2: length, 3: total},
        None,
    )
    functions = (attention, SPEC.reference)
    check_export(functions, case.tensors, other.tensors, shapes, **case.options)


def test_spec() -> None:
    assert {(state.name, state.kind, state.dim, state.limit) for state in SPEC.states} == {
        ("key", "grows", 2, "window"),
        ("value", "grows", 2, "window"),
    }
    for is_causal in (True, False):
        case = make_case(is_causal=is_causal)
        assert SPEC.causal(call_node(SPEC, *case.tensors, **case.options)) == is_causal


@pytest.mark.parametrize(("window", "keys"), [(None, 7), (3, 3), (9, 7)])
def test_flops(window: int | None, keys: int) -> None:
    case = make_case(queries=5, total=7, head_dim=4, value_dim=3, window=window)
    node = call_node(SPEC, *case.tensors, **case.options)
    assert SPEC.flops(node) == 2 * 2 * 4 * 5 * keys * (4 + 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAST | ALL_HIDDEN)
def test_gpu_equals_reference(name: str, dtype: torch.dtype) -> None:
    case = (FAST | ALL_HIDDEN)[name].to(dtype)
    output = _run(case.to(dtype, "cuda")).cpu()
    _assert_near(output, _reference(case))
