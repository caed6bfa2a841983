"""Definition of ``fxgraft::selective_scan``."""

from __future__ import annotations

import torch

from fxgraft.kernels.define import define
from fxgraft.kernels.selective_scan.cost import flops
from fxgraft.kernels.selective_scan.reference import (
    initial_state,
    selective_scan,
    skip_and_gate,
    time_steps,
)
from fxgraft.kernels.spec import OpSpec, State

CHUNK = 16  # the states of all its tokens, [CHUNK, B, D, N], should fit in the cache


def _fake(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *A.shape, dtype=dtype)


def _implementation(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = time_steps(dt, dt_bias, softplus, dtype)
    dts, inputs, Bs, Cs = (v.to(dtype).permute(2, 0, 1) for v in (steps, steps * x, B, C))
    hidden = initial_state(x, A, state, dtype)
    output = x.new_empty(x.shape[2], *x.shape[:2], dtype=dtype)
    for start in range(0, x.shape[2], CHUNK):
        chunk = slice(start, start + CHUNK)
        states = _chunk_states(dts[chunk], inputs[chunk], Bs[chunk], A.to(dtype), hidden)
        output[chunk] = torch.einsum("tbdn,tbn->tbd", states, Cs[chunk])
        hidden = states[-1]
    y = skip_and_gate(output.permute(1, 2, 0), x, D, z)
    return y.contiguous(), hidden.clone()


def _chunk_states(
    steps: torch.Tensor,
    inputs: torch.Tensor,
    B: torch.Tensor,
    A: torch.Tensor,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """The states after each of T tokens: [T, B, D, N]."""
    decay = torch.exp(steps.unsqueeze(-1) * A)
    states = inputs.unsqueeze(-1) * B.unsqueeze(2)
    for t in range(states.shape[0]):
        hidden = states[t].addcmul_(decay[t], hidden)
    return states


SPEC = define(
    OpSpec(
        name="selective_scan",
        kind="mixer",
        reference=selective_scan,
        flops=flops,
        states=(State("ssm", "state", "fixed", output=1),),
    ),
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
    "Tensor? dt_bias=None, Tensor? state=None, *, bool softplus=False) -> (Tensor, Tensor)",
    fake=_fake,
    implementation=_implementation,
)
