"""The Triton kernels of ``fxgraft::paged_attention`` against the reference in float64."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.paged_attention import reference
from tests.kernels._interpreter import INTERPRETED, RUNS_KERNELS, prepare
from tests.kernels._paged_calls import ERRORS, Call, assert_near, copied

prepare()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS_KERNELS, reason="there is no GPU, and this is no interpreter"),
]
kernels: Any = (
    importlib.import_module("fxgraft.kernels.paged_attention.triton") if RUNS_KERNELS else None
)


def check(call: Call, *, longest: int = -1) -> Tensor:
    """Compare output and caches with the reference; returns the output."""
    arguments = call.arguments()
    options = {"scale": call.head_dim**-0.5} | call.options
    wide: Any = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    ]
    expected = reference.paged_attention(*wide, **options)
    given: Any = [None if x is None else copied(x) for x in arguments]
    output = kernels.paged_attention(*given, longest_past=longest, **options)
    assert output.transpose(1, 2).is_contiguous()
    assert output.dtype == call.dtype
    assert not output.isnan().any()
    active = [past >= 0 for past in call.past]
    assert not output[[not is_active for is_active in active]].any()
    assert_near(output[active], expected[active], ERRORS[call.dtype])
    for kind in (3, 4):
        cache, wanted = given[kind].cpu(), cast(Tensor, wide[kind])
        assert torch.equal(cache.isnan(), wanted.isnan())
        assert_near(cache.nan_to_num(), wanted.nan_to_num(), ERRORS[call.dtype])
    return output


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        (torch.float32, 1, 64),
        (torch.float32, 4, 80),
        (torch.bfloat16, 1, 80),
        (torch.bfloat16, 4, 64),
        (torch.float16, 1, 64),
        (torch.float16, 4, 80),
    ],
)
def test_step(dtype: torch.dtype, group: int, head_dim: int) -> None:
    past = (0, 15, -1, 16, 140)
    check(Call(past, group=group, head_dim=head_dim, dtype=dtype, angles=head_dim))


@pytest.mark.parametrize(
    "call",
    [
        Call((300, 30), group=2, head_dim=128, page=32),
        Call((130,), head_dim=96, value_dim=40, kv_heads=3),
        Call((65, 70), group=8, head_dim=256, dtype=torch.bfloat16, kv_heads=1),
        Call((90,), group=20, kv_heads=1, value_dim=32),
        Call((300, 75), group=8, dtype=torch.bfloat16, page=8),
        Call((200, 64), group=4, dtype=torch.bfloat16, page=32, options={"window": 70}),
        Call((70, 5), group=1, head_dim=256, dtype=torch.bfloat16, kv_heads=1),
        Call((150, 64), packed=True, angles=32, options={"interleaved": True}),
        Call((150, 64), group=3, packed=True, angles=48),
        Call((300, 5, -3), has_sinks=True, options={"window": 129}),
        Call((300, 5), group=4, has_sinks=True, options={"window": 64, "softcap": 2.0}),
        Call((200, 0), group=1, options={"softcap": 1.5, "window": 1}),
    ],
    ids=lambda call: str(call.options or call.head_dim),
)
def test_step_with_rules(call: Call) -> None:
    check(call)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_step_does_not_depend_on_other_rows(group: int, dtype: torch.dtype) -> None:
    """Bit for bit; in float32 not even on how many there are."""
    options: dict[str, Any] = {"scale": 0.125}
    many = Call((140, 3, 270), group=group, dtype=dtype)
    given: Any = [None if x is None else copied(x) for x in many.arguments()]
    together = kernels.paged_attention(*given, **options)[0]
    given[6][1:] = -1
    assert torch.equal(together, kernels.paged_attention(*given, **options)[0])
    one: Any = [x if i in (3, 4) or x is None else x[:1] for i, x in enumerate(given)]
    alone = kernels.paged_attention(*one, **options)[0]
    if dtype == torch.float32:
        assert torch.equal(together, alone)
    assert_near(together, alone.cpu().double(), ERRORS[dtype])


def test_rows_longer_than_the_longest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than splits, in a batch that gives each row one split."""
    chosen = kernels.decode_config
    short = {"splits": 1, "least": 64, "longest": 128}
    monkeypatch.setattr(kernels, "decode_config", lambda *sizes: replace(chosen(*sizes), **short))
    check(Call((300, 128, 129, 5, -1), angles=64, kv_heads=1))
    check(Call((400, 129), group=4, dtype=torch.bfloat16, options={"window": 200}))


