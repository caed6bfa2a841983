"""Laws that every recurrent op obeys, each checked on each op.

The reference in float64 is the oracle; each op's own file checks the reference against a closed
form that has no recurrence in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxgraft.kernels import (
    causal_conv1d,
    causal_pad,
    gated_delta_rule,
    linear_recurrence,
    mlstm,
    selective_scan,
    ssd,
    wkv,
)
from fxgraft.kernels.spec import OpSpec

Arguments = dict[str, torch.Tensor]
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One op with one choice of options.

    Attributes:
        spec: the op.
        shapes: shape of each tensor argument, with ``"S"`` for the sequence dimension.
        options: keyword-only arguments.
    """

    spec: OpSpec
    shapes: Mapping[str, tuple[int | str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def arguments(self, length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Arguments:
        """Random tensor arguments in the ranges that models have."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {
            name: [length if size == "S" else int(size) for size in shape]
            for name, shape in self.shapes.items()
        }
        return {
            name: _in_range(
                self.spec.name, name, torch.randn(size, generator=generator, dtype=torch.float64)
            ).to(dtype)
            for name, size in sizes.items()
        }

    def call(self, function: Callable[..., Any], arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Call the op or its reference."""
        return function(**arguments, **self.options)

    def cut(self, arguments: Arguments, start: int, stop: int) -> Arguments:
        """The arguments for tokens ``start`` to ``stop`` only."""
        return {
            name: value.narrow(self.shapes[name].index("S"), start, stop - start)
            if "S" in self.shapes[name]
            else value
            for name, value in arguments.items()
        }

    @property
    def output_time(self) -> int:
        """The dimension of time in the output, which is that of the first argument."""
        return next(iter(self.shapes.values())).index("S")


def _in_range(op: str, name: str, value: torch.Tensor) -> torch.Tensor:
    if (op, name) in {("selective_scan", "A"), ("ssd", "A"), ("wkv", "decay")}:
        return -value.exp()
    if (op, name) == ("gated_delta_rule", "gate"):
        return -F.softplus(value)
    if name in {"beta", "decay"}:
        return value.sigmoid()
    if (op, name) == ("gated_delta_rule", "key"):
        return F.normalize(value, dim=-1)
    return value


_SCAN: dict[str, tuple[int | str, ...]] = {
    "x": (BATCH, 3, "S"),
    "dt": (BATCH, 3, "S"),
    "A": (3, 4),
    "B": (BATCH, 4, "S"),
    "C": (BATCH, 4, "S"),
}
_SCAN_ALL = {**_SCAN, "D": (3,), "z": (BATCH, 3, "S"), "dt_bias": (3,)}
_SSD: dict[str, tuple[int | str, ...]] = {
    "x": (BATCH, "S", 4, 3),
    "dt": (BATCH, "S", 4),
    "A": (4,),
    "B": (BATCH, "S", 2, 5),
    "C": (BATCH, "S", 2, 5),
}
_SSD_ALL = {**_SSD, "D": (4,), "dt_bias": (4,), "z": (BATCH, "S", 4, 3)}
_DELTA: dict[str, tuple[int | str, ...]] = {
    "query": (BATCH, "S", 2, 3),
    "key": (BATCH, "S", 2, 3),
    "value": (BATCH, "S", 4, 5),
    "gate": (BATCH, "S", 4),
    "beta": (BATCH, "S", 4),
}
_MLSTM: dict[str, tuple[int | str, ...]] = {
    "query": (BATCH, "S", 2, 3),
    "key": (BATCH, "S", 2, 3),
    "value": (BATCH, "S", 2, 5),
    "input_gate": (BATCH, "S", 2),
    "forget_gate": (BATCH, "S", 2),
}
_CONV: dict[str, tuple[int | str, ...]] = {"x": (BATCH, 3, "S"), "weight": (3, 4)}

CASES = {
    "selective_scan": Case(selective_scan.SPEC, _SCAN, {"softplus": True}),
    "selective_scan, all arguments": Case(selective_scan.SPEC, _SCAN_ALL, {"softplus": True}),
    "ssd": Case(ssd.SPEC, _SSD, {"softplus": True}),
    "ssd, all arguments": Case(
        ssd.SPEC, _SSD_ALL, {"softplus": True, "dt_min": 0.1, "dt_max": 1.5}
    ),
    "ssd, skip per channel": Case(ssd.SPEC, {**_SSD, "D": (4, 3)}, {"softplus": True}),
    "causal_conv1d": Case(causal_conv1d.SPEC, _CONV),
    "causal_conv1d, all arguments": Case(
        causal_conv1d.SPEC, {**_CONV, "bias": (3,)}, {"activation": "silu"}
    ),
    "causal_conv1d, one tap": Case(causal_conv1d.SPEC, {**_CONV, "weight": (3, 1)}),
    "gated_delta_rule": Case(gated_delta_rule.SPEC, _DELTA, {"scale": 0.5}),
    "gated_delta_rule, gate per channel": Case(
        gated_delta_rule.SPEC,
        {**_DELTA, "gate": (BATCH, "S", 4, 3)},
        {"scale": 0.5, "l2norm": True},
    ),
    "wkv": Case(
        wkv.SPEC,
        {"key": (BATCH, "S", 3), "value": (BATCH, "S", 3), "decay": (3,), "bonus": (3,)},
    ),
    "linear_recurrence": Case(
        linear_recurrence.SPEC, {"x": (BATCH, "S", 3), "decay": (BATCH, "S", 3)}
    ),
    "mlstm": Case(mlstm.SPEC, _MLSTM, {"scale": 0.5}),
    "causal_pad": Case(causal_pad.SPEC, {"x": (BATCH, "S", 3)}, {"size": 2, "dim": 1}),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_opcheck(case: Case) -> None:
    # one length below and one above the chunk: the two paths of the implementations
    for length in (1, 5):
        arguments = {k: v.requires_grad_() for k, v in case.arguments(length).items()}
        torch.library.opcheck(case.spec.overload, (), {**arguments, **case.options})


@every_case
def test_equals_float64_reference_at_odd_lengths(case: Case) -> None:
    for length in (1, 2, 7, 63, 64, 65, 131):
        arguments = case.arguments(length, seed=length)
        doubles = {name: value.double() for name, value in arguments.items()}
        outputs = case.call(case.spec.overload, arguments)
        expected = case.call(case.spec.reference, doubles)
        for output, oracle in zip(outputs, expected, strict=True):
            assert output.dtype == torch.float32
            torch.testing.assert_close(output.double(), oracle, rtol=2e-4, atol=2e-4)


@every_case
def test_split_anywhere_equals_whole(case: Case) -> None:
    length = 70
    arguments = case.arguments(length, torch.float64)
    whole, *final_states = case.call(case.spec.overload, arguments)
    for cut in (1, 2, 63, 64, 69):
        head, *states = case.call(case.spec.overload, case.cut(arguments, 0, cut))
        carried = {
            state.argument: states[state.output - 1] for state in case.spec.states
        }
        tail, *last = case.call(
            case.spec.overload, {**case.cut(arguments, cut, length), **carried}
        )
        if case.spec is causal_pad.SPEC:
            tail = tail.narrow(1, case.options["size"], length - cut)
        joined = torch.cat([head, tail], case.output_time)
        torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(last, final_states, rtol=1e-9, atol=1e-9)


@every_case
def test_zero_state_is_no_state(case: Case) -> None:
    arguments = case.arguments(6)
    expected = case.call(case.spec.overload, arguments)
    zeros = {
        state.argument: torch.zeros_like(expected[state.output]) for state in case.spec.states
    }
    for actual, oracle in zip(
        case.call(case.spec.overload, {**arguments, **zeros}), expected, strict=True
    ):
        assert torch.equal(actual, oracle)


@every_case
def test_gradients(case: Case) -> None:
    # through the output and the next state; the given state is differentiable too
    arguments = case.arguments(3, torch.float64)
    outputs = case.call(case.spec.overload, arguments)
    for state in case.spec.states:
        arguments[state.argument] = torch.rand_like(outputs[state.output]) + 0.1
    names = list(arguments)
    inputs = [arguments[name].requires_grad_() for name in names]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return case.call(case.spec.overload, dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@every_case
def test_bfloat16_keeps_dtype_and_float32_state(case: Case) -> None:
    arguments = case.arguments(9, torch.bfloat16)
    output, *states = case.call(case.spec.overload, arguments)
    oracle, *_ = case.call(
        case.spec.reference, {name: value.double() for name, value in arguments.items()}
    )
    assert output.dtype == torch.bfloat16
    keeps_inputs = case.spec in (causal_conv1d.SPEC, causal_pad.SPEC)
    assert {state.dtype for state in states} == {
        torch.bfloat16 if keeps_inputs else torch.float32
    }
    torch.testing.assert_close(output.double(), oracle, rtol=0.02, atol=0.05)


@every_case
def test_flops_are_linear_in_batch_and_length(case: Case) -> None:
    graph = torch.fx.Graph()
    arguments: dict[str, Any] = {}
    for name, value in case.arguments(7).items():
        arguments[name] = graph.placeholder(name)
        arguments[name].meta["val"] = value
    node = graph.call_function(case.spec.overload, kwargs={**arguments, **case.options})
    flops = case.spec.flops(node)
    assert math.isfinite(flops)
    assert flops == 0 if case.spec is causal_pad.SPEC else flops > 0
    assert int(flops) % (BATCH * 7) == 0
