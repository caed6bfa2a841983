"""What is served, as the server says it of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fxgraft.kernels.spec import spec_of
from fxgraft.layers import find_layers
from fxgraft.program import Program


@dataclass(frozen=True)
class ServedModel:
    """A model behind the server.

    Attributes:
        name: in requests.
        source: what it was read from.
        backend: that runs it.
        passes: that rewrote it, in order.
        context_length: most tokens of prompt and answer together; None: unbounded.
        layers: of each layer in order, the op that mixes tokens.
        op_layers: of each op that keeps state in the engine's order, the index of its layer.
        created: seconds since 1970.
    """

    name: str
    source: str = ""
    backend: str = ""
    passes: tuple[str, ...] = ()
    context_length: int | None = None
    layers: tuple[str, ...] = ()
    op_layers: tuple[int, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict[str, Any]:
        """As in ``/v1/models``."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fxgraft",
            "max_model_len": self.context_length,
        }


def layer_facts(program: Program) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Values of ``layers`` and ``op_layers`` for a Program."""
    layers = find_layers(program)
    layer_of = {node: layer.index for layer in layers for node in layer.nodes}
    stateful = [n for n in program.graph.nodes if (spec := spec_of(n)) and spec.states]
    places = [layer_of.get(node, -1) for node in stateful]
    return tuple(layer.kind for layer in layers), tuple(places)
