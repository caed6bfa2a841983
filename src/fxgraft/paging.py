"""``page_state``: from a step graph to one whose state lies in pools that all requests share.

The paged graph takes the new tokens of some rows and, instead of their state, where it lies:

* growing state in blocks (arXiv 2309.06180, section 4.1): ``table_<group>`` names each row's
  blocks, layer by layer; layers whose entries have one shape and one bound share a group, and a
  pool of blocks;
* fixed state in slots: ``slots`` names each row's;
* ``past`` counts the tokens of a row before the new ones; negative for a row without a request.

It changes the pools in place and returns ``logits`` [batch, 1, vocabulary] alone. The rewrite is
driven by ``OpSpec``: an op with a form of its own on pools is replaced by it; for any other op,
growing state is read as a dense tensor and fixed state copied out and in.

Rows hold no padding, so nothing asks which of the new tokens are real. Ops that keep one and the
same growing state share it.

Where a row may choose between ops (``fxgraft::choose_rows``), those that it does not choose see
it as a row without a request.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from fxgraft import graph as graphs
from fxgraft.errors import StateError
from fxgraft.kernels.spec import InPlace, OpSpec, State, argument, set_argument, spec_of
from fxgraft.padding import forget_new, mask_nodes
from fxgraft.program import Input, Program, Range
from fxgraft.state import StateTensor, StepProgram, is_request_input
from fxgraft.symbolic import fake_inputs

aten = torch.ops.aten
fx = torch.ops.fxgraft
_OWN = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Pool:
    """One tensor that holds a state of all requests.

    Attributes:
        name: the input of the paged graph.
        dtype: element type.
        shape: sizes of one block or slot.
        states: names of the states (``"<op>.<state>"``) that lie in it.
        dim: the dimension of tokens, counting that of blocks; 0 for fixed state.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    states: tuple[str, ...]
    dim: int = 0

    @property
    def item_bytes(self) -> int:
        """Bytes of one block or slot."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def empty(self, count: int, device: torch.device) -> torch.Tensor:
        """``count`` blocks or slots of zeros."""
        return torch.zeros((count, *self.shape), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class BlockGroup:
    """Ops whose growing states share blocks: one shape, one bound.

    Attributes:
        layers: numbers of the ops, counted over all that own state; the order of the table. Of
            ops that share blocks, the first.
        limit: most past entries that are still needed, None for all.
        pools: one per growing state of such an op.
    """

    layers: tuple[int, ...]
    limit: int | None
    pools: tuple[Pool, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, over all pools of the group."""
        return sum(pool.item_bytes for pool in self.pools)


@dataclass(frozen=True)
class PagedProgram:
    """A paged graph and a description of its pools.

    Its inputs, in order: ``own_inputs``, ``past`` int32 [batch], ``slots`` int64 [batch], one
    ``table_<g>`` int32 [ops of the group, batch, pages] per group, then the pools: those of each
    group, then those of slots.

    Attributes:
        program: the graph.
        block_size: tokens per block.
        groups: growing state.
        slot_pools: fixed state.
        choices: for each input that chooses an op per row, the ops (number and name) it chooses
            between, by choice.
        needs_mask: whether ``attention_mask`` has a meaning; where not, shapes do not depend on
            how long the past is.
    """

    program: Program
    block_size: int
    groups: tuple[BlockGroup, ...]
    slot_pools: tuple[Pool, ...]
    choices: dict[str, tuple[tuple[int, ...], ...]]
    op_names: tuple[str, ...]
    needs_mask: bool

    @property
    def own_inputs(self) -> tuple[Input, ...]:
        """The inputs that are the model's own."""
        names = [spec.name for spec in self.program.inputs]
        return self.program.inputs[: names.index("past")]

    @property
    def request_inputs(self) -> tuple[Input, ...]:
        """The model's own inputs that hold one value per row."""
        return tuple(s for s in self.own_inputs if s.name not in _OWN and is_request_input(s))


