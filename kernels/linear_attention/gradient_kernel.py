"""Triton kernels of the backward pass of ``linear_attention``, in chunks.

They work on heads with one state of W × Dv, whose gates are log decays: N states of Dk × Dv are
one with W = N · Dk, and what acts on single tokens is differentiated by PyTorch. With S the state
before a chunk, dS' the gradient of the state behind it, b the running sums of log decays and
P = tril(dO Vᵀ)::

    dQ = e^b ⊙ (dO Sᵀ + P (K ⊙ e^-b))
    dK = e^(b[C] - b) ⊙ (V dS'ᵀ) + e^-b ⊙ Pᵀ (Q ⊙ e^b)
    dV = Aᵀ dO + (K ⊙ e^(b[C] - b)) dS'
    dS = e^b[C] ⊙ dS' + (Q ⊙ e^b)ᵀ dO
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.linear_attention.chunk_kernel import chunk_of, product


@triton.jit
def load_tokens(x, row, head, token, end, column, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """[C, columns] of a contiguous tensor [rows, tokens, HEADS, WIDTH], 0 outside it.

    Args:
        row: number of the tensor's first token times rows before.
    """
    inside = (token < end)[:, None] & (column < WIDTH)[None, :]
    places = ((row + token)[:, None] * HEADS + head) * WIDTH + column[None, :]
    return tl.load(x + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(x, value, row, head, token, end, column, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The opposite of ``load_tokens``."""
    inside = (token < end)[:, None] & (column < WIDTH)[None, :]
    places = ((row + token)[:, None] * HEADS + head) * WIDTH + column[None, :]
    tl.store(x + places, value, mask=inside)


