"""Fake inputs with named symbolic dimensions, for graphs that are built rather than captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxgraft.program import Input, Range

# Pairwise different and larger than 1, so that a dimension is taken neither for a constant nor
# for another dimension.
_FIRST_HINT = 5


def fake_inputs(
    inputs: Sequence[Input], dimensions: Mapping[str, Range], device: torch.device | str = "cpu"
) -> list[torch.Tensor]:
    """Fake tensors for ``inputs`` in which equal dimension names share one symbol.

    Args:
        inputs: shapes and dtypes.
        dimensions: every name that occurs in a shape.
        device: of the fake tensors.
    """
    hints = {name: _FIRST_HINT + 2 * index for index, name in enumerate(dimensions)}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    return [_fake(spec, hints, mode, device) for spec in inputs]


def _fake(
    spec: Input, hints: Mapping[str, int], mode: FakeTensorMode, device: torch.device | str
) -> torch.Tensor:
    sizes = [hints[size] if isinstance(size, str) else size for size in spec.shape]
    dynamic = [
        DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC for size in spec.shape
    ]
    context = StatelessSymbolicContext(
        dynamic_sizes=dynamic,
        constraint_sizes=[None] * len(sizes),
    )
    value = mode.from_tensor(torch.empty(sizes, dtype=spec.dtype), symbolic_context=context)
    return value.to(device) if torch.device(device).type != "cpu" else value
