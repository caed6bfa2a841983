"""The pass ``prune_heads``: which heads go, and how it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import Field, field_validator

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.passes.prune_heads import choose, structure
from fxgraft.passes.prune_heads.heads import Heads, find_heads
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass


class PruneHeads(Pass):
    """Remove attention heads from the graph, with their weights and their share of the cache.

    A removed head contributes nothing, as if its output were zero before the output projection
    (arXiv 2506.00743; the equality is property H2 of the tests). With grouped queries, a
    key/value head goes when all its query heads are gone; groups of unequal size become one
    attention per size, so that nothing is padded or repeated.
    """

    effect: ClassVar[Effect] = Effect.BEHAVIOUR
    requires: ClassVar[frozenset[str]] = frozenset({"stateless", "dense_weights", "has_attention"})
    looks_for: ClassVar[str] = "attention heads to remove"

    sparsity: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of all query heads to remove, in [0, 1)."""
    heads: dict[int, list[int]] | None = None
    """Query heads to remove, by attention layer, instead of choosing by a score."""
    score: Literal["magnitude", "random"] = "magnitude"
    """How heads are ranked: by the norm of their value and output weights, or at random."""
    scores: Path | None = None
    """A safetensors file with a tensor `scores` [layers, heads] to rank by instead."""
    scope: Literal["global", "per_layer"] = "global"
    """Compare heads across all layers, or remove the same share in each."""
    min_heads: int = Field(default=1, ge=0)
    """Query heads that every layer keeps; with 0 a layer may lose its whole attention."""
    seed: int = 0
    """Of the random score."""

    @field_validator("heads", mode="before")
    @classmethod
    def _number_layers(cls, value: object) -> object:
        """In YAML and JSON the keys are text."""
        if not isinstance(value, Mapping):
            return value
        layers = cast("Mapping[object, object]", value).items()
        return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in layers}

    def neutral(self) -> PruneHeads:
        """Remove no head."""
        return PruneHeads()

    def precheck(self, program: Program) -> None:
        """Refuse heads that the model does not have."""
        if self.heads is None:
            return
        layers = find_heads(program)
        for layer, indices in self.heads.items():
            if not 0 <= layer < len(layers):
                raise InputError(
                    f"pass 'prune_heads': field 'heads' names layer {layer}; the model has "
                    f"attention layers 0 to {len(layers) - 1}",
                    "name existing layers",
                )
            count = layers[layer].query_heads
            wrong = [index for index in indices if not 0 <= index < count]
            if wrong:
                raise InputError(
                    f"pass 'prune_heads': layer {layer} has query heads 0 to {count - 1}, "
                    f"field 'heads' names {wrong}",
                    "name existing heads",
                )

    def run(self, program: Program) -> list[str]:
        """Remove the chosen heads of every layer."""
        layers = find_heads(program)
        removed = self._chosen(program, layers)
        changed = 0
        for heads, gone in zip(layers, removed, strict=True):
            if gone:
                structure.remove(program, heads, gone)
                changed += 1
        graphs.finish(program.graph_module)
        total = sum(heads.query_heads for heads in layers)
        count = sum(len(gone) for gone in removed)
        return [f"{count} of {total} query heads removed, in {changed} of {len(layers)} layers"]

    def _chosen(self, program: Program, layers: list[Heads]) -> list[set[int]]:
        if self.heads is not None:
            return [set(self.heads.get(index, [])) for index in range(len(layers))]
        if self.sparsity == 0.0:
            return [set() for _ in layers]
        if self.scores is not None:
            ranks = choose.from_file(self.scores, layers)
        elif self.score == "random":
            ranks = choose.random(layers, self.seed)
        else:
            ranks = choose.magnitude(program, layers)
        return choose.select(ranks, self.sparsity, self.scope, self.min_heads)
