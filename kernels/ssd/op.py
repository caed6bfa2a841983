"""Definition of ``fxgraft::ssd``."""

from __future__ import annotations

import torch

from fxgraft.kernels.define import define
from fxgraft.kernels.segments import segment_sums
from fxgraft.kernels.spec import OpSpec, State
from fxgraft.kernels.ssd.cost import flops
from fxgraft.kernels.ssd.reference import (
    expand_groups,
    initial_state,
    skip_and_gate,
    ssd,
    step,
    time_steps,
)

CHUNK = 64


def _fake(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    hidden = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=dtype)
    return x.new_empty(x.shape), hidden


def _implementation(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = time_steps(dt, dt_bias, softplus, dt_min, dt_max, dtype)
    hidden = initial_state(x, B, state, dtype)
    values, rate, Bs, Cs = (v.to(dtype) for v in (x, A, B, C))
    if x.shape[1] == 1:
        Bs, Cs = (expand_groups(v, x.shape[2])[:, 0] for v in (Bs, Cs))
        output, hidden = step(values[:, 0], steps[:, 0], rate, Bs, Cs, hidden)
        return skip_and_gate(output.unsqueeze(1), x, D, z), hidden
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[1], CHUNK):
        t = slice(start, start + CHUNK)
        inputs = steps[:, t].unsqueeze(-1) * values[:, t]
        output[:, t], hidden = _chunk(inputs, steps[:, t] * rate, Bs[:, t], Cs[:, t], hidden)
    return skip_and_gate(output, x, D, z), hidden


def _chunk(
    inputs: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens at once: attention inside the chunk, the state for all before it.

    The block decomposition of arXiv 2405.21060, section 6, one block row at a time. ``inputs``
    [B, T, H, P] and ``log_decay`` [B, T, H] have the time steps multiplied in.
    """
    heads = inputs.shape[2]
    log_decay = log_decay.transpose(1, 2)
    from_start = log_decay.cumsum(2).exp()[..., None]  # [B, H, T, 1]
    between = segment_sums(log_decay).exp()  # [B, H, T, T]
    scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # [B, G, T, T]
    scores = scores.repeat_interleave(heads // B.shape[2], 1) * between
    values = inputs.transpose(1, 2)
    writes, reads = (expand_groups(v, heads).transpose(1, 2) for v in (B, C))  # [B, H, T, N]
    output = scores @ values + (from_start * reads) @ hidden.transpose(2, 3)
    added = values.transpose(2, 3) @ (between[:, :, -1, :, None] * writes)
    hidden = from_start[:, :, -1, :, None] * hidden + added
    return output.transpose(1, 2), hidden


SPEC = define(
    OpSpec(
        name="ssd",
        kind="mixer",
        reference=ssd,
        flops=flops,
        states=(State("ssm", "state", "fixed", output=1),),
    ),
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? dt_bias=None, "
    "Tensor? z=None, Tensor? state=None, *, bool softplus=False, float dt_min=0.0, "
    "float? dt_max=None) -> (Tensor, Tensor)",
    fake=_fake,
    implementation=_implementation,
)
