"""The attentions of the language model inside a Program, and what stands in a score's way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxgraft.errors import PassError
from fxgraft.kernels.spec import argument, dims, spec_of
from fxgraft.program import Program

_TOKENS = frozenset({"input_ids", "position_ids"})


@dataclass(frozen=True)
class Attention:
    """One attention over the text.

    Attributes:
        node: the op.
        layer: its place among the attentions over the text.
    """

    node: Node
    layer: int

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(dims(argument(self.node, "query"))[1])  # pyright: ignore[reportArgumentType]

    @property
    def why_not_linear(self) -> str | None:
        """Why the sum of the logits is not the query times the sum of the keys; None if it is."""
        if argument(self.node, "softcap"):
            return "soft cap"
        if argument(self.node, "window") is not None:
            return "sliding window"
        if argument(self.node, "chunk") is not None:
            return "chunks"
        return None if argument(self.node, "bias") is None else "mask or bias of its own"


def find_attentions(program: Program) -> list[Attention]:
    """The attentions of tokens to earlier tokens, in graph order.

    Those of an image encoder do not see the tokens, and cross-attention is not causal.

    Raises:
        PassError: a layer has several, so that no score ranks all of its heads.
    """
    seen = _token_nodes(program)
    found: list[Attention] = []
    modules: set[str] = set()
    for node in program.graph.nodes:
        spec = spec_of(node)
        if node.target is not torch.ops.fxgraft.attention.default or spec is None:
            continue
        if argument(node, "key") not in seen or spec.causal(node) is False:
            continue
        module = str(node.meta.get("module", node.name))
        if module in modules:
            raise PassError(
                f"pass 'spin': the heads of {module!r} are divided among several attentions",
                "apply 'spin' to a model whose pruned groups of heads have one size",
            )
        modules.add(module)
        found.append(Attention(node, len(found)))
    return found


def _token_nodes(program: Program) -> set[Node]:
    """Tensors that depend on the tokens."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in _TOKENS:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes) and not _is_size(node):
            found.add(node)
    return found


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
