"""The linear layers of a Program as matrix products on macros: sizes, patterns, replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor
from torch.fx import Node

from fxgraft.backends.flexcim import patterns
from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.macro import Gemm
from fxgraft.backends.flexcim.patterns import DENSE, Pattern
from fxgraft.errors import InputError
from fxgraft.program import Program
from fxgraft.sparsity import DeclaredPattern, declared
from fxgraft.weight_products import WeightProduct, weight_products


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        name: of the node.
        weight: name of its weight.
        gemm: of one copy, with the pattern that the weight obeys.
        copies: matrices; experts count each.
        source: where the pattern comes from: ``"option"``, ``"packed"`` (the weight is stored in
            that form), ``"declared"`` or ``"weight"``.
        most: see ``patterns.most_kept``; None without values or for a dense weight.
    """

    name: str
    weight: str
    gemm: Gemm
    copies: int
    source: str
    most: Mapping[int, int] | None = None


@dataclass(frozen=True)
class _Found:
    """What is known of a weight; see ``Linear`` and ``Gemm``."""

    pattern: Pattern
    source: str
    replays: int
    most: Mapping[int, int] | None


class Patterns:
    """Which pattern each weight has: by option, by declaration, or as its zeros say.

    Args:
        program: whose weights.
        hardware: that runs them.
        chosen: pattern by glob over weight names, for example ``{"*.mlp.*": "2:4"}``.
        padded: globs of weights whose input dimension was padded to whole groups.

    Raises:
        InputError: a glob matches no weight of a linear layer.
    """

    def __init__(
        self,
        program: Program,
        hardware: Hardware,
        chosen: Mapping[str, str] | None = None,
        padded: Sequence[str] = (),
    ) -> None:
        self.program, self.hardware = program, hardware
        self._chosen, self._padded = dict(chosen or {}), tuple(padded)
        self._declared = declared(program)
        self._known: dict[tuple[str, ...], _Found] = {}
        products = weight_products(program).values()
        names = {name for product in products for name in product.weights}
        for glob in (*self._chosen, *self._padded):
            if not any(fnmatchcase(name, glob) for name in names):
                raise InputError(
                    f"{glob!r} matches the weight of no linear layer",
                    f"their names look like: {', '.join(sorted(names)[:3])}",
                )

    def linear(self, product: WeightProduct) -> Linear:
        """A product as a linear layer.

        Raises:
            InputError: the pattern is impossible, or M does not divide K; names the node.
            LoweringError: the weight keeps more than its pattern allows.
        """
        if product.weights not in self._known:
            self._known[product.weights] = self._find(product, product.node.name)
        found = self._known[product.weights]
        gemm = Gemm(product.reduction, product.outputs, found.pattern, found.replays)
        weight = " + ".join(product.weights)
        return Linear(product.node.name, weight, gemm, product.copies, found.source, found.most)

    def _find(self, product: WeightProduct, node: str) -> _Found:
        matrices = product.matrices(self.program)
        kept = None if matrices.is_meta else (matrices != 0).flatten(0, 1)
        is_dense = kept is None or bool(kept.all())
        most = None if kept is None or is_dense else patterns.most_kept(kept)
        asked, source = self._asked(product, node)
        if asked is None:
            pattern = patterns.sparsest(most or {})
        else:
            pattern = patterns.check(Pattern(asked.n, asked.m), self.hardware, node)
            patterns.check_length(pattern, product.reduction, asked.is_padded, node)
            if kept is not None:
                patterns.check_mask(kept, pattern, node)
        if self.hardware.cell == "dense":
            pattern = DENSE
        return _Found(pattern, source, self._replays(pattern, kept), most)

    def _asked(self, product: WeightProduct, node: str) -> tuple[DeclaredPattern | None, str]:
        """What was asked for, and by what; the last glob that matches wins."""
        names = product.weights
        for glob in reversed(self._chosen):
            if any(fnmatchcase(name, glob) for name in names):
                found = patterns.parse(self._chosen[glob], node)
                return DeclaredPattern(found.n, found.m, self._is_padded(names)), "option"
        if product.pattern is not None:
            return DeclaredPattern(*product.pattern), "packed"
        for name in names:
            if name in self._declared:
                noted = self._declared[name]
                padded = noted.is_padded or self._is_padded(names)
                return DeclaredPattern(noted.n, noted.m, padded), "declared"
        return None, "weight"

    def _is_padded(self, names: Sequence[str]) -> bool:
        return any(fnmatchcase(name, glob) for name in names for glob in self._padded)

    def _replays(self, pattern: Pattern, kept: Tensor | None) -> int:
        """phi; without values the worst case, as many as there are pairs in a group."""
        if self.hardware.cell != "pair" or not pattern.is_sparse:
            return 1
        if kept is None:
            return max(pattern.m // 2, 1)
        return patterns.pair_factor(patterns.slots(kept, pattern), self.hardware.columns)


def linears(
    program: Program,
    hardware: Hardware,
    chosen: Mapping[str, str] | None = None,
    padded: Sequence[str] = (),
) -> dict[Node, Linear]:
    """Every linear layer of a Program, in graph order; see ``Patterns``."""
    found = Patterns(program, hardware, chosen, padded)
    return {node: found.linear(product) for node, product in weight_products(program).items()}
