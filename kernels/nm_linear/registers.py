"""What a thread of the tensor-core kernel does with 32-bit registers, tensors [T] of T threads.

Every tensor has one element for each thread, so that a tensor is a register. ``ASSEMBLY`` chooses
the instructions of an NVIDIA GPU; without it the same is said in Triton's words, for its
interpreter. Source of the instructions: the PTX manual, ``prmt``, ``ld`` and ``mma.m16n8k16``.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false
# Its compiler takes no starred items.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_weights(pointers, inside, ASSEMBLY: tl.constexpr):
    """16 bytes at int32 pointers, read once; where not ``inside``, anything."""
    if ASSEMBLY:
        words = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
            "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4]; }",
            "=r,=r,=r,=r,l,r",
            [pointers.to(tl.int64), inside.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        words = ()
        for place in tl.static_range(4):
            words = words + (tl.load(pointers + place, mask=inside, other=0).to(tl.uint32),)
    return words


@triton.jit
def load_inputs(pointers, ASSEMBLY: tl.constexpr):
    """16 bytes at int32 pointers."""
    if ASSEMBLY:
        words = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointers.to(tl.int64)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        words = ()
        for place in tl.static_range(4):
            words = words + (tl.load(pointers + place).to(tl.uint32),)
    return words


@triton.jit
def permute_bytes(a, b, CHOICE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Four of the bytes of a (0 to 3) and b (4 to 7), one for each hexadecimal digit of CHOICE.

    A digit from 8 on stands for eight copies of the highest bit of byte digit - 8.
    """
    if ASSEMBLY:
        chosen = tl.full(a.shape, CHOICE, tl.uint32)
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, chosen],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.zeros_like(a)
        for place in tl.static_range(4):
            digit = (CHOICE >> (4 * place)) & 15
            byte = ((a if digit % 8 < 4 else b) >> (8 * (digit % 4))) & 255
            if digit >= 8:
                byte = (byte >> 7) * 255
            found = found | (byte << (8 * place))
    return found


@triton.jit
def _as_numbers(words, ELEMENT: tl.constexpr):
    """The lower and the upper 16 bits as float32."""
    low = (words & 0xFFFF).to(tl.uint16).to(ELEMENT, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(ELEMENT, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def scale_bfloat16(words, gains, offset, ASSEMBLY: tl.constexpr):
    """Pairs of bfloat16 times (gain + offset), rounded once where ``offset`` is 0 or 1."""
    if ASSEMBLY:
        half = offset.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        offsets = tl.zeros_like(words) + (half | (half << 16))
        scaled = tl.inline_asm_elementwise(
            "{ .reg .b32 part; fma.rn.bf16x2 part, $1, $3, $4; fma.rn.bf16x2 $0, $1, $2, part; }",
            "=r,r,r,r,r",
            [words, gains, offsets, tl.full(words.shape, 0x80008000, tl.uint32)],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        low, high = _as_numbers(words, tl.bfloat16)
        low_gain, high_gain = _as_numbers(gains, tl.bfloat16)
        low = (low * (low_gain + offset)).to(tl.bfloat16).to(tl.uint16, bitcast=True)
        high = (high * (high_gain + offset)).to(tl.bfloat16).to(tl.uint16, bitcast=True)
        scaled = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    return scaled


@triton.jit
def _add_product(total, upper_total, a, b, ELEMENT: tl.constexpr):
    """Add to two columns of each row what one register of each thread gives, as ``multiply``."""
    WARPS: tl.constexpr = a.shape[0] // 32
    for half in tl.static_range(2):
        left = tl.reshape(_as_numbers(a, ELEMENT)[half], (WARPS, 8, 1, 4))
        right = tl.reshape(_as_numbers(b, ELEMENT)[half], (WARPS, 1, 8, 4))
        added = tl.reshape(tl.sum(left * right, axis=3), (a.shape[0], 2))
        even, odd = tl.split(added)
        total += even
        upper_total += odd
    return total, upper_total


@triton.jit
def multiply(totals, a, b, ELEMENT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Add A · B to 16 x 8 sums of each warp.

    Thread 4 r + t has rows r and r + 8 and columns 2 t and 2 t + 1 of them.

    Args:
        totals: float32 sums: row r, both columns, then row r + 8.
        a: four registers of two elements: rows r and r + 8 for the first inputs of t, then both
            for the next ones.
        b: two registers: the same inputs of column r.
        ELEMENT: bfloat16 or float16.
        ASSEMBLY: as above.
    """
    if ASSEMBLY:
        KIND: tl.constexpr = "bf16" if tl.bfloat16 == ELEMENT else "f16"
        found = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32." + KIND + "." + KIND + ".f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b[0], b[1], totals[0], totals[1], totals[2], totals[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        first, second, third, fourth = totals
        for k in tl.static_range(2):
            first, second = _add_product(first, second, a[2 * k], b[k], ELEMENT)
            third, fourth = _add_product(third, fourth, a[2 * k + 1], b[k], ELEMENT)
        found = (first, second, third, fourth)
    return found
