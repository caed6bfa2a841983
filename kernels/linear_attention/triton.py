"""The Triton kernels of ``linear_attention`` as functions of its arguments."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fxgraft.kernels.launch import (
    COUNTERS,
    arrival_counters,
    blocks_of,
    launch_options,
    over,
    power_of_2,
    processors,
)
from fxgraft.kernels.linear_attention.arguments import refusal as refusal
from fxgraft.kernels.linear_attention.arguments import state_dtype, state_heads
from fxgraft.kernels.linear_attention.chunk_kernel import output_kernel, states_kernel
from fxgraft.kernels.linear_attention.chunkwise import CHUNK, LARGEST_SUM
from fxgraft.kernels.linear_attention.decode_kernel import decode_kernel
from fxgraft.kernels.linear_attention.deferred import Ring
from fxgraft.kernels.linear_attention.deferred_kernel import deferred_kernel
from fxgraft.kernels.linear_attention.gate_kernel import NO_FLOOR
from fxgraft.kernels.linear_attention.step_kernel import step_kernel

RECURRENT_TOKENS = 64
"""Fewer tokens than this go through the recurrent kernel."""

_CELLS_PER_PROGRAM = 8192  # 64 registers of each of 128 threads


@dataclass(frozen=True)
class ChunkTiles:
    """How the chunkwise kernels take 16-bit products; float32 takes smaller tiles.

    Attributes:
        chunk: tokens, 64 or 128.
        states, outputs: rows of the state at a time, warps, stages and registers of a thread, of
            either kernel.
    """

    chunk: int = 128
    states: tuple[int, int, int, int] = (32, 4, 2, 255)
    outputs: tuple[int, int, int, int] = (32, 8, 2, 255)


CHUNK_TILES = ChunkTiles()


@dataclass(frozen=True)
class Rules:
    """The keyword arguments of the op."""

    scale: float
    temperature: float | None = None
    floor: float | None = None
    write_scale: str = "none"
    eps: float = 1e-6
    dtype: torch.dtype | None = None

    @property
    def gate_options(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "TEMPERATURE": self.temperature or 0.0,
            "FLOOR": NO_FLOOR.value if self.floor is None else self.floor,
            "SCALES_WRITES": self.write_scale == "sqrt",
        }


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call as kernels take them; see the op for their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    mixing: Tensor
    norm_weight: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences: rows of the batch, or of what is packed in one."""
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def heads(self) -> int:
        """Heads that have states."""
        return state_heads(self.query, self.key, self.gate)

    @property
    def mask_bytes(self) -> Tensor | None:
        """The mask as kernels read it."""
        return None if self.key_mask is None else self.key_mask.view(torch.uint8)

    @property
    def norm_stride(self) -> int:
        """From the norm's weights of one head to the next."""
        weight = self.norm_weight
        return 0 if weight is None or weight.dim() == 1 else weight.stride(0)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that kernels are compiled for."""
        heads = self.heads
        return {
            "HEADS": heads,
            "GROUP": self.query.shape[2] // heads,
            "KEY_GROUP": heads // self.key.shape[2],
            "STATES": self.gate.shape[3],
            "KEY_DIM": self.query.shape[3],
            "VALUE_DIM": self.value.shape[3],
        }


def inputs_of(*tensors: Tensor | None, **options: Any) -> tuple[Inputs, Rules]:
    """Arguments in the op's order, with gates spread and last dimensions contiguous."""
    query, key, value, gate, *others = tensors
    assert query is not None
    assert key is not None
    assert value is not None
    assert gate is not None
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    heads = state_heads(query, key, gate)
    gate = gate.expand(*query.shape[:2], heads, gate.shape[3], query.shape[3])
    mixing, *rest = others
    assert mixing is not None
    mixing = mixing.expand(query.shape[2], gate.shape[3])
    mixing = mixing if mixing.stride(-1) == 1 else mixing.contiguous()
    rest = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in rest]
    return Inputs(query, key, value, gate, mixing, *rest), Rules(**options)


