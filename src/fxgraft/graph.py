"""Inserting and refreshing graph nodes so that their metadata stays true.

Every node carries:

* ``meta["val"]``: a fake tensor (or symbolic number) with the node's shape and dtype,
* ``meta["module"]``: path of the module it came from, for example ``model.layers.3.mlp.up_proj``,
* ``meta["source"]``: the user's source line, ``file.py:120: code``,
* ``meta["made_by"]``: name of the pass that inserted it (absent on captured nodes).
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
from collections.abc import Callable, Collection, Generator, Iterable
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

from fxgraft import fake_calls
from fxgraft.errors import GraphError

_made_by: contextvars.ContextVar[str] = contextvars.ContextVar("made_by", default="")
_INHERITED = ("module", "source")


@contextlib.contextmanager
def made_by(name: str) -> Generator[None]:
    """Stamp every node inserted inside with ``meta["made_by"] = name``."""
    token = _made_by.set(name)
    try:
        yield
    finally:
        _made_by.reset(token)


@contextlib.contextmanager
def no_collection() -> Generator[None]:
    """Keep Python from looking for garbage while thousands of long-lived nodes are made.

    Each look walks all of them: it took longer than the rewrite itself.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode (and its symbols) that the graph's values belong to.

    Raises:
        GraphError: the graph has no tensor value to take it from.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise GraphError("the graph has no shapes", "capture it with fxgraft.capture")


def weight_of(module: GraphModule, name: str) -> torch.Tensor:
    """The parameter or buffer of that name."""
    owner: Any = module
    for part in name.split("."):
        owner = getattr(owner, part)
    return cast(torch.Tensor, owner)


def evaluate(node: Node) -> Any:
    """Compute a node's fake value from its inputs' values.

    Raises:
        GraphError: the op rejects the shapes; names the node, its module and source line.
    """
    if node.op == "placeholder":
        return node.meta["val"]
    mode = fake_mode(node.graph)
    if node.op == "get_attr":
        assert node.graph.owning_module is not None
        weight = weight_of(node.graph.owning_module, str(node.target))
        return fake_calls.weight(mode, weight)
    if node.op == "output":
        return map_arg(node.args[0], lambda n: n.meta["val"])
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        return fake_calls.call(mode, cast(Callable[..., Any], node.target), args, kwargs)  # pyright: ignore[reportArgumentType]
    except Exception as error:
        raise GraphError(
            f"node {node.name!r} ({node.target}) cannot take its inputs: {error}\n"
            f"  in module {node.meta.get('module', '?')!r} at {node.meta.get('source', '?')}",
            "a rewrite gave it inputs of the wrong shape; check the pass "
            f"{node.meta.get('made_by', '') or 'before this point'!r}",
        ) from error


def insert(
    anchor: Node,
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    after: bool = False,
    name: str | None = None,
) -> Node:
    """Insert a call next to ``anchor`` with complete metadata.

    Args:
        anchor: the node whose module path and source line the new node inherits.
        target: the operator to call.
        args: its arguments, nodes or constants.
        kwargs: its keyword arguments.
        after: insert behind the anchor instead of before it.
        name: name hint for the node.

    Raises:
        GraphError: the operator cannot take these arguments.
    """
    graph = anchor.graph
    place = graph.inserting_after(anchor) if after else graph.inserting_before(anchor)
    with place:
        node = graph.create_node(
            "call_function", target, cast("tuple[Argument, ...]", args), kwargs or {}, name=name
        )
    inherit(node, anchor)
    node.meta["val"] = evaluate(node)
    return node


def place(
    anchor: Node,
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    after: bool = False,
) -> Node:
    """Insert a call next to ``anchor`` without computing its value.

    For rewrites that change inputs and recompute all values at their end (``propagate``).
    """
    graph = anchor.graph
    where = graph.inserting_after(anchor) if after else graph.inserting_before(anchor)
    with where:
        node = graph.call_function(target, cast("tuple[Argument, ...]", args), kwargs or {})
    inherit(node, anchor)
    return node


def insert_weight(module: GraphModule, anchor: Node, name: str) -> Node:
    """Insert a read of the weight ``name`` before ``anchor`` (it must exist in the module)."""
    with module.graph.inserting_before(anchor):
        node = module.graph.create_node("get_attr", name)
    inherit(node, anchor)
    node.meta["val"] = evaluate(node)
    return node


def inherit(node: Node, anchor: Node) -> None:
    """Give ``node`` the module path and source line of ``anchor`` and the current pass's name."""
    for key in _INHERITED:
        if key in anchor.meta:
            node.meta[key] = anchor.meta[key]
    if _made_by.get():
        node.meta["made_by"] = _made_by.get()


def refresh(changed: Iterable[Node], *, until: Collection[Node] = ()) -> None:
    """Recompute values downstream of nodes whose arguments or weights changed.

    Stops along a path as soon as a value comes out with the shape and dtype it had.

    Args:
        changed: the nodes to start from.
        until: nodes to leave alone, because other inputs of theirs are yet to change.

    Raises:
        GraphError: some node cannot take the new shapes.
    """
    pending = set(changed)
    if not pending:
        return
    graph = next(iter(pending)).graph
    for node in graph.nodes:
        if node not in pending or node.op == "output" or node in until:
            continue
        pending.discard(node)
        value = evaluate(node)
        same = signature(value) == signature(node.meta.get("val"))
        node.meta["val"] = value
        if not same:
            pending.update(node.users)


def propagate(module: GraphModule) -> None:
    """Recompute every value from the placeholders' values."""
    for node in module.graph.nodes:
        if node.op != "output":
            node.meta["val"] = evaluate(node)


def signature(value: Any) -> object:
    """Shape and dtype of a value, or of each of several, comparable with ``==``."""
    if isinstance(value, torch.Tensor):
        return (tuple(str(size) for size in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(signature(item) for item in cast("tuple[Any, ...]", value))
    return str(value)


def finish(module: GraphModule) -> None:
    """Drop dead nodes and unused weights, check the graph and regenerate its code."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    drop_unused_weights(module)
    module.graph.lint()
    module.recompile()


def drop_unused_weights(module: GraphModule) -> None:
    """Remove parameters and buffers that no node reads."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for path, owner in cast("list[tuple[str, torch.nn.Module]]", [*module.named_modules()]):
        prefix = f"{path}." if path else ""
        stored = [
            *owner.named_parameters(recurse=False, remove_duplicate=False),
            *owner.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for key, _ in stored:
            if prefix + key not in used:
                delattr(owner, key)


def set_weight(module: GraphModule, name: str, value: torch.Tensor) -> None:
    """Store a weight under a dotted name, creating the modules on the way.

    Trainable-type tensors that are ``nn.Parameter`` stay parameters; others become buffers.
    """
    *parents, leaf = name.split(".")
    owner: torch.nn.Module = module
    for part in parents:
        child = getattr(owner, part, None)
        if not isinstance(child, torch.nn.Module):
            child = torch.nn.Module()
            owner.add_module(part, child)
        owner = child
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def short_target(node: Node) -> str:
    """An operator's readable name: ``aten.linear``, ``fxgraft.attention``, ``getitem``."""
    target = node.target
    if isinstance(target, OpOverload):
        namespace, name = target.name().split("::")
        return f"{namespace}.{name}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
