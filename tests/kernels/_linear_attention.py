"""Calls of ``linear_attention`` of any size, and an oracle that shares no code with the op."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxgraft.kernels.linear_attention.deferred import Ring
from tests.kernels._helpers import randn


@dataclass(frozen=True)
class Call:
    """One call: sizes and options.

    Attributes:
        state_heads: heads of the gate: key heads (0), query heads, or 1.
        gate_dim: channels of the gate: those of the key (0), or 1.
        spread: standard deviation of the gate logits.
    """

    batch: int = 1
    length: int = 5
    kv_heads: int = 2
    group: int = 1
    states: int = 2
    head_dim: int = 32
    value_dim: int = 0
    state_heads: int = 0
    gate_dim: int = 0
    spread: float = 3.0
    with_norm: bool = False
    with_state: bool = False
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments: DSLA's, but for what ``options`` says."""
        defaults = {"scale": self.head_dim**-0.5, "temperature": 16.0, "floor": -1.0}
        return defaults | self.options

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """Random arguments by name."""
        heads, value_dim = self.kv_heads * self.group, self.value_dim or self.head_dim
        rows = self.batch, self.length
        gates = self.state_heads or self.kv_heads, self.states, self.gate_dim or self.head_dim
        found = {
            "query": randn(*rows, heads, self.head_dim, dtype=dtype, seed=seed),
            "key": randn(*rows, self.kv_heads, self.head_dim, dtype=dtype, seed=seed + 1),
            "value": randn(*rows, self.kv_heads, value_dim, dtype=dtype, seed=seed + 2),
            "gate": (self.spread * randn(*rows, *gates, seed=seed + 3)).to(dtype),
            "mixing": randn(self.states, seed=seed + 4).softmax(-1).to(dtype),
        }
        if self.with_norm:
            found["norm_weight"] = 1 + randn(heads, value_dim, dtype=dtype, seed=seed + 5)
        if self.with_state:
            kept = heads if self.state_heads == heads else self.kv_heads
            shape = (self.batch, kept, self.states, self.head_dim, value_dim)
            wide = torch.promote_types(dtype, torch.float32)
            found["state"] = randn(*shape, dtype=wide, seed=seed + 6)
        return found

    def longer(self, length: int) -> Call:
        """The same call of another length."""
        return replace(self, length=length)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    norm_weight: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float,
    temperature: float = 1.0,
    floor: float | None = None,
    write_scale: str = "none",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formulas of the op read literally: one head, state and token after the other."""
    batch, length, heads, key_dim = query.shape
    states, value_dim = gate.shape[3], value.shape[3]
    kept = heads if gate.shape[2] == heads else key.shape[2]
    decay = torch.log(torch.sigmoid(gate)) / temperature
    decay = decay if floor is None else torch.maximum(decay, torch.tensor(floor).to(decay))
    g = decay.exp().expand(batch, length, kept, states, key_dim)
    last = query.new_zeros(batch, kept, states, key_dim, value_dim) if state is None else state
    memory = [[[last[b, h, n] for n in range(states)] for h in range(kept)] for b in range(batch)]
    rows: list[Tensor] = []
    for b in range(batch):
        for t in range(length):
            for h in range(kept):
                k, v = (x[b, t, h * key.shape[2] // kept] for x in (key, value))
                for n in range(states):
                    gated = g[b, t, h, n]
                    write = k * (1 - gated**2).sqrt() if write_scale == "sqrt" else k
                    memory[b][h][n] = gated[:, None] * memory[b][h][n] + torch.outer(write, v)
            for j in range(heads):
                read = torch.stack([
                    w * (query[b, t, j] @ memory[b][j * kept // heads][n])
                    for n, w in enumerate(mixing)
                ]).sum(0)  # fmt: skip
                read = scale * read
                if norm_weight is not None:
                    read = read / (read.pow(2).mean() + eps).sqrt() * norm_weight[j]
                rows.append(read)
    output = torch.stack(rows).view(batch, length, heads, value_dim)
    after = torch.stack([torch.stack([torch.stack(of) for of in row]) for row in memory])
    return output, after


def error(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


DEFERRED = Call(
    batch=4, group=2, head_dim=8, value_dim=20, length=1, options={"write_scale": "sqrt"}
)
_SLOTS, _PAST = (5, 2, -1, 3), (7, 0, 4, -1)


def _deferred(size: int, device: torch.device | str) -> tuple[Tensor, Tensor, Ring, Tensor]:
    """Slots, and a pool with an empty ring; the first row has a prompt of 7 tokens."""
    pool = randn(6, 2, 2, 8, 20, dtype=torch.float32).to(device)
    ring = Ring.empty(pool, size)
    ring.origin[5] = 7
    past = torch.tensor(_PAST, dtype=torch.int32, device=device)
    return torch.tensor(_SLOTS, device=device), pool, ring, past


def _one(step: int, device: torch.device | str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in DEFERRED.tensors(seed=10 * step).items()}


def check_deferred(step: Any, size: int, device: torch.device | str = "cpu") -> None:
    """Deferred steps equal immediate ones at every step; the pool is written every R tokens."""
    slots, pool, ring, past = _deferred(size, device)
    immediate = pool.clone()
    for number in range(2 * size + 3):
        tensors, before = _one(number, device), pool.clone()
        moved = torch.where(past < 0, past, past + number)
        moved = moved.to(torch.int32)
        found = step(
            **tensors, memory_cache=pool, ring=ring, slots=slots, past=moved, **DEFERRED.keywords
        )
        expected = torch.ops.fxgraft.linear_attention_slots(
            **tensors, memory_cache=immediate, slots=slots, past=moved, **DEFERRED.keywords
        )
        assert error(found, expected) < 1e-5
        is_full = (number + 1) % size == 0
        assert is_full != torch.equal(pool, before)
        if is_full:
            assert error(pool[[5, 2]], immediate[[5, 2]]) < 1e-5


def check_dropped(step: Any, dropped: int, device: torch.device | str = "cpu") -> None:
    """Going back in the ring equals never having seen the tokens that are given up."""
    results: list[Tensor] = []
    for rejected in (0, dropped):
        slots, pool, ring, past = _deferred(16, device)
        active = (past >= 0).int()
        for number in range(4 + rejected):
            moved = past + number * active
            step(
                **_one(number, device), memory_cache=pool, ring=ring, slots=slots,
                past=moved.to(torch.int32), **DEFERRED.keywords,
            )  # fmt: skip
        moved = (past + 4 * active).to(torch.int32)
        results.append(
            step(
                **_one(99, device), memory_cache=pool, ring=ring, slots=slots, past=moved,
                **DEFERRED.keywords,
            )
        )  # fmt: skip
    assert torch.equal(*results)
