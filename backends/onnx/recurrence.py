"""Recurrent ops: the one-token form of the op's reference, run over the tokens by a ``Scan``.

Driven by ``OpSpec``: its fixed states are what the Scan carries, and the arguments and results
that have the number of tokens among their dimensions are what it runs over. A graph of one token
gets the one-token form itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor

from fxgraft import graph as graphs
from fxgraft.backends.onnx.assembler import ONE, Dims
from fxgraft.backends.onnx.builder import Body, Value
from fxgraft.backends.onnx.call import Call, Result, Translate
from fxgraft.kernels.spec import OpSpec, dims, expr

Initial = Callable[[Call, Tensor], Value]


def inline_reference(spec: OpSpec) -> Translate:
    """Translate an op by tracing its reference."""

    def translate(call: Call) -> Result:
        examples = {name: node.meta["val"] for name, node in call.nodes().items()}
        values = {n: call.value(n) for n, fake in examples.items() if isinstance(fake, Tensor)}
        results = call.context.inline(call, spec.reference, examples, values, call.b)
        return results if isinstance(call.result, (tuple, list)) else results[0]

    return translate


def recurrent(spec: OpSpec, initial: Initial | None = None) -> Translate:
    """Translate an op that carries fixed states from token to token.

    Args:
        spec: the op's registration.
        initial: makes the state before the first token, given its fake tensor, where the node is
            given none; zeros by default.
    """

    def translate(call: Call) -> Result:
        time = _time(call, spec)
        if time is None:
            return inline_reference(spec)(call)
        return _Scan(call, spec, time).build(initial or zeros)

    return translate


def zeros(call: Call, state: Tensor) -> Value:
    """A state of zeros."""
    return call.b.full(dims(state), 0, state.dtype)


def _time(call: Call, spec: OpSpec) -> sympy.Expr | None:
    """The number of tokens: the dynamic size that no state has; None if it is fixed."""
    states = [call.result[state.output] for state in spec.states]
    carried = {symbol for state in states for size in dims(state) for symbol in size.free_symbols}
    sizes = {size for n in call.nodes() for size in call.dims(n) if size.free_symbols - carried}
    if len(sizes) > 1:
        raise call.error(f"it runs over several dynamic sizes: {sorted(map(str, sizes))}")
    return next(iter(sizes), None)


@dataclass
class _Scan:
    """One node that runs over ``time`` tokens."""

    call: Call
    spec: OpSpec
    time: sympy.Expr

    def build(self, initial: Initial) -> Sequence[Value]:
        """Build the Scan; returns the op's results in order."""
        call, results = self.call, self.call.result
        order = {state.output: place for place, state in enumerate(self.spec.states)}
        scanned = [name for name in call.nodes() if self.time in call.dims(name)]
        starts = [
            call.optional(state.argument) or initial(call, results[state.output])
            for state in self.spec.states
        ]
        items = [call.value(name) for name in scanned]
        others = [place for place in range(len(results)) if place not in order]
        found = call.b.call_many(
            "Scan",
            *starts,
            *items,
            dtypes=[results[place].dtype for place in (*order, *others)],
            body=self._body(scanned, others),
            num_scan_inputs=len(items),
            scan_input_axes=tuple(call.dims(name).index(self.time) for name in scanned),
            scan_output_axes=tuple(dims(results[place]).index(self.time) for place in others),
        )
        places = dict(zip((*order, *others), found, strict=True))
        return [places[place] for place in range(len(results))]

    def _body(self, scanned: Sequence[str], others: Sequence[int]) -> Body:
        call, results = self.call, self.call.result
        b = call.b.body()
        carried = {s.argument: b.input(results[s.output].dtype) for s in self.spec.states}
        items = {name: b.input(call.fake(name).dtype) for name in scanned}
        examples, values = dict[str, object](), dict[str, Value]()
        for name, node in call.nodes().items():
            examples[name] = node.meta["val"]
            if isinstance(examples[name], Tensor) and name not in items:
                values[name] = call.value(name)
        for name, item in items.items():
            one = self._one_token(call.dims(name))
            examples[name] = self._fake(call.fake(name))
            axis = call.dims(name).index(self.time)
            values[name] = b.unsqueeze(item, [*one[:axis], *one[axis + 1 :]], axis)
        for state in self.spec.states:
            examples[state.argument] = results[state.output]
            values[state.argument] = carried[state.argument]
        outputs = call.context.inline(call, self.spec.reference, examples, values, b)
        after = [outputs[state.output] for state in self.spec.states]
        for place in others:
            axis = dims(results[place]).index(self.time)
            after.append(b.squeeze(outputs[place], self._one_token(dims(results[place])), axis))
        return Body(b, (*carried.values(), *items.values()), b.outputs(after))

    def _one_token(self, sizes: Dims) -> list[sympy.Expr]:
        return [ONE if size == self.time else size for size in sizes]

    def _fake(self, whole: Tensor) -> Tensor:
        """A fake tensor like ``whole`` for one token."""
        shape = [1 if expr(size) == self.time else size for size in whole.shape]
        with graphs.fake_mode(self.call.node.graph):
            return torch.empty(shape, dtype=whole.dtype)
