"""``token_automaton`` in ONNX: a ``Scan`` of its one-token form."""

from __future__ import annotations

from torch import Tensor

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.backends.onnx.recurrence import recurrent
from fxgraft.kernels.spec import dims
from fxgraft.kernels.token_automaton.op import SPEC


def _initial(call: Call, state: Tensor) -> Value:
    return call.b.full(dims(state), call.constant("initial"), state.dtype)


translates(SPEC.overload)(recurrent(SPEC, _initial))
