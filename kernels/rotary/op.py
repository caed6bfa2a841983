"""``fxgraft::rotary``: rotate pairs of channels by an angle that depends on the position.

Source: Su et al., arXiv 2104.09864, eq. 34.

Args:
    x: queries or keys [B, H, S, D].
    cos, sin: [B|1, 1, S, R], R <= D and even. The first R channels rotate, the rest pass through.
    interleaved: False pairs channel c with c + R/2 (Llama, GPT-NeoX; cos holds the angles twice,
        one run after the other). True pairs 2c with 2c + 1 (GPT-J, Cohere; cos holds each angle
        twice in a row).

Returns:
    [B, H, S, D] in x's dtype; computed in the wider of x's and cos's.

Raises:
    InputError: R is odd or above D.
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.define import define
from fxgraft.kernels.rotary import cost, reference
from fxgraft.kernels.spec import OpSpec


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    width, head_dim = cos.shape[-1], x.shape[-1]
    if width % 2 or width > head_dim:
        raise InputError(
            f"rotary has angles for {width} of {head_dim} channels",
            "pass cos and sin of an even width, at most that of x",
        )
    return reference.rotary(x, cos, sin, interleaved=interleaved)


SPEC = define(
    OpSpec(
        name="rotary",
        kind="position",
        reference=reference.rotary,
        flops=cost.flops,
    ),
    "(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor",
    _rotary,
    _rotary,
)