@dataclass
class _Paging:
    """Work in progress on one graph."""

    step: StepProgram
    program: Program
    block_size: int
    masks: Collection[Node]
    inputs: list[Input] = field(default_factory=list[Input])
    groups: list[BlockGroup] = field(default_factory=list[BlockGroup])
    slot_pools: list[Pool] = field(default_factory=list[Pool])
    hosts: dict[int, int] = field(default_factory=dict[int, int])
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    ends: list[tuple[Node, Node, Node]] = field(default_factory=list[tuple[Node, Node, Node]])

    @property
    def graph(self) -> Graph:
        return self.program.graph

    def states_of(self, number: int) -> dict[str, StateTensor]:
        prefix = f"{number}."
        return {
            state.name.removeprefix(prefix): state
            for state in self.step.states
            if state.name.startswith(prefix)
        }


def page_state(step: StepProgram, *, block_size: int = 16) -> PagedProgram:
    """Put the state of a step graph into pools.

    Args:
        step: from ``insert_state``; it is not changed.
        block_size: tokens per block of growing state.

    Raises:
        StateError: the graph keeps no state at all.
    """
    if not step.states:
        raise StateError("the model keeps no state between steps", "serve a causal language model")
    program = step.program.copy()
    work = _Paging(step, program, block_size, mask_nodes(program))
    stateful = [(n, s) for n in program.graph.nodes if (s := spec_of(n)) and s.states]
    forget_new(program, work.masks)
    branches = _branches(stateful)
    work.hosts = _hosts(work, stateful, branches)
    _add_mask_input(work)
    _add_inputs(work, stateful)
    for number, (node, spec) in enumerate(stateful):
        _page_op(work, number, node, spec, branches.get(node))
    return _finish(work, stateful, branches)


def _add_mask_input(work: _Paging) -> None:
    """Give the graph an ``attention_mask``, whose width is the number of tokens to look at."""
    own = work.step.own_inputs
    work.inputs = [*own]
    nodes = {node.name: node for node in work.program.placeholders}
    if "attention_mask" not in nodes:
        mask = _placeholder(work, "attention_mask", torch.int64, ("batch", "total"), own[-1].name)
        nodes["attention_mask"] = mask
    work.nodes = nodes


def _placeholder(
    work: _Paging,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int | str, ...],
    behind: str | None = None,
) -> Node:
    anchor = next(
        n for n in reversed(work.program.placeholders) if behind is None or n.name == behind
    )
    with work.graph.inserting_after(anchor):
        node = work.graph.placeholder(name)
    work.inputs.append(Input(name, dtype, shape))
    work.nodes[name] = node
    return node


def _add_inputs(work: _Paging, stateful: Sequence[tuple[Node, OpSpec]]) -> None:
    work.groups, work.slot_pools = _plan(work, stateful)
    _placeholder(work, "past", torch.int32, ("batch",))
    _placeholder(work, "slots", torch.int64, ("batch",))
    for index, group in enumerate(work.groups):
        shape = (len(group.layers), "batch", "pages")
        _placeholder(work, f"table_{index}", torch.int32, shape)
    for index, group in enumerate(work.groups):
        for pool in group.pools:
            _placeholder(work, pool.name, pool.dtype, (f"blocks_{index}", *pool.shape))
    for pool in work.slot_pools:
        _placeholder(work, pool.name, pool.dtype, ("slot_count", *pool.shape))


def _plan(
    work: _Paging, stateful: Sequence[tuple[Node, OpSpec]]
) -> tuple[list[BlockGroup], list[Pool]]:
    slots: list[Pool] = []
    held: dict[int, dict[str, list[int]]] = {}
    for number, (_, spec) in enumerate(stateful):
        states = work.states_of(number)
        for state in spec.states:
            if state.kind == "grows":
                names = held.setdefault(work.hosts[number], {})
                names.setdefault(state.name, []).append(number)
            else:
                kept = states[state.name]
                name = f"slots_{kept.name.replace('.', '_')}"
                slots.append(Pool(name, kept.dtype, _sizes(kept.shape[1:]), (kept.name,)))
    alike: dict[Any, list[int]] = {}
    for host, names in held.items():
        kinds = tuple(_kind_of(work, host, name, numbers) for name, numbers in names.items())
        alike.setdefault(kinds, []).append(host)
    groups = [
        BlockGroup(tuple(hosts), kinds[0].limit, tuple(k.pool(index, hosts) for k in kinds))
        for index, (kinds, hosts) in enumerate(alike.items())
    ]
    return groups, slots


