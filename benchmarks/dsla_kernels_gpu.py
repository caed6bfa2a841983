"""Kernels of dual-state linear attention on one GPU, against flash-linear-attention and SDPA.

Llama-2-7B's shape: 32 heads of 128, two states. Decode: float32 states, updated in place by slots,
everything fused (gates, mixing, output norm), in CUDA graphs, on states that together exceed the
L2 cache. Its floor is the time to move the states once in and once out at the bandwidth of a
device copy, measured in the same run. The peer is the best composition from fla: one fused
recurrent call for a key of twice the width, whose gates, mixing and norm are PyTorch's.

Prefill: bfloat16, batch 1, both states; peers are SDPA and fla's chunk_gla with ONE state.

    python benchmarks/dsla_kernels_gpu.py [--out FOLDER]

The result file is written anew after each part, so that what was measured is kept whenever it
ends. Kernels are compiled before, in several processes. Without flash-linear-attention (the
package ``flash-linear-attention``) its columns are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from kernels_gpu import check, copy_bandwidth
from torch import Tensor
from torch.nn.functional import logsigmoid, rms_norm, scaled_dot_product_attention

from fxgraft import results
from fxgraft.kernels.linear_attention import reference
from fxgraft.kernels.linear_attention.deferred import Ring, deferred_step
from fxgraft.kernels.tuning import measure

HEADS, STATES, DIM = 32, 2, 128
TEMPERATURE, FLOOR, SCALE = 16.0, -1.0, DIM**-0.5
OPTIONS = {"scale": SCALE, "temperature": TEMPERATURE, "floor": FLOOR}
DTYPE = torch.bfloat16
DECODE_TARGETS = {1: 4.3e-6, 8: 24e-6, 64: 185e-6}
DECODE_RATIOS = {1: 5.0, 8: 3.0, 64: 1.3}
PREFILL_TARGETS = {8192: 0.45e-3, 32768: 1.7e-3}
BANDWIDTH_TARGET, DEFERRED_RATIO, RING = 0.96, 1.5, 16
_CACHE = 256e6  # more than an L2 cache holds
_FLA_JOBS = 8  # processes that compile fla's variants
fx = cast(Any, torch.ops).fxgraft


def main() -> None:
    """Measure, and write the result file after each part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    folder = parser.parse_args().out
    prepare()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.3f} TB/s", flush=True)
    rows = [results.row("device copy", bandwidth / 1e12, "TB/s", better="higher")]
    notes = [] if has_fla() else ["flash-linear-attention was not installed: no peer for decode"]
    for part in (decode_rows(bandwidth), deferred_rows(), prefill_rows(), fla_prefill_rows()):
        rows += part
        results.write("dsla_kernels_gpu", "dsla", rows, folder, notes=notes)


def prepare() -> None:
    """Compile all kernels, in processes of their own."""
    jobs: list[tuple[str, int]] = [("decode", batch) for batch in DECODE_TARGETS]
    jobs += [("prefill", 0), ("backward", 0)]
    if has_fla():
        jobs += [("fla decode", 0), *(("fla prefill", number) for number in range(_FLA_JOBS))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), context) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: tuple[str, int]) -> None:
    """Run the kernels of a job once: (kind, batch or number of the process)."""
    kind, number = job
    if kind == "decode":
        deferred_calls(number, 1)[0]()
        _decode_call(number, ours_in_place)()
    elif kind == "fla decode":
        _decode_call(1, fla_composition)()
    elif kind == "prefill":
        fx.linear_attention(*Tokens.make(1, 2048).arguments, **OPTIONS)
    elif kind == "backward":
        backward_seconds(Tokens.make(1, 2048), 1)
    else:
        _fla("chunk_gla")
        for tuner in _tuners():
            tuner.configs = tuner.configs[number::_FLA_JOBS] or tuner.configs[:1]
        chunk_gla(Tokens.make(1, 2048))
    torch.cuda.synchronize()


def _tuners() -> list[Any]:
    """Those of fla's kernels that are loaded."""
    from triton.runtime.autotuner import Autotuner

    found: dict[int, Any] = {}
    modules = [module for name, module in sys.modules.items() if name.startswith("fla.")]
    for value in [value for module in modules for value in vars(module).values()]:
        while hasattr(value, "fn"):
            if isinstance(value, Autotuner):
                found[id(value)] = value
            value = value.fn
    return list(found.values())


def has_fla() -> bool:
    """Whether flash-linear-attention is installed."""
    return importlib.util.find_spec("fla") is not None


def _fla(name: str) -> Callable[..., Any]:
    """A function of ``fla.ops.gla``."""
    return getattr(importlib.import_module("fla.ops.gla"), name)


