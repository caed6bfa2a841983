"""The pass ``optimize``: exact clean-ups and fusions that make lowered code fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from fxgraft import graph as graphs
from fxgraft.passes.optimize import (
    activations,
    constants,
    duplicates,
    identities,
    in_place,
    norms,
    projections,
    rotary,
)
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass

# In this order: each rewrite makes the next one's patterns plainer. Constants are folded after
# the norms, which would else lose the trained weight w in w + 1.
_REWRITES: tuple[tuple[str, Callable[[Program], int]], ...] = (
    ("make_functional", in_place.rewrite),
    ("remove_identities", identities.rewrite),
    ("deduplicate", duplicates.rewrite),
    ("fuse_norms", norms.rewrite),
    ("fuse_rotary", rotary.rewrite),
    ("fuse_activations", activations.rewrite),
    ("fold_constants", constants.rewrite),
    ("merge_projections", projections.rewrite),
    ("remove_identities", identities.rewrite),
    ("deduplicate", duplicates.rewrite),
)


class Optimize(Pass):
    """Rewrite a Program so that it computes the same with fewer and larger operations.

    Backends then find normalisations, rotary embeddings and gated activations as ops, and one
    projection for q/k/v and for gate/up. Running it twice changes nothing more.
    """

    effect: ClassVar[Effect] = Effect.EXACT
    looks_for: ClassVar[str] = "operations that can be dropped, shared, folded or fused"
    may_match_nothing: ClassVar[bool] = True

    make_functional: bool = True
    """Replace elementwise operators that work in place, where that cannot be seen."""
    remove_identities: bool = True
    """Drop casts, views, dropouts and arithmetic that change nothing."""
    deduplicate: bool = True
    """Compute equal subexpressions once, across layers too."""
    fuse_norms: bool = True
    """Make spelled-out RMSNorm one op."""
    fuse_rotary: bool = True
    """Make spelled-out rotary position embedding one op."""
    fuse_activations: bool = True
    """Make spelled-out activations, and activation(gate) * up, one op."""
    fold_constants: bool = True
    """Compute what depends on weights alone, where the result is small."""
    merge_projections: bool = True
    """Merge sibling linear layers, such as q/k/v and gate/up, into one."""

    def run(self, program: Program) -> list[str]:
        """Rewrite the Program.

        Returns:
            For each rewrite how many places it changed.
        """
        counts: dict[str, int] = {}
        for name, rewrite in _REWRITES:
            if getattr(self, name):
                counts[name] = counts.get(name, 0) + rewrite(program)
        if any(counts.values()):
            graphs.finish(program.graph_module)
        return [f"{name}: {count}" for name, count in counts.items() if count]

    def neutral(self) -> Optimize:
        """With every rewrite switched off."""
        return Optimize(**{name: False for name, _ in _REWRITES})