@dataclass(frozen=True)
class _Kind:
    """Growing states that may lie in one pool.

    Attributes:
        offsets: the ops that have the state, counted from the one whose blocks it lies in.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    limit: int | None
    offsets: tuple[int, ...]

    def pool(self, index: int, hosts: Sequence[int]) -> Pool:
        """Their pool in the group number ``index``."""
        states = tuple(f"{h + offset}.{self.name}" for h in hosts for offset in self.offsets)
        return Pool(f"blocks_{index}_{self.name}", self.dtype, self.shape, states, self.dim)


def _kind_of(work: _Paging, host: int, name: str, numbers: Sequence[int]) -> _Kind:
    state = work.states_of(numbers[0])[name]
    offsets = tuple(number - host for number in numbers)
    shape = _block_shape(work, state)
    return _Kind(name, state.dtype, shape, state.grows or 0, state.limit, offsets)


def _hosts(
    work: _Paging, stateful: Sequence[tuple[Node, OpSpec]], branches: Collection[Node]
) -> dict[int, int]:
    """For each op the one in whose blocks its growing states lie: itself, or an earlier one.

    Ops that keep one and the same tensor share blocks, unless rows choose between ops.
    """
    found: dict[int, int] = {}
    held: dict[int, dict[str, tuple[Node, int | None]]] = {}
    for number, (node, spec) in enumerate(stateful):
        states = work.states_of(number)
        mine = {
            state.name: (_new_part(node, state), states[state.name].limit)
            for state in spec.states
            if state.kind == "grows"
        }
        others = () if node in branches else reversed(held)
        host = next((other for other in others if _share(held[other], mine)), number)
        found[number] = host
        if node not in branches:
            held.setdefault(host, {}).update(mine)
    return found


def _share(
    one: dict[str, tuple[Node, int | None]], other: dict[str, tuple[Node, int | None]]
) -> bool:
    """Whether some state is the same in both, and none of that name another one."""
    both = one.keys() & other.keys()
    limits = {limit for _, limit in (*one.values(), *other.values())}
    return bool(both) and len(limits) == 1 and all(one[name] == other[name] for name in both)


def _block_shape(work: _Paging, state: StateTensor) -> tuple[int, ...]:
    shape = list(state.shape)
    assert state.grows is not None
    shape[state.grows] = work.block_size
    return _sizes(tuple(shape[1:]))


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in shape):
        raise StateError(
            f"a state has the shape {list(shape)}, which differs between requests",
            "capture the model with a fixed size there",
        )
    return cast("tuple[int, ...]", shape)


def _branches(stateful: Sequence[tuple[Node, OpSpec]]) -> dict[Node, tuple[Node, int]]:
    """For each op that rows may choose: the choice, and the number it is chosen by."""
    found: dict[Node, tuple[Node, int]] = {}
    ops = {node for node, _ in stateful}
    for node in [*ops]:
        reached = _choice_behind(node)
        if reached is not None:
            found[node] = reached
    return found


def _choice_behind(node: Node) -> tuple[Node, int] | None:
    """Follow the op's only path to a choice between alternatives."""
    current = node
    while True:
        users = [u for u in current.users if not _is_state_output(current, u)]
        if len(users) != 1:
            return None
        user = users[0]
        if user.target is fx.choose_rows.default:
            options = cast("Sequence[Node]", user.args[1])
            return cast(Node, user.args[0]), list(options).index(current)
        if user.op == "output" or ((spec := spec_of(user)) and spec.states):
            return None
        current = user