@dataclass(frozen=True)
class Tokens:
    """Random tokens of one layer, [B, S, 32, 128] in bfloat16, gates [B, S, 32, 2, 128]."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    mixing: Tensor
    norm_weight: Tensor

    @staticmethod
    def make(batch: int, length: int) -> Tokens:
        """Logits around a half-life of some hundred tokens."""
        rows = batch, length, HEADS
        query, key, value = (torch.randn(*rows, DIM, dtype=DTYPE, device="cuda") for _ in range(3))
        gate = 4 + 2 * torch.randn(*rows, STATES, DIM, dtype=DTYPE, device="cuda")
        mixing = torch.tensor([0.4, 0.6], device="cuda")
        return Tokens(query, key, value, gate, mixing, torch.ones(HEADS, DIM, device="cuda"))

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What the op takes before the state."""
        return self.query, self.key, self.value, self.gate, self.mixing


def decode_rows(bandwidth: float) -> Iterator[results.Row]:
    """One token for each of 1 to 64 requests."""
    for batch, target in DECODE_TARGETS.items():
        name = f"decode, batch {batch}, fused gate and norm"
        check(name, decode_error(batch))
        ours = decode_seconds(batch, ours_in_place)
        floor = 2 * state_bytes(batch) / bandwidth
        print(f"{name} {ours * 1e6:.1f} us, {floor / ours:.0%} of the copy bandwidth", flush=True)
        yield results.row(name, ours * 1e6, "µs", target=target * 1e6, bound=("floor", floor * 1e6))
        if has_fla():
            peer = decode_seconds(batch, fla_composition)
            yield results.row(
                f"{name}: times faster than fla's fused_recurrent_gla of width 256", peer / ours,
                "×", target=DECODE_RATIOS[batch], better="higher",
            )  # fmt: skip
        if batch == max(DECODE_TARGETS):
            share = floor / ours
            yield results.row(
                f"{name}: of the copy bandwidth", share, "", target=BANDWIDTH_TARGET,
                better="higher", bound=("copy", 1.0),
            )  # fmt: skip


def deferred_rows() -> Iterator[results.Row]:
    """Steps that write the state every 16th token, without norm, against writing it always."""
    for batch in DECODE_TARGETS:
        immediate = decode_seconds(batch, ours_in_place)
        deferred = deferred_seconds(batch)
        print(f"deferred write, batch {batch}: {deferred * 1e6:.1f} us", flush=True)
        name = f"deferred write, R = {RING}, batch {batch}: times faster"
        target = DEFERRED_RATIO if batch == max(DECODE_TARGETS) else None
        yield results.row(name, immediate / deferred, "×", target=target, better="higher")


