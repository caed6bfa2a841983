"""The pass ``seal``: where vectors are added, and when."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, ValidationInfo, field_validator
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft import sources
from fxgraft.errors import InputError
from fxgraft.kernels.spec import dims
from fxgraft.offline import OfflineStage
from fxgraft.passes.seal import automaton
from fxgraft.passes.seal.calibration import SealCalibration
from fxgraft.passes.seal.streams import stream_at, stream_users
from fxgraft.passes.seal.vector import SteeringVector, norm
from fxgraft.program import Input, Program
from fxgraft.transform import Effect, Pass

NONE = "none"
"""The name by which a request takes no vector."""


class Seal(Pass):
    """Steer chains of thought (SEAL, arXiv 2504.07986).

    At every token that completes a paragraph break inside an open thinking section, the vector,
    times the coefficient, is added to the residual stream that enters a block. All other
    positions keep every bit. Breaks and tags are found in the text, so any tokenizer works; a
    break in the prompt fires as one in the answer does, which makes a recomputed cache equal to
    the one that decoding built.

    With ``vectors`` in place of ``vector`` the model gets two inputs with one value per row:
    ``seal_vector`` says by name or number which vector the row takes, ``seal_strength`` (default
    1) is one more factor.
    """

    effect: ClassVar[Effect] = Effect.BEHAVIOUR
    requires: ClassVar[frozenset[str]] = frozenset({"stateless", "causal_lm"})
    looks_for: ClassVar[str] = "the residual stream that enters a block"
    offline: ClassVar[type[OfflineStage] | None] = SealCalibration

    vector: Path | None = None
    """File with the steering vector (see `SteeringVector`), or artifact of `calibrate seal`."""
    vectors: dict[str, Path] = Field(default_factory=dict[str, Path], validate_default=True)
    """Vectors by name that requests choose from; in place of `vector`."""
    default: str = NONE
    """Which of `vectors` a row takes that chooses none."""
    layer: int | tuple[int, ...] | None = None
    """Steer the input of this block (0 is the first), or of each of these; default the file's."""
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
    any_model: bool = False
    """Take vectors that were extracted from another model."""
    most: PositiveFloat = 1.0
    """Warn where the vector is longer than this share of the hidden states it is added to."""

    @field_validator("vectors")
    @classmethod
    def _one_source(cls, vectors: dict[str, Path], info: ValidationInfo) -> dict[str, Path]:
        # A wrong 'vector' is not in the data; it has its own message.
        if "vector" in info.data and (info.data["vector"] is None) == (not vectors):
            raise ValueError("give either 'vector' or 'vectors'")
        if NONE in vectors:
            raise ValueError(f"no vector can have the name {NONE!r}: it stands for no vector")
        return vectors

    @field_validator("default")
    @classmethod
    def _is_known(cls, default: str, info: ValidationInfo) -> str:
        known = (NONE, *info.data.get("vectors", ()))
        if default not in known:
            raise ValueError(f"should be one of {', '.join(known)}")
        return default

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers 0, 1, ... of the input ``seal_vector`` stand for."""
        everyone = (NONE, *self.vectors)
        return (self.default, *(name for name in everyone if name != self.default))

    def neutral(self) -> Seal:
        """Add nothing."""
        return self.model_copy(update={"coefficient": 0.0})

    def precheck(self, program: Program) -> None:
        """Refuse vectors, layers or tags that do not fit the model."""
        count = len(program.layers)
        for index in self._layers():
            if not 0 <= index <= count or (index == count and not self.after_norm):
                raise InputError(
                    f"pass 'seal': layer {index} is outside 0 to {count - 1}",
                    f"name a block, or set after_norm with layer {count} to steer after the "
                    "final norm",
                )
            width = int(dims(stream_at(program, index))[-1])  # pyright: ignore[reportArgumentType]
            for path in self._paths():
                self._check(program, path, index, width)
        self._automaton(program)

    def run(self, program: Program) -> list[str]:
        """Insert the automaton at the inputs and the additions at the blocks."""
        indices = self._layers()
        # Found before anything is inserted: nodes of the pass would count as the blocks' own.
        streams = [stream_at(program, index) for index in indices]
        readers = [stream_users(program, index) for index in indices]
        tables = self._automaton(program)
        chosen = self._insert_inputs(program) if self.vectors else None
        fired = _insert_automaton(program, tables)
        strength = self._insert_strength(program, fired, chosen)
        for index, stream, users in zip(indices, streams, readers, strict=True):
            self._insert_steer(program, index, (stream, users, fired), strength, chosen)
        graphs.finish(program.graph_module)
        return [*self._said(len(program.layers)), *self._warnings(program)]

    def _paths(self) -> list[Path]:
        return [*self.vectors.values()] if self.vector is None else [self.vector]

    def _layers(self) -> list[int]:
        if isinstance(self.layer, int):
            return [self.layer]
        if self.layer is not None:
            return sorted(set(self.layer))
        found = {SteeringVector.load(path).layer for path in self._paths()}
        if len(found) > 1:
            raise InputError(
                f"pass 'seal': the vectors are for the layers {sorted(found)}",
                "say with the field 'layer' where to add them",
            )
        return [*found]

    def _check(self, program: Program, path: Path, index: int, width: int) -> None:
        vector = SteeringVector.load(path, index)
        if vector.vector.shape[0] != width:
            raise InputError(
                f"pass 'seal': the vector in {path} has {vector.vector.shape[0]} values, "
                f"the model's hidden size is {width}",
                "use a vector that was extracted from this model",
            )
        if not self.any_model:
            vector.check(program, path)

    def _automaton(self, program: Program) -> automaton.Automaton:
        source = self.tokenizer or str(program.origin.get("source") or "")
        if not source:
            raise InputError(
                "pass 'seal': the model was given as a module, so its tokenizer is not known",
                "set the field 'tokenizer' to the model's name or folder",
            )
        size = program.input("input_ids").high or int(dims(program.output_nodes["logits"])[-1])  # pyright: ignore[reportArgumentType]
        return automaton.tables_of(source, size, self.start, self.end, self.within == "everywhere")

    def _insert_inputs(self, program: Program) -> tuple[Node, Node]:
        """The inputs that say which vector each row takes, and how much of it."""
        names = self.names
        vector = Input("seal_vector", torch.int64, ("batch",), "zeros", len(names), names)
        strength = Input("seal_strength", torch.float32, ("batch",), "ones")
        return _add_input(program, vector), _add_input(program, strength)

    def _insert_strength(
        self, program: Program, anchor: Node, chosen: tuple[Node, Node] | None
    ) -> Node:
        """The coefficient [], or [B] where rows have strengths of their own."""
        read = _read(program, anchor, "coefficient", torch.tensor(self.coefficient))
        if chosen is None:
            return read
        return graphs.insert(anchor, torch.ops.aten.mul.Tensor, (chosen[1], read))

    def _insert_steer(
        self,
        program: Program,
        index: int,
        place: tuple[Node, list[Node], Node],
        strength: Node,
        chosen: tuple[Node, Node] | None,
    ) -> None:
        stream, users, fired = place
        anchor = min(users)
        vectors = _read(
            program, anchor, "vector", self._vectors(index).to(stream.meta["val"].dtype)
        )
        slot = () if chosen is None else (chosen[0],)
        steered = graphs.insert(
            anchor,
            torch.ops.fxgraft.steer.default,
            (stream, fired, vectors, strength, *slot),
            name="steered",
        )
        for user in users:
            user.replace_input_with(stream, steered)

    def _vectors(self, index: int) -> Tensor:
        """The vector [D], or a table [T, D] with 0 in the row of no vector."""
        if self.vector is not None:
            return SteeringVector.load(self.vector, index).direction
        found = {n: SteeringVector.load(p, index).direction for n, p in self.vectors.items()}
        nothing = torch.zeros_like(next(iter(found.values())))
        return torch.stack([found.get(name, nothing) for name in self.names])

    def _said(self, count: int) -> list[str]:
        what = "vector" if self.vector is not None else f"one of {', '.join(self.names)}"
        places = [
            "after the final norm" if index == count else f"entering block {index}"
            for index in self._layers()
        ]
        return [f"{what} added {place}, coefficient {self.coefficient:g}" for place in places]

    def _warnings(self, program: Program) -> list[str]:
        found: list[str] = []
        for index in self._layers():
            for path in self._paths():
                vector = SteeringVector.load(path, index)
                share = abs(self.coefficient) * float(norm(vector.vector))
                share /= vector.hidden_norm or float("inf")
                if share > self.most:
                    found.append(f"warning: {path} adds {share:.2f} of a hidden state's norm")
        if self.within == "think" and not self._writes_tags(program):
            found.append(
                f"warning: {self.start!r} is no token and not in the chat template: it fires only "
                "where the model spells it"
            )
        return found

    def _writes_tags(self, program: Program) -> bool:
        tokenizer = sources.tokenizer(self.tokenizer or str(program.origin["source"]))
        template = str(getattr(tokenizer, "chat_template", None) or "")
        return self.start in template or self.start in tokenizer.get_vocab()


def _add_input(program: Program, spec: Input) -> Node:
    """Give the Program one more input with one value per row."""
    if any(known.name == spec.name for known in program.inputs):
        raise InputError(
            f"pass 'seal': the model already has an input {spec.name!r}",
            "name all vectors in one pass 'seal'; only passes with one 'vector' can be repeated",
        )
    with program.graph.inserting_after(program.placeholders[-1]):
        node = program.graph.placeholder(spec.name)
    ids = next(one for one in program.placeholders if one.name == "input_ids").meta["val"]
    node.meta["val"] = ids.new_zeros(ids.shape[:1], dtype=spec.dtype)
    program.inputs = (*program.inputs, spec)
    return node


def _insert_automaton(program: Program, tables: automaton.Automaton) -> Node:
    ids = next(node for node in program.placeholders if node.name == "input_ids")
    anchor = next(node for node in program.graph.nodes if node.op != "placeholder")
    values = {"next_state": tables.next_state, "fire": tables.fire, "classes": tables.classes}
    reads = {name: _read(program, anchor, name, value) for name, value in values.items()}
    both = graphs.insert(
        anchor,
        torch.ops.fxgraft.token_automaton.default,
        (ids, reads["next_state"], reads["fire"]),
        {"classes": reads["classes"], "initial": tables.initial},
    )
    return graphs.insert(anchor, operator.getitem, (both, 0), name="fired")


def _read(program: Program, anchor: Node, name: str, value: Tensor) -> Node:
    """Store a buffer under a free name and read it."""
    stored = program.add_weight(f"seal.{name}", value.to(program.device))
    return graphs.insert_weight(program.graph_module, anchor, stored)
