"""``causal_mask`` in ONNX: comparisons of positions."""

from __future__ import annotations

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.backends.onnx.ops.visibility import visible_keys
from fxgraft.kernels.causal_mask.op import SPEC


@translates(SPEC.overload)
def causal_mask(c: Call) -> Value:
    """The keep-mask that ``attention`` applies, bool [B, 1, S, T]."""
    length, total = c.out_dims[2:]
    mask_dims = c.dims("key_mask")
    visible = visible_keys(c, length, total, c.value("key_mask"), mask_dims)
    assert visible is not None
    return c.b.call("Expand", visible, c.b.vector(c.out_dims))
