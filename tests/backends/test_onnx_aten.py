"""PyTorch's own operators in ONNX: many in one model, at other sizes than those of the capture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxgraft import graph as graphs
from fxgraft.frontends.exporting import export
from fxgraft.program import Input, Program
from tests.backends._onnx import Runner
from tests.kernels._helpers import randn

Functions = Mapping[str, Callable[[Tensor, Tensor], Any]]
"""Functions of x float [B, S, 6] and n int64 [B, S] from 0 to 5."""

any_torch: Any = torch
any_make_fx: Any = make_fx

ARITHMETIC: Functions = {
    "add": lambda x, n: torch.add(x, n[..., None], alpha=2),
    "sub": lambda x, n: x - n[..., None],
    "rsub": lambda x, n: 3 - x,
    "mul": lambda x, n: x * x[:, :1] * 0.5,
    "div": lambda x, n: n / 4,
    "div of a rest": lambda x, n: x / (1 + x.abs()),
    "div_floor": lambda x, n: torch.div(x, 0.7, rounding_mode="floor"),
    "div_trunc": lambda x, n: torch.div(n - 3, 2, rounding_mode="trunc"),
    "floor_divide": lambda x, n: (n - 3) // 2,
    "remainder": lambda x, n: (n - 3) % 4,
    "remainder of floats": lambda x, n: x % 0.7,
    "neg": lambda x, n: -x,
    "pow": lambda x, n: x.abs() ** 1.5 + 2.0**x + x**2,
    "square": lambda x, n: x.square() * x.abs().rsqrt(),
    "exponentials": lambda x, n: x.exp() + x.expm1() + x.exp2() + x.abs().log1p() + x.abs().log2(),
    "trigonometry": lambda x, n: x.sin() * x.cos() + x.tanh() + x.atan(),
    "more of them": lambda x, n: x.tan() + x.tanh().acos() + x.tanh().asin() + x.erf(),
    "hyperbolic": lambda x, n: x.sinh() + x.cosh() + x.abs().sqrt().reciprocal(),
    "rounding": lambda x, n: x.floor() + x.ceil() + x.round() + x.trunc() + x.sign(),
    "clamp": lambda x, n: x.clamp(-0.5, 0.5) + x.clamp_min(0.1) + x.clamp(max=n[..., None]),
    "extremes": lambda x, n: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "comparisons": lambda x, n: (x > 0) & (x <= 1) | (n[..., None] == 2) ^ (x != x.flip(-1)),
    "logic": lambda x, n: ~(n >= 2) & torch.logical_or(n < 1, n.bool()),
    "bits": lambda x, n: (n & 3) | (~n ^ 5),
    "where": lambda x, n: torch.where(n[..., None] > 2, x, -1.0).masked_fill(x > 1, 9.0),
    "where of numbers": lambda x, n: torch.where(n > 2, 1.0, x[..., 0]) + torch.where(n > 1, 1, 2),
    "negation": lambda x, n: n.logical_not() ^ torch.logical_xor(n > 1, n > 3),
    "filled by a tensor": lambda x, n: x.masked_fill(x > 0, x[0, 0, 0]),
    "is_nan": lambda x, n: (x / (n[..., None] - 2)).isinf() | (x * 0).isnan(),
    "cast": lambda x, n: x.to(torch.int32) + n[..., None].to(torch.float64),
    "lerp": lambda x, n: torch.lerp(x, x * 2, 0.3),
    "addcmul": lambda x, n: torch.addcmul(x, x, x, value=0.5),
}
ACTIVATIONS: Functions = {
    "relu": lambda x, n: F.relu(x) + F.relu6(x) + F.leaky_relu(x, 0.2),
    "gelu": lambda x, n: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "silu": lambda x, n: F.silu(x) + F.mish(x) + F.hardswish(x) + F.hardsigmoid(x),
    "elu": lambda x, n: F.elu(x, 0.7) + F.hardtanh(x, -0.2, 0.4),
    "selu": lambda x, n: F.selu(x) + F.celu(x, 0.8),
    "softplus": lambda x, n: F.softplus(x * 30) + F.softplus(x, beta=2.0),
    "log_sigmoid": lambda x, n: F.logsigmoid(x) + x.sigmoid(),
    "glu": lambda x, n: F.glu(x),
    "softmax": lambda x, n: x.softmax(-1) + x.log_softmax(1),
}
REDUCTIONS: Functions = {
    "sum": lambda x, n: x.sum(-1) + n.sum() + x.sum((0, 2), keepdim=True)[:, :, 0],
    "mean": lambda x, n: x.mean(1) + x.mean(),
    "extremes": lambda x, n: x.amax(-1) + x.amin(-1) + x.max() - x.min(),
    "max": lambda x, n: x.max(-1),
    "min": lambda x, n: x.min(1, keepdim=True),
    "arg": lambda x, n: x.argmax(-1) + x.argmin(1, keepdim=True)[..., 0] + x.argmax(),
    "any": lambda x, n: (x > 1.5).any(-1) | (x > -2).all(-1) | (x > 3).any() | (x > -9).all(),
    "prod": lambda x, n: x.prod(-1) + x[:1, 0].prod(),
    "cumsum": lambda x, n: x.cumsum(1) + n.cumsum(-1)[..., None],
    "var": lambda x, n: x.var(-1) + x.std(-1, unbiased=False) + x.var((1, 2))[:, None],
    "norm": lambda x, n: F.normalize(x, dim=-1) + torch.linalg.vector_norm(x, 1, -1, keepdim=True),
    "logsumexp": lambda x, n: torch.logsumexp(x * 500, -1),
    "topk": lambda x, n: x.topk(3, -1),
    "smallest": lambda x, n: x.topk(2, 1, largest=False).values,
    "sort": lambda x, n: x.sort(-1, descending=True),
    "argsort": lambda x, n: x.argsort(1),
    "stable sort": lambda x, n: n.reshape(-1).sort(stable=True),
    "histc": lambda x, n: torch.histc(n.float(), 6, 0, 5),
    "one_hot": lambda x, n: F.one_hot(n, 6),
}
SHAPES: Functions = {
    "view": lambda x, n: x.reshape(x.shape[0], -1, 3).view(x.shape[0] * x.shape[1] * 2, 3),
    "flatten": lambda x, n: x.flatten(0, 1).unflatten(0, (x.shape[0], x.shape[1])),
    "transposes": lambda x, n: x.transpose(1, 2).permute(2, 0, 1).mT.movedim(0, -1),
    "swap": lambda x, n: x.swapaxes(0, 1).contiguous().clone().detach(),
    "squeeze": lambda x, n: x[:, :, None, :1].squeeze().unsqueeze(-2).squeeze(1),
    "expand": lambda x, n: n[:, None].expand(-1, 3, -1) + n[:, None].expand(n.shape[0], 3, -1),
    "broadcast": lambda x, n: torch.broadcast_tensors(x[:, :1], x)[0],
    "repeat": lambda x, n: x.repeat(2, 1, 3),
    "repeat_interleave": lambda x, n: x.repeat_interleave(2, 1),
    "cat": lambda x, n: torch.cat((x, x[:, :1], n[..., None].expand_as(x)), 1),
    "stack": lambda x, n: torch.stack((x, -x), -2),
    "split": lambda x, n: (*x.split((1, 2, 3), -1), *x.chunk(2, -1), *x.split(4, -1)),
    "split at": lambda x, n: torch.tensor_split(x, 4, -1),
    "unbind": lambda x, n: x.unbind(-1)[2],
    "slice": lambda x, n: x[1:, :-1, 1::2],
    "slice by size": lambda x, n: x.flip(1)[:, x.shape[1] // 2 :],
    "narrow": lambda x, n: x.narrow(1, 1, x.shape[1] - 1),
    "select": lambda x, n: x[:, -1] + x.select(1, 0),
    "roll": lambda x, n: x.roll((1, -2), (1, 2)),
    "unfold": lambda x, n: x.unfold(2, 3, 2),
    "pad": lambda x, n: F.pad(x, (1, 2, 0, 1), value=3.0) + F.pad(x, (2, 1, 1, 0), "reflect"),
    "pad a mask": lambda x, n: F.pad(n > 2, (1, 0)),
    "replicate": lambda x, n: F.pad(x, (1, 1), "replicate"),
    "triangles": lambda x, n: x.triu(1) + x.tril(),
    "eye": lambda x, n: torch.eye(x.shape[1]) + torch.ones(x.shape[1], 1).tril(-1),
    "creation": lambda x, n: (
        torch.full((x.shape[1], 2), 1.5) + torch.zeros_like(x[0, :, :2]) + x.new_ones(2)
    ),
    "arange": lambda x, n: (
        torch.arange(x.shape[1]) + torch.arange(2, 2 + 3 * x.shape[1], 3)
        + torch.arange(0, 1, 1 / 5).sum()
    ),
    "full of a size": lambda x, n: torch.full_like(n, x.shape[1]),
    "sizes": lambda x, n: n % (x.shape[1] + 1) + x.shape[0] * x.shape[1],
}  # fmt: skip
INDEXING: Functions = {
    "embedding": lambda x, n: F.embedding(n, x[0, :1, :, None].expand(2, 6, 3)[0]),
    "index_select": lambda x, n: x.index_select(2, n[0, :1] * 0 + 5),
    "gather": lambda x, n: x.gather(2, n[..., None]),
    "index": lambda x, n: x[:, :, n[0]],
    "index leading": lambda x, n: x[0, 0][n],
    "index pairs": lambda x, n: x[torch.arange(x.shape[0])[:, None], n * 0, n],
    "index inner pairs": lambda x, n: x[:, n * 0, n],
    "mask": lambda x, n: x[n > 2],
    "put": lambda x, n: x.index_put((torch.arange(x.shape[0]),), x.new_tensor(4.0)),
    "put mask": lambda x, n: x.masked_fill(n[..., None] > 3, 0.0).index_put(
        (n > 2,), x.new_zeros(())
    ),
    "put accumulate": lambda x, n: x[0, 0].index_put((n,), x[..., 0], accumulate=True),
    "scatter": lambda x, n: x.scatter(2, n[..., None], 7.0),
    "scatter src": lambda x, n: x.scatter(2, n[..., None], -x),
    "scatter_add": lambda x, n: x.scatter_add(2, n[..., None], x),
    "scatter_reduce": lambda x, n: x.scatter_reduce(2, n[..., None], x * 2, "amax"),
    "index_copy": lambda x, n: x.index_copy(2, n[0, :1], x[..., :1] * 2),
    "index_add": lambda x, n: x.index_add(2, n[0, :1], x[..., :1]),
    "slice assignment": lambda x, n: x.slice_scatter(x[:, :1] * 2, 1, 0, 1),
    "select assignment": lambda x, n: x.select_scatter(x[..., 0] * 0, 2, 3),
    "nonzero": lambda x, n: (n > 2).nonzero(),
}
MATRICES: Functions = {
    "matmul": lambda x, n: x @ x.mT + torch.bmm(x, x.mT),
    "mm": lambda x, n: torch.mm(x[0], x[0].T) + torch.addmm(x[0, :, :1], x[0], x[0].T, beta=2.0),
    "baddbmm": lambda x, n: torch.baddbmm(x[..., :1], x, x.mT, beta=0.5, alpha=2.0),
    "mv": lambda x, n: torch.mv(x[0], x[0, 0]) + x[0] @ x[0, 0],
    "einsum": lambda x, n: torch.einsum("bsd,btd->bst", x, x),
    "outer": lambda x, n: torch.outer(x[0, 0], x[0, 0]),
    "layer_norm": lambda x, n: F.layer_norm(x, (6,)),
    "rms_norm": lambda x, n: F.rms_norm(x, (6,), x[0, 0], 1e-3),
    "group_norm": lambda x, n: F.group_norm(x.mT, 3, x[0, 0], x[0, 0]),
    "instance_norm": lambda x, n: F.instance_norm(x.mT),
    "conv1d": lambda x, n: F.conv1d(x.mT, torch.ones(4, 3, 2), padding=1, groups=2),
    "conv1d same": lambda x, n: F.conv1d(x.mT, torch.ones(4, 6, 3), padding="same"),
    "conv_transpose1d": lambda x, n: F.conv_transpose1d(x.mT, torch.ones(6, 2, 3), stride=2),
    "pools": lambda x, n: F.max_pool1d(x, 2) + F.avg_pool1d(x, 2),
    "adaptive": lambda x, n: F.adaptive_avg_pool1d(x, 3) + F.adaptive_avg_pool1d(x, 1),
    "conv2d": lambda x, n: F.conv2d(x[:, None], torch.ones(2, 1, 2, 2), stride=(1, 2)),
    "pools of images": lambda x, n: F.max_pool2d(x[:, None], 2, 1) + F.avg_pool2d(x[:, None], 2, 1),
    "nearest": lambda x, n: F.interpolate(x[:, :1], scale_factor=2.0),
    "nearest of images": lambda x, n: F.interpolate(x[:, None, :1], scale_factor=(2.0, 3.0)),
    "linear": lambda x, n: F.interpolate(x, size=9, mode="linear", align_corners=True),
    "bicubic": lambda x, n: F.interpolate(x[:, None, :2], size=(5, 7), mode="bicubic"),
    "conv2d same": lambda x, n: F.conv2d(x[:, None], torch.ones(2, 1, 3, 3), padding="same"),
    "conv3d": lambda x, n: F.conv3d(x[:, None, None], torch.ones(2, 1, 1, 2, 2), padding=(1, 0, 0)),
    "conv_transpose2d": lambda x, n: F.conv_transpose2d(
        x[:, None], torch.ones(1, 2, 2, 2), stride=2, padding=1, output_padding=1
    ),
    "batch_norm": lambda x, n: F.batch_norm(x.mT, x[0, 0], x[0, 0].abs() + 1, x[0, 0], x[0, 0]),
    "adaptive of images": lambda x, n: (
        F.adaptive_avg_pool2d(x[:, None, :4], (2, 3)) + F.adaptive_avg_pool2d(x[:, None], 1)
    ),
    "bilinear": lambda x, n: F.interpolate(
        x[:, None, :2], size=(5, 7), mode="bilinear", align_corners=False
    ),
    "complex": lambda x, n: torch.view_as_real(
        torch.view_as_complex(x.reshape(*x.shape[:2], 3, 2))
        * any_torch.polar(torch.ones_like(x), x)[:, :, :3]
    ),
}
GROUPS: Mapping[str, Functions] = {
    "arithmetic": ARITHMETIC,
    "activations": ACTIVATIONS,
    "reductions": REDUCTIONS,
    "shapes": SHAPES,
    "indexing": INDEXING,
    "matrices": MATRICES,
}


class All(nn.Module):
    """Every function of a group, its results one after the other."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for one in self.functions.values() for part in _parts(one(x, n)))