def deferred_seconds(batch: int) -> float:
    """Seconds per call, averaged over filling a ring once."""
    calls = deferred_calls(batch, max(2, int(_CACHE // state_bytes(batch)) + 1))
    # Neighbours in this order use different layers, so that no state is found in the cache.
    return measure([call for held in range(RING) for call in calls[held::RING]])


def deferred_calls(batch: int, layers: int) -> list[Callable[[], object]]:
    """Calls that fill a ring once, one layer's after the other's."""
    slots = torch.arange(1, batch + 1, device="cuda")
    calls: list[Callable[[], object]] = []
    for _ in range(layers):
        tokens, pool = Tokens.make(batch, 1), _pool(batch)
        ring = Ring.empty(pool, RING)
        for held in range(RING):
            past = torch.full((batch,), RING + held, dtype=torch.int32, device="cuda")
            given = (*tokens.arguments, pool, ring, slots, past)
            calls.append(partial(deferred_step, *given, **OPTIONS))
    return calls


def state_bytes(batch: int) -> int:
    """Of the states of one layer."""
    return batch * HEADS * STATES * DIM * DIM * 4


Decode = Callable[[Tokens, Tensor, Tensor, Tensor], Callable[[], object]]


def ours_in_place(
    tokens: Tokens, pool: Tensor, slots: Tensor, past: Tensor
) -> Callable[[], object]:
    """One launch."""
    return partial(
        fx.linear_attention_slots,
        *tokens.arguments,
        pool,
        slots,
        past,
        tokens.norm_weight,
        **OPTIONS,
    )


def fla_composition(
    tokens: Tokens, pool: Tensor, slots: Tensor, past: Tensor
) -> Callable[[], object]:
    """The two states as one of twice the key width; the state is copied back into the pool."""
    run, states = _fla("fused_recurrent_gla"), pool[1:].flatten(2, 3)
    weights = tokens.mixing.to(DTYPE).view(1, 1, 1, STATES, 1)

    def call() -> Tensor:
        decay = (logsigmoid(tokens.gate.float()) / TEMPERATURE).clamp(min=FLOOR).flatten(3)
        query = (tokens.query.unsqueeze(3) * weights).flatten(3)
        key = tokens.key.unsqueeze(3).expand(-1, -1, -1, STATES, -1).flatten(3)
        output, last = run(
            query, key, tokens.value, gk=decay, scale=SCALE, initial_state=states,
            output_final_state=True,
        )  # fmt: skip
        states.copy_(last)
        return rms_norm(output, (DIM,)) * tokens.norm_weight

    return call


def decode_seconds(batch: int, make: Decode) -> float:
    """Seconds per call, over enough layers that no state is found in the cache."""
    count = max(4, int(_CACHE // (2 * state_bytes(batch))) + 1)
    return measure([_decode_call(batch, make) for _ in range(count)])


def _decode_call(batch: int, make: Decode) -> Callable[[], object]:
    slots = torch.arange(1, batch + 1, device="cuda")
    past = torch.full((batch,), 9, dtype=torch.int32, device="cuda")
    return make(Tokens.make(batch, 1), _pool(batch), slots, past)


def _pool(batch: int) -> Tensor:
    return torch.randn(batch + 1, HEADS, STATES, DIM, DIM, device="cuda")


def decode_error(batch: int) -> float:
    """Relative error of one step, output and states, against float64."""
    tokens, pool = Tokens.make(batch, 1), _pool(batch)
    slots = torch.arange(1, batch + 1, device="cuda")
    past = torch.full((batch,), 9, dtype=torch.int32, device="cuda")
    wide = [part.double() for part in (*tokens.arguments, tokens.norm_weight)]
    run = cast(Any, reference.linear_attention)
    expected = run(*wide, state=pool[1:].double(), **OPTIONS)
    output = ours_in_place(tokens, pool, slots, past)()
    found = cast(Tensor, output), pool[1:]
    return max(_error(f, e) for f, e in zip(found, expected, strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def prefill_rows() -> Iterator[results.Row]:
    """Prompts of one request."""
    for length in (2048, *PREFILL_TARGETS):
        name = f"prefill, {length} tokens, both states"
        if length == 2048:
            check(name, prefill_error(length))
        tokens = Tokens.make(1, length)
        ours = measure([partial(fx.linear_attention, *tokens.arguments, **OPTIONS)] * 3)
        heads_first = [x.transpose(1, 2) for x in (tokens.query, tokens.key, tokens.value)]
        softmax = measure(
            [partial(cast(Any, scaled_dot_product_attention), *heads_first, is_causal=True)] * 3
        )
        flops = length * HEADS * (8 * DIM**2 + 6 * 64 * DIM)
        print(
            f"{name} {ours * 1e3:.3f} ms, {flops / ours / 1e12:.0f} TFLOP/s, SDPA "
            f"{softmax * 1e3:.3f} ms", flush=True,
        )  # fmt: skip
        yield milliseconds(name, ours, ("SDPA, causal", softmax), PREFILL_TARGETS.get(length))
        yield milliseconds(f"{name}: backward", backward_seconds(tokens), None, None)


def fla_prefill_rows() -> Iterator[results.Row]:
    """The longer prompts again, against fla, which tunes its kernels first."""
    if not has_fla():
        return
    for length in PREFILL_TARGETS:
        tokens = Tokens.make(1, length)
        ours = measure([partial(fx.linear_attention, *tokens.arguments, **OPTIONS)] * 3)
        peer = measure([partial(chunk_gla, tokens)] * 3)
        print(f"prefill, {length} tokens: fla's chunk_gla {peer * 1e3:.3f} ms", flush=True)
        name = f"prefill, {length} tokens, both states, again"
        yield milliseconds(name, ours, ("fla chunk_gla, one state", peer), None)


def chunk_gla(tokens: Tokens) -> object:
    """fla's chunkwise form with one of the two states."""
    decay = (logsigmoid(tokens.gate[:, :, :, 0].float()) / TEMPERATURE).clamp(min=FLOOR)
    return _fla("chunk_gla")(
        tokens.query, tokens.key, tokens.value, decay, scale=SCALE, output_final_state=True
    )


def milliseconds(
    name: str, seconds: float, peer: tuple[str, float] | None, target: float | None
) -> results.Row:
    """A row of times, given in seconds."""
    return results.row(
        name,
        seconds * 1e3,
        "ms",
        target=None if target is None else target * 1e3,
        peer=None if peer is None else (peer[0], peer[1] * 1e3),
    )


def prefill_error(length: int) -> float:
    """Relative error of outputs and last states against the recurrence in float64."""
    tokens = Tokens.make(1, length)
    found = fx.linear_attention(*tokens.arguments, **OPTIONS)
    wide = [part.double() for part in tokens.arguments]
    expected = cast(Any, reference.linear_attention)(*wide, **OPTIONS)
    return max(_error(f, e) for f, e in zip(found, expected, strict=True))


def backward_seconds(tokens: Tokens, repeats: int = 5) -> float:
    """Seconds of a backward pass, recomputation of the forward pass included."""
    leaves = [part.detach().requires_grad_() for part in tokens.arguments]
    times: list[float] = []
    for _ in range(repeats):
        output, _ = fx.linear_attention(*leaves, **OPTIONS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(output.sum(), leaves)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
