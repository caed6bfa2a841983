"""One or more example calls of every recurrent op, at any length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.nn import functional as F

from fxgraft.kernels import (
    causal_conv1d,
    causal_pad,
    gated_delta_rule,
    linear_attention,
    linear_recurrence,
    mlstm,
    selective_scan,
    ssd,
    wkv,
)
from fxgraft.kernels.spec import OpSpec

Arguments = dict[str, torch.Tensor]
Shape = tuple[int | str, ...]
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
    shapes: Mapping[str, Shape]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def arguments(self, length: int, dtype: torch.dtype = torch.float32) -> Arguments:
        """Random tensor arguments in the ranges that models have."""
        generator = torch.Generator().manual_seed(length)
        arguments: Arguments = {}
        for name, shape in self.shapes.items():
            sizes = [length if size == "S" else int(size) for size in shape]
            value = torch.randn(sizes, generator=generator, dtype=torch.float64)
            arguments[name] = _in_range(self.spec.name, name, value).to(dtype)
        return arguments

    def positional(self, arguments: Arguments) -> tuple[torch.Tensor | None, ...]:
        """The arguments in the schema's order, None for those that are not given."""
        schema = cast(Any, self.spec.overload)._schema
        names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        return tuple(arguments.get(name) for name in names)

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Call the op."""
        return cast(Any, self.spec.overload)(**arguments, **self.options)

    def reference(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Call the reference."""
        return cast(Any, self.spec.reference)(**arguments, **self.options)

    def cut(self, arguments: Arguments, start: int, stop: int) -> Arguments:
        """The arguments for tokens ``start`` to ``stop`` only."""
        return {
            name: value.narrow(self.shapes[name].index("S"), start, stop - start)
            if "S" in self.shapes[name]
            else value
            for name, value in arguments.items()
        }

    def next_state(self, outputs: tuple[torch.Tensor, ...]) -> Arguments:
        """The state arguments for the next call."""
        return {state.argument: outputs[state.output] for state in self.spec.states}

    @property
    def time(self) -> int:
        """The dimension of time in the output, which is that of the first argument."""
        return next(iter(self.shapes.values())).index("S")


def _in_range(op: str, name: str, value: torch.Tensor) -> torch.Tensor:
    if (op, name) in {("selective_scan", "A"), ("ssd", "A"), ("wkv", "decay")}:
        return -value.exp()
    if (op, name) == ("gated_delta_rule", "gate"):
        return -F.softplus(value)
    if (op, name) == ("linear_attention", "gate"):
        return -2 * value.abs()
    if (op, name) == ("gated_delta_rule", "key"):
        return F.normalize(value, dim=-1)
    if name in {"beta", "decay"}:
        return value.sigmoid()
    return value


_CONV: dict[str, Shape] = {"x": (BATCH, 3, "S"), "weight": (3, 4)}
_SCAN: dict[str, Shape] = {
    "x": (BATCH, 3, "S"),
    "dt": (BATCH, 3, "S"),
    "A": (3, 4),
    "B": (BATCH, 4, "S"),
    "C": (BATCH, 4, "S"),
}
_SSD: dict[str, Shape] = {
    "x": (BATCH, "S", 4, 3),
    "dt": (BATCH, "S", 4),
    "A": (4,),
    "B": (BATCH, "S", 2, 5),
    "C": (BATCH, "S", 2, 5),
}
_DELTA: dict[str, Shape] = {
    "query": (BATCH, "S", 2, 3),
    "key": (BATCH, "S", 2, 3),
    "value": (BATCH, "S", 4, 5),
    "gate": (BATCH, "S", 4),
    "beta": (BATCH, "S", 4),
}
_LINEAR: dict[str, Shape] = {
    "query": (BATCH, "S", 4, 3),
    "key": (BATCH, "S", 2, 3),
    "value": (BATCH, "S", 2, 5),
    "gate": (BATCH, "S", 2, 2, 3),
    "mixing": (2,),
}
_MLSTM: dict[str, Shape] = {
    "query": (BATCH, "S", 2, 3),
    "key": (BATCH, "S", 2, 3),
    "value": (BATCH, "S", 2, 5),
    "input_gate": (BATCH, "S", 2),
    "forget_gate": (BATCH, "S", 2),
}
_WKV: dict[str, Shape] = {
    "key": (BATCH, "S", 3),
    "value": (BATCH, "S", 3),
    "decay": (3,),
    "bonus": (3,),
}

CASES = {
    "causal_conv1d": Case(causal_conv1d.SPEC, _CONV),
    "causal_conv1d, all arguments": Case(
        causal_conv1d.SPEC, {**_CONV, "bias": (3,)}, {"activation": "silu"}
    ),
    "causal_conv1d, one tap": Case(causal_conv1d.SPEC, {**_CONV, "weight": (3, 1)}),
    "causal_pad": Case(causal_pad.SPEC, {"x": (BATCH, "S", 3)}, {"size": 2, "dim": 1}),
    "gated_delta_rule": Case(gated_delta_rule.SPEC, _DELTA, {"scale": 0.5}),
    "gated_delta_rule, gate per channel": Case(
        gated_delta_rule.SPEC,
        {**_DELTA, "gate": (BATCH, "S", 4, 3)},
        {"scale": 0.5, "l2norm": True},
    ),
    "linear_attention": Case(linear_attention.SPEC, _LINEAR, {"scale": 0.5}),
    "linear_attention, all arguments": Case(
        linear_attention.SPEC,
        {**_LINEAR, "gate": (BATCH, "S", 4, 3, 1), "mixing": (4, 3), "norm_weight": (4, 5)},
        {
            "scale": 0.5,
            "temperature": 4.0,
            "floor": -1.0,
            "write_scale": "sqrt",
            "eps": 1e-2,
        },
    ),
    "linear_recurrence": Case(
        linear_recurrence.SPEC, {"x": (BATCH, "S", 3), "decay": (BATCH, "S", 3)}
    ),
    "mlstm": Case(mlstm.SPEC, _MLSTM, {"scale": 0.5}),
    "selective_scan": Case(selective_scan.SPEC, _SCAN, {"softplus": True}),
    "selective_scan, all arguments": Case(
        selective_scan.SPEC,
        {**_SCAN, "D": (3,), "z": (BATCH, 3, "S"), "dt_bias": (3,)},
        {"softplus": True},
    ),
    "ssd": Case(ssd.SPEC, _SSD, {"softplus": True}),
    "ssd, all arguments": Case(
        ssd.SPEC,
        {**_SSD, "D": (4,), "dt_bias": (4,), "z": (BATCH, "S", 4, 3)},
        {"softplus": True, "dt_min": 0.1, "dt_max": 1.5},
    ),
    "ssd, skip per channel": Case(ssd.SPEC, {**_SSD, "D": (4, 3)}, {"softplus": True}),
    "wkv": Case(wkv.SPEC, _WKV),
}
