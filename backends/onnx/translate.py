"""From a graph of operators to an ONNX graph."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxgraft import graph as graphs
from fxgraft.backends.onnx.assembler import Assembler
from fxgraft.backends.onnx.aten.complex import ON_PAIRS
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, Result, Translate, is_size
from fxgraft.backends.onnx.folding import fold
from fxgraft.backends.onnx.recurrence import inline_reference, recurrent
from fxgraft.backends.onnx.table import TABLE
from fxgraft.errors import Error, LoweringError
from fxgraft.kernels.spec import dims, expr, spec_of
from fxgraft.operators import qualified_name
from fxgraft.tracing import signature, take_apart, trace

# Checks of sizes and dtypes that were made when the graph was captured.
_CHECKS = frozenset({
    "aten::_assert_scalar", "aten::_assert_async", "aten::_assert_tensor_metadata",
    "aten::sym_constrain_range", "aten::sym_constrain_range_for_size",
})  # fmt: skip


@dataclass
class Shared:
    """What translations of parts of one model share.

    Attributes:
        is_decode: whether the model is for one new token per row.
        maxima: largest size of each symbolic dimension that is bounded.
        traced: graphs of op references by signature.
        counts: how many nodes of each operator were translated.
        used: the ONNX operators that they became.
    """

    is_decode: bool = False
    maxima: Mapping[sympy.Symbol, int] = field(default_factory=dict[sympy.Symbol, int])
    traced: dict[Hashable, GraphModule] = field(default_factory=dict[Hashable, GraphModule])
    counts: Counter[str] = field(default_factory=Counter[str])
    used: dict[str, set[str]] = field(default_factory=lambda: defaultdict[str, set[str]](set))


class Translation:
    """Translates one graph (see ``Context`` in ``call.py``).

    Args:
        module: the graph, every node with its fake value and none changing a tensor in place.
        b: what to build.
        shared: with other parts of the model.
        anchor: the node that this graph stands for, None for a model's own graph.
    """

    def __init__(
        self, module: GraphModule, b: Assembler, shared: Shared, anchor: Node | None = None
    ) -> None:
        self.module, self.b, self.shared, self.anchor = module, b, shared, anchor
        self.values: dict[Node, Value | Sequence[Value]] = {}

    def run(self, inputs: Iterable[Value]) -> list[Value]:
        """Translate all nodes.

        Args:
            inputs: one value per placeholder that is a tensor.

        Returns:
            One value per output.

        Raises:
            LoweringError: some node has no ONNX form; names it.
        """
        remaining = iter(inputs)
        placeholders = self.module.graph.find_nodes(op="placeholder")
        for node in placeholders:
            if not is_size(node):
                self.values[node] = next(remaining)
                self._note_sizes(node)
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._weight(node)
            elif node.op == "call_function" and self._computes(node):
                self.values[node] = self._node(node)
                self._note_sizes(node)
        output = self.module.graph.output_node().args[0]
        nodes = output if isinstance(output, (tuple, list)) else (output,)
        return [self.value(cast(Node, node)) for node in nodes]

    @property
    def is_decode(self) -> bool:
        """Whether the graph is for one new token per row."""
        return self.shared.is_decode

    def value(self, node: Node) -> Value:
        """The ONNX value of a tensor node."""
        found = self.values[node]
        assert isinstance(found, Value)
        return found

    def maximum(self, size: sympy.Expr) -> int | None:
        """The largest value of a size, None if it is unbounded or not known."""
        total = 0
        for term in sympy.Add.make_args(size):
            if isinstance(term, sympy.Integer):
                total += int(term)
            elif isinstance(term, sympy.Symbol) and term in self.shared.maxima:
                total += self.shared.maxima[term]
            else:
                return None
        return total

    def inline(
        self,
        call: Call,
        function: Callable[..., Any],
        examples: Mapping[str, Any],
        values: Mapping[str, Value],
        b: Assembler,
    ) -> list[Value]:
        """See ``Context.inline``."""
        others = {name: item for name, item in call.arguments.items() if name not in examples}
        names = list(examples)
        key = (function, signature([*examples.items()]), signature([*others.items()]))
        if key not in self.shared.traced:

            def run(*items: Any) -> Any:
                return function(**others, **dict(zip(names, items, strict=True)))

            self.shared.traced[key] = trace(call.node, run, list(examples.values()))
        part = Translation(self.shared.traced[key], b, self.shared, self.anchor or call.node)
        return part.run(values[name] for name in names if name in values)

    def _computes(self, node: Node) -> bool:
        if qualified_name(node) in _CHECKS:
            return False
        return not is_size(node) or node.target is torch.ops.aten.item.default

    def _weight(self, node: Node) -> Value:
        weight = graphs.weight_of(self.module, str(node.target))
        weight = torch.view_as_real(weight) if weight.is_complex() else weight
        return self.b.constant(weight, name=str(node.target))

    def _node(self, node: Node) -> Result:
        if node.target is operator.getitem:
            source, place = cast("tuple[Node, int]", node.args)
            return cast("Sequence[Value]", self.values[source])[place]
        b, op = self.b.root, graphs.short_target(node)
        folded = fold(node, self._known)
        if folded is not None:
            self._count(op, set())
            return self.b.constant(folded, name=_name(node))
        b.origin, b.ops = self._module_of(node), set()
        result = self._translate(node)
        self._count(op, b.ops)
        return result

    def _count(self, op: str, used: set[str]) -> None:
        if self.anchor is None:
            self.shared.counts[op] += 1
            self.shared.used[op] |= used

    def _translate(self, node: Node) -> Result:
        call = Call(node, self.b, self)
        if str(node.target) not in ON_PAIRS and any(
            map(_is_complex, (node, *node.all_input_nodes))
        ):
            raise self._error(call, "ONNX has no complex numbers")
        try:
            translate = TABLE.get(str(node.target)) or _default(node)
            if translate is not None:
                return translate(call)
            return self._taken_apart(node)
        except LoweringError:
            raise
        except Error as error:
            raise self._error(call, error.problem) from error
        except Exception as error:  # of torch, while it traces or folds
            raise self._error(call, f"{type(error).__name__}: {error}") from error

    def _taken_apart(self, node: Node) -> Result:
        simpler = take_apart(node)
        if simpler is None:
            raise self._error(Call(node, self.b, self), "ONNX has no form of this operator here")
        part = Translation(simpler, self.b, self.shared, self.anchor or node)
        results = part.run(self.value(n) for n in node.all_input_nodes if not is_size(n))
        return results if isinstance(node.meta["val"], (tuple, list)) else results[0]

    def _error(self, call: Call, problem: str) -> LoweringError:
        inner = graphs.short_target(call.node)
        if self.anchor is None:
            return call.error(problem)
        return Call(self.anchor, self.b, self).error(f"{inner} inside it: {problem}")

    def _module_of(self, node: Node) -> str:
        return str((self.anchor or node).meta.get("module", ""))

    def _known(self, node: Node) -> Value | None:
        value = self.values.get(node)
        return value if isinstance(value, Value) else None

    def _note_sizes(self, node: Node) -> None:
        value, fake = self.values[node], node.meta["val"]
        if isinstance(fake, torch.SymInt) and isinstance(value, Value):
            number = self.b.cast(value, torch.int64)
            self.b.symbols[cast(sympy.Symbol, expr(fake))] = (number, None)
        elif isinstance(value, Value):
            self.b.note_sizes(value, dims(node))


def _is_complex(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_complex()


def _name(node: Node) -> str:
    """A readable name: of the weight that a constant was made from."""
    source = next(iter(node.all_input_nodes), node)
    return f"{source.target}.{node.name}" if source.op == "get_attr" else node.name


def _default(node: Node) -> Translate | None:
    """The translation of an fxgraft op that has none of its own, from its registration."""
    spec = spec_of(node)
    if spec is None:
        return None
    fixed = any(state.kind == "fixed" for state in spec.states)
    return recurrent(spec) if fixed else inline_reference(spec)
