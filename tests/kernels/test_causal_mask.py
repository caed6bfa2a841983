"""``fxgraft::causal_mask`` against attention's visibility rules, one entry at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.attention.op import SPEC as ATTENTION
from fxgraft.kernels.causal_mask.op import SPEC
from tests.kernels._attention_oracle import CASES, Case, make_case, padding, sees
from tests.kernels._helpers import call_node, check_export, op_of, opcheck

causal_mask = op_of(SPEC)
attention = op_of(ATTENTION)


def _key_mask(case: Case) -> Tensor:
    batch, _, total, _ = case.key.shape
    return torch.ones(batch, total, dtype=torch.bool) if case.key_mask is None else case.key_mask


def _mask(case: Case) -> Tensor:
    rules = {"is_causal": case.is_causal, "window": case.window, "chunk": case.chunk}
    return causal_mask(_key_mask(case), case.query.shape[2], **rules)


@pytest.mark.parametrize("name", CASES)
def test_oracle(name: str) -> None:
    case = CASES[name]
    batch, _, queries, _ = case.query.shape
    total = case.key.shape[2]
    expected = [
        [[[sees(case, b, i, j) for j in range(total)] for i in range(queries)]]
        for b in range(batch)
    ]
    assert torch.equal(_mask(case), torch.tensor(expected))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bias is None])
def test_mask_as_bias_equals_rules(name: str) -> None:
    case = CASES[name]
    query, key, value, _, _, sinks = case.tensors
    options = {"scale": case.scale, "softcap": case.softcap, "is_causal": False}
    masked = attention(query, key, value, None, _mask(case), sinks, **options)
    torch.testing.assert_close(masked, attention(*case.tensors, **case.options))


def test_errors() -> None:
    key_mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="4 queries but only 3 keys"):
        causal_mask(key_mask, 4)
    with pytest.raises(InputError, match="window"):
        causal_mask(key_mask, 3, window=2, is_causal=False)


@pytest.mark.parametrize("is_causal", [True, False])
def test_opcheck(is_causal: bool) -> None:
    opcheck(SPEC, padding("..xxx", "xxxxx"), 3, is_causal=is_causal, chunk=2)
    opcheck(SPEC, padding("..xxx", "xxxxx"), 1, is_causal=is_causal)


def test_export() -> None:
    def of_query(mask: Tensor, query: Tensor) -> Tensor:
        return causal_mask(mask, query.shape[1], window=3, chunk=4)

    def by_reference(mask: Tensor, query: Tensor) -> Tensor:
        result = SPEC.reference(mask, query.shape[1], window=3, chunk=4)
        assert isinstance(result, Tensor)
        return result

    batch = Dim("batch")
    check_export(
        (of_query, by_reference),
        (padding("..xxx", "xxxxx"), torch.ones(2, 3)),
        (padding("....xxxx", "xxxxxxxx", "........"), torch.ones(3, 7)),
        ({0: batch, 1: Dim("total")}, {0: batch, 1: Dim("length")}),
    )


def test_flops() -> None:
    case = make_case()
    assert SPEC.flops(call_node(SPEC, _key_mask(case), 5)) == 0
