"""Norms, gated activations and attention of prompts on a GPU: cases and timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from fxgraft.kernels.tuning import measure

DTYPE = torch.bfloat16
_CALLS = 64
fx = cast(Any, torch.ops).fxgraft


@dataclass(frozen=True)
class Case:
    """One call of ours and of PyTorch's.

    Attributes:
        name: what is measured.
        ours, library: seconds per call.
        bytes: that a call reads and writes, 0 if it is bound by arithmetic.
        flops: operations of a call that is.
    """

    name: str
    ours: float
    library: float
    bytes: int = 0
    flops: float = 0.0


def _times(
    ours: Callable[..., Tensor], library: Callable[..., Tensor], *size: int
) -> tuple[float, float]:
    """Of both, on inputs that are together more than a cache holds, or 64 of them."""
    bytes_each = size[0] * size[1] * DTYPE.itemsize
    count = min(_CALLS, int(256e6 // bytes_each) + 1)
    inputs = [torch.randn(*size, dtype=DTYPE, device="cuda") for _ in range(count)]
    pairs = [inputs[i % count] for i in range(max(count, 16))]
    of_ours, of_library = (measure([partial(run, x) for x in pairs]) for run in (ours, library))
    return of_ours, of_library


def elementwise() -> list[Case]:
    """RMS norm over 4096 channels, and SiLU gates of 11008 channels in one merged tensor."""
    weight = torch.randn(4096, dtype=DTYPE, device="cuda")

    def norm(x: Tensor) -> Tensor:
        return fx.rms_norm(x, weight, eps=1e-5)

    def gate(x: Tensor) -> Tensor:
        return fx.gated_activation(*x.chunk(2, -1), activation="silu")

    def library_gate(x: Tensor) -> Tensor:
        opened, up = x.chunk(2, -1)
        return silu(opened) * up

    found: list[Case] = []
    for rows in (1, 64, 4096):
        times = _times(norm, lambda x: rms_norm(x, (4096,), weight, 1e-5), rows, 4096)
        size = (2 * rows + 1) * 4096 * DTYPE.itemsize
        found.append(Case(f"rms_norm {rows}×4096", *times, bytes=size))
        times = _times(gate, library_gate, rows, 2 * 11008)
        size = 3 * rows * 11008 * DTYPE.itemsize
        found.append(Case(f"gated_activation {rows}×11008", *times, bytes=size))
    return found


def prompts() -> list[Case]:
    """Prompts of one row with 32 query and 8 kv heads of 128 channels, rotated and written."""
    found: list[Case] = []
    for tokens, past in ((2048, 0), (512, 8192), (2048, 8192)):
        blocks = -(-(tokens + past) // 16)
        caches = [torch.randn(blocks, 8, 16, 128, dtype=DTYPE, device="cuda") for _ in range(2)]
        new = [
            torch.randn(1, tokens, heads, 128, dtype=DTYPE, device="cuda").transpose(1, 2)
            for heads in (32, 8, 8)
        ]
        table = torch.randperm(blocks, device="cuda").to(torch.int32)[None]
        length = torch.full((1,), past, dtype=torch.int32, device="cuda")
        angle = torch.randn(1, 1, tokens, 128, device="cuda")
        ours = partial(
            fx.paged_attention, *new, *caches, table, length, angle.cos(), angle.sin(),
            scale=128**-0.5, longest_past=past,
        )  # fmt: skip
        dense = [cache.view(1, 8, -1, 128)[:, :, : tokens + past] for cache in caches]
        library = partial(
            scaled_dot_product_attention, new[0], *dense, is_causal=past == 0, enable_gqa=True
        )
        times = measure([ours] * 4), measure([library] * 4)
        pairs = tokens * (past + tokens / 2)
        name = f"prompt of {tokens} tokens behind {past}"
        found.append(Case(name, *times, flops=4 * 32 * 128 * pairs))
    return found
