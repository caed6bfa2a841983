"""``fxgraft::linear_attention``: gated linear attention with N states per head.

For each head, with g[t, n] = exp(log decay) per key channel and S[0, n] the given state or 0::

    S[t, n]   = diag(g[t, n]) S[t-1, n] + (f[t, n] ⊙ k[t])ᵀ v[t]
    output[t] = norm(scale · q[t] Σ_n mixing[n] S[t, n])

The write factor f is 1, or √(1 - g²) where ``write_scale`` is ``"sqrt"``. A token sees its own
write, whatever its own gate. Sources: GLA, arXiv 2312.06635, equation 3; DSLA, arXiv 2506.09316,
section 3.1, of which the two recurrences are independent.

The recurrent form takes one step per token (``reference``), the chunkwise form one per chunk
(``chunkwise``); both give the same. On CUDA, Triton kernels take chunks, see ``triton``.

Args:
    query: [B, S, Hq, Dk], any strides.
    key: [B, S, Hkv, Dk]; Hq is a multiple of Hkv, and consecutive query heads share a key head.
    value: [B, S, Hkv, Dv].
    gate: [B, S, Hs, N, Dk]. Hs is Hkv, or Hq where each query head shall have states of its own;
        Hs and Dk may be 1, which means the same gate for all. What a gate means is said by
        ``temperature``.
    mixing: weight of each state in the output, [N] or [Hq, N]; (γ, 1 - γ) for DSLA.
    norm_weight: weight of a root-mean-square normalisation of each head's output, [Dv] or
        [Hq, Dv]; none if not given.
    key_mask: bool [B, S], one value per new token, False for padding, which writes and forgets
        nothing (its output is the read-out of the state as it is).
    cu_seqlens: integers [R + 1], bounds of R sequences packed in one row (B = 1), of which each
        has a state; not together with ``key_mask``.
    state: [B or R, Hs, N, Dk, Dv]; zeros if not given.
    scale: factor of the query, Dk^-1/2 in all known models.
    temperature: τ, where ``gate`` holds logits: log decay = logsigmoid(gate) / τ. If not given,
        ``gate`` holds the log decay itself (not above 0).
    floor: the log decay is not let below it. At -1 or above, chunks of 64 tokens need no
        splitting.
    write_scale: ``"none"`` or ``"sqrt"``.
    eps: of the normalisation.
    dtype: of the returned state. If not given, float32, or float64 for float64 inputs. A type of
        16 bits is refused unless it is given here.

Returns:
    The output [B, S, Hq, Dv] of the query's dtype, and the state after the last token
    [B or R, Hs, N, Dk, Dv]. The arithmetic inside is in float32 (float64 for float64 inputs).

Raises:
    InputError: shapes do not fit, ``write_scale`` is unknown, or the state has 16 bits unasked.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.kernels.accelerate import has_triton, on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.linear_attention import arguments, chunkwise, cost, reference
from fxgraft.kernels.spec import InPlace, OpSpec, State, argument


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    norm_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    *,
    write_scale: str = "none",
    dtype: torch.dtype | None = None,
    **_: Any,
) -> int:
    """Refuse what does not fit; returns the number of states' rows."""
    arguments.check(query, key, value, gate, mixing, norm_weight, key_mask, cu_seqlens, write_scale)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    arguments.check_state(query, key, value, gate, rows, state, dtype)
    return rows


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    *others: Tensor | None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    rows = _check(query, key, value, gate, mixing, *others, dtype=dtype, **options)
    heads = arguments.state_heads(query, key, gate)
    value_dim = value.shape[3]
    output = query.new_empty((*query.shape[:3], value_dim))
    kept = arguments.state_dtype(query, dtype)
    shape = (rows, heads, gate.shape[3], query.shape[3], value_dim)
    return output, query.new_empty(shape, dtype=kept)


def _implementation(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check(*tensors, **options)
    return chunkwise.linear_attention(*tensors, **options)


def _by_kernels(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from fxgraft.kernels.linear_attention import triton

    _check(*tensors, **options)
    takes = arguments.refusal(*tensors[:3]) is None
    return (triton if takes else chunkwise).linear_attention(*tensors, **options)


def _differentiable(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The form that the backward pass differentiates."""
    # While a backward pass is traced, there is no memory for a kernel to read.
    is_real = type(tensors[0]) is Tensor
    if not (is_real and tensors[0].is_cuda and has_triton()):
        return chunkwise.linear_attention(*tensors, **options)
    from fxgraft.kernels.linear_attention import training, triton

    takes = arguments.refusal(*tensors[:3]) is None and triton.is_bounded(triton.Rules(**options))
    return (training if takes else chunkwise).linear_attention(*tensors, **options)


def _in_place(node: Node, masks: Collection[Node]) -> InPlace | None:
    """The same over slots, unless sequences are packed or a mask hides more than padding."""
    mask = argument(node, "key_mask")
    if argument(node, "cu_seqlens") is not None or not (mask is None or mask in masks):
        return None
    names = (
        "query", "key", "value", "gate", "mixing", "norm_weight",
        "scale", "temperature", "floor", "write_scale", "eps", "dtype",
    )  # fmt: skip
    target = torch.ops.fxgraft.linear_attention_slots.default
    return InPlace(target, {name: argument(node, name) for name in names})


SPEC = define(
    OpSpec(
        name="linear_attention",
        kind="mixer",
        reference=reference.linear_attention,
        flops=cost.flops,
        states=(State("memory", "state", "fixed", output=1),),
        in_place=_in_place,
        refusal=arguments.node_refusal,
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor gate, Tensor mixing, "
    "Tensor? norm_weight=None, Tensor? key_mask=None, Tensor? cu_seqlens=None, "
    "Tensor? state=None, *, float scale, float? temperature=None, float? floor=None, "
    'str write_scale="none", float eps=1e-06, ScalarType? dtype=None) -> (Tensor, Tensor)',
    fake=_fake,
    implementation=_implementation,
    differentiable=_differentiable,
)
on_cuda(SPEC, _by_kernels, _implementation)