@pytest.mark.parametrize(
    ("dtype", "group", "past"),
    [
        (torch.float32, 3, (0, -1)),
        (torch.bfloat16, 1, (0, 0)),
        (torch.float16, 3, (0,)),
    ],
)
def test_prompt_without_past(dtype: torch.dtype, group: int, past: tuple[int, ...]) -> None:
    call = Call(past, new=19, group=group, dtype=dtype, angles=64, packed=True)
    output = check(call, longest=0)
    assert_near(check(call), output.cpu().double(), ERRORS[dtype])


@pytest.mark.parametrize(
    "call",
    [
        Call((100, -1, 7, 0), new=33, group=2, angles=64),
        Call((63, 64), new=70, head_dim=80, dtype=torch.bfloat16, angles=20),
        Call((40,), new=5, head_dim=128, value_dim=72, group=2, dtype=torch.float16, page=32),
        Call((40, 3), new=3, head_dim=256, kv_heads=1, dtype=torch.bfloat16),
        Call((200, 31), new=70, options={"window": 50}, has_sinks=True),
        Call((200, 31), new=70, options={"window": 90, "softcap": 3.0}, dtype=torch.bfloat16),
        Call((9,), new=80, options={"window": 3, "interleaved": True}, angles=32, group=2),
        Call((0, 0), new=40, has_sinks=True),
    ],
    ids=lambda call: str(call.options or call.head_dim),
)
def test_prompt_behind_a_past(call: Call) -> None:
    check(call, longest=max(call.past))


def test_prompt_equals_steps() -> None:
    """A prompt in one call, and token by token."""
    call = Call((70, 10), new=4, group=2, angles=64, options={"window": 40})
    options = {"scale": 0.125} | call.options
    given: Any = [None if x is None else copied(x) for x in call.arguments()]
    again: Any = [None if x is None else x.clone() for x in given]
    together = kernels.paged_attention(*given, **options)
    for token in range(call.new):
        new: list[Any] = [x[:, :, token : token + 1] for x in (*again[:3], *again[7:9])]
        past = again[6] + token
        inputs: Any = (*new[:3], *again[3:6], past, *new[3:], again[9])
        step = kernels.paged_attention(*inputs, **options)
        assert_near(step, together[:, :, token : token + 1].cpu().double(), 1e-5)
    assert torch.equal(given[3].nan_to_num(), again[3].nan_to_num())


def test_unsupported_inputs() -> None:
    def is_taken(*shape: int, dtype: torch.dtype = torch.float32, angles: int = 8) -> bool:
        query = torch.empty(1, *shape, dtype=dtype)
        return kernels.supports(query, query[:, :1], query[:, :1], torch.empty(1, 1, 1, angles))

    assert is_taken(4, 1, 64)
    assert not is_taken(4, 1, 64, dtype=torch.float64)
    assert not is_taken(4, 1, 512)
    assert not is_taken(4, 0, 64)
    assert not is_taken(256, 1, 128)
    assert not is_taken(4, 1, 64, angles=7)
    assert not is_taken(4, 1, 64, angles=66)
    turned = torch.empty(1, 4, 64, 2).transpose(2, 3)
    assert not kernels.supports(turned, turned, turned, None)


@pytest.mark.skipif(INTERPRETED, reason="a graph is of a GPU")
def test_step_in_a_cuda_graph() -> None:
    """One graph serves any lengths that its table holds."""
    call = Call((900, 33, 64), group=4, dtype=torch.bfloat16, angles=64, head_dim=64)
    options: dict[str, Any] = {"scale": 0.125}
    given: Any = [None if x is None else copied(x) for x in call.arguments()]
    eager = kernels.paged_attention(*given, **options)
    graph = torch.cuda.CUDAGraph()
    lengths = given[6].clone()
    given[6].fill_(-1)
    with torch.cuda.graph(graph):
        output = kernels.paged_attention(*given, **options)
    graph.replay()
    assert not output.any()
    given[6].copy_(lengths)
    for _ in range(3):
        graph.replay()
        assert torch.equal(output, eager)