def _parts(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _inputs(batch: int, sequence: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    n = torch.randint(0, 6, (batch, sequence), generator=generator)
    return {"x": randn(batch, sequence, 6, dtype=torch.float32, seed=sequence), "n": n}


def _functions(group: str, is_taken_apart: bool) -> Functions:
    # Taken apart, an instance normalisation is a batch normalisation as in training.
    left_out = {"instance_norm"} if is_taken_apart else set[str]()
    return {name: one for name, one in GROUPS[group].items() if name not in left_out}


def _program(group: str, is_taken_apart: bool) -> Program:
    specs = (
        Input("x", torch.float32, ("batch", "sequence", 6)),
        Input("n", torch.int64, ("batch", "sequence")),
    )
    program = export(All(_functions(group, is_taken_apart)), specs, _inputs(3, 5))
    if not is_taken_apart:
        return program
    fakes = [node.meta["val"] for node in program.placeholders]
    with graphs.fake_mode(program.graph):
        simpler = any_make_fx(program.graph_module, core_aten_decompositions())(*fakes)
    return replace(program, graph_module=simpler)


@pytest.mark.parametrize(
    "is_taken_apart",
    [pytest.param(False, id="whole"), pytest.param(True, id="taken apart", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("opset", [18, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", GROUPS)
def test_operators(group: str, opset: int, is_taken_apart: bool, tmp_path: Path) -> None:
    functions = _functions(group, is_taken_apart)
    runner = Runner(_program(group, is_taken_apart), tmp_path, opset)
    # Tracing a graph again may fix sizes.
    for sizes in ((3, 5),) if is_taken_apart else ((3, 5), (2, 8)):
        values = _inputs(*sizes)
        names = [name for name, one in functions.items() for _ in _parts(one(*values.values()))]
        for name, found, expected in zip(
            names, runner(values), All(functions)(**values), strict=True
        ):
            assert found.dtype == expected.dtype, name
            assert found.shape == expected.shape, name
            close = torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert close, f"{name} at {sizes}: {(found - expected).abs().max()}"
