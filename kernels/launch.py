"""What the Triton kernels share: programmatic dependent launch, counters, layouts of inputs.

Programmatic dependent launch (CUDA programming guide, section of that name) starts a kernel while
the one before it still runs. A kernel may then read weights at once, but must call
``wait_for_inputs`` before it reads anything that an earlier kernel wrote, and before it writes.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxgraft.errors import Error

COUNTERS = 1 << 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_counters: dict[tuple[int | None, int | str], Tensor] = {}


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start, once all programs have said so or ended."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def only_wait_for_inputs(PDL: tl.constexpr):
    """Wait as ``wait_for_inputs`` does, and let the next kernel wait for ``start_next``."""
    if PDL:
        gdc_wait()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel start, and wait until what earlier kernels wrote can be read.

    Every program of a kernel calls it, also one that has nothing to do: a later kernel relies on
    this kernel's end to know that the kernels before it have ended.
    """
    start_next(PDL)
    only_wait_for_inputs(PDL)


@triton.jit
def prefetch(pointers, PDL: tl.constexpr):
    """Ask for the 128-byte lines that ``pointers`` (a tensor) lie in to be brought into L2."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; an H100's where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_options(device: torch.device) -> dict[str, Any]:
    """The keyword arguments of a launch that turn programmatic dependent launch on or off."""
    pdl = supports_pdl(device)
    return {"PDL": pdl, "launch_pdl": pdl}


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """Int32 counters [>= count], all 0, by which programs find out who arrives last.

    A kernel leaves them 0. There is one buffer for each stream, and one for all CUDA graphs of a
    device: graphs that use it must not run at the same time.

    Raises:
        Error: more counters than there are, or the first use on a device is under graph capture.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if count > COUNTERS:
        raise Error(f"a kernel needs {count} counters of {COUNTERS}", "split the batch")
    captures = torch.cuda.is_current_stream_capturing()
    key = (device.index, "graphs" if captures else torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        if captures:
            raise Error(
                "the first call of a kernel on this device is under CUDA graph capture",
                "call the function once before it is captured",
            )
        for owner in {key, (device.index, "graphs")} - _counters.keys():
            _counters[owner] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


def over(kernel: Any, *grid: int) -> Any:
    """``kernel[grid]``: a type checker takes a kernel's definition for its call."""
    return kernel[grid]


def blocks_of(size: int, block: int) -> int:
    """Blocks that hold ``size`` elements."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not below ``size`` (1 for 0)."""
    return 1 << max(size - 1, 0).bit_length()


def row_layout(x: Tensor) -> tuple[int, int, int] | None:
    """How the rows of x [..., D] lie in memory, if two numbers tell it.

    Returns:
        (inner, outer stride, inner stride): row r begins at (r // inner) · outer stride +
        (r % inner) · inner stride elements. None if the last dimension is not contiguous, the
        strides do not descend, or more numbers are needed.
    """
    if x.dim() == 0 or x.numel() == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return None
    groups: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = [groups[-1][0] * size, stride]
        else:
            groups.append([size, stride])
    if len(groups) > 2 or any(stride < x.shape[-1] for _, stride in groups):
        return None
    if len(groups) == 2 and groups[0][1] < groups[1][0] * groups[1][1]:
        return None
    groups = [[1, 0], *groups] if len(groups) == 1 else groups or [[1, 0], [1, 0]]
    return groups[1][0], groups[0][1], groups[1][1]
