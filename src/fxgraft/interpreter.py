"""Runs a Program node by node, keeping values and holding them against the nodes' metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import Interpreter, Node

from fxgraft.errors import Error, GraphError
from fxgraft.graph import short_target
from fxgraft.kernels.spec import Expr, dims
from fxgraft.program import Program


def run(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    verify: bool = False,
    kept: dict[str, Any] | None = None,
    stand_ins: Mapping[Any, Callable[..., Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Run a Program and return its outputs by name.

    Args:
        program: its weights must not be on the meta device.
        inputs: by name.
        verify: hold every value against the shape and dtype in ``meta["val"]``.
        kept: filled with every node's value by node name.
        stand_ins: functions to call instead of some operators.

    Raises:
        GraphError: an operator fails, or metadata is untrue; names the node and who made it.
    """
    interpreter = _Interpreter(program, verify, kept, stand_ins or {})
    with torch.no_grad():
        values = cast("tuple[Any, ...]", interpreter.run(*program.bind(**inputs)))
    named = zip(program.outputs, values, strict=True)
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


def describe_node(node: Node) -> str:
    """A node with its operator, module, source line and maker, for messages."""
    text = f"node {node.name!r} ({short_target(node)})"
    if node.meta.get("module"):
        text += f" in module {node.meta['module']!r}"
    if node.meta.get("source"):
        text += f" at {node.meta['source']}"
    if node.meta.get("made_by"):
        text += f", inserted by pass {node.meta['made_by']!r}"
    return text


class _Interpreter(Interpreter):
    def __init__(
        self,
        program: Program,
        verify: bool,
        kept: dict[str, Any] | None,
        stand_ins: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__(program.graph_module)
        self._stand_ins = stand_ins
        self.extra_traceback = False
        self._verify = verify
        self._kept = kept
        self._sizes: dict[Expr, int] = {}
        self._evaluated: dict[Expr, Expr] = {}

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except Error:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise GraphError(
                f"{describe_node(n)} fails when it is run: {reason}",
                "check the arguments that the node was given",
            ) from error
        if self._verify and isinstance(value, torch.Tensor):
            self._compare(n, value)
        if self._kept is not None:
            self._kept[n.name] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self._stand_ins.get(target, target), args, kwargs)

    def _compare(self, node: Node, value: torch.Tensor) -> None:
        expected = node.meta.get("val")
        if not isinstance(expected, torch.Tensor):
            raise GraphError(
                f"{describe_node(node)} gives a tensor, its metadata says {expected!r}",
                "insert nodes with fxgraft.graph.insert, which records their values",
            )
        if node.op == "placeholder":
            symbols = zip(dims(expected), value.shape, strict=True)
            self._sizes |= {s: size for s, size in symbols if s.is_Symbol}
        shape = [self._evaluate(size) for size in dims(expected)]
        same = len(shape) == value.dim() and all(map(_agrees, shape, value.shape))
        if not same or expected.dtype != value.dtype:
            raise GraphError(
                f"{describe_node(node)} gives {_text(value.dtype, value.shape)}, its metadata "
                f"says {_text(expected.dtype, dims(expected))}",
                "call fxgraft.graph.refresh with the nodes whose arguments or weights changed",
            )

    def _evaluate(self, size: Expr) -> Expr:
        if size not in self._evaluated:
            self._evaluated[size] = cast(Any, size).subs(self._sizes)
        return self._evaluated[size]


def _agrees(size: Expr, actual: int) -> bool:
    """Whether a size is as expected, or unknown because it depends on data."""
    return bool(size.free_symbols) or int(cast(Any, size)) == actual


def _text(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(str(size) for size in shape)}]"
