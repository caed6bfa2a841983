"""``head_gate`` in ONNX: its reference, which is comparisons, a sum and a choice."""

from __future__ import annotations

from fxgraft.backends.onnx.call import translates
from fxgraft.backends.onnx.recurrence import inline_reference
from fxgraft.kernels.head_gate.op import SPEC

translates(SPEC.overload)(inline_reference(SPEC))
