"""Fusions of ``optimize`` on small modules: what they must find, and what they must leave."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from fxgraft.passes.optimize import Optimize
from fxgraft.transform import apply
from tests.passes._optimize import (
    HEADS,
    HIDDEN,
    WIDTH,
    Binary,
    Unary,
    kind,
    optimize,
    optimized,
    trace,
    trace_with,
)


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NORMS: dict[str, Binary] = {
    "weight first": lambda x, w: w * norm(x),
    "weight last": lambda x, w: norm(x) * w,
    "offset": lambda x, w: norm(x) * (1.0 + w),
    "product as square": lambda x, w: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
    "division by root": lambda x, w: w * (x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)),
    "power": lambda x, w: torch.pow(1e-5 + x.pow(2).mean(2, keepdim=True), -0.5) * x * w,
    "library": lambda x, w: nn.functional.rms_norm(x, (HIDDEN,), w, 1e-6),
}


@pytest.mark.parametrize("function", NORMS.values(), ids=NORMS)
def test_norms(function: Binary) -> None:
    assert optimize(trace_with(torch.rand(HIDDEN), function)) == {"fxgraft.rms_norm": 1}


def test_norm_without_weight_and_norm_of_a_norm() -> None:
    assert optimize(trace(norm)) == {"fxgraft.rms_norm": 1}
    assert optimize(trace(lambda x: norm(norm(x) * 2))) == {"fxgraft.rms_norm": 2, "aten.mul": 1}


OUTSIDE_WEIGHTS: dict[str, tuple[Binary, Tensor]] = {
    "two dimensions": (lambda x, w: norm(x) * w, torch.rand(5, HIDDEN)),
    "read twice": (lambda x, w: norm(x) + norm(x) * w, torch.rand(HIDDEN)),
}


@pytest.mark.parametrize(("function", "weight"), OUTSIDE_WEIGHTS.values(), ids=OUTSIDE_WEIGHTS)
def test_a_weight_that_the_op_cannot_take_stays_outside(function: Binary, weight: Tensor) -> None:
    found = optimize(trace_with(weight, function, "batch", 5, HIDDEN))
    assert (found["fxgraft.rms_norm"], found["aten.mul"], found["aten.rsqrt"]) == (1, 1, 0)


NO_NORMS: dict[str, Unary] = {
    "other dimension": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "other power": lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6),
    "other numerator": lambda x: x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("function", NO_NORMS.values(), ids=NO_NORMS)
def test_what_is_no_rms_norm(function: Unary) -> None:
    assert not optimize(trace(function))["fxgraft.rms_norm"]


def test_centred_norm_is_a_layer_norm() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
        return w * (centred * torch.rsqrt(variance + 1e-5))

    assert optimize(trace_with(torch.rand(HIDDEN), function)) == {"aten.layer_norm": 1}


NARROW_NORMS: dict[str, tuple[Binary, torch.dtype, int]] = {
    "llama": (lambda x, w: w * norm(x.float()).to(x.dtype), torch.bfloat16, 0),
    "gemma": (lambda x, w: (norm(x.float()) * (1.0 + w.float())).type_as(x), torch.float32, 3),
    "t5": (lambda x, w: (x * norm_root(x.float())).to(x.dtype) * w, torch.bfloat16, 0),
}


@pytest.mark.parametrize(("function", "dtype", "casts"), NARROW_NORMS.values(), ids=NARROW_NORMS)
def test_narrow_norms_keep_their_order_of_casts(
    function: Binary, dtype: torch.dtype, casts: int
) -> None:
    weight = torch.rand(HIDDEN).to(torch.bfloat16)
    program = trace_with(weight, function, dtype=torch.bfloat16)
    after = apply(program, Optimize(fold_constants=False))
    calls = [node for node in after.graph.nodes if node.op == "call_function"]
    [fused] = [node for node in calls if kind(node) == "fxgraft.rms_norm"]
    assert fused.args[0].meta["val"].dtype == dtype
    assert len(calls) == 1 + casts
    x = torch.randn(4, 7, HIDDEN).to(torch.bfloat16)
    assert torch.equal(after(x)[0], program(x)[0])


def norm_root(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def frequencies(x: Tensor, rotated: int, sequence: int = 2) -> Tensor:
    """Angles [S, R / 2]."""
    positions = torch.arange(x.shape[sequence], dtype=torch.float32)
    return torch.outer(positions, 10.0 ** -torch.arange(rotated // 2))


def halves_swapped(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), -1)


def neighbours_swapped(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def llama_rotary(x: Tensor) -> Tensor:
    angles = torch.cat((f := frequencies(x, WIDTH), f), -1)[None, None]
    return x * angles.cos() + halves_swapped(x) * angles.sin()


def turning_back(x: Tensor) -> Tensor:
    angles = torch.cat((f := frequencies(x, WIDTH), f), -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((second, -first), -1) * angles.sin()


def as_difference(x: Tensor) -> Tensor:
    angles = torch.cat((f := frequencies(x, WIDTH), f), -1)
    first, second = x.chunk(2, -1)
    return angles.cos() * x - torch.cat((second, -first), -1) * angles.sin()


def partial_rotary(x: Tensor) -> Tensor:
    angles = torch.cat((f := frequencies(x, 4), f), -1)[None, None]
    turned, rest = x[..., :4], x[..., 4:]
    return torch.cat((turned * angles.cos() + halves_swapped(turned) * angles.sin(), rest), -1)


def cohere_rotary(x: Tensor) -> Tensor:
    angles = frequencies(x, WIDTH).repeat_interleave(2, dim=-1)[None, None]
    return x * angles.cos() + neighbours_swapped(x) * angles.sin()


def gptj_rotary(x: Tensor) -> Tensor:
    """Sequence first, as GPT-J has it; x comes in heads first."""
    angles = frequencies(x, 4).repeat_interleave(2, dim=-1)[None, :, None]
    x = x.transpose(1, 2)
    turned, rest = x[..., :4], x[..., 4:]
    turned = turned * angles.cos() + neighbours_swapped(turned) * angles.sin()
    return torch.cat((turned, rest), -1).permute(0, 2, 1, 3)


def gpt_oss_rotary(x: Tensor) -> Tensor:
    cos, sin = (f := frequencies(x, WIDTH)[None, None]).cos(), f.sin()
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def deepseek_rotary(x: Tensor) -> Tensor:
    """Neighbouring channels in, halves out."""
    cos, sin = (f := frequencies(x, WIDTH)[None, None]).cos(), f.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def complex_rotary(x: Tensor) -> Tensor:
    f = frequencies(x, WIDTH)
    circle = torch.polar(torch.ones_like(f), f)[None, None]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * circle).flatten(3).type_as(x)


ROTARIES: dict[str, tuple[Unary, bool]] = {
    "llama": (llama_rotary, False),
    "turning back": (turning_back, False),
    "as a difference": (as_difference, False),
    "partial": (partial_rotary, False),
    "cohere": (cohere_rotary, True),
    "gpt-j": (gptj_rotary, True),
    "gpt-oss": (gpt_oss_rotary, False),
    "deepseek": (deepseek_rotary, False),
    "complex": (complex_rotary, True),
}


@pytest.mark.parametrize(("function", "interleaved"), ROTARIES.values(), ids=ROTARIES)
def test_rotary(function: Unary, interleaved: bool) -> None:
    after = optimized(trace(function, "batch", HEADS, "sequence", WIDTH))
    calls = [n for n in after.graph.nodes if n.op == "call_function"]
    [fused] = [n for n in calls if kind(n) == "fxgraft.rotary"]
    assert bool(fused.kwargs.get("interleaved")) == interleaved
    assert fused.args[1].meta["val"].dim() == 4
    kinds = Counter(map(kind, calls))
    assert not kinds["aten.add"] + kinds["aten.sub"] + kinds["aten.polar"] + kinds["aten.stack"]
    if function is not deepseek_rotary:
        assert after.output_nodes["output"] is fused


def test_rotary_in_bfloat16_casts_as_before() -> None:
    def function(x: Tensor) -> Tensor:
        return llama_rotary(x.float()).to(x.dtype)

    program = trace(function, "batch", HEADS, "sequence", WIDTH, dtype=torch.bfloat16)
    after = optimized(program)
    x = torch.randn(2, HEADS, 9, WIDTH).to(torch.bfloat16)
    assert torch.equal(after(x)[0], program(x)[0])
    [fused] = after.graph.find_nodes(op="call_function", target=torch.ops.fxgraft.rotary.default)
    assert fused.args[0].op == "placeholder"


def unequal_angles(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2]), torch.rand(WIDTH))[None, None]
    return x * angles.cos() + halves_swapped(x) * angles.sin()


def per_head_angles(x: Tensor) -> Tensor:
    angles = torch.cat((f := frequencies(x, WIDTH), f), -1).expand(HEADS, -1, -1)
    return x * angles.cos() + halves_swapped(x) * angles.sin()


def unequal_parts(x: Tensor) -> Tensor:
    angles = torch.cat((f := frequencies(x, WIDTH), f), -1)[None, None]
    return x * angles.cos() + torch.cat((-x[..., 3:], x[..., :3]), -1) * angles.sin()


@pytest.mark.parametrize("function", [unequal_angles, per_head_angles, unequal_parts])
def test_what_is_no_rotary(function: Unary) -> None:
    program = trace(function, "batch", HEADS, "sequence", WIDTH)
    after = apply(program, Optimize(), check=False)
    assert not after.graph.find_nodes(op="call_function", target=torch.ops.fxgraft.rotary.default)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


GELUS: list[Unary] = [gelu_new, gelu_fast, lambda x: gelu_new(x + x.sin())]


@pytest.mark.parametrize("function", GELUS)
def test_spelled_out_gelu(function: Unary) -> None:
    found = optimize(trace(function))
    assert (found["aten.gelu"], found["aten.tanh"], found["aten.mul"]) == (1, 0, 0)


def test_another_polynomial_is_no_gelu() -> None:
    program = trace(lambda x: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044715 * x**3))))
    assert not optimize(program)["aten.gelu"]


ACTIVATIONS: list[tuple[Unary, str]] = [
    (nn.functional.silu, "silu"),
    (lambda x: x * torch.sigmoid(x), "silu"),
    (nn.functional.gelu, "gelu"),
    (gelu_new, "gelu_tanh"),
    (nn.functional.relu, "relu"),
    (torch.sigmoid, "sigmoid"),
]


@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS)
@pytest.mark.parametrize("swapped", [False, True])
def test_gated_activations(activation: Unary, name: str, swapped: bool) -> None:
    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return up * activation(gate) if swapped else activation(gate) * up

    output = optimized(trace(function)).output_nodes["output"]
    assert kind(output) == "fxgraft.gated_activation"
    assert output.kwargs == {"activation": name}
    assert [node.args[1] for node in output.all_input_nodes] == [0, 1]


NO_GATES: dict[str, Unary] = {
    "broadcast": lambda x: torch.sigmoid(x[..., :1]) * x,
    "squared": lambda x: torch.relu(x) * torch.relu(x),
    "read twice": lambda x: (y := nn.functional.silu(x)) * x.sin() + y,
}


@pytest.mark.parametrize("function", NO_GATES.values(), ids=NO_GATES)
def test_what_is_no_gate(function: Unary) -> None:
    assert not optimize(trace(function))["fxgraft.gated_activation"]
