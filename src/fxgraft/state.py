"""``insert_state``: from a whole-sequence graph to a step graph with explicit state.

The step graph takes the new tokens and the state so far, and returns logits and the next state.
With an empty past it is the prefill graph, with one new token the decode graph; it also takes a
prompt in chunks. The rewrite is driven by ``OpSpec`` alone:

1. Nodes that do not depend on the tokens (positions, masks, biases) are computed for the *total*
   length, past and new. Where they meet token-dependent nodes, their new rows are cut out.
2. An op's growing state is concatenated in front of the argument that it grows from.
3. An op's fixed state becomes an input, and the op's state output becomes an output.
4. Logits are computed for the last position only.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import sympy
import torch
from torch.fx import Graph, Node

from fxgraft import collectives
from fxgraft import graph as graphs
from fxgraft.errors import StateError
from fxgraft.kernels.spec import OpSpec, State, argument, dims, expr, set_argument, spec_of
from fxgraft.program import Input, Program, Range
from fxgraft.symbolic import fake_inputs

aten = torch.ops.aten
_END = sys.maxsize
PROMPT_LENGTH = "prompt_length"
"""Input int64 [batch] of a Program that treats prompts and answers differently: the number of
tokens of a row's prompt; 0 where all tokens so far belong to it."""
# Ops that treat the rows of a [batch, sequence, ...] tensor alike, so that a row can be selected
# before them instead of after them.
_ROW_WISE = frozenset({
    aten.linear.default, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.add.Tensor,
    aten.mul.Scalar, aten.to.dtype, aten._to_copy.default, aten.clamp.default,
    aten.slice.Tensor, aten.contiguous.default, aten.alias.default, aten.to.dtype_layout,
    aten.layer_norm.default,
})  # fmt: skip