def over_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    memory_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    norm_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attend in place; the arguments are those of ``linear_attention_slots``."""
    inputs, rules = inputs_of(query, key, value, gate, mixing, norm_weight, **options)
    return attend(inputs, rules, memory_cache, memory_cache, (slots, past))


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    norm_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend; the arguments are those of ``linear_attention``."""
    inputs, rules = inputs_of(
        query, key, value, gate, mixing, norm_weight, key_mask, cu_seqlens, **options
    )
    state = state if state is None else state.contiguous()
    after = empty_state(inputs, rules)
    return attend(inputs, rules, state, after), after


def empty_state(inputs: Inputs, rules: Rules) -> Tensor:
    """Room for the states after a call."""
    sizes = inputs.sizes
    shape = (inputs.rows, *(sizes[name] for name in ("HEADS", "STATES", "KEY_DIM", "VALUE_DIM")))
    return inputs.query.new_empty(shape, dtype=state_dtype(inputs.query, rules.dtype))


def attend(
    inputs: Inputs,
    rules: Rules,
    before: Tensor | None,
    after: Tensor,
    place: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """By the kernel that suits the number of tokens and the gates; arguments as in ``step``."""
    length = inputs.query.shape[1]
    if length == 1 and inputs.cu_seqlens is None:
        return decode(inputs, rules, before, after, place)
    few = length < RECURRENT_TOKENS
    form = step if few or not is_bounded(rules) else chunks
    return form(inputs, rules, before, after, place)


def is_bounded(rules: Rules) -> bool:
    """Whether the log decays of a chunk add up to few enough for the chunkwise kernels."""
    return rules.floor is not None and -rules.floor * CHUNK <= LARGEST_SUM


def chunks(
    inputs: Inputs,
    rules: Rules,
    before: Tensor | None,
    after: Tensor,
    place: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The chunkwise kernels; arguments as in ``step``."""
    wide = inputs.query.dtype == torch.float32
    plan = Plan.of(inputs, chunk=CHUNK if wide else CHUNK_TILES.chunk)
    states = plan.states(inputs, before, after, rules, place)
    past = None if place is None else torch.where(place[0] < 0, -1, place[1])
    return plan.outputs(inputs, rules, states, past)


@dataclass(frozen=True)
class Plan:
    """How tokens fall into chunks.

    Attributes:
        count: chunks of a row, or at most so many of all packed sequences.
        starts: packed: number of the first chunk of each sequence.
        blocks: tile sizes and operand type of the kernels.
    """

    count: int
    starts: Tensor | None
    blocks: dict[str, Any]

    @staticmethod
    def of(inputs: Inputs, dtype: torch.dtype | None = None, chunk: int = CHUNK) -> Plan:
        """The plan for a call, whose products are of ``dtype``, by default the query's."""
        length, bounds = inputs.query.shape[1], inputs.cu_seqlens
        width = inputs.gate.shape[3] * inputs.query.shape[3]
        wide = (dtype or inputs.query.dtype) == torch.float32
        blocks = {
            "CHUNK": chunk,
            "SEQUENCES": power_of_2(inputs.rows),
            "BLOCK_K": min(64, max(16, power_of_2(width))),
            "BLOCK_V": min(64, max(16, power_of_2(inputs.value.shape[3]))),
            "DTYPE": tl.float32 if wide else tl.bfloat16,
        }
        if bounds is None:
            return Plan(blocks_of(length, chunk), None, blocks)
        parts = (bounds.diff() + chunk - 1) // chunk
        starts = (parts.cumsum(0) - parts).to(torch.int64)
        return Plan(blocks_of(length, chunk) + inputs.rows, starts, blocks)

    def tiles(self, chosen: tuple[int, int, int, int], sizes: dict[str, int]) -> dict[str, Any]:
        """What the forward kernels are compiled for.

        Args:
            chosen: of ``ChunkTiles``.
            sizes: of the call.
        """
        if self.blocks["DTYPE"] is tl.float32:
            return self.blocks | {"STAGES": 1, "FAST": False, "num_warps": 4}
        width, value_dim = sizes["STATES"] * sizes["KEY_DIM"], sizes["VALUE_DIM"]
        block_k, warps, stages, registers = chosen
        return self.blocks | {
            "BLOCK_K": min(block_k, max(16, power_of_2(width))),
            "BLOCK_V": min(128, max(16, power_of_2(value_dim))),
            "STAGES": stages,
            "FAST": True,
            "num_warps": warps,
            "maxnreg": registers,
        }

    def empty_states(self, inputs: Inputs) -> Tensor:
        """Room for a state per chunk and head [chunks, Hs, N · Dk, Dv]."""
        query, sizes = inputs.query, inputs.sizes
        rows = query.shape[0] if self.starts is None else 1
        dtype = torch.float32 if self.blocks["DTYPE"] is tl.float32 else torch.bfloat16
        width = sizes["STATES"] * sizes["KEY_DIM"]
        return query.new_empty(
            (rows * self.count, sizes["HEADS"], width, sizes["VALUE_DIM"]), dtype=dtype
        )

    def chunks_row(self, inputs: Inputs) -> int:
        """What kernels are told of rows: chunks of each, or the number of packed sequences."""
        return self.count if self.starts is None else inputs.rows

    def states(
        self,
        inputs: Inputs,
        before: Tensor | None,
        after: Tensor,
        rules: Rules,
        place: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """States before each chunk; the last ones are written to ``after``."""
        key, value, gate, mask = inputs.key, inputs.value, inputs.gate, inputs.key_mask
        states, sizes = self.empty_states(inputs), inputs.sizes
        slots, past = place or (None, None)
        blocks = self.tiles(CHUNK_TILES.states, sizes)
        grid = (
            inputs.rows * sizes["HEADS"],
            blocks_of(states.shape[2], blocks["BLOCK_K"]),
            blocks_of(states.shape[3], blocks["BLOCK_V"]),
        )
        over(states_kernel, *grid)(
            key, value, gate, inputs.mask_bytes, inputs.cu_seqlens, self.starts,
            before, after, slots, past, states,
            *key.stride()[:3], *value.stride()[:3], *gate.stride(),
            0 if mask is None else mask.stride(0),
            0 if before is None else before.stride(0), after.stride(0),
            key.shape[1], self.chunks_row(inputs),
            **sizes,
            **rules.gate_options,
            **blocks,
            **launch_options(key.device),
        )  # fmt: skip
        return states

    def outputs(self, inputs: Inputs, rules: Rules, states: Tensor, past: Tensor | None) -> Tensor:
        """Outputs of all chunks."""
        query, key, value, gate = inputs.query, inputs.key, inputs.value, inputs.gate
        mask, norm, sizes = inputs.key_mask, inputs.norm_weight, inputs.sizes
        value_dim = sizes["VALUE_DIM"]
        output = query.new_empty((*query.shape[:3], value_dim))
        rows = query.shape[0] if self.starts is None else 1
        blocks = self.tiles(CHUNK_TILES.outputs, sizes)
        blocks["BLOCK_V"] = min(128, max(16, power_of_2(value_dim)))
        if norm is not None:
            blocks["BLOCK_V"] = max(16, power_of_2(value_dim))
        if blocks["BLOCK_V"] > 128:
            blocks["num_warps"] = 8
        grid = (self.count, rows * query.shape[2], blocks_of(value_dim, blocks["BLOCK_V"]))
        over(output_kernel, *grid)(
            query, key, value, gate, inputs.mixing, norm, inputs.mask_bytes,
            inputs.cu_seqlens, self.starts, past, states, output,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *gate.stride(),
            inputs.mixing.stride(0), inputs.norm_stride, 0 if mask is None else mask.stride(0),
            query.shape[1], self.chunks_row(inputs), rules.scale, rules.eps,
            **sizes,
            **rules.gate_options,
            **blocks,
            **launch_options(query.device),
        )  # fmt: skip
        return output


def step(
    inputs: Inputs,
    rules: Rules,
    before: Tensor | None,
    after: Tensor,
    place: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The recurrent kernel.

    Args:
        inputs: tokens.
        rules: options.
        before, after: [rows or slots, Hs, N, Dk, Dv], contiguous but for the first dimension.
        place: slots and past of each row.
    """
    query, key, value, gate = inputs.query, inputs.key, inputs.value, inputs.gate
    length, value_dim = query.shape[1], value.shape[3]
    sizes, rows, heads = inputs.sizes, inputs.rows, inputs.heads
    output = query.new_empty((*query.shape[:3], value_dim))
    block_w = power_of_2(sizes["STATES"] * sizes["KEY_DIM"])
    block_v = value_columns(rows * heads, block_w, value_dim, query.device)
    tiles = blocks_of(value_dim, block_v)
    norm, mask = inputs.norm_weight, inputs.mask_bytes
    shares_norm = norm is not None and tiles > 1
    slots, past = place or (None, None)
    over(step_kernel, rows * heads, tiles)(
        query, key, value, gate, inputs.mixing, norm,
        mask, inputs.cu_seqlens, before, after, slots, past, output,
        torch.empty_like(output, dtype=torch.float32) if shares_norm else None,
        arrival_counters(query.device, rows * heads) if shares_norm else None,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *gate.stride(),
        inputs.mixing.stride(0), inputs.norm_stride, 0 if mask is None else mask.stride(0),
        0 if before is None else before.stride(0), after.stride(0),
        length, rules.scale, rules.eps,
        **rules.gate_options,
        BLOCK_W=block_w,
        BLOCK_V=block_v,
        ALL_V=power_of_2(value_dim),
        TILES=tiles,
        num_warps=max(1, min(8, block_w * block_v // 2048)),
        **sizes,
        **launch_options(query.device),
    )  # fmt: skip
    return output


def value_columns(pairs: int, block_w: int, value_dim: int, device: torch.device) -> int:
    """Columns of a head's states that one program holds.

    As many as registers hold, but fewer where there would not be two programs for each
    multiprocessor; at least 16, which are 64 bytes of a row. All of them where there are more
    heads than counters by which programs find out that a head is complete.

    Args:
        pairs: rows times heads.
        block_w: rows of a head's states.
        value_dim: columns.
        device: whose multiprocessors are counted.
    """
    widest = power_of_2(value_dim)
    if pairs > COUNTERS:
        return widest
    columns = min(widest, max(16, _CELLS_PER_PROGRAM // block_w))
    while columns > 16 and pairs * blocks_of(value_dim, columns) < 2 * processors(device):
        columns //= 2
    return columns


@dataclass(frozen=True)
class DecodeTiles:
    """How kernels of one token take a head's states.

    Attributes:
        columns: that a program takes at a time.
        loops: how often.
        tiles: programs that share a head.
        prefetch: columns of a program that are asked for ahead.
        warps: of a program.
    """

    columns: int
    loops: int
    tiles: int
    prefetch: int
    warps: int

    @staticmethod
    def of(
        pairs: int, width: int, value_dim: int, device: torch.device, *, even: bool = False
    ) -> DecodeTiles:
        """As measured on an H100: heads are shared while there are too few of them.

        Args:
            pairs: rows times heads.
            width: rows of a head's states.
            value_dim: columns.
            device: whose multiprocessors are counted.
            even: take 32 numbers for each of 256 threads at a time, whatever the batch.
        """
        block_w, widest = power_of_2(width), power_of_2(value_dim)
        columns = min(widest, max(8, _CELLS_PER_PROGRAM // block_w))
        own = widest
        while own > columns and 2 * pairs * blocks_of(value_dim, own) <= processors(device):
            own //= 2
        is_shared = own < widest
        if is_shared and not even:
            columns = max(8, columns // 2)
        elif pairs >= 8 * processors(device) and not even:
            columns = min(widest, 2 * columns)
        return DecodeTiles(
            columns=columns,
            loops=own // columns,
            tiles=blocks_of(value_dim, own),
            prefetch=own if is_shared else columns,
            warps=max(1, min(16, block_w * columns // 1024)),
        )

    @property
    def options(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {
            "BLOCK_V": self.columns,
            "LOOPS": self.loops,
            "PREFETCH": self.prefetch,
            "num_warps": self.warps,
        }


def decode(
    inputs: Inputs,
    rules: Rules,
    before: Tensor | None,
    after: Tensor,
    place: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The kernel of one token per row; arguments as in ``step``."""
    query, key, value, gate = inputs.query, inputs.key, inputs.value, inputs.gate
    value_dim, sizes, pairs = value.shape[3], inputs.sizes, inputs.rows * inputs.heads
    output = query.new_empty((*query.shape[:3], value_dim))
    width = sizes["STATES"] * sizes["KEY_DIM"]
    tiles = DecodeTiles.of(pairs, width, value_dim, query.device)
    norm, mask = inputs.norm_weight, inputs.mask_bytes
    shares_norm = norm is not None and tiles.tiles > 1
    slots, past = place or (None, None)
    over(decode_kernel, pairs, tiles.tiles)(
        query, key, value, gate, inputs.mixing, norm, mask, before, after, slots, past, output,
        torch.empty_like(output, dtype=torch.float32) if shares_norm else None,
        arrival_counters(query.device, pairs) if shares_norm else None,
        query.stride(0), query.stride(2), key.stride(0), key.stride(2),
        value.stride(0), value.stride(2), gate.stride(0), *gate.stride()[2:],
        inputs.mixing.stride(0), inputs.norm_stride, 0 if mask is None else mask.stride(0),
        0 if before is None else before.stride(0), after.stride(0),
        0 if before is None else before.shape[0], rules.scale, rules.eps,
        **rules.gate_options,
        BLOCK_W=power_of_2(width),
        BLOCK_G=power_of_2(sizes["GROUP"]),
        ALL_V=power_of_2(value_dim),
        TILES=tiles.tiles,
        **tiles.options,
        **sizes,
        **launch_options(query.device),
    )  # fmt: skip
    return output


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
    """One token per row; arguments and result are those of ``deferred.deferred_step``."""
    inputs, rules = inputs_of(query, key, value, gate, mixing, **options)
    query, key, value, gate = inputs.query, inputs.key, inputs.value, inputs.gate
    sizes, pairs = inputs.sizes, inputs.rows * inputs.heads
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    width = ring.keys.shape[3]
    tiles = DecodeTiles.of(pairs, width, value.shape[3], query.device, even=True)
    over(deferred_kernel, pairs, tiles.tiles)(
        query, key, value, gate, inputs.mixing, memory_cache,
        ring.keys, ring.sums, ring.values, ring.origin, slots, past, output,
        query.stride(0), query.stride(2), key.stride(0), key.stride(2),
        value.stride(0), value.stride(2), gate.stride(0), *gate.stride()[2:],
        inputs.mixing.stride(0), memory_cache.stride(0), memory_cache.shape[0], rules.scale,
        RING=ring.size,
        BLOCK_W=power_of_2(width),
        BLOCK_G=power_of_2(sizes["GROUP"]),
        BLOCK_R=power_of_2(ring.size),
        maxnreg=128,
        **tiles.options,
        **sizes,
        **rules.gate_options,
        **launch_options(query.device),
    )  # fmt: skip
    return output
