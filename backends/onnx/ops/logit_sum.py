"""``logit_sum`` in ONNX: its reference, a cumulative sum and a product at any length."""

from __future__ import annotations

from fxgraft.backends.onnx.call import translates
from fxgraft.backends.onnx.recurrence import inline_reference
from fxgraft.kernels.logit_sum.op import SPEC

translates(SPEC.overload)(inline_reference(SPEC))
