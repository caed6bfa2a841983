"""Which tokens belong to images, and which rows are gated: nodes at the start of the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import dims
from fxgraft.program import Program
from fxgraft.prompt_parts import prompt_length, share_sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """Nodes that all layers share.

    Attributes:
        image: bool [B, S], tokens of images that are no padding.
        gated: bool [B, S], rows to gate.
    """

    image: Node
    gated: Node


class RowBuilder:
    """Inserts the nodes behind the inputs.

    Args:
        program: is changed.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        inputs = {node.name: node for node in program.placeholders}
        self.ids = inputs["input_ids"]
        self.anchor = next(node for node in program.graph.nodes if node.op != "placeholder")
        for name in ("attention_mask", "position_ids"):
            if name in inputs and len(dims(inputs[name])) == 2:
                share_sizes(inputs[name], self.ids)
        mask = inputs.get("attention_mask")
        self.mask = None if mask is None else self._insert(aten.ne.Scalar, mask, 0)
        given = inputs.get("position_ids")
        # Some models give several positions per token.
        self.given = given if given is not None and len(dims(given)) == 2 else None
        self.position = self._position()

    def of_tokens(self, tokens: tuple[int, ...], vocabulary: int, rows: str) -> Rows:
        """Images are made of certain tokens; text behind the first one is gated."""
        parts = [self._insert(aten.eq.Scalar, self.ids, token) for token in tokens]
        image = parts[0]
        for part in parts[1:]:
            image = self._insert(aten.logical_or.default, image, part)
        image = self._real(image)
        return Rows(image, self._gated(self._behind_image(tokens, vocabulary, image), rows))

    def of_span(self, span: tuple[int, int], rows: str) -> Rows:
        """Images lie at fixed places, counted from the first token that is no padding."""
        start, end = span
        inside = self._insert(
            aten.logical_and.default,
            self._insert(aten.ge.Scalar, self.position, start),
            self._insert(aten.lt.Scalar, self.position, end),
        )
        behind = self._insert(aten.ge.Scalar, self.position, end)
        return Rows(self._real(inside), self._gated(self._real(behind), rows))

    def _behind_image(self, tokens: tuple[int, ...], vocabulary: int, image: Node) -> Node:
        """bool [B, S]: tokens of no image, with one before them, by an automaton of two states."""
        is_image = torch.zeros(vocabulary, dtype=torch.bool)
        is_image[list(tokens)] = True
        tables = {
            "next_state": torch.stack((is_image, torch.ones_like(is_image))).to(torch.uint8),
            "fire": torch.stack((torch.zeros_like(is_image), ~is_image)),
        }
        reads = [self._weight(name, value) for name, value in tables.items()]
        ids = self.ids
        if self.mask is not None:
            # Any other token takes the place of padding.
            other = int((~is_image).to(torch.uint8).argmax())
            ids = self._insert(aten.where.ScalarOther, self.mask, ids, other)
        both = self._insert(torch.ops.fxgraft.token_automaton.default, ids, *reads)
        return self._real(self._insert(operator.getitem, both, 0))

    def _gated(self, behind: Node, rows: str) -> Node:
        if rows == "all_text":
            return behind
        given = prompt_length(self.program)
        end = self._insert(
            aten.where.self, self._insert(aten.gt.Scalar, given, 0), given, self._end()
        )
        first = self._insert(aten.unsqueeze.default, self._insert(aten.sub.Tensor, end, 1), 1)
        late = self._insert(aten.ge.Tensor, self.position, first)
        return self._insert(aten.logical_and.default, behind, late)

    def _position(self) -> Node:
        """int64 [B, S] or [1, S]: tokens that are no padding, counted from 0."""
        if self.given is not None:
            return self.given
        if self.mask is not None:
            counted = self._insert(aten.cumsum.default, self.mask, 1)
            return self._insert(aten.sub.Tensor, counted, 1)
        length = self._insert(aten.sym_size.int, self.ids, 1)
        device = self.program.device
        row = self._insert(aten.arange.default, length, kwargs={"device": device})
        return self._insert(aten.unsqueeze.default, row, 0)

    def _end(self) -> Node:
        """int64 [B] or [1]: the number of tokens so far."""
        last = self._insert(aten.amax.default, self.position, [1])
        return self._insert(aten.add.Tensor, last, 1)

    def _real(self, rows: Node) -> Node:
        """Without padding, as [B, S]."""
        if self.mask is not None:
            return self._insert(aten.logical_and.default, rows, self.mask)
        whole = self._insert(aten.ge.Scalar, self.ids, 0)
        return self._insert(aten.logical_and.default, rows, whole)

    def _weight(self, name: str, value: torch.Tensor) -> Node:
        stored = self.program.add_weight(f"spin.{name}", value.to(self.program.device))
        return graphs.insert_weight(self.program.graph_module, self.anchor, stored)

    def _insert(self, target: Any, *args: Any, kwargs: dict[str, Any] | None = None) -> Node:
        return graphs.insert(self.anchor, target, args, kwargs)
