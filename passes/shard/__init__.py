"""Pass ``shard``: tensor parallelism, one process's share of a model."""

from fxgraft.passes.shard.shard import Shard

__all__ = ["Shard"]
