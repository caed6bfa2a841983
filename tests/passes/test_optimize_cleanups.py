"""Clean-ups of ``optimize`` on small modules: what they must find, and what they must leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgraft.passes.optimize import Optimize, in_place
from fxgraft.transform import apply
from tests.passes._optimize import (
    HIDDEN,
    Binary,
    Unary,
    optimize,
    optimized,
    trace,
    trace_module,
    trace_with,
)

IDENTITIES: list[tuple[Unary, str]] = [
    (lambda x: x.to(torch.float32) * 2, "aten.mul"),
    (lambda x: x.type_as(x) * 2, "aten.mul"),
    (lambda x: nn.functional.dropout(x, 0.5, False) * 2, "aten.mul"),
    (lambda x: (x * 2)[:, :, :].expand(-1, -1, HIDDEN), "aten.mul"),
    (lambda x: (x * 2).view(x.shape).squeeze(2), "aten.mul"),
    (lambda x: x.transpose(0, 1).permute(1, 0, 2) * 2, "aten.mul"),
    (lambda x: (x * 1.0 + 0.0) / 1 - 0 + 3, "aten.add"),
    (lambda x: torch.cat((x, x[..., :0]), -1) * 2, "aten.mul"),
    (lambda x: (x * 2).clone(), "aten.mul"),
    (lambda x: x.transpose(1, 2).contiguous().reshape(x.shape[0], -1) * 2, "aten.mul"),
]


@pytest.mark.parametrize(("function", "left"), IDENTITIES)
def test_identities_are_dropped(function: Unary, left: str) -> None:
    found = set(optimize(trace(function)))
    assert found - {"aten.sym_size", "aten.transpose", "aten.reshape"} == {left}


LOOKALIKES: list[tuple[Unary, str]] = [
    (lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], -1), "aten.contiguous"),
    (lambda x: x.to(torch.float64).to(torch.float32), "aten.to"),
    (lambda x: x[:, 1:], "aten.slice"),
    (lambda x: x.int() * 1.0, "aten.mul"),
    (lambda x: torch.cat((x, x[:, :1]), 1), "aten.cat"),
    (lambda x: 1.0 - x, "aten.rsub"),
    (lambda x: 1.0 / x.exp(), "aten.reciprocal"),
]


@pytest.mark.parametrize(("function", "kept"), LOOKALIKES)
def test_what_only_looks_like_an_identity_is_kept(function: Unary, kept: str) -> None:
    assert kept in optimize(trace(function))


def test_duplicates_are_merged_across_spellings_of_a_size() -> None:
    program = trace(lambda x: x.sin().view(x.size(0), -1) + x.sin().view(x.shape[0], -1))
    found = optimize(program)
    assert (found["aten.sin"], found["aten.view"], found["aten.sym_size"]) == (1, 1, 1)


def test_random_ops_and_other_constants_are_no_duplicates() -> None:
    program = trace(lambda x: torch.rand_like(x) * 0 + torch.rand_like(x) * 0 + x)
    assert optimize(program)["aten.rand_like"] == 2
    program = trace(lambda x: (x.int() * 2).float() + x.int() * 2.0)
    assert optimize(program)["aten.mul"] == 2


def test_values_around_a_write_are_no_duplicates() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        before = y.sin()
        y[:, 0].fill_(1.0)
        return before + y.sin()

    assert optimize(trace(function))["aten.sin"] == 2


def test_in_place_operators_become_functional() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y /= y.sum(-1, keepdim=True)
        return y.mul_(3) + 1

    found = optimize(trace(function))
    assert not any(name.endswith("_") for name in found)


SEEN_WRITES: list[Unary] = [
    lambda x: x.add_(1) * 2,
    lambda x: ((y := x * 2)[:, 0].add_(1).sum() * 0) + y,
    lambda x: ((view := (y := x * 2)[:, 0]).sum() * 0) + y.add_(1).sum() + view.sum(),
]


@pytest.mark.parametrize("function", SEEN_WRITES)
def test_a_write_that_is_seen_elsewhere_stays(function: Unary) -> None:
    assert in_place.rewrite(trace(function)) == 0


def test_constants_are_folded_into_small_buffers() -> None:
    decay = torch.rand(HIDDEN)
    after = optimized(trace_with(decay, lambda x, w: x * -torch.exp(w.float())))
    assert dict(after.weights()).keys() == {"w_neg"}
    assert torch.equal(after.weight("w_neg"), -torch.exp(decay))


NOT_FOLDED: dict[str, Binary] = {
    "view of a weight": lambda x, w: x @ w.t(),
    "larger than its inputs": lambda x, w: x @ (w.repeat(1, 3000) * 2),
    "constructor": lambda x, w: x @ w + torch.arange(HIDDEN),
    "random": lambda x, w: x * (w[0] + torch.rand(HIDDEN)),
}


@pytest.mark.parametrize("function", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_other_constants_are_not_folded(function: Binary) -> None:
    before = trace_with(torch.rand(HIDDEN, HIDDEN), function)
    after = apply(before, Optimize(), check=False)
    assert dict(after.weights()).keys() == {"w"}


def test_meta_constants_are_not_folded() -> None:
    program = trace_with(torch.rand(HIDDEN), lambda x, w: x * w.exp())
    program.set_weight("w", nn.Parameter(torch.rand(HIDDEN, device="meta"), requires_grad=False))
    assert Optimize().run(program) == []


class Siblings(nn.Module):
    """Three layers of one input; what happens to their results is up to ``combine``."""

    def __init__(
        self, biases: tuple[bool, ...], combine: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        sizes = (HIDDEN, 4, 6)
        self.parts = nn.ModuleDict(
            {
                name: nn.Linear(HIDDEN, size, bias)
                for name, size, bias in zip("abc", sizes, biases, strict=True)
            }
        )
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        results = [part(x) for part in self.parts.values()]
        return torch.cat(results, -1) if self.combine is None else self.combine(x, *results)


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_siblings_are_merged(biases: tuple[bool, ...]) -> None:
    program = trace_module(Siblings(biases))
    after = optimized(program)
    merged = after.weight("parts.a+b+c.weight")
    assert merged.shape == (HIDDEN + 10, HIDDEN)
    assert isinstance(merged, nn.Parameter)
    assert merged.requires_grad
    names = ["parts.a+b+c.weight", "parts.a+b+c.bias"][: 1 + any(biases)]
    assert sorted(dict(after.weights()), reverse=True) == names
    if biases == (True, False, True):
        assert after.weight("parts.a+b+c.bias")[HIDDEN : HIDDEN + 4].eq(0).all()


def test_a_view_that_a_piece_does_not_allow_becomes_a_reshape() -> None:
    def combine(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        flat = a.contiguous().view(x.shape[0], -1)
        return flat.sum(1, keepdim=True) + b.transpose(1, 2).contiguous().view(x.shape[0], -1)

    found = optimize(trace_module(Siblings((True, True, False), combine)))
    assert found["aten.reshape"] >= 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(HIDDEN, HIDDEN, False), nn.Linear(HIDDEN, HIDDEN, False)
        self.c = nn.Linear(HIDDEN, HIDDEN, False)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(x)).sin())


class Strangers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleDict({"proj": nn.Linear(HIDDEN, HIDDEN)})
        self.two = nn.ModuleDict({"proj": nn.Linear(HIDDEN, HIDDEN)})

    def forward(self, x: Tensor) -> Tensor:
        return self.one["proj"](x) + self.two["proj"](x)


@pytest.mark.parametrize("model", [Tied, Strangers])
def test_tied_weights_and_other_owners_are_not_merged(model: type[nn.Module]) -> None:
    before = trace_module(model())
    after = optimized(before)
    assert dict(after.weights()).keys() == dict(before.weights()).keys()


def test_inserted_nodes_say_where_they_come_from() -> None:
    after = optimized(trace_module(Siblings((True, True, True))))
    made: list[Any] = [n for n in after.graph.nodes if n.meta.get("made_by") == "optimize"]
    assert {n.meta["module"] for n in made} == {"parts.a+b+c", "parts.a", "parts.b", "parts.c"}
    assert all("test_optimize_cleanups.py" in node.meta["source"] for node in made)
