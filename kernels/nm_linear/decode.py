"""How the Triton kernels read packed weights; the form is that of ``layout``.

A thread holds one weight row of one chunk: V groups, whose n-th kept weights it loads with one
instruction of 16 bytes (for 2-byte elements and V = 8). Its lanes are neighbouring rows, so that a
warp reads one contiguous stretch of values and of indices, and so that all its lanes ask for the
same M inputs: that gather is served without bank conflicts.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(pointers, stride, WORDS: tl.constexpr):
    """The integers [T, WORDS] of T threads, ``stride`` elements apart."""
    # A branch that returned would not end the function: its condition is known while compiling.
    if WORDS == 1:
        words = tl.load(pointers).to(tl.uint32)[:, None]
    else:
        even = load_words(pointers, 2 * stride, WORDS // 2)
        odd = load_words(pointers + stride, 2 * stride, WORDS // 2)
        words = tl.reshape(tl.join(even, odd), (pointers.shape[0], WORDS))
    return words


@triton.jit
def unpack_codes(words, WORDS: tl.constexpr, LANE: tl.constexpr, CODE_BITS: tl.constexpr):
    """One code for each group, uint32 [T, LANE], of integers [T, WORDS]."""
    PER: tl.constexpr = LANE // WORDS
    THREADS: tl.constexpr = words.shape[0]
    shifts = (tl.arange(0, PER) * CODE_BITS).to(tl.uint32)
    codes = tl.reshape(words, (THREADS, WORDS, 1)) >> shifts[None, None, :]
    codes = tl.reshape(codes, (THREADS, LANE))
    if CODE_BITS < 32:
        codes = codes & ((1 << CODE_BITS) - 1)
    return codes


@triton.jit
def highest_bit(x, ASSEMBLY: tl.constexpr):
    """Position of the highest bit that is set, int32; x is uint32 and not 0."""
    if ASSEMBLY:
        position = tl.inline_asm_elementwise(
            "bfind.u32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        # A float's exponent; all 32 bits at once could round up to the next power of 2.
        upper = x >> 16
        part = tl.where(upper != 0, upper, x)
        exponent = (part.to(tl.float32).to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127
        position = exponent + tl.where(upper != 0, 16, 0)
    return position


@triton.jit
def take_position(
    codes, n: tl.constexpr, IS_MASK: tl.constexpr, POSITION_BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Column in its group of the n-th kept weight, and the codes for the (n - 1)-th.

    To be called with n from N - 1 to 0: the last kept column is a mask's highest bit.
    """
    if IS_MASK:
        position = highest_bit(codes, ASSEMBLY)
        codes = codes ^ (1 << position).to(tl.uint32)
    else:
        position = ((codes >> (n * POSITION_BITS)) & ((1 << POSITION_BITS) - 1)).to(tl.int32)
    return position, codes


@triton.jit
def kept_bits(
    codes, N: tl.constexpr, IS_MASK: tl.constexpr, POSITION_BITS: tl.constexpr
):  # fmt: skip
    """The kept columns of each group as bits, uint32."""
    bits = codes
    if not IS_MASK:
        bits = tl.zeros_like(codes)
        for n in tl.static_range(N):
            position = (codes >> (n * POSITION_BITS)) & ((1 << POSITION_BITS) - 1)
            bits = bits | (1 << position.to(tl.int32)).to(tl.uint32)
    return bits
