"""What the compiler knows about an op: its state, its whole-length arguments, its cost.

``insert_state``, the layer view and the cost model are driven by these records alone; none of
them knows an op by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import sympy
import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxgraft.errors import Error

Expr = sympy.Expr
ZERO = sympy.Integer(0)
Kind = Literal["mixer", "norm", "position", "activation", "intervention", "linear", "mask", "state"]


@dataclass(frozen=True)
class State:
    """One piece of state that an op carries from one step to the next.

    Attributes:
        name: the field's name for it, for example ``"key"`` or ``"conv"``.
        argument: the op argument that takes the state. For ``"grows"`` it is the argument whose
            past values are kept (the past is concatenated in front of it); for ``"fixed"`` it is
            the optional argument that takes the previous state.
        kind: ``"grows"`` with the number of tokens, or ``"fixed"`` in size.
        dim: dimension along which a growing state grows.
        limit: name of an integer op argument that bounds a growing state: a query sees at most
            that many most recent keys, itself included, so ``limit - 1`` past entries suffice.
        output: index of the op's output that is the next state (``"fixed"`` only).
    """

    name: str
    argument: str
    kind: Literal["grows", "fixed"]
    dim: int = 0
    limit: str | None = None
    output: int = 0


@dataclass(frozen=True)
class Cost:
    """Work of one node as expressions over the graph's symbols.

    Attributes:
        flops: floating-point operations, a multiply-add counted as two.
        bytes_read: bytes of inputs, weights and state read, each once.
        bytes_written: bytes of outputs and state written, each once.
        state_bytes: bytes of state that the node keeps between steps.
    """

    flops: Expr = ZERO
    bytes_read: Expr = ZERO
    bytes_written: Expr = ZERO
    state_bytes: Expr = ZERO

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.state_bytes + other.state_bytes,
        )


@dataclass(frozen=True)
class InPlace:
    """A call that does what a node does, on state that lies in pools.

    Growing state lies in blocks: the call also gets ``table`` and ``past`` (see
    ``fxgraft.kernels.append_pages.op``). Fixed state lies in slots: the call also gets ``slots``
    and ``past`` (see ``fxgraft.kernels.read_slots.op``). For each state it gets the pool as
    ``<name>_cache``, which it changes.

    Attributes:
        target: the operator.
        arguments: its other arguments by name; the arguments that carried state hold only what
            belongs to the new tokens.
    """

    target: OpOverload
    arguments: dict[str, object]


@dataclass(frozen=True)
class PackedWeight:
    """How an op of kind ``"linear"`` stores its weight in another form than [O, K].

    Attributes:
        arguments: names of the tensors that hold the weight; the first one's name is the weight's.
        pattern: N and M of a node, if at most N of each M neighbours along K are kept.
        shape: O and K of a node.
        unpack: the weight [O, K] of a node, given the values of ``arguments``.
        experts: for a node whose rows are sorted by which of E weights they meet, E, and
            ``unpack`` gives [E, O, K]; else None.
    """

    arguments: tuple[str, ...]
    pattern: Callable[[Node], tuple[int, int]]
    shape: Callable[[Node], tuple[Expr, Expr]]
    unpack: Callable[[Node, Sequence[torch.Tensor]], torch.Tensor]
    experts: Callable[[Node], int | None] = lambda node: None


@dataclass(frozen=True)
class OpSpec:
    """The registration of one op.

    Attributes:
        name: op name without namespace, equal to its folder under ``kernels/``.
        kind: what the op is in a layer; ``"mixer"`` ops mix tokens.
        reference: plain PyTorch, any floating dtype up to float64, differentiable, exportable.
        states: state the op owns; empty for stateless ops.
        total_dims: arguments that span the whole length (past and new) in a step graph, as
            argument name → dimension.
        causal: given a node, whether the op lets a token see earlier tokens only; None if that
            depends on the values of a mask.
        flops: floating-point operations of a node, over the symbols in its ``meta["val"]``.
        in_place: given a node of a step graph and the nodes that only tell which past tokens are
            real, the same on pools, or None where the op has no such form for this node.
        packed: how its weight is stored, if not as the argument ``weight`` [O, K].
    """

    name: str
    kind: Kind
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...] | None]
    flops: Callable[[Node], Expr]
    states: tuple[State, ...] = ()
    total_dims: Mapping[str, int] = field(default_factory=dict[str, int])
    causal: Callable[[Node], bool | None] = lambda node: True
    in_place: Callable[[Node, Collection[Node]], InPlace | None] = lambda node, masks: None
    refusal: Callable[[Node], str | None] = lambda node: None
    packed: PackedWeight | None = None

    @property
    def overload(self) -> OpOverload:
        """The operator that appears as a node's target."""
        return getattr(torch.ops.fxgraft, self.name).default


_SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Add an op to the registry.

    Raises:
        Error: an op of that name is registered already.
    """
    if spec.name in _SPECS:
        raise Error(f"op {spec.name!r} is registered twice", "give the op another name")
    _SPECS[spec.name] = spec
    return spec


def specs() -> Mapping[str, OpSpec]:
    """All registered ops by name."""
    return dict(_SPECS)


def spec_of(node: Node) -> OpSpec | None:
    """The spec of the op that a graph node calls, or None for any other node."""
    if node.op != "call_function":
        return None
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "fxgraft":
        return None
    return _SPECS.get(target.name().split("::")[1].split(".")[0])


def _schema(node: Node) -> Any:
    """The schema of the operator that a node calls."""
    return cast(Any, node.target)._schema


def argument(node: Node, name: str) -> object:
    """The value that a call node passes for the op argument ``name``, or its default.

    Raises:
        Error: the op has no such argument.
    """
    for position, schema_argument in enumerate(_schema(node).arguments):
        if schema_argument.name != name:
            continue
        if name in node.kwargs:
            return node.kwargs[name]
        if position < len(node.args) and not schema_argument.kwarg_only:
            return node.args[position]
        return schema_argument.default_value
    raise Error(f"{node.target} has no argument {name!r}", "check the op's schema")


def set_argument(node: Node, name: str, value: object) -> None:
    """Make a call node pass ``value`` for the op argument ``name``."""
    names = [a.name for a in _schema(node).arguments]
    position = names.index(name)
    if name not in node.kwargs and position < len(node.args):
        node.update_arg(position, value)  # pyright: ignore[reportArgumentType]
    else:
        node.update_kwarg(name, value)  # pyright: ignore[reportArgumentType]


def dims(value: object) -> tuple[Expr, ...]:
    """Shape of a node or fake tensor as sympy expressions.

    Args:
        value: a graph node whose ``meta["val"]`` is a tensor, or such a tensor.
    """
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, (tuple, list)):
        value = cast("Sequence[object]", value)[0]
    assert isinstance(value, torch.Tensor)
    return tuple(expr(size) for size in value.shape)


def expr(size: int | torch.SymInt) -> Expr:
    """A dimension as a sympy expression."""
    return cast(Any, size).node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
