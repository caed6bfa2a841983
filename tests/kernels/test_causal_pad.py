"""``fxgraft::causal_pad`` against plain padding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fxgraft.kernels.causal_pad.op import SPEC
from tests.kernels._helpers import op_of, randn

causal_pad = op_of(SPEC)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_equals_padding(length: int) -> None:
    x = randn(2, 3, length)
    padded, state = causal_pad(x, size=2, dim=2)
    assert torch.equal(padded, F.pad(x, (2, 0)))
    assert torch.equal(state, F.pad(x, (2, 0))[..., -2:])


def test_keeps_integers() -> None:
    ids = torch.arange(6).view(1, 6)
    padded, state = causal_pad(ids, torch.tensor([[7]]), size=1, dim=-1)
    assert padded.tolist() == [[7, 0, 1, 2, 3, 4, 5]]
    assert state.tolist() == [[5]]
