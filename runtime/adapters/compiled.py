"""What the adapters need of a compiled model."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fxgraft.program import Program


class CompiledModel(Protocol):
    """A compiled causal language model."""

    @property
    def program(self) -> Program:
        """What was compiled."""
        ...

    def __call__(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> Any:
        """An object with ``logits`` [B, S, V] for ``input_ids`` int64 [B, S]."""
        ...

    def generate(
        self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """See ``fxgraft.generation.generate``."""
        ...
