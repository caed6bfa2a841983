"""``steer`` in ONNX: its reference, which is a few primitives at any length."""

from __future__ import annotations

from fxgraft.backends.onnx.call import translates
from fxgraft.backends.onnx.recurrence import inline_reference
from fxgraft.kernels.steer.op import SPEC

translates(SPEC.overload)(inline_reference(SPEC))