def _is_state_output(node: Node, user: Node) -> bool:
    spec = spec_of(node)
    if user.op == "output":
        return True
    return bool(spec and spec.states and user.target is operator.getitem and user.args[1] != 0)


def _page_op(
    work: _Paging, number: int, node: Node, spec: OpSpec, branch: tuple[Node, int] | None
) -> None:
    growing = [state for state in spec.states if state.kind == "grows"]
    anchor = _cat_of(work, number, growing[0]) if growing else node
    past, slots = _rows_of(work, anchor, branch)
    table = _table_of(work, number, anchor)
    for state in spec.states:
        if state.kind == "grows":
            set_argument(node, state.argument, _new_part(node, state))
    form = spec.in_place(node, work.masks)
    if form is not None:
        _use_pools(work, number, node, spec, form, (past, slots, table))
        return
    for state in spec.states:
        if state.kind == "grows":
            assert table is not None
            _read_blocks(work, number, node, state, past, table)
        else:
            _copy_slots(work, number, node, state, past, slots)


def _rows_of(work: _Paging, node: Node, branch: tuple[Node, int] | None) -> tuple[Node, Node]:
    past, slots = work.nodes["past"], work.nodes["slots"]
    if branch is None:
        return past, slots
    chosen = graphs.place(node, aten.eq.Scalar, branch)
    return (
        graphs.place(node, aten.where.ScalarOther, (chosen, past, -1)),
        graphs.place(node, aten.where.ScalarOther, (chosen, slots, 0)),
    )


def _table_of(work: _Paging, number: int, node: Node) -> Node | None:
    for index, group in enumerate(work.groups):
        if work.hosts[number] in group.layers:
            place = group.layers.index(work.hosts[number])
            return graphs.place(node, aten.select.int, (work.nodes[f"table_{index}"], 0, place))
    return None


def _new_part(node: Node, state: State) -> Node:
    joined = argument(node, state.argument)
    assert isinstance(joined, Node)
    _, new = cast("list[Node]", joined.args[0])
    return new


def _pool_of(work: _Paging, number: int, state: State) -> Node:
    name = f"{number}.{state.name}"
    pools = [*(pool for group in work.groups for pool in group.pools), *work.slot_pools]
    return next(work.nodes[pool.name] for pool in pools if name in pool.states)


def _use_pools(
    work: _Paging,
    number: int,
    node: Node,
    spec: OpSpec,
    form: InPlace,
    place: tuple[Node, Node, Node | None],
) -> None:
    past, slots, table = place
    given: dict[str, Any] = {**form.arguments, "past": past}
    if any(state.kind == "grows" for state in spec.states):
        given["table"] = table
    if any(state.kind == "fixed" for state in spec.states):
        given["slots"] = slots
    for state in spec.states:
        given[f"{state.name}_cache"] = _pool_of(work, number, state)
    args, kwargs = _bound(form, given)
    call = graphs.place(node, form.target, args, kwargs)
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(call)
        return
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(call)


