"""Plain PyTorch form of ``mlstm``: one step per token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

Cell = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Memory [B, H, Dk, Dv], normalizer [B, H, Dk], stabilizer [B, H]."""


def mlstm(
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
    """Run the mLSTM cell (arXiv 2405.04517, equations 19 to 27, stabilised as in appendix A.3).

    With ``f = logsigmoid(forget_gate[t])``, ``i = input_gate[t]``, ``m[t] = max(f + m[t-1], i)``:
    ``C[t] = e^{f+m[t-1]-m[t]} C[t-1] + e^{i-m[t]} k vᵀ``, n the same with 1 for v, and
    ``output[t] = scale C[t]ᵀ q / (max(|scale n[t]·q|, e^{-m[t]}) + epsilon)``.

    Args:
        query: [B, S, H, Dk].
        key: [B, S, H, Dk].
        value: [B, S, H, Dv].
        input_gate: before the exponential, [B, S, H].
        forget_gate: before the sigmoid, [B, S, H].
        memory: C, [B, H, Dk, Dv]; zeros if not given.
        normalizer: n, [B, H, Dk]; zeros if not given.
        stabilizer: m, [B, H]; zeros if not given.
        scale: factor of the query.
        epsilon: added to the denominator.

    Returns:
        The output [B, S, H, Dv] of ``query``'s dtype, and memory, normalizer and stabilizer after
        the last token, which are float32, or float64 for float64 inputs, like the arithmetic
        inside.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    cell = initial_cell(query, value, (memory, normalizer, stabilizer), dtype)
    queries, keys, values, inputs = (v.to(dtype) for v in (query, key, value, input_gate))
    forgets = F.logsigmoid(forget_gate.to(dtype))
    outputs: list[torch.Tensor] = []
    for t in range(query.shape[1]):
        cell = _update(keys[:, t], values[:, t], inputs[:, t], forgets[:, t], cell)
        outputs.append(_read(scale * queries[:, t], cell, epsilon))
    return torch.stack(outputs, 1).to(query.dtype), *cell


def _update(
    key: torch.Tensor, value: torch.Tensor, write: torch.Tensor, forget: torch.Tensor, cell: Cell
) -> Cell:
    """The cell after one token: ``key`` [B, H, Dk], ``value`` [B, H, Dv], gates [B, H]."""
    memory, normalizer, previous = cell
    stabilizer = torch.maximum(forget + previous, write)
    kept = torch.exp(forget + previous - stabilizer)
    written = torch.exp(write - stabilizer)[..., None] * key
    memory = kept[..., None, None] * memory + written[..., None] * value[..., None, :]
    return memory, kept[..., None] * normalizer + written, stabilizer


def _read(query: torch.Tensor, cell: Cell, epsilon: float) -> torch.Tensor:
    memory, normalizer, stabilizer = cell
    answer = (query[..., None, :] @ memory).squeeze(-2)
    weight = (query * normalizer).sum(-1).abs()
    return answer / (torch.maximum(weight, torch.exp(-stabilizer)) + epsilon)[..., None]


def initial_cell(
    query: torch.Tensor,
    value: torch.Tensor,
    given: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    dtype: torch.dtype,
) -> Cell:
    """The given parts of the cell, zeros for those that are not."""
    batch, _, heads, key_dim = query.shape
    memory, normalizer, stabilizer = (
        query.new_zeros(batch, heads, *shape, dtype=dtype) if part is None else part.to(dtype)
        for part, shape in zip(given, ((key_dim, value.shape[3]), (key_dim,), ()), strict=True)
    )
    return memory, normalizer, stabilizer
