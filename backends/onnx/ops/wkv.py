"""``wkv`` in ONNX: a ``Scan`` of the one-token form of its reference."""

from __future__ import annotations

from fxgraft.backends.onnx.call import translates
from fxgraft.backends.onnx.recurrence import recurrent
from fxgraft.kernels.wkv.op import SPEC

translates(SPEC.overload)(recurrent(SPEC))
