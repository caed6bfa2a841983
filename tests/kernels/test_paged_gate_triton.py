"""Heads that the Triton kernels of ``fxgraft::paged_attention`` suppress, against the reference."""

# The kernels' modules are imported only where they can run.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.kernels.paged_attention import reference
from tests.kernels._helpers import randn
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
NAMES = ("chosen", "gated", "key_sum_cache", "slots", "chosen_cache")


@dataclass
class Gated:
    """A call whose heads are scored and ranked.

    Attributes:
        call: the attention.
        score: "sums" of logits or "shares" of attention.
        keep, factor: of the op.
        gated: rows whose tokens are gated, the others are not; None for all.
    """

    call: Call
    score: str
    keep: int
    factor: float = 0.25
    gated: tuple[int, ...] | None = None
    chosen: float = 0.3

    def arguments(self, seed: int = 0) -> list[Tensor | None]:
        """Tensors in the op's order; sums of new requests are NaN, and unused flags set."""
        call, given = self.call, self.call.arguments(seed)
        batch, new = len(call.past), call.new
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(batch, new, generator=generator) < self.chosen
        gated = torch.ones(batch, new, dtype=torch.bool)
        if self.gated is not None:
            gated[[row for row in range(batch) if row not in self.gated]] = False
        if self.score == "sums":
            sums = randn(batch + 2, call.kv_heads, call.head_dim, dtype=torch.float32, seed=seed)
            slots = torch.randperm(batch, generator=generator) + 1
            sums[slots[torch.tensor(call.past) == 0]] = math.nan
            return [*given, chosen, gated, sums, slots, None]
        cache = given[3]
        assert cache is not None
        flags = torch.rand(cache.shape[0], call.page, generator=generator) < self.chosen
        return [*given, chosen, gated, None, None, flags | cache[:, 0, :, 0].isnan()]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the op."""
        scale = {"scale": self.call.head_dim**-0.5}
        return scale | self.call.options | {"keep": self.keep, "factor": self.factor}


def check(case: Gated, *, longest: int = -1, seed: int = 0) -> Tensor:
    """Compare output and states with the reference in the call's type; returns the output."""
    arguments = case.arguments(seed)
    wanted: Any = [None if x is None else x.clone() for x in arguments]
    expected = reference.paged_attention(*wanted, **case.options)
    given: Any = [None if x is None else copied(x) for x in arguments]
    output = kernels.paged_attention(*given, longest_past=longest, **case.options)
    active = [past >= 0 for past in case.call.past]
    assert output.transpose(1, 2).is_contiguous()
    assert not output[[not is_active for is_active in active]].any()
    assert torch.equal((output == 0).all(-1).cpu(), (expected == 0).all(-1))
    error = ERRORS[case.call.dtype]
    assert_near(output[active], expected[active].double(), error)
    for place in (3, 4, 12):
        if given[place] is not None:
            found, state = given[place].cpu(), wanted[place].double()
            assert torch.equal(found.isnan(), state.isnan())
            assert_near(found.nan_to_num(), state.nan_to_num(), error)
    if given[14] is not None:
        assert torch.equal(given[14].cpu(), wanted[14])
    return output


STEPS = [
    Call((0, 15, -1, 16, 140), kv_heads=3, head_dim=80, angles=80),
    Call((300, 3), kv_heads=8, head_dim=64, angles=32, options={"interleaved": True}),
    Call((0, 200, -1), kv_heads=2, group=3, head_dim=80, angles=80),
    Call((140, 33), kv_heads=5, head_dim=64, angles=64, dtype=torch.bfloat16, packed=True),
    Call((90, 270), kv_heads=2, group=4, angles=64, dtype=torch.bfloat16),
    Call((130, 1), kv_heads=3, value_dim=40, dtype=torch.float16),
    Call((300, 5), group=2, has_sinks=True, options={"window": 64, "softcap": 2.0}),
]