@triton.jit
def state_block(x, number, wide, column, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Block of a state or its gradient, from [chunks · heads, WIDTH, VALUE_DIM]."""
    inside = (wide < WIDTH)[:, None] & (column < VALUE_DIM)[None, :]
    places = (number * WIDTH + wide)[:, None] * VALUE_DIM + column[None, :]
    return tl.load(x + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def state_gradients_kernel(
    query, log_decay, bounds, starts, output_gradient, after_gradient, gradients, before_gradient,
    length, chunks_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the states behind each chunk, from the last chunk to the first.

    Args:
        query: [rows, tokens, HEADS · GROUP, WIDTH], contiguous, as are all others.
        log_decay: [rows, tokens, HEADS, WIDTH].
        bounds, starts, chunks_row: as in ``chunk_of``.
        output_gradient: [rows, tokens, HEADS · GROUP, VALUE_DIM].
        after_gradient: of the last states [sequences, HEADS, WIDTH, VALUE_DIM], or None.
        gradients: [chunks, HEADS, WIDTH, VALUE_DIM], written.
        before_gradient: of the first states, like ``after_gradient``, written.
    """
    pair = tl.program_id(0)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    sequence = row
    wide = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (wide < WIDTH)[:, None] & (column < VALUE_DIM)[None, :]
    wait_for_inputs(PDL)
    begin, end, number = row * 0, row * 0 + length, row * chunks_row
    tokens_before = row * length
    if bounds is not None:
        begin, end = tl.load(bounds + row).to(tl.int64), tl.load(bounds + row + 1).to(tl.int64)
        number = tl.load(starts + row).to(tl.int64)
        tokens_before = row * 0
    gradient = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if after_gradient is not None:
        gradient = state_block(
            after_gradient, sequence * HEADS + head, wide, column, WIDTH, VALUE_DIM
        )
    count = tl.cdiv(end - begin, CHUNK).to(tl.int32)
    for i in range(count):
        chunk = count - 1 - i
        places = ((number + chunk) * HEADS + head) * WIDTH + wide
        target = gradients + places[:, None] * VALUE_DIM + column[None, :]
        tl.store(target, gradient.to(gradients.dtype.element_ty), mask=inside)
        token = begin + chunk * CHUNK + tl.arange(0, CHUNK)
        decay = load_tokens(log_decay, tokens_before, head, token, end, wide, HEADS, WIDTH)
        kept, last = tl.exp(tl.cumsum(decay, axis=0)), tl.exp(tl.sum(decay, axis=0))
        gradient *= last[:, None]
        for j in range(GROUP):
            index = head * GROUP + j
            q = load_tokens(query, tokens_before, index, token, end, wide, HEADS * GROUP, WIDTH)
            wanted = load_tokens(
                output_gradient, tokens_before, index, token, end, column, HEADS * GROUP, VALUE_DIM
            )
            gradient += product(tl.trans(q * kept), wanted, DTYPE)
    places = ((sequence * HEADS + head) * WIDTH + wide)[:, None] * VALUE_DIM + column[None, :]
    tl.store(before_gradient + places, gradient, mask=inside)


@triton.jit
def token_gradients_kernel(
    query, key, value, log_decay, bounds, starts, output_gradient, states, gradients,
    query_gradient, key_gradient, length, chunks_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys of one chunk and state head, BLOCK_K channels of them.

    Args:
        key: like ``log_decay``.
        value: [rows, tokens, HEADS, VALUE_DIM].
        states, gradients: of the state before and behind each chunk.
        query_gradient, key_gradient: float32, written; the others as in
            ``state_gradients_kernel``.
    """
    pair = tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    wide = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    wait_for_inputs(PDL)
    row, first, end, number = chunk_of(
        tl.program_id(0).to(tl.int64), row, bounds, starts, chunks_row, length, CHUNK, SEQUENCES
    )
    if first < end:
        before = row * length
        within = tl.arange(0, CHUNK)
        token, is_past = first + within, within[:, None] >= within[None, :]
        place = number * HEADS + head
        k = load_tokens(key, before, head, token, end, wide, HEADS, WIDTH)
        decay = load_tokens(log_decay, before, head, token, end, wide, HEADS, WIDTH)
        sums, last = tl.cumsum(decay, axis=0), tl.sum(decay, axis=0)
        growth, kept = tl.exp(-sums), tl.exp(sums)
        keys = k * growth
        written = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for start in range(0, VALUE_DIM, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            v = load_tokens(value, before, head, token, end, column, HEADS, VALUE_DIM)
            block = state_block(gradients, place, wide, column, WIDTH, VALUE_DIM)
            written += product(v, tl.trans(block), DTYPE)
        inner = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for j in range(GROUP):
            index = head * GROUP + j
            pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
            read = tl.zeros((CHUNK, BLOCK_K), tl.float32)
            for start in range(0, VALUE_DIM, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                v = load_tokens(value, before, head, token, end, column, HEADS, VALUE_DIM)
                wanted = load_tokens(
                    output_gradient, before, index, token, end, column, HEADS * GROUP, VALUE_DIM
                )
                block = state_block(states, place, wide, column, WIDTH, VALUE_DIM)
                pairs += product(wanted, tl.trans(v), DTYPE)
                read += product(wanted, tl.trans(block), DTYPE)
            pairs = tl.where(is_past, pairs, 0.0)
            q = load_tokens(query, before, index, token, end, wide, HEADS * GROUP, WIDTH)
            result = (product(pairs, keys, DTYPE) + read) * kept
            store_tokens(
                query_gradient, result, before, index, token, end, wide, HEADS * GROUP, WIDTH
            )
            inner += product(tl.trans(pairs), q * kept, DTYPE)
        result = inner * growth + written * tl.exp(last[None, :] - sums)
        store_tokens(key_gradient, result, before, head, token, end, wide, HEADS, WIDTH)


@triton.jit
def value_gradients_kernel(
    query, key, log_decay, bounds, starts, output_gradient, gradients, value_gradient,
    length, chunks_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the values of one chunk and state head, BLOCK_V channels of them.

    Args:
        value_gradient: float32, written; the others as in ``token_gradients_kernel``.
    """
    pair = tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    wait_for_inputs(PDL)
    row, first, end, number = chunk_of(
        tl.program_id(0).to(tl.int64), row, bounds, starts, chunks_row, length, CHUNK, SEQUENCES
    )
    if first < end:
        before = row * length
        within = tl.arange(0, CHUNK)
        token, is_past = first + within, within[:, None] >= within[None, :]
        result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        for j in range(GROUP):
            index = head * GROUP + j
            scores = tl.zeros((CHUNK, CHUNK), tl.float32)
            for start in range(0, WIDTH, BLOCK_K):
                wide = start + tl.arange(0, BLOCK_K)
                k = load_tokens(key, before, head, token, end, wide, HEADS, WIDTH)
                q = load_tokens(query, before, index, token, end, wide, HEADS * GROUP, WIDTH)
                decay = load_tokens(log_decay, before, head, token, end, wide, HEADS, WIDTH)
                sums = tl.cumsum(decay, axis=0)
                scores += product(q * tl.exp(sums), tl.trans(k * tl.exp(-sums)), DTYPE)
            scores = tl.where(is_past, scores, 0.0)
            wanted = load_tokens(
                output_gradient, before, index, token, end, column, HEADS * GROUP, VALUE_DIM
            )
            result += product(tl.trans(scores), wanted, DTYPE)
        for start in range(0, WIDTH, BLOCK_K):
            wide = start + tl.arange(0, BLOCK_K)
            k = load_tokens(key, before, head, token, end, wide, HEADS, WIDTH)
            decay = load_tokens(log_decay, before, head, token, end, wide, HEADS, WIDTH)
            left = tl.sum(decay, axis=0)[None, :] - tl.cumsum(decay, axis=0)
            block = state_block(gradients, number * HEADS + head, wide, column, WIDTH, VALUE_DIM)
            result += product(k * tl.exp(left), block, DTYPE)
        store_tokens(value_gradient, result, before, head, token, end, column, HEADS, VALUE_DIM)
