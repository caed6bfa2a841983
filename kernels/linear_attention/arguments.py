"""What both forms of ``linear_attention`` share: arguments checked and brought to one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from fxgraft.errors import InputError
from fxgraft.kernels.spec import argument

WRITE_SCALES = ("none", "sqrt")
WIDEST = 256
"""Largest head of query, key and value that the Triton kernels take."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Options:
    """The keyword arguments of the op that act on single tokens."""

    scale: float
    temperature: float | None
    floor: float | None
    write_scale: str


@dataclass(frozen=True)
class Tokens:
    """Tokens as they enter the recurrence; everything that acts on one token alone is applied.

    Attributes:
        query: [B, S, Hs, G, N, Dk], scaled and weighted by ``mixing``.
        key: [B, S, Hs, N or 1, Dk], what is written.
        value: [B, S, Hs, Dv].
        log_decay: [B, S, Hs, N, Dk].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor

    def cut(self, start: int, stop: int) -> Tokens:
        """The tokens from ``start`` up to ``stop``."""
        parts = (self.query, self.key, self.value, self.log_decay)
        return Tokens(*(part[:, start:stop] for part in parts))


Form = Callable[[Tokens, Tensor], tuple[Tensor, Tensor]]
"""Outputs [B, S, Hq, Dv] and last memory, from tokens and the memory [B, Hs, N, Dk, Dv] before."""


def state_heads(query: Tensor, key: Tensor, gate: Tensor) -> int:
    """Heads that have states of their own: the query's if the gate has so many, else the key's."""
    return query.shape[2] if gate.shape[2] == query.shape[2] else key.shape[2]


def state_dtype(query: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Element type of the state that the op returns."""
    return torch.promote_types(query.dtype, torch.float32) if dtype is None else dtype


def tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    key_mask: Tensor | None,
    options: Options,
) -> Tokens:
    """The tokens of a call, in at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, length, query_heads, key_dim = query.shape
    heads = state_heads(query, key, gate)
    states = gate.shape[3]
    group = query_heads // heads
    decay = log_decay(gate.to(dtype), options.temperature, options.floor)
    decay = decay.expand(batch, length, heads, states, key_dim)
    keys = _per_head(key.to(dtype), heads).unsqueeze(3)
    if options.write_scale == "sqrt":
        keys = keys * write_factor(decay)
    weights = options.scale * mixing.to(dtype).expand(query_heads, states)
    queries = query.to(dtype).reshape(batch, length, heads, group, 1, key_dim)
    queries = queries * weights.reshape(heads, group, states, 1)
    given = Tokens(queries, keys, _per_head(value.to(dtype), heads), decay)
    return given if key_mask is None else _hide(given, key_mask)


def log_decay(gate: Tensor, temperature: float | None, floor: float | None) -> Tensor:
    """Logarithm of the decay: logsigmoid(gate) / temperature, not below the floor."""
    decay = gate if temperature is None else F.logsigmoid(gate) / temperature
    return decay if floor is None else decay.clamp(min=floor)


def write_factor(log_decay: Tensor) -> Tensor:
    """√(1 - g²), by which a write keeps the variance of the state independent of the decay g."""
    left = -torch.expm1(2 * log_decay)
    # the square root has no slope at 0, where a gate never forgets
    return left.clamp(min=torch.finfo(left.dtype).tiny).sqrt()


def _per_head(x: Tensor, heads: int) -> Tensor:
    repeats = heads // x.shape[2]
    return x if repeats == 1 else x.repeat_interleave(repeats, 2)


def _hide(given: Tokens, key_mask: Tensor) -> Tokens:
    """Padding writes nothing and forgets nothing, whatever its key and value hold."""
    hidden = ~key_mask[:, :, None, None]
    return replace(
        given,
        key=given.key.masked_fill(hidden.unsqueeze(-1), 0),
        value=given.value.masked_fill(hidden, 0),
        log_decay=given.log_decay.masked_fill(hidden.unsqueeze(-1), 0),
    )


def initial_state(given: Tokens, cu_seqlens: Tensor | None, state: Tensor | None) -> Tensor:
    """The given state in the arithmetic's dtype, or zeros [B or R, Hs, N, Dk, Dv]."""
    if state is not None:
        return state.to(given.key.dtype)
    rows = given.key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return given.key.new_zeros(rows, *given.log_decay.shape[2:], given.value.shape[-1])


