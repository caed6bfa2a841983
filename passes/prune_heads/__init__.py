"""Pass ``prune_heads``: remove attention heads, so that shapes shrink."""

from fxgraft.passes.prune_heads.prune_heads import PruneHeads

__all__ = ["PruneHeads"]