def _bound(form: InPlace, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the order of the operator's schema."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for one in cast(Any, form.target)._schema.arguments:
        value = given.get(one.name, one.default_value)
        if one.kwarg_only:
            kwargs[one.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _read_blocks(
    work: _Paging, number: int, node: Node, state: State, past: Node, table: Node
) -> None:
    new = argument(node, state.argument)
    assert isinstance(new, Node)
    old = _cat_of(work, number, state)
    limit = work.states_of(number)[state.name].limit
    total = graphs.place(old, aten.sym_size.int, (work.nodes["attention_mask"], 1))
    if limit is not None:
        length = graphs.place(old, aten.sym_size.int, (new, state.dim))
        most = graphs.place(old, operator.add, (length, limit))
        total = graphs.place(old, cast(Any, torch).sym_min, (total, most))
    pool = _pool_of(work, number, state)
    kwargs: dict[str, Any] = {"dim": state.dim, "total": total}
    joined = graphs.place(old, fx.append_pages.default, (new, pool, table, past), kwargs)
    for user in list(old.users):
        if user.op != "output":
            user.replace_input_with(old, joined)
    set_argument(node, state.argument, joined)


def _cat_of(work: _Paging, number: int, state: State) -> Node:
    past = work.nodes[f"past_{number}_{state.name}"]
    return next(user for user in past.users if user.target is aten.cat.default)


def _copy_slots(
    work: _Paging, number: int, node: Node, state: State, past: Node, slots: Node
) -> None:
    pool = _pool_of(work, number, state)
    value = graphs.place(node, fx.read_slots.default, (pool, slots, past))
    set_argument(node, state.argument, value)
    following = next(
        (u for u in node.users
         if u.target is operator.getitem and u.args[1] == state.output), None
    )  # fmt: skip
    if following is None:
        following = graphs.place(node, operator.getitem, (node, state.output), after=True)
    graphs.place(following, fx.write_slots.default, (pool, slots, following), after=True)


def _finish(
    work: _Paging,
    stateful: Sequence[tuple[Node, OpSpec]],
    branches: dict[Node, tuple[Node, int]],
) -> PagedProgram:
    choices = _choices(stateful, branches)
    names = tuple(spec.name for _, spec in stateful)
    output = work.graph.output_node()
    logits = cast("Sequence[Node]", output.args[0])[0]
    output.args = ((logits,),)
    _drop_old_state(work)
    _keep_order(work)
    dimensions = _dimensions(work)
    program = replace(
        work.program, inputs=tuple(work.inputs), outputs=("logits",), dimensions=dimensions
    )
    values = fake_inputs(program.inputs, dimensions, program.device)
    for node, value in zip(program.placeholders, values, strict=True):
        node.meta["val"] = value
    graphs.finish(program.graph_module)
    graphs.propagate(program.graph_module)
    return PagedProgram(
        program,
        work.block_size,
        tuple(work.groups),
        tuple(work.slot_pools),
        choices,
        names,
        bool(work.nodes["attention_mask"].users),
    )


def _choices(
    stateful: Sequence[tuple[Node, OpSpec]], branches: dict[Node, tuple[Node, int]]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    found: dict[str, dict[int, list[int]]] = {}
    for number, (node, _) in enumerate(stateful):
        if node in branches:
            choice, option = branches[node]
            found.setdefault(choice.name, {}).setdefault(option, []).append(number)
    return {
        name: tuple(tuple(options.get(k, ())) for k in range(max(options) + 1))
        for name, options in found.items()
    }


def _drop_old_state(work: _Paging) -> None:
    """Remove the state inputs of the step graph, and the sizes that were read from them."""
    work.graph.eliminate_dead_code()
    for state in work.step.states:
        node = work.nodes[f"past_{state.name.replace('.', '_')}"]
        for user in list(node.users):
            if user.target is not aten.sym_size.int:
                raise StateError(
                    f"node {user.name!r} reads the state {state.name!r} as a whole",
                    "the op that owns this state needs a form on pools",
                )
            mask, ids = work.nodes["attention_mask"], work.nodes["input_ids"]
            last = work.program.placeholders[-1]
            new = graphs.place(last, aten.sym_size.int, (ids, 1), after=True)
            total = graphs.place(new, aten.sym_size.int, (mask, 1), after=True)
            past = graphs.place(total, operator.sub, (total, new), after=True)
            user.replace_all_uses_with(past)
            work.graph.erase_node(user)
        work.graph.erase_node(node)


def _keep_order(work: _Paging) -> None:
    """The Program names its inputs in the order of the graph's."""
    order = {node.name: index for index, node in enumerate(work.program.placeholders)}
    work.inputs.sort(key=lambda spec: order[spec.name])


def _dimensions(work: _Paging) -> dict[str, Range]:
    used = {size for spec in work.inputs for size in spec.shape if isinstance(size, str)}
    known = work.program.dimensions
    return {name: known.get(name, Range(1, None)) for name in sorted(used)}