def across_sequences(
    form: Form, given: Tokens, cu_seqlens: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a form to the rows of a batch, or to each of the sequences packed in one row."""
    if cu_seqlens is None:
        return form(given, memory)
    bounds = sequence_bounds(cu_seqlens)
    results: list[tuple[Tensor, Tensor]] = []
    for row, (start, stop) in enumerate(pairwise(bounds)):
        before = memory[row : row + 1]
        if stop > start:
            results.append(form(given.cut(start, stop), before))
        else:
            nothing = given.value.new_empty(1, 0, *_output_shape(given))
            results.append((nothing, before))
    return torch.cat([out for out, _ in results], 1), torch.cat([last for _, last in results])


def sequence_bounds(cu_seqlens: Tensor) -> list[int]:
    """The bounds as numbers; waits for the device."""
    return cast("list[int]", cu_seqlens.tolist())  # pyright: ignore[reportUnknownMemberType]


def _output_shape(given: Tokens) -> tuple[int, int]:
    return given.query.shape[2] * given.query.shape[3], given.value.shape[-1]


def normalize(output: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square normalisation of each head's output, if there is a weight for it."""
    if weight is None:
        return output
    factor = torch.rsqrt(output.pow(2).mean(-1, keepdim=True) + eps)
    return output * factor * weight.to(output.dtype)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    norm_weight: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    write_scale: str,
) -> None:
    """Refuse shapes and options that do not fit.

    Raises:
        InputError: names the argument and the shapes that would fit.
    """
    if write_scale not in WRITE_SCALES:
        raise InputError(
            f"linear_attention's write_scale is {write_scale!r}",
            f"pass one of {', '.join(WRITE_SCALES)}",
        )
    batch, length, query_heads, key_dim = query.shape
    key_heads = key.shape[2]
    if query_heads % key_heads:
        raise InputError(
            f"linear_attention has {query_heads} query heads for {key_heads} key heads",
            "the number of query heads is a multiple of the number of key heads",
        )
    states = gate.shape[3] if gate.dim() == 5 else 1
    rows = (batch, length)
    _fits("key", key, (rows, (key_heads,), (key_dim,)))
    _fits("value", value, (rows, (key_heads,), (value.shape[-1],)))
    _fits("gate", gate, (rows, (1, key_heads, query_heads), (states,), (1, key_dim)))
    _fits("mixing", mixing, ((), (query_heads,), (states,)), optional=1)
    if norm_weight is not None:
        _fits("norm_weight", norm_weight, ((), (query_heads,), (value.shape[-1],)), optional=1)
    _check_rows(key_mask, cu_seqlens, batch, length)


def _check_rows(
    key_mask: Tensor | None, cu_seqlens: Tensor | None, batch: int, length: int
) -> None:
    if key_mask is not None and (
        key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, length)
    ):
        raise InputError(
            f"linear_attention's key_mask is {list(key_mask.shape)} of {key_mask.dtype}",
            f"pass {[batch, length]} of bool, one value per new token, False for padding",
        )
    if cu_seqlens is not None and (batch != 1 or key_mask is not None or cu_seqlens.dim() != 1):
        raise InputError(
            f"linear_attention got cu_seqlens {list(cu_seqlens.shape)} for a batch of {batch}"
            f"{' with a key_mask' if key_mask is not None else ''}",
            "pack the sequences in one row without padding, and pass [R + 1] bounds",
        )


def _fits(
    name: str,
    tensor: Tensor,
    allowed: tuple[tuple[int, ...], ...],
    optional: int = 0,
) -> None:
    """Check the sizes of a tensor; the first entry is those of batch and length, taken whole."""
    rows, *others = allowed
    wanted = [(size,) for size in rows] + others
    shape = tuple(tensor.shape)
    if optional and len(shape) == len(wanted) - optional:
        wanted = wanted[optional:]
    if len(shape) == len(wanted) and all(s in w for s, w in zip(shape, wanted, strict=True)):
        return
    text = ", ".join("|".join(str(s) for s in dict.fromkeys(w)) for w in wanted)
    raise InputError(f"linear_attention's {name} is {list(shape)}", f"pass [{text}]")


def check_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    rows: int,
    state: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    """Refuse a state of another shape, and one of 16 bits that nobody asked for.

    A state that is rounded to 16 bits at every step loses what it remembers: at a half-life of
    4096 tokens the output is 9 % off after 8192 tokens in bfloat16.

    Raises:
        InputError: names what is wrong with the state.
    """
    if state is None:
        return
    heads = state_heads(query, key, gate)
    shape = (rows, heads, gate.shape[3], query.shape[3], value.shape[3])
    if tuple(state.shape) != shape:
        raise InputError(
            f"linear_attention's state is {list(state.shape)}", f"pass {[int(s) for s in shape]}"
        )
    if state.dtype.itemsize < 4 and state.dtype != dtype:
        raise InputError(
            f"linear_attention's state is {state.dtype}: rounded at every step, it forgets",
            f"keep it in float32, or force it with dtype={state.dtype}",
        )


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the Triton kernels do not take these, or None if they do."""
    widest = max(query.shape[-1], value.shape[-1])
    if widest > WIDEST:
        return f"heads of {widest} channels; the kernels take up to {WIDEST}"
    wrong = next((x.dtype for x in (query, key, value) if x.dtype not in _KERNEL_DTYPES), None)
    return None if wrong is None else f"the kernels do not compute in {wrong}"


def node_refusal(node: Node) -> str | None:
    """The same for a node of a graph."""
    return refusal(*(cast(Node, argument(node, n)).meta["val"] for n in ("query", "key", "value")))
