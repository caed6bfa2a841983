"""Decoding with a deferred write: states are written back once every R tokens, exactly.

A slot keeps its state of some tokens ago, the checkpoint, and a ring of what the m < R tokens since
then wrote. An output is the chunk formula for one row: the decayed checkpoint, and attention over
the ring. So a step reads the state but does not write it, except for the step that fills the ring
(DSLA specification, section 6; known for other recurrences as ReplaySSM). Forgetting the last
tokens, as speculative decoding does, is to call with a smaller ``past``, as long as the ring still
holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import has_triton
from fxgraft.kernels.linear_attention.arguments import Options, refusal, tokens


@dataclass(frozen=True)
class Ring:
    """What the tokens since the checkpoint wrote, for each slot of a pool; W = N · Dk.

    Attributes:
        keys: [slots, Hs, R, W], with their write factors.
        sums: [slots, Hs, R, W], log decays since the checkpoint, up to each token.
        values: [slots, Hs, R, Dv].
        origin: int32 [slots], tokens behind which the slot's state was last written by others,
            such as by a prompt.
    """

    keys: Tensor
    sums: Tensor
    values: Tensor
    origin: Tensor

    @staticmethod
    def empty(pool: Tensor, size: int) -> Ring:
        """A ring of ``size`` tokens for each slot of a pool [slots, Hs, N, Dk, Dv].

        Raises:
            InputError: the size is below 1.
        """
        if size < 1:
            raise InputError(f"a ring holds {size} tokens", "let it hold at least 1")
        slots, heads, states, key_dim, value_dim = pool.shape
        wide = pool.new_zeros(2, slots, heads, size, states * key_dim, dtype=torch.float32)
        values = pool.new_zeros(slots, heads, size, value_dim, dtype=torch.float32)
        return Ring(wide[0], wide[1], values, pool.new_zeros(slots, dtype=torch.int32))

    @property
    def size(self) -> int:
        """Tokens between two writes of the state."""
        return self.keys.shape[2]


def deferred_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    memory_cache: Tensor,
    ring: Ring,
    slots: Tensor,
    past: Tensor,
    **options: Any,
) -> Tensor:
    """One token per row; equal to ``linear_attention_slots`` at every step.

    Args:
        query, key, value, gate, mixing: of the op, S = 1.
        memory_cache: checkpoints [slots, Hs, N, Dk, Dv], changed every R steps.
        ring: changed in place.
        slots, past: of ``linear_attention_slots``; ``past`` is not below the slot's origin.
        options: ``scale``, ``temperature``, ``floor`` and ``write_scale`` of the op.

    Returns:
        [B, 1, Hq, Dv] in the query's dtype.

    Raises:
        InputError: there is more than one token per row.
    """
    if query.shape[1] != 1:
        raise InputError(
            f"a deferred step got {query.shape[1]} tokens per row",
            "write prompts with linear_attention_slots, and set the ring's origin",
        )
    arguments: tuple[Any, ...] = (
        query, key, value, gate, mixing, memory_cache, ring, slots, past,
    )  # fmt: skip
    if query.is_cuda and has_triton() and refusal(query, key, value) is None:
        from fxgraft.kernels.linear_attention import triton

        return triton.deferred_step(*arguments, **options)
    return reference(*arguments, **options)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    memory_cache: Tensor,
    ring: Ring,
    slots: Tensor,
    past: Tensor,
    *,
    scale: float,
    temperature: float | None = None,
    floor: float | None = None,
    write_scale: str = "none",
) -> Tensor:
    """``deferred_step`` in plain PyTorch, row by row."""
    given = tokens(
        query, key, value, gate, mixing, None, Options(scale, temperature, floor, write_scale)
    )
    keys = given.key.expand(given.log_decay.shape).flatten(3)
    output = value.new_zeros(*query.shape[:3], value.shape[3], dtype=keys.dtype)
    for row in range(query.shape[0]):
        slot, seen = int(slots[row]), int(past[row])
        if slot < 0 or seen < 0:
            continue
        token = given.query[row, 0].flatten(2), keys[row, 0], given.value[row, 0]
        decay = given.log_decay[row, 0].flatten(1)
        found = _step(token, decay, memory_cache[slot], ring, slot, seen)
        output[row, 0] = found.flatten(0, 1)
    return output.to(query.dtype)


def _step(
    token: tuple[Tensor, Tensor, Tensor],
    decay: Tensor,
    checkpoint: Tensor,
    ring: Ring,
    slot: int,
    seen: int,
) -> Tensor:
    """Outputs [Hs, G, Dv] of one row: query [Hs, G, W], key and decay [Hs, W], value [Hs, Dv]."""
    query, key, value = token
    held = (seen - int(ring.origin[slot])) % ring.size
    before = ring.sums[slot, :, held - 1] if held else torch.zeros_like(decay)
    for kept, new in ((ring.keys, key), (ring.sums, before + decay), (ring.values, value)):
        kept[slot, :, held] = new
    keys, sums, values = (
        x[slot, :, : held + 1].to(key.dtype) for x in (ring.keys, ring.sums, ring.values)
    )
    last = sums[:, -1:]
    grown = keys * (last - sums).exp()
    memory = checkpoint.flatten(1, 2).to(key.dtype)
    if seen == held:  # nothing was before the ring
        memory = torch.zeros_like(memory)
    output = (query * last.exp()) @ memory + (query @ grown.transpose(1, 2)) @ values
    if held + 1 == ring.size:
        written = last.exp().transpose(1, 2) * memory + grown.transpose(1, 2) @ values
        checkpoint.copy_(written.view(checkpoint.shape))
    return output
