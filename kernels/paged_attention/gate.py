"""Suppressing heads in paged attention: its arguments, and the plain PyTorch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.head_gate import reference as head_gate
from fxgraft.kernels.logit_sum import reference as logit_sum


@dataclass(frozen=True)
class Gate:
    """What decides which heads are suppressed, as ``fxgraft.kernels.paged_attention.op`` says.

    Attributes:
        chosen, gated: bool [B, S].
        key_sums: the op's ``key_sum_cache``, or None.
        slots: int64 [B], where ``key_sums`` is given.
        chosen_cache: bool [N, block_size], or None.
        keep: heads that stay.
        factor: of the others.
    """

    chosen: Tensor
    gated: Tensor
    key_sums: Tensor | None
    slots: Tensor | None
    chosen_cache: Tensor | None
    keep: int
    factor: float

    @classmethod
    def of(
        cls,
        chosen: Tensor | None,
        gated: Tensor | None,
        key_sums: Tensor | None,
        slots: Tensor | None,
        chosen_cache: Tensor | None,
        keep: int,
        factor: float,
    ) -> Gate | None:
        """The gate that the op's arguments describe, or None where no head is suppressed.

        Raises:
            InputError: they describe no gate and are no plain call either.
        """
        given = (chosen, gated, key_sums, slots, chosen_cache)
        if all(tensor is None for tensor in given):
            return None
        by_sums = key_sums is not None and slots is not None
        is_one = by_sums != (chosen_cache is not None) and (key_sums is None) == (slots is None)
        if chosen is None or gated is None or not is_one:
            raise InputError(
                "paged_attention's gate is incomplete",
                "pass chosen and gated, and either key_sum_cache and slots or chosen_cache",
            )
        if keep < 0:
            raise InputError(f"paged_attention keeps {keep} heads", "keep 0 or more")
        return cls(chosen, gated, key_sums, slots, chosen_cache, keep, factor)

    def check(self, query: Tensor, key: Tensor, key_cache: Tensor) -> None:
        """Refuse tensors of wrong shapes or dtypes.

        Raises:
            InputError: names the tensor.
        """
        batch, _, length, head_dim = query.shape
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "chosen": (self.chosen, (batch, length)),
            "gated": (self.gated, (batch, length)),
            "slots": (self.slots, (batch,)),
            "chosen_cache": (self.chosen_cache, (key_cache.shape[0], key_cache.shape[2])),
        }
        if self.key_sums is not None:
            shape = (self.key_sums.shape[0], key.shape[1], head_dim)
            expected["key_sum_cache"] = (self.key_sums, shape)
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(
                    f"paged_attention's {name} is {list(tensor.shape)}", f"pass {list(shape)}"
                )
        flags = (self.chosen, self.gated, self.chosen_cache)
        if any(tensor is not None and tensor.dtype != torch.bool for tensor in flags):
            raise InputError("paged_attention's chosen, gated and chosen_cache", "pass bool")


def with_gate(
    attend: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    sinks: Tensor | None,
    gate: Gate,
    rules: dict[str, Any],
) -> Tensor:
    """Attend, and suppress heads.

    Args:
        attend: paged attention without a gate.
        tensors: query to past of the op; query and key rotated.
        sinks: as in the op.
        gate: its states are brought up to date.
        rules: scale, window and softcap.
    """
    score = _by_sums(tensors, gate, rules) if gate.key_sums is not None else None
    output = attend(*tensors, None, None, sinks, **rules)
    if score is None:
        score = _by_shares(tensors, sinks, gate, rules)
    is_gated = gate.gated & ~gate.chosen
    result = head_gate.head_gate(output, score, is_gated, keep=gate.keep, factor=gate.factor)
    return output.copy_(result)


def _by_sums(tensors: tuple[Tensor, ...], gate: Gate, rules: dict[str, Any]) -> Tensor:
    """Scores [B, H, S] by the sums of logits; the summed keys get the new ones added."""
    (query, key), past = tensors[:2], tensors[-1]
    assert gate.key_sums is not None
    assert gate.slots is not None
    before = torch.where((past > 0)[:, None, None], gate.key_sums[gate.slots], 0)
    score, after = logit_sum.logit_sum(query, key, gate.chosen, before, scale=rules["scale"])
    is_active = past >= 0
    gate.key_sums[gate.slots[is_active]] = after[is_active].to(gate.key_sums.dtype)
    return score


def _by_shares(
    tensors: tuple[Tensor, ...], sinks: Tensor | None, gate: Gate, rules: dict[str, Any]
) -> Tensor:
    """Scores [B, H, S] by shares of attention; the new keys and what is chosen are written."""
    from fxgraft.kernels.paged_attention_mass.reference import paged_attention_mass

    query, key, _, key_cache, _, table, past = tensors
    assert gate.chosen_cache is not None
    caches = (key_cache, gate.chosen_cache)
    return paged_attention_mass(query, key, gate.chosen, *caches, table, past, sinks, **rules)
