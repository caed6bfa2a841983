"""Definition of ``fxgraft::mlstm``."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fxgraft.kernels.define import define
from fxgraft.kernels.mlstm.cost import flops
from fxgraft.kernels.mlstm.reference import Cell, initial_cell, mlstm
from fxgraft.kernels.segments import segment_sums
from fxgraft.kernels.spec import OpSpec, State

CHUNK = 64


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    memory: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
    stabilizer: torch.Tensor | None = None,
    *,
    scale: float,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, heads, key_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(value.shape),
        query.new_empty(batch, heads, key_dim, value.shape[3], dtype=dtype),
        query.new_empty(batch, heads, key_dim, dtype=dtype),
        query.new_empty(batch, heads, dtype=dtype),
    )


def _implementation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    memory: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
    stabilizer: torch.Tensor | None = None,
    *,
    scale: float,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    cell = initial_cell(query, value, (memory, normalizer, stabilizer), dtype)
    forget = F.logsigmoid(forget_gate.to(dtype))
    # [B, S, H, ...] to [B, H, S, ...], one matrix product per head
    per_token = [v.to(dtype).transpose(1, 2) for v in (query, key, value, input_gate, forget)]
    output = value.new_empty(value.shape, dtype=dtype)
    for start in range(0, query.shape[1], CHUNK):
        q, k, v, write, kept = (x[:, :, start : start + CHUNK] for x in per_token)
        chunk_output, cell = _chunk(scale * q, k, v, write, kept, cell, epsilon)
        output[:, start : start + CHUNK] = chunk_output.transpose(1, 2)
    memory, normalizer, stabilizer = cell
    return output.to(query.dtype), memory, normalizer, stabilizer


def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write: torch.Tensor,
    forget: torch.Tensor,
    cell: Cell,
    epsilon: float,
) -> tuple[torch.Tensor, Cell]:
    """T tokens at once, each argument [B, H, T, ...]: attention inside, the cell for all before."""
    memory, normalizer, previous = cell
    from_start = forget.cumsum(2) + previous.unsqueeze(-1)
    between = segment_sums(forget) + write.unsqueeze(-2)  # log weight of token s at token t
    stabilizer = torch.maximum(from_start, between.amax(-1))  # [B, H, T]
    weights = torch.exp(between - stabilizer.unsqueeze(-1))
    kept = torch.exp(from_start - stabilizer).unsqueeze(-1)
    scores = weights * (query @ key.transpose(2, 3))
    answer = kept * (query @ memory) + scores @ value
    weight = kept * (query @ normalizer.unsqueeze(-1)) + scores.sum(-1, keepdim=True)
    bound = torch.exp(-stabilizer).unsqueeze(-1)
    output = answer / (torch.maximum(weight.abs(), bound) + epsilon)
    written = weights[:, :, -1].unsqueeze(-1) * key
    memory = kept[:, :, -1:] * memory + written.transpose(2, 3) @ value
    normalizer = kept[:, :, -1] * normalizer + written.sum(2)
    return output, (memory, normalizer, stabilizer[:, :, -1].contiguous())


SPEC = define(
    OpSpec(
        name="mlstm",
        kind="mixer",
        reference=mlstm,
        flops=flops,
        states=(
            State("memory", "memory", "fixed", output=1),
            State("normalizer", "normalizer", "fixed", output=2),
            State("stabilizer", "stabilizer", "fixed", output=3),
        ),
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor input_gate, Tensor forget_gate, "
    "Tensor? memory=None, Tensor? normalizer=None, Tensor? stabilizer=None, *, float scale, "
    "float epsilon=1e-06) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    implementation=_implementation,
)
