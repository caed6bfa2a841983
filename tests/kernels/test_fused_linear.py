"""``fxgraft::fused_linear`` on a CPU, and what it refuses; its kernels have a file of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxgraft.errors import InputError
from fxgraft.kernels.fused_linear import reference
from fxgraft.kernels.fused_linear.op import SPEC
from tests.kernels._helpers import call_node, op_of, opcheck, randn

fused_linear = op_of(SPEC)


def arguments(*parts: str, width: int = 6, rows: int = 6) -> list[Any]:
    shapes = {"bias": (rows,), "norm_weight": (5,), "residual": (2, 3, width)}
    others = [randn(*shape, seed=2) if name in parts else None for name, shape in shapes.items()]
    return [randn(2, 3, 5), randn(rows, 5, seed=1), *others]


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("parts", [(), ("bias",), ("norm_weight", "residual")], ids=str)
def test_parts_in_their_order(parts: tuple[str, ...], activation: str | None) -> None:
    eps = 1e-3 if "norm_weight" in parts else None
    options: dict[str, Any] = {"activation": activation, "eps": eps, "norm_offset": 1.0}
    given = arguments(*parts, width=3 if activation else 6)
    x, weight, bias, gain, residual = given
    if eps is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (gain + 1)
    expected = x @ weight.T + (0 if bias is None else bias)
    if activation is not None:
        gate, up = expected.chunk(2, -1)
        functional = torch.nn.functional
        expected = up * {
            "silu": functional.silu,
            "gelu": functional.gelu,
            "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
            "relu": torch.relu,
            "sigmoid": torch.sigmoid,
        }[activation](gate)
    expected = expected + (0 if residual is None else residual)
    torch.testing.assert_close(fused_linear(*given, **options), expected)
    torch.testing.assert_close(reference.fused_linear(*given, **options), expected)


def test_schema_is_true() -> None:
    given = arguments("bias", "norm_weight", "residual", width=3)
    opcheck(SPEC, *given, eps=1e-5, activation="silu")


def test_work_counts_every_part() -> None:
    plain = call_node(SPEC, *arguments())
    full = call_node(SPEC, *arguments("bias", "norm_weight", "residual"), eps=1e-5)
    assert SPEC.flops is not None
    assert SPEC.flops(plain) == 2 * 6 * 5 * 6
    # The norm's 4 per element of x, the bias, and the residual.
    assert SPEC.flops(full) - SPEC.flops(plain) == 4 * 30 + 36 + 36


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({0: randn(2, 3, 4)}, {}, r"weight is \[6, 5\] for x \[2, 3, 4\]"),
        ({2: torch.zeros(6)}, {}, "have the dtypes torch.float32, torch.float64"),
        ({2: randn(5)}, {}, r"bias is \[5\]"),
        ({3: randn(5)}, {}, "norm_weight but no eps"),
        ({4: randn(2, 3, 5)}, {}, r"residual is \[2, 3, 5\]"),
        ({1: randn(5, 5)}, {"activation": "silu"}, "5 rows of weight"),
        ({}, {"activation": "swish"}, "no activation 'swish'"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[int, Any], options: dict[str, Any], message: str) -> None:
    given = arguments()
    for place, value in change.items():
        given[place] = value
    with pytest.raises(InputError, match=message):
        fused_linear(*given, **options)