@dataclass(frozen=True)
class StateTensor:
    """One state input (and output) of a step graph.

    Attributes:
        name: layer index and field, for example ``"3.key"``.
        dtype: element type.
        shape: sizes; strings are dimension names (``"batch"``, ``"past"``, ``"past_32"``).
        grows: the dimension that grows with the tokens, or None for a state of fixed size.
        limit: most past entries kept of a growing state, or None.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    grows: int | None = None
    limit: int | None = None

    def empty(self, batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The state before the first token."""
        sizes = [batch if s == "batch" else 0 if isinstance(s, str) else s for s in self.shape]
        return torch.zeros(sizes, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class StepProgram:
    """A step graph and a description of its state.

    The graph's inputs are the model's own (``attention_mask`` spans past and new tokens), then
    one per state; its outputs are ``logits`` [batch, 1, vocabulary], then one per state.
    """

    program: Program
    states: tuple[StateTensor, ...]

    @property
    def own_inputs(self) -> tuple[Input, ...]:
        """The inputs that are not state."""
        return self.program.inputs[: len(self.program.inputs) - len(self.states)]

    def empty_state(self, batch: int) -> list[torch.Tensor]:
        """State before the first token, one tensor per entry of ``states``."""
        return [state.empty(batch, self.program.device) for state in self.states]


@dataclass
class _Insertion:
    """Work in progress on one graph."""

    program: Program
    symbols: dict[str, sympy.Symbol]
    total: Node | None = None
    length: Node | None = None
    clones: dict[Node, Node] = field(default_factory=dict[Node, Node])
    inputs: list[Input] = field(default_factory=list[Input])
    outputs: list[Node] = field(default_factory=list[Node])
    states: list[StateTensor] = field(default_factory=list[StateTensor])

    @property
    def graph(self) -> Graph:
        return self.program.graph

    @property
    def sequence(self) -> sympy.Symbol:
        return self.symbols["sequence"]


def insert_state(program: Program, *, all_logits: bool = False) -> StepProgram:
    """Turn a causal language model's Program into a step graph.

    Args:
        program: with inputs ``input_ids`` [batch, sequence] (and, where the model takes them,
            ``attention_mask``, ``position_ids`` and inputs with one value per row) and an output
            ``logits``.
        all_logits: return logits of every new position instead of the last one.

    Raises:
        StateError: a layer is not causal, or mixes tokens outside an op that owns state; names
            the node, its module and source line.
    """
    _check_inputs(program)
    copy = program.copy()
    work = _Insertion(copy, copy.symbols)
    stateful = [
        (node, spec) for node in copy.graph.nodes if (spec := spec_of(node)) and spec.states
    ]
    _check_causal(stateful)
    token_nodes = _token_nodes(copy)
    _check_mixing(work, token_nodes)
    _add_lengths(work, stateful)
    for index, (node, spec) in enumerate(stateful):
        for state in spec.states:
            _add_state(work, index, node, state)
    _join_worlds(work, token_nodes)
    for node, spec in stateful:
        _trim_total_arguments(work, node, spec)
    if not all_logits:
        _last_row(work)
    return _finish(work)


def _check_inputs(program: Program) -> None:
    names = {spec.name for spec in program.inputs}
    known = {"input_ids", "attention_mask", "position_ids"}
    unknown = {
        spec.name
        for spec in program.inputs
        if spec.name not in known and not is_request_input(spec) and not is_token_input(spec)
    }
    if "input_ids" not in names or "logits" not in program.outputs:
        raise StateError(
            "the Program is no language model: it has no input_ids or no logits",
            "generate with a causal language model",
        )
    if unknown:
        raise StateError(
            f"the Program also takes {', '.join(sorted(unknown))}, which has no meaning per step",
            "capture the model with input_ids, attention_mask and position_ids only",
        )


def is_request_input(spec: Input) -> bool:
    """Whether an input holds one value per row, such as a strength that a request may set."""
    return spec.shape[:1] == ("batch",) and all(isinstance(size, int) for size in spec.shape[1:])


def is_token_input(spec: Input) -> bool:
    """Whether an input holds a vector per token, such as features of an image."""
    return (
        spec.shape[:2] == ("batch", "sequence") and len(spec.shape) > 2 and spec.default == "zeros"
    )


def _check_causal(stateful: Sequence[tuple[Node, OpSpec]]) -> None:
    for node, spec in stateful:
        if spec.causal(node) is False:
            raise StateError(
                f"{_where(node)} looks at later tokens (it is not causal)",
                "step-by-step generation needs causal attention in every layer",
            )


def _where(node: Node) -> str:
    module, source = node.meta.get("module", "?"), node.meta.get("source", "?")
    return f"node {node.name!r} ({graphs.short_target(node)}) in module {module!r} at {source}"


def _token_nodes(program: Program) -> set[Node]:
    """Nodes whose values depend on the tokens or their given positions."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name != "attention_mask":
                found.add(node)
        elif _is_size(node):
            continue
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _check_mixing(work: _Insertion, token_nodes: set[Node]) -> None:
    """A token-dependent tensor with two sequence dimensions was mixed outside a stateful op."""
    for node in work.graph.nodes:
        if node not in token_nodes or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        sizes = dims(node)
        if sum(1 for size in sizes if work.sequence in size.free_symbols) > 1:
            raise StateError(
                f"{_where(node)} mixes tokens outside an op that owns state",
                "this attention bypasses transformers' attention registry; generation without "
                "state still works",
            )


def _add_lengths(work: _Insertion, stateful: Sequence[tuple[Node, OpSpec]]) -> None:
    """Nodes for the number of new tokens and of all tokens."""
    placeholders = {node.name: node for node in work.program.placeholders}
    last = work.program.placeholders[-1]
    ids = placeholders["input_ids"]
    work.length = graphs.place(last, aten.sym_size.int, (ids, 1), after=True)
    work.length.meta["val"] = ids.meta["val"].shape[1]
    for node in work.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if node is not work.length and expr(node.meta["val"]) == work.sequence:
            node.replace_all_uses_with(work.length)
    for spec in work.program.inputs:
        if spec.name == "attention_mask":
            shape = (spec.shape[0], "total")
            work.inputs.append(replace(spec, shape=shape))
            mask = placeholders["attention_mask"]
            work.total = graphs.place(work.length, aten.sym_size.int, (mask, 1), after=True)
        else:
            work.inputs.append(spec)


def _placeholder(
    work: _Insertion, name: str, dtype: torch.dtype, shape: tuple[int | str, ...]
) -> Node:
    last = work.program.placeholders[-1]
    with work.graph.inserting_after(last):
        node = work.graph.placeholder(name)
    work.inputs.append(Input(name, dtype, shape))
    return node


def _add_state(work: _Insertion, index: int, node: Node, state: State) -> None:
    name = f"{index}.{state.name}"
    if state.kind == "grows":
        _add_growing(work, name, node, state)
    else:
        _add_fixed(work, name, node, state)


def _add_growing(work: _Insertion, name: str, node: Node, state: State) -> None:
    new = argument(node, state.argument)
    assert isinstance(new, Node)
    limit = argument(node, state.limit) if state.limit else None
    kept = int(limit) - 1 if isinstance(limit, int) else None
    past = "past" if kept is None else f"past_{kept}"
    shape = tuple(
        past if axis == state.dim else _dimension(work, size) for axis, size in enumerate(dims(new))
    )
    dtype = new.meta["val"].dtype
    placeholder = _placeholder(work, f"past_{name.replace('.', '_')}", dtype, shape)
    joined = graphs.place(node, aten.cat.default, ([placeholder, new], state.dim))
    set_argument(node, state.argument, joined)
    work.states.append(StateTensor(name, dtype, shape, state.dim, kept))
    work.outputs.append(joined if kept is None else _keep_last(node, joined, state.dim, kept))


def _keep_last(anchor: Node, joined: Node, dim: int, kept: int) -> Node:
    size = graphs.place(anchor, aten.sym_size.int, (joined, dim))
    surplus = graphs.place(anchor, operator.sub, (size, kept))
    start = graphs.place(anchor, cast(Any, torch).sym_max, (surplus, 0))
    return graphs.place(anchor, aten.slice.Tensor, (joined, dim, start, _END))


def _add_fixed(work: _Insertion, name: str, node: Node, state: State) -> None:
    value = node.meta["val"][state.output]
    shape = tuple(_dimension(work, size) for size in dims(value))
    placeholder = _placeholder(work, f"past_{name.replace('.', '_')}", value.dtype, shape)
    set_argument(node, state.argument, placeholder)
    work.states.append(StateTensor(name, value.dtype, shape))
    existing = [
        user
        for user in node.users
        if user.target is operator.getitem and user.args[1] == state.output
    ]
    work.outputs.append(
        existing[0]
        if existing
        else graphs.place(node, operator.getitem, (node, state.output), after=True)
    )


def _dimension(work: _Insertion, size: sympy.Expr) -> int | str:
    if size.is_Integer:
        return int(size)  # pyright: ignore[reportArgumentType]
    for name, symbol in work.symbols.items():
        if size == symbol:
            return name
    raise StateError(
        f"a state has the size {size}, which is no dimension of the model",
        "capture the model with a fixed size there",
    )


def _join_worlds(work: _Insertion, token_nodes: set[Node]) -> None:
    """Cut the new rows out of total-length values wherever token-dependent nodes read them.

    A value whose rows are counted over the whole batch (a router's flat index of tokens) belongs
    to the new tokens itself; users come before what they read, so that this is known in time.
    """
    for node in reversed(list(work.graph.nodes)):
        if node not in token_nodes or node.op == "placeholder":
            continue
        spec = spec_of(node)
        for source in list(node.all_input_nodes):
            if source in token_nodes or not _spans_sequence(work, source):
                continue
            if _counts_rows_of_batch(work, source):
                token_nodes.add(source)
                continue
            whole = _arguments_named(node, source, spec.total_dims if spec else {})
            value = _rows(work, node, source, whole)
            node.replace_input_with(source, value)


def _arguments_named(node: Node, source: Node, total_dims: Any) -> int | None:
    for name, dim in total_dims.items():
        if argument(node, name) is source:
            return dim
    return None


def _spans_sequence(work: _Insertion, node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    return any(work.sequence in expr(size).free_symbols for size in value.shape)


def _counts_rows_of_batch(work: _Insertion, node: Node) -> bool:
    both = {work.sequence, work.symbols["batch"]}
    return any(both <= size.free_symbols for size in dims(node))


def _rows(work: _Insertion, user: Node, source: Node, whole: int | None) -> Node:
    value = _total(work, source)
    for axis, size in enumerate(dims(source)):
        if axis == whole or work.sequence not in size.free_symbols:
            continue
        if size != work.sequence:
            raise StateError(
                f"{_where(source)} has the size {size} in dimension {axis}, not the sequence "
                "length itself",
                "generation without state still works",
            )
        start = graphs.place(user, operator.neg, (work.length,))
        value = graphs.place(user, aten.slice.Tensor, (value, axis, start, _END))
    return value


def _total(work: _Insertion, node: Node) -> Node:
    """The node's value for the total length: a copy of what computes it."""
    if node.op in ("placeholder", "get_attr"):
        return node
    if node in work.clones:
        return work.clones[node]
    if node is work.length:
        clone = _total_length(work)
    elif not node.all_input_nodes:
        clone = node
    else:
        for source in node.all_input_nodes:
            _total(work, source)
        with work.graph.inserting_after(node):
            clone = work.graph.node_copy(node, lambda n: work.clones.get(n, n))
        clone.meta = dict(node.meta)
    work.clones[node] = clone
    return clone


def _total_length(work: _Insertion) -> Node:
    if work.total is not None:
        return work.total
    growing = [state for state in work.states if state.grows is not None and state.limit is None]
    if not growing:
        raise StateError(
            "positions cannot be told from the state: the model takes no attention_mask and no "
            "state grows with every token",
            "capture the model with an attention_mask input",
        )
    state = growing[0]
    past = next(
        n for n in work.program.placeholders if n.name == f"past_{state.name.replace('.', '_')}"
    )
    last = work.program.placeholders[-1]
    length = graphs.place(last, aten.sym_size.int, (past, state.grows), after=True)
    assert work.length is not None
    work.total = graphs.place(
        max(length, work.length), operator.add, (length, work.length), after=True
    )
    return work.total


def _trim_total_arguments(work: _Insertion, node: Node, spec: OpSpec) -> None:
    """An op that keeps a bounded past sees only the end of its total-length arguments."""
    bounded = [s for s in spec.states if s.limit and isinstance(argument(node, s.limit), int)]
    if not bounded:
        return
    key = argument(node, bounded[0].argument)
    size = graphs.place(node, aten.sym_size.int, (key, bounded[0].dim))
    start = graphs.place(node, operator.neg, (size,))
    for name, axis in spec.total_dims.items():
        value = argument(node, name)
        if isinstance(value, Node):
            cut = graphs.place(node, aten.slice.Tensor, (value, axis, start, _END))
            set_argument(node, name, cut)


def _last_row(work: _Insertion) -> None:
    """Select the last position as early as possible before the logits."""
    logits = work.program.output_nodes["logits"]
    place = logits
    while len(place.users) == 1 and (source := _row_source(work, place)):
        place = source
    users = list(place.users)
    last = graphs.place(place, aten.slice.Tensor, (place, 1, -1, _END), after=True)
    for user in users:
        if place is logits or len(users) == 1 or _reaches(user, logits):
            user.replace_input_with(place, last)


def _row_source(work: _Insertion, node: Node) -> Node | None:
    """The [batch, sequence, ...] tensor of which each row makes one row of ``node``, or None."""
    is_row_wise = node.target in _ROW_WISE and _others_broadcast(work, node)
    source = node.args[0] if is_row_wise else collectives.joined(node)
    if not isinstance(source, Node) or len(dims(source)) != 3:
        return None
    return source if dims(source)[1] == work.sequence else None


def _others_broadcast(work: _Insertion, node: Node) -> bool:
    if node.target is aten.slice.Tensor and dims(node) != dims(node.args[0]):
        return False
    return not any(_spans_sequence(work, source) for source in node.all_input_nodes[1:])


def _reaches(node: Node, goal: Node) -> bool:
    while node is not goal:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
        if node.op == "output":
            return False
    return True


def _finish(work: _Insertion) -> StepProgram:
    output = work.graph.output_node()
    logits = work.program.output_nodes["logits"]
    output.args = ((logits, *work.outputs),)
    names = ("logits", *(f"present_{state.name.replace('.', '_')}" for state in work.states))
    dimensions = dict(work.program.dimensions)
    for state in work.states:
        for size in state.shape:
            if isinstance(size, str):
                dimensions.setdefault(size, Range(0, state.limit))
    dimensions["total"] = Range(1, None)
    order = {node.name: index for index, node in enumerate(work.program.placeholders)}
    work.inputs.sort(key=lambda spec: order[spec.name])
    program = replace(work.program, inputs=tuple(work.inputs), outputs=names, dimensions=dimensions)
    values = step_inputs(program.inputs, dimensions, program.device)
    for node, value in zip(program.placeholders, values, strict=True):
        node.meta["val"] = value
    graphs.finish(program.graph_module)
    graphs.propagate(program.graph_module)
    return StepProgram(program, tuple(work.states))


def step_inputs(
    inputs: Sequence[Input],
    dimensions: Mapping[str, Range],
    device: torch.device,
    sizes: Mapping[str, int] | None = None,
) -> list[torch.Tensor]:
    """Fake inputs of a step graph, in which the total length is past and new tokens.

    Sizes stand in such that every bounded past is full and shorter than the unbounded one.

    Args:
        inputs: of the step graph.
        dimensions: the dynamic ones.
        device: of the fake tensors.
        sizes: dimensions that are fixed numbers.
    """
    fixed = sizes or {}
    hints = {name: 4 + bounds.maximum for name, bounds in dimensions.items()
             if name.startswith("past_") and bounds.maximum}  # fmt: skip
    longest = max(hints.values(), default=4)
    hints = {name: size - 4 for name, size in hints.items()}
    hints |= {"past": longest + 6, "total": longest + 32}
    derived: dict[str, sympy.Expr] = {}
    if "past" in dimensions:
        derived["total"] = sum(
            (sympy.Symbol(name) for name in ("past", "sequence") if name in dimensions),
            start=sympy.Integer(0 if "sequence" in dimensions else fixed["sequence"]),
        )
    return fake_inputs(inputs, dimensions, device, hints=hints, derived=derived)