@pytest.mark.parametrize("factor", [0.25, 0.0])
@pytest.mark.parametrize("score", ["sums", "shares"])
@pytest.mark.parametrize("call", STEPS, ids=lambda call: f"{call.head_dim}-{call.group}")
def test_step(call: Call, score: str, factor: float) -> None:
    """Requests of any length, new ones and none, one part and several."""
    heads = call.kv_heads * call.group
    check(Gated(call, score, keep=heads // 2, factor=factor, chosen=0.2))


@pytest.mark.parametrize("score", ["sums", "shares"])
@pytest.mark.parametrize("group", [1, 3])
def test_no_head_or_all_heads_stay(score: str, group: int) -> None:
    call = Call((70, 20), group=group, kv_heads=3)
    case = Gated(call, score, keep=0, factor=0.0, chosen=0.0)
    given: Any = [None if x is None else copied(x) for x in case.arguments()]
    assert not kernels.paged_attention(*given, **case.options).any()
    stays = check(replace(case, keep=3 * group))
    plain: Any = [None if x is None else copied(x) for x in call.arguments()]
    assert torch.equal(stays, kernels.paged_attention(*plain, scale=call.head_dim**-0.5))


@pytest.mark.parametrize("new", [1, 19])
@pytest.mark.parametrize("score", ["sums", "shares"])
@pytest.mark.parametrize("group", [1, 2])
def test_rows_that_are_not_gated_keep_their_bits(score: str, new: int, group: int) -> None:
    """Rows without an image among them, and chosen tokens."""
    call = Call((140, 0, 33), new=new, group=group, kv_heads=3, angles=64)
    case = Gated(call, score, keep=1, gated=(1,), chosen=0.4)
    output = check(case)
    plain: Any = [None if x is None else copied(x) for x in call.arguments()]
    expected = kernels.paged_attention(*plain, scale=call.head_dim**-0.5)
    assert torch.equal(output[[0, 2]], expected[[0, 2]])
    chosen = case.arguments()[10]
    assert chosen is not None
    kept = chosen[1].to(output.device)
    assert torch.equal(output[1][:, kept], expected[1][:, kept])
    assert bool(kept.all()) or not torch.equal(output[1], expected[1])


@pytest.mark.parametrize("new", [1, 5])
def test_equal_scores_go_to_the_lower_head(new: int) -> None:
    """Without a chosen key all scores are 0."""
    call = Call((0, 20), new=new, kv_heads=5)
    case = Gated(call, "sums", keep=2, factor=0.0, chosen=0.0)
    given: Any = [None if x is None else copied(x) for x in case.arguments()]
    given[12].zero_()
    output = kernels.paged_attention(*given, **case.options)
    assert (output[:, :2] != 0).any(-1).all()
    assert not output[:, 2:].any()


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_nan_is_the_lowest_score(new: int, factor: float) -> None:
    """Of one head and row; other rows do not notice."""
    case = Gated(Call((40, 20), new=new, kv_heads=4), "sums", 3, factor, chosen=0.0)
    given: Any = [None if x is None else copied(x) for x in case.arguments()]
    clean = [None if x is None else x.clone() for x in given]
    given[12][given[13][0], 1] = math.nan
    output = kernels.paged_attention(*given, **case.options)
    expected = kernels.paged_attention(*clean, **case.options)
    plain: Any = [None if x is None else copied(x) for x in case.call.arguments()]
    whole = kernels.paged_attention(*plain, scale=case.options["scale"])
    assert torch.equal(output[1], expected[1])
    assert torch.equal(output[0, [0, 2, 3]], whole[0, [0, 2, 3]])
    assert torch.allclose(output[0, 1], factor * whole[0, 1], rtol=1e-5)


PROMPTS = [
    Call((0, -1, 0), new=37, kv_heads=3, head_dim=80, angles=80),
    Call((0, 20, 7), new=70, kv_heads=2, group=2, angles=64),
    Call((63, 5), new=40, kv_heads=4, angles=20, dtype=torch.bfloat16),
    Call((40, 0), new=3, kv_heads=2, value_dim=72, head_dim=128, group=2, dtype=torch.float16),
    Call((9, 50), new=33, options={"window": 20, "softcap": 3.0}, has_sinks=True, group=2),
]


@pytest.mark.parametrize("score", ["sums", "shares"])
@pytest.mark.parametrize("call", PROMPTS, ids=lambda call: f"{call.head_dim}-{call.new}")
def test_prompt(call: Call, score: str) -> None:
    """Chunks behind a past and prompts without one, by the library's attention and by ours."""
    heads = call.kv_heads * call.group
    longest = max(call.past)
    for factor in (0.0, 0.25):
        check(Gated(call, score, keep=heads // 2, factor=factor), longest=longest)


@pytest.mark.parametrize("score", ["sums", "shares"])
def test_prompt_equals_steps(score: str) -> None:
    case = Gated(Call((70, 10), new=4, group=2, angles=64), score, keep=2)
    given: Any = [None if x is None else copied(x) for x in case.arguments()]
    again: Any = [None if x is None else x.clone() for x in given]
    together = kernels.paged_attention(*given, **case.options)
    for token in range(case.call.new):
        per_token = slice(token, token + 1)
        inputs: Any = list(again)
        for place in (0, 1, 2, 7, 8):
            inputs[place] = again[place][:, :, per_token]
        inputs[6] = again[6] + token
        for place in (10, 11):
            inputs[place] = again[place][:, per_token]
        step = kernels.paged_attention(*inputs, **case.options)
        assert_near(step, together[:, :, per_token].cpu().double(), 1e-5)
    for place in (12, 14):
        if given[place] is not None:
            found, state = given[place].double().cpu(), again[place].double().cpu()
            assert_near(found, state, 1e-5)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("score", ["sums", "shares"])
@pytest.mark.parametrize("group", [1, 2])
def test_parts_of_a_row_do_not_matter(
    score: str, splits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = kernels.decode_config
    few = {"splits": splits, "least": 64, "longest": 128}
    monkeypatch.setattr(kernels, "decode_config", lambda *sizes: replace(chosen(*sizes), **few))
    check(Gated(Call((300, 128, 129, 5, -1), kv_heads=2, group=group), score, keep=1, chosen=0.1))


def test_which_gates_are_taken() -> None:
    from fxgraft.kernels.paged_attention.gate import Gate

    query = torch.empty(1, 4, 1, 64)
    flags, slots = torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)

    def is_taken(sums: Tensor, heads: int = 4) -> bool:
        gate = Gate(flags, flags, sums, slots, None, 1, 0.0)
        many = query[:, :1].expand(1, heads, 1, 64)
        return kernels.supports(many, query, query, None, gate)

    assert is_taken(torch.empty(3, 4, 64))
    assert not is_taken(torch.empty(3, 4, 64, dtype=torch.float64))
    assert not is_taken(torch.empty(3, 64, 4).mT)
    assert not is_taken(torch.empty(3, 4, 64), 132)


@pytest.mark.skipif(INTERPRETED, reason="a graph is of a GPU")
@pytest.mark.parametrize("score", ["sums", "shares"])
def test_one_graph_serves_any_choice(score: str) -> None:
    """Lengths, flags and states are read when the graph is replayed."""
    call = Call((900, 33, 64), group=1, kv_heads=8, dtype=torch.bfloat16, angles=64)
    case = Gated(call, score, keep=3, chosen=0.0)
    given: Any = [None if x is None else copied(x) for x in case.arguments()]
    other: Any = [None if x is None else copied(x) for x in replace(case, gated=(0,)).arguments(3)]
    kernels.paged_attention(*given, **case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernels.paged_attention(*given, **case.options)
    graph.replay()
    first = output.clone()
    assert torch.equal(first, kernels.paged_attention(*given, **case.options))
    given[11].copy_(other[11])
    graph.replay()
    assert torch.equal(output[0], first[0])
    assert not torch.equal(output, first)
