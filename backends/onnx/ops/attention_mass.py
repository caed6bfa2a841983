"""``attention_mass`` in ONNX: its reference, the softmax of all logits."""

from __future__ import annotations

from fxgraft.backends.onnx.call import translates
from fxgraft.backends.onnx.recurrence import inline_reference
from fxgraft.kernels.attention_mass.op import SPEC

translates(SPEC.overload)(inline_reference(SPEC))
