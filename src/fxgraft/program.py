"""Program: one captured graph, its weights, a view of its layers and its history."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sympy
import torch
from torch.fx import GraphModule, Node

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.history import Record
from fxgraft.kernels.spec import dims

if TYPE_CHECKING:
    from fxgraft.cost import CostTable
    from fxgraft.diff import GraphDiff
    from fxgraft.layers import Layer

Default = Literal["required", "ones", "zeros", "positions", "prompts"]
"""``prompts``: 0 at tokens of a prompt and 1 at those of an answer; left out, all are a prompt."""


@dataclass(frozen=True)
class Input:
    """One input of a Program.

    Attributes:
        name: keyword under which the original model takes it.
        dtype: element type.
        shape: sizes; a string is the name of a dynamic dimension.
        default: what stands in when the caller leaves the input out.
        high: exclusive upper bound of random integers that are valid here (0: not an index).
        names: what the integers 0, 1, ... stand for, where a caller may say it by name.
        fixed: the only value that the graph computes with, flattened: sizes that the model reads
            as Python numbers. Empty for inputs that may hold anything.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    default: Default = "required"
    high: int = 0
    names: tuple[str, ...] = ()
    fixed: tuple[int, ...] = ()

    def fixed_value(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """``fixed`` as a tensor of the input's shape."""
        sizes = [size for size in self.shape if isinstance(size, int)]
        return torch.tensor(self.fixed, dtype=self.dtype, device=device).reshape(sizes)


@dataclass(frozen=True)
class Range:
    """Allowed sizes of a dynamic dimension; ``maximum`` None means unbounded."""

    minimum: int = 1
    maximum: int | None = None


@dataclass
class Program:
    """A model as one FX graph, and what was done to it.

    Attributes:
        graph_module: the graph; weights are attributes under their original names.
        inputs: in the order of the graph's placeholders.
        outputs: names of the outputs, in order.
        dimensions: dynamic dimensions by name, with their ranges.
        origin: where the model came from, as JSON values: ``source``, ``class``, ``config``,
            ``output`` (``"mapping"``, ``"tuple"`` or ``"tensor"``), ``context_length``.
        history: one record per pass that ran.
    """

    graph_module: GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    dimensions: dict[str, Range]
    origin: dict[str, Any] = field(default_factory=dict[str, Any])
    history: list[Record] = field(default_factory=list[Record])

    @property
    def graph(self) -> torch.fx.Graph:
        """The FX graph."""
        return self.graph_module.graph

    @property
    def layers(self) -> list[Layer]:
        """The model's blocks, derived from the graph as it is now."""
        from fxgraft.layers import find_layers

        return find_layers(self)

    @property
    def symbols(self) -> dict[str, sympy.Symbol]:
        """Symbol of each dynamic dimension in the nodes' shapes."""
        found: dict[str, sympy.Symbol] = {}
        for spec, node in zip(self.inputs, self.placeholders, strict=True):
            for name, size in zip(spec.shape, dims(node), strict=True):
                if isinstance(name, str) and isinstance(size, sympy.Symbol):
                    found.setdefault(name, size)
        return found

    @property
    def placeholders(self) -> list[Node]:
        """The graph's input nodes."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output_nodes(self) -> dict[str, Node]:
        """The node behind each output name."""
        values = self.graph.output_node().args[0]
        assert isinstance(values, (tuple, list))
        return {
            name: value
            for name, value in zip(self.outputs, values, strict=True)
            if isinstance(value, Node)
        }

    @cached_property
    def device(self) -> torch.device:
        """Device of the weights."""
        for _, weight in self.weights():
            return weight.device
        return torch.device("cpu")

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters and buffers with their names, a shared tensor once per name."""
        yield from self.graph_module.named_parameters(remove_duplicate=False)
        yield from self.graph_module.named_buffers(remove_duplicate=False)

    def weight(self, name: str) -> torch.Tensor:
        """The weight of that name."""
        return graphs.weight_of(self.graph_module, name)

    def set_weight(self, name: str, value: torch.Tensor) -> None:
        """Replace or add a weight; refresh the shapes of what reads it."""
        graphs.set_weight(self.graph_module, name, value)
        readers = list(self.graph.find_nodes(op="get_attr", target=name))
        graphs.refresh(readers)

    def add_weight(self, name: str, value: torch.Tensor) -> str:
        """Add a weight; returns the name it got, a free one close to ``name``."""
        taken = {known for known, _ in self.weights()}
        free, number = name, 2
        while free in taken:
            free, number = f"{name}_{number}", number + 1
        graphs.set_weight(self.graph_module, free, value)
        return free

    def count_parameters(self) -> int:
        """Number of weight elements, shared tensors counted once."""
        return sum(weight.numel() for weight in self._distinct_weights())

    def count_bytes(self) -> int:
        """Bytes of weights, shared tensors counted once."""
        return sum(w.numel() * w.element_size() for w in self._distinct_weights())

    def _distinct_weights(self) -> Iterator[torch.Tensor]:
        seen: set[int] = set()
        for _, weight in self.weights():
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight

    def copy(self) -> Program:
        """A Program with its own graph and history that shares this one's weights."""
        graph = torch.fx.Graph()
        output = graph.graph_copy(self.graph, val_map={}, return_output_node=True)
        assert isinstance(output, tuple)
        graph.output(output[0])
        module = GraphModule(dict(self.weights()), graph, class_name="Program")
        return replace(
            self,
            graph_module=module,
            dimensions=dict(self.dimensions),
            origin=copy.deepcopy(self.origin),
            history=list(self.history),
        )

    def bind(self, *args: torch.Tensor, **kwargs: torch.Tensor | None) -> list[torch.Tensor]:
        """Arrange call arguments in placeholder order and fill in defaults.

        Raises:
            InputError: an input is missing, unknown, or of the wrong rank.
        """
        from fxgraft.inputs import bind

        return bind(self, args, kwargs)

    def example(self, seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
        """Random valid inputs.

        Args:
            seed: of the random generator.
            sizes: size of each dynamic dimension, default small.
        """
        from fxgraft.inputs import example

        return example(self, seed, sizes)

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor | None) -> tuple[Any, ...]:
        """Run the graph eagerly, op by op, and return the outputs in order."""
        with torch.no_grad():
            return self.graph_module(*self.bind(*args, **kwargs))

    def cost(self, **symbols: int) -> CostTable:
        """Operations and bytes per node, as expressions or evaluated at given sizes.

        Args:
            symbols: sizes of dynamic dimensions, for example ``batch=1, sequence=128``.
        """
        from fxgraft.cost import cost_table

        return cost_table(self, symbols)

    def diff(self, other: Program) -> GraphDiff:
        """What differs between ``other`` (before) and this Program (after)."""
        from fxgraft.diff import diff

        return diff(other, self)

    def draw(self, path: str | Path) -> Path:
        """Draw the Program by layers as ``.svg`` or ``.html``."""
        from fxgraft.draw import draw

        return draw(self, Path(path))

    def save(self, folder: str | Path) -> Path:
        """Write the Program to a folder; an interrupted save leaves an old one intact."""
        from fxgraft.serialize import save

        return save(self, Path(folder))

    @staticmethod
    def load(folder: str | Path) -> Program:
        """Read a saved Program; nothing from the file is executed."""
        from fxgraft.serialize import load

        return load(Path(folder))

    def input(self, name: str) -> Input:
        """The input of that name.

        Raises:
            InputError: there is none.
        """
        for spec in self.inputs:
            if spec.name == name:
                return spec
        names = ", ".join(spec.name for spec in self.inputs)
        raise InputError(f"the Program has no input {name!r}", f"its inputs are: {names}")

    def sizes(self, values: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Size of each dynamic dimension in actual inputs."""
        found: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name in values:
                for name, size in zip(spec.shape, values[spec.name].shape, strict=True):
                    if isinstance(name, str):
                        found.setdefault(name, int(size))
        return found

    def __str__(self) -> str:
        from fxgraft.draw import as_text

        return as_text(self)
