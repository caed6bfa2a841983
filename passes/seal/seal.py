"""The pass ``seal``: where the vector is added, and when."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft import sources
from fxgraft.errors import InputError
from fxgraft.generation import Vocabulary
from fxgraft.kernels.spec import dims
from fxgraft.passes.seal import automaton
from fxgraft.passes.seal.vector import SteeringVector
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass


class Seal(Pass):
    """Steer chains of thought (SEAL, arXiv 2504.07986).

    At every token that completes a paragraph break inside an open thinking section, the vector,
    times the coefficient, is added to the residual stream that enters one block. All other
    positions keep every bit. Breaks and tags are found in the text, so any tokenizer works; a
    break in the prompt fires as one in the answer does, which makes a recomputed cache equal to
    the one that decoding built.
    """

    effect: ClassVar[Effect] = Effect.BEHAVIOUR
    requires: ClassVar[frozenset[str]] = frozenset({"stateless", "causal_lm"})
    looks_for: ClassVar[str] = "the residual stream that enters a block"

    vector: Path
    """Safetensors file with the steering vector; see `SteeringVector`."""
    layer: int | None = Field(default=None, ge=0)
    """Steer the input of this block (0 is the first); default the file's layer."""
    coefficient: float = Field(default=1.0, allow_inf_nan=False)
    """Strength in the paper's sign: x + coefficient * (E - RT)."""
    after_norm: bool = False
    """Allow `layer` to be the number of blocks: steer after the final norm."""
    within: Literal["think", "everywhere"] = "think"
    """Fire only inside a thinking section, or at every paragraph break."""
    start: str = Field(default="<think>", min_length=1)
    """Text that opens a thinking section."""
    end: str = Field(default="</think>", min_length=1)
    """Text that closes it."""
    tokenizer: str | None = None
    """Model whose tokenizer to use; default the Program's own source."""

    def neutral(self) -> Seal:
        """Add nothing."""
        return self.model_copy(update={"coefficient": 0.0})

    def precheck(self, program: Program) -> None:
        """Refuse a vector or a layer that does not fit the model."""
        vector = SteeringVector.load(self.vector)
        layers = program.layers
        index = vector.layer if self.layer is None else self.layer
        if index > len(layers) or (index == len(layers) and not self.after_norm):
            raise InputError(
                f"pass 'seal': layer {index} is outside 0 to {len(layers) - 1}",
                f"name a block, or set after_norm with layer {len(layers)} to steer after the "
                "final norm",
            )
        width = int(dims(self._stream(program, index))[-1])  # pyright: ignore[reportArgumentType]
        if vector.vector.shape[0] != width:
            raise InputError(
                f"pass 'seal': the vector in {self.vector} has {vector.vector.shape[0]} values, "
                f"the model's hidden size is {width}",
                "use a vector that was extracted from this model",
            )

    def run(self, program: Program) -> list[str]:
        """Insert the automaton at the inputs and the addition at the block."""
        vector = SteeringVector.load(self.vector)
        index = vector.layer if self.layer is None else self.layer
        tables = _tables(*self._tokens(program), self.start, self.end, self.within == "everywhere")
        stream = self._stream(program, index)
        fired = self._insert_automaton(program, tables)
        self._insert_steer(program, stream, fired, vector.direction, index)
        graphs.finish(program.graph_module)
        place = (
            "after the final norm" if index == len(program.layers) else f"entering block {index}"
        )
        return [f"vector added {place}, coefficient {self.coefficient:g}"]

    def _stream(self, program: Program, index: int) -> Node:
        layers = program.layers
        if index < len(layers):
            return layers[index].residual_in
        node = program.output_nodes["logits"]
        while node.target is not torch.ops.aten.linear.default:
            node = node.all_input_nodes[0]
        source = node.args[0]
        assert isinstance(source, Node)
        return source

    def _tokens(self, program: Program) -> tuple[str, int]:
        """The source of the tokenizer, and the number of tokens."""
        source = self.tokenizer or str(program.origin.get("source") or "")
        if not source:
            raise InputError(
                "pass 'seal': the model was given as a module, so its tokenizer is not known",
                "set the field 'tokenizer' to the model's name or folder",
            )
        size = program.input("input_ids").high or int(dims(program.output_nodes["logits"])[-1])  # pyright: ignore[reportArgumentType]
        return source, size

    def _insert_automaton(self, program: Program, tables: automaton.Automaton) -> Node:
        ids = next(node for node in program.placeholders if node.name == "input_ids")
        anchor = next(node for node in program.graph.nodes if node.op != "placeholder")
        reads = [
            _read(program, anchor, name, value)
            for name, value in (("next_state", tables.next_state), ("fire", tables.fire))
        ]
        both = graphs.insert(
            anchor,
            torch.ops.fxgraft.token_automaton.default,
            (ids, *reads),
            {"initial": tables.initial},
        )
        return graphs.insert(anchor, operator.getitem, (both, 0), name="fired")

    def _insert_steer(
        self, program: Program, stream: Node, fired: Node, direction: Tensor, index: int
    ) -> None:
        users = _users_from(program, stream, index)
        anchor = min(users)
        dtype = stream.meta["val"].dtype
        values = {"vector": direction.to(dtype), "coefficient": torch.tensor(self.coefficient)}
        reads = [
            _read(program, anchor, name, value.to(program.device)) for name, value in values.items()
        ]
        steered = graphs.insert(
            anchor, torch.ops.fxgraft.steer.default, (stream, fired, *reads), name="steered"
        )
        for user in users:
            user.replace_input_with(stream, steered)


@functools.lru_cache(maxsize=4)
def _tables(source: str, size: int, start: str, end: str, everywhere: bool) -> automaton.Automaton:
    """The automaton for a model's tokens; kept, since the neutral check needs it once more."""
    vocabulary = Vocabulary(sources.tokenizer(source))
    tokens = [vocabulary.bytes_of(token) for token in range(size)]
    return automaton.build(tokens, start, end, everywhere=everywhere)


def _users_from(program: Program, stream: Node, index: int) -> list[Node]:
    """The readers of a block's input that belong to the block or come after it."""
    layers = program.layers
    if index >= len(layers):
        return list(stream.users)
    first = layers[index].nodes[0]
    return [user for user in stream.users if not user < first]


def _read(program: Program, anchor: Node, name: str, value: Tensor) -> Node:
    """Store a buffer under a free name and read it."""
    stored = program.add_weight(f"seal.{name}", value.to(program.device))
    return graphs.insert_weight(program.graph_module, anchor, stored)
