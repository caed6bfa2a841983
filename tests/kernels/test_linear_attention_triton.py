"""The Triton kernels of ``fxgraft::linear_attention`` against the reference in float64."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.linear_attention import reference
from fxgraft.kernels.linear_attention_slots import reference as slots_reference
from tests.kernels._helpers import randn
from tests.kernels._interpreter import DEVICE, RUNS_KERNELS, prepare
from tests.kernels._linear_attention import Call, check_deferred, check_dropped, error, wide

prepare()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS_KERNELS, reason="there is no GPU, and this is no interpreter"),
]


def _module(name: str) -> Any:
    return importlib.import_module(f"fxgraft.kernels.linear_attention.{name}")


kernels: Any = _module("triton") if RUNS_KERNELS else None
training: Any = _module("training") if RUNS_KERNELS else None
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_NONE: Mapping[str, Any] = {}
SQRT = {"write_scale": "sqrt"}
CALLS = {
    "DSLA": Call(batch=2, head_dim=64),
    "odd sizes": Call(
        batch=2, group=3, kv_heads=1, states=3, head_dim=20, value_dim=37, with_norm=True,
        with_state=True, options=SQRT,
    ),
    "states per query head": Call(
        group=2, state_heads=4, gate_dim=1, head_dim=32, with_state=True, options={"floor": -0.5}
    ),
    "one gate for all": Call(batch=2, kv_heads=3, state_heads=1, gate_dim=1, head_dim=16),
    "GLA": Call(states=1, head_dim=32, options={"floor": -0.25}),
}  # fmt: skip
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
UNBOUNDED = {"floor": None, "temperature": 1.0}


def _device(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in tensors.items()}


def _check(
    call: Call, extra: Mapping[str, Any] = _NONE, dtype: torch.dtype = torch.float32
) -> None:
    """Compare outputs and last states with the reference."""
    tensors = _device({**call.tensors(dtype), **extra})
    found = kernels.linear_attention(**tensors, **call.keywords)
    expected = reference.linear_attention(**cast(Any, wide(tensors)), **call.keywords)
    assert found[0].dtype == dtype
    assert found[0].is_contiguous()
    for result, oracle in zip(found, expected, strict=True):
        assert error(result, oracle) < ERRORS[dtype]


@every_call
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_outputs_and_states(call: Call, length: int) -> None:
    _check(call.longer(length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 3, 150])
def test_16_bit_inputs(dtype: torch.dtype, length: int) -> None:
    _check(CALLS["odd sizes"].longer(length), dtype=dtype)


@pytest.mark.parametrize("length", [5, 70])
def test_unbounded_gates_take_the_recurrent_kernel(length: int) -> None:
    call = Call(length=length, head_dim=16, options=UNBOUNDED)
    gate = torch.where(call.tensors()["gate"] > 0, 60.0, -60.0)
    _check(call, {"gate": gate})


@pytest.mark.parametrize("length", [6, 130])
@pytest.mark.parametrize("left", [False, True])
def test_padding_holds_anything(length: int, left: bool) -> None:
    call = Call(batch=2, length=length, head_dim=16, options=SQRT)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 2] = False
    mask = mask if left else mask.flip(1)
    tensors = call.tensors()
    poison = {
        n: tensors[n].masked_fill(~mask[:, :, None, None], math.nan) for n in ("key", "value")
    }
    # The reference selects padding away before it counts, as the op does.
    _check(call, {"key_mask": mask, **poison})


@pytest.mark.parametrize("bounds", [(0, 5), (0, 3, 3, 20, 21), (0, 1, 65, 140, 140)])
def test_packed_sequences(bounds: tuple[int, ...]) -> None:
    call = Call(length=bounds[-1], group=2, head_dim=16, with_norm=True)
    state = randn(len(bounds) - 1, 2, 2, 16, 16, dtype=torch.float32)
    _check(call, {"cu_seqlens": torch.tensor(bounds), "state": state})


def test_strided_inputs() -> None:
    """Query, key and value as parts of one projection."""
    call = Call(batch=2, length=70, head_dim=16)
    mixed = randn(2, 70, 6 * 16, dtype=torch.float32).unflatten(2, (6, 16))
    parts = dict(zip(("query", "key", "value"), mixed.split(2, 2), strict=True))
    for length in (1, 70):
        cut = {name: part[:, :length] for name, part in parts.items()}
        gate = call.tensors()["gate"][:, :length]
        _check(call.longer(length), {"gate": gate, **cut})


@pytest.mark.parametrize("length", [1, 3, 70])
@pytest.mark.parametrize("with_norm", [False, True])
def test_slots_in_place(length: int, with_norm: bool) -> None:
    """Slots in any order; rows without a request, or without a slot, change nothing."""
    call = Call(batch=5, length=length, group=2, head_dim=16, value_dim=40, with_norm=with_norm)
    tensors = _device(call.tensors())
    pool = randn(8, 2, 2, 16, 40, dtype=torch.float32).to(DEVICE)
    pool[5] = math.nan  # taken by a request that begins
    slots = torch.tensor([6, 0, 5, -1, 3], device=DEVICE)
    past = torch.tensor([9, -1, 0, 4, 1], dtype=torch.int32, device=DEVICE)
    expected_pool, found_pool = pool.double(), pool.clone()
    expected = slots_reference.linear_attention_slots(
        **cast(Any, wide(tensors)), memory_cache=expected_pool, slots=slots, past=past,
        **call.keywords,
    )  # fmt: skip
    found = kernels.over_slots(
        **tensors, memory_cache=found_pool, slots=slots, past=past, **call.keywords
    )
    assert error(found, expected) < 1e-5
    assert not found[[1, 3]].any()
    for slot in (6, 5, 3):
        assert error(found_pool[slot], expected_pool[slot]) < 1e-5
    untouched = [0, 1, 2, 4, 7]
    assert torch.equal(found_pool[untouched], pool[untouched])


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_norm_over_several_programs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "value_columns", lambda *sizes: columns)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    call = Call(batch=2, length=3, group=2, head_dim=16, value_dim=50, with_norm=True)
    _check(call)
    _check(call)  # the counters are 0 again


@pytest.mark.parametrize(("columns", "loops"), [(8, 1), (16, 1), (16, 2), (16, 4), (64, 1)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_one_token_by_any_tiles(
    columns: int, loops: int, with_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for a head or several, which take their columns at once or not."""
    tiles = kernels.DecodeTiles(columns, loops, -(-50 // (columns * loops)), columns, 1)
    monkeypatch.setattr(kernels.DecodeTiles, "of", lambda *sizes: tiles)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    call = Call(
        batch=2, length=1, group=3, head_dim=16, value_dim=50, with_norm=with_norm, with_state=True
    )
    mask = torch.tensor([[True], [False]])
    for _ in range(2):  # the counters are 0 again
        _check(call, {"key_mask": mask})


@pytest.mark.parametrize("chunk", [64, 128])
def test_16_bit_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that forget all at once, or nothing, in sequences that end within a chunk."""
    monkeypatch.setattr(kernels, "CHUNK_TILES", kernels.ChunkTiles(chunk))
    call = Call(length=300, group=2, head_dim=32, options=SQRT, spread=40.0)
    bounds = torch.tensor([0, 5, 5, 205, 300])
    state = randn(4, 2, 2, 32, 32, dtype=torch.float32)
    _check(call, {"cu_seqlens": bounds, "state": state}, torch.bfloat16)


@every_call
@pytest.mark.parametrize("length", [3, 70])
def test_gradients(call: Call, length: int) -> None:
    tensors = _device(replace(call, with_state=True).longer(length).tensors())
    found = _gradients(training.linear_attention, tensors, call)
    expected = _gradients(reference.linear_attention, wide(tensors), call)
    for name, gradient in found.items():
        assert error(gradient, expected[name]) < 1e-4, name


def test_gradients_of_packed_sequences() -> None:
    call = Call(length=140, group=2, head_dim=16, options=SQRT)
    state = randn(4, 2, 2, 16, 16, dtype=torch.float32)
    tensors = _device({**call.tensors(), "state": state})
    bounds = torch.tensor([0, 3, 3, 100, 140], device=DEVICE)
    found = _gradients(training.linear_attention, tensors, call, cu_seqlens=bounds)
    expected = _gradients(reference.linear_attention, wide(tensors), call, cu_seqlens=bounds)
    for name, gradient in found.items():
        assert error(gradient, expected[name]) < 1e-4, name


def test_gradients_of_bfloat16() -> None:
    call = Call(batch=2, length=100, group=2, head_dim=32, with_norm=True)
    tensors = _device(call.tensors(torch.bfloat16))
    found = _gradients(training.linear_attention, tensors, call)
    expected = _gradients(reference.linear_attention, wide(tensors), call)
    for name, gradient in found.items():
        # Two bfloat16 products of opposite sign make the gradient of a gate.
        assert error(gradient, expected[name]) < 4e-2, name


def test_extreme_gates_stay_finite() -> None:
    call = Call(length=200, kv_heads=1, head_dim=16, options={"temperature": 1.0} | SQRT)
    tensors = _device(call.tensors())
    tensors["gate"] = torch.where(tensors["gate"] > 0, 60.0, -60.0)
    gradients = _gradients(training.linear_attention, tensors, call)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    _check(call, {"gate": tensors["gate"]})


def _gradients(
    function: Any, tensors: dict[str, Tensor], call: Call, **extra: Any
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output, last = function(**leaves, **extra, **call.keywords)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    (output * weights).sum().add(last.square().sum()).backward()
    return {name: cast(Tensor, leaf.grad) for name, leaf in leaves.items()}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_deferred_write(size: int) -> None:
    check_deferred(kernels.deferred_step, size, DEVICE)


def test_dropped_tokens() -> None:
    check_dropped(kernels.deferred_step, 2, DEVICE)


def test_what_the_kernels_do_not_take() -> None:
    x, large = torch.empty(1, 1, 1, 64), torch.empty(1, 1, 1, 512)
    assert kernels.refusal(x, x, x) is None
    assert "heads of 512 channels" in kernels.refusal(large, large, x)
    assert "float64" in kernels.refusal(x.double(), x.double(), x.double())


@pytest.mark.parametrize("half_life", [4096.0, 16384.0])
def test_long_half_lives_keep_their_digits(half_life: float) -> None:
    """The gate's logarithm near 1 decides how much is left after thousands of tokens."""
    logit = -math.log(2 ** (16 / half_life) - 1)
    length = 100
    tensors = Call(length=length, kv_heads=1, head_dim=16).tensors()
    tensors["gate"] = torch.full((1, length, 1, 2, 16), logit)
    call = Call(kv_heads=1, head_dim=16, options={"floor": None})
    given = _device(tensors)
    found, _ = kernels.linear_attention(**given, **call.keywords)
    expected, _ = reference.linear_attention(**cast(Any, wide(given)), **call.keywords)
    assert error(found, expected) < 1e-6
