"""``torch.export`` of a module into a Program: weights as attributes, readable metadata."""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Generator, Iterator, Mapping
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node

from fxgraft import graph as graphs
from fxgraft.errors import CaptureError
from fxgraft.frontends import frozen_sizes
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Program, Range

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\s*\n\s*(?P<code>[^\n]*)')

_FROZEN_REMEDY = (
    "the model branches on this size or loops over it; rewrite that line, or leave the dimension "
    "out of `dynamic`, so that it is fixed knowingly"
)


def export(
    model: nn.Module, specs: tuple[Input, ...], values: Mapping[str, torch.Tensor]
) -> Program:
    """Capture ``model`` called with ``values``.

    Raises:
        CaptureError: with the module path and source line where the capture failed.
    """
    with _evaluating(model):
        exported = _run(model, specs, values)
    program = _to_program(model, exported, specs)
    _check_dynamic(program)
    return program


def _run(
    model: nn.Module, specs: tuple[Input, ...], values: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    dynamic = {
        spec.name: {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(spec.shape)
            if isinstance(size, str)
        }
        for spec in specs
    }
    keywords: dict[str, Any] = dict(values)
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords["use_cache"] = False
    dynamic |= {name: None for name in keywords if name not in dynamic}  # pyright: ignore[reportAssignmentType]
    with (
        torch.no_grad(),
        graphs.no_collection(),
        _no_cache(model),
        frozen_sizes.watch(model) as frozen,
    ):
        try:
            return torch.export.export(model, (), keywords, dynamic_shapes=dynamic, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            lost = frozen.explain(str(error), specs)
            if lost:
                raise CaptureError(
                    f"cannot capture {type(model).__name__}: {lost}", _FROZEN_REMEDY
                ) from error
            raise _capture_error(model, error) from error


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode; afterwards each module, frozen ones too, has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Generator[None]:
    """A cache cannot be captured; state is inserted afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    users: list[Any] = [config for config in configs.values() if hasattr(config, "use_cache")]
    previous = [config.use_cache for config in users]
    for config in users:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in zip(users, previous, strict=True):
            config.use_cache = value


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    text = str(error)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frozen_sizes.is_library(frame.filename)
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "unknown"
    path = _module_path(model, error)
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        remedy = (
            "the branch depends on tensor values; replace it with torch.where or torch.cond, or "
            "decide it outside the model"
        )
    elif "Constraints violated" in text:
        remedy = "the model restricts a dynamic size; leave that dimension out of `dynamic`"
    else:
        remedy = "make this line traceable by torch.export, or capture a part of the model"
    return CaptureError(
        f"cannot capture {type(model).__name__}: {first.strip()[:400]}\n"
        f"  in module {path!r} at {place}",
        remedy,
    )


def _module_path(model: nn.Module, error: Exception) -> str:
    """Dotted path of the innermost module whose forward is on the error's call stack."""
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    names = {id(module): name for name, module in modules}
    found = ""
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if id(owner) in names and names[id(owner)]:
            found = names[id(owner)]
        frame = frame.tb_next
    return found or type(model).__name__


def _to_program(
    model: nn.Module, exported: torch.export.ExportedProgram, specs: tuple[Input, ...]
) -> Program:
    graph = exported.graph_module.graph
    weights: dict[str, torch.Tensor] = {}
    kept: dict[str, Input] = {spec.name: spec for spec in specs}
    order: list[Input] = []
    tied = _tied_names(model)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            _keep_input(graph, node, kept, order)
            continue
        assert spec.target is not None
        for name, users in _readers(node, tied.get(spec.target, [spec.target])).items():
            weights[name] = _stored(exported, spec.target)
            _read_weight(graph, node, name, users)
        graph.erase_node(node)
    names, kind = _outputs(exported, graph)
    for node in graph.nodes:
        _describe(node)
    module = GraphModule(weights, graph, class_name="Program")
    for name, weight in weights.items():
        graphs.set_weight(module, name, weight)
    program = Program(
        module, tuple(order), names, _ranges(exported, order, graph), origin(model, kind)
    )
    graphs.finish(module)
    return program


def _stored(exported: torch.export.ExportedProgram, name: str) -> torch.Tensor:
    if name in exported.state_dict:
        return cast(torch.Tensor, exported.state_dict[name])
    return cast(torch.Tensor, exported.constants[name])


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by each of them."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name: group for group in names.values() for name in group}


def _readers(node: Node, names: list[str]) -> dict[str, list[Node]]:
    """Who reads a weight, by the name that it has in the reader's module; export knows but one."""
    readers: dict[str, list[Node]] = {}
    for user in node.users:
        module = _innermost_module(user)
        own = next((name for name in names if name.rpartition(".")[0] == module), names[0])
        readers.setdefault(own, []).append(user)
    return readers


def _read_weight(graph: torch.fx.Graph, node: Node, name: str, users: list[Node]) -> None:
    with graph.inserting_before(min(users)):
        read = graph.create_node("get_attr", name)
    read.meta["val"] = node.meta["val"]
    read.meta["module"] = name.rpartition(".")[0]
    for user in users:
        user.replace_input_with(node, read)


def _keep_input(
    graph: torch.fx.Graph, node: Node, kept: Mapping[str, Input], order: list[Input]
) -> None:
    if node.name in kept:
        order.append(kept[node.name])
    elif not node.users:
        graph.erase_node(node)
    else:
        raise CaptureError(
            f"the graph kept an input {node.name!r} that was not described", "report the model"
        )


def _outputs(
    exported: torch.export.ExportedProgram, graph: torch.fx.Graph
) -> tuple[tuple[str, ...], str]:
    output = graph.output_node()
    values = cast("tuple[Any, ...]", output.args[0])
    user = [
        value
        for value, spec in zip(values, exported.graph_signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    structure = pytree.tree_unflatten(
        list(range(len(user))), cast(pytree.TreeSpec, exported.call_spec.out_spec)
    )
    kind = "mapping" if isinstance(structure, Mapping) else "tuple"
    kind = "tensor" if isinstance(structure, int) else kind
    names: dict[int, str] = {}
    _name_outputs(structure, "" if kind != "tensor" else "output", names)
    kept = [
        (names.get(index, f"output_{index}"), value)
        for index, value in enumerate(user)
        if isinstance(value, Node)
    ]
    output.args = (tuple(value for _, value in kept),)
    return tuple(name for name, _ in kept), kind


def _name_outputs(structure: Any, prefix: str, names: dict[int, str]) -> None:
    if isinstance(structure, int):
        names[structure] = prefix
    elif isinstance(structure, Mapping):
        for key, value in cast("Mapping[str, Any]", structure).items():
            _name_outputs(value, f"{prefix}.{key}" if prefix else str(key), names)
    elif isinstance(structure, (tuple, list)):
        for index, value in enumerate(cast("tuple[Any, ...]", structure)):
            _name_outputs(value, f"{prefix}.{index}" if prefix else f"output_{index}", names)


def _describe(node: Node) -> None:
    """Replace export's metadata by the three keys that fxgraft keeps."""
    meta: dict[str, Any] = {}
    if "val" in node.meta:
        meta["val"] = node.meta["val"]
    module = node.meta.get("module") or _innermost_module(node)
    if module:
        meta["module"] = module
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if frames:
        last = next((f for f in reversed(frames) if "/torch/" not in f["file"]), frames[-1])
        file = last["file"].rsplit("/", 1)[-1]
        meta["source"] = f"{file}:{last['line']}: {last['code'].strip()}"
    node.meta = meta


def _innermost_module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    if str(path).startswith("_empty_nn_module_stack"):
        return ""
    if str(path).startswith("_empty_nn_module_stack"):
        return ""
    return re.sub(r"^L\['self'\]\.?", "", str(path)).split("@")[0]


def _ranges(
    exported: torch.export.ExportedProgram, specs: list[Input], graph: torch.fx.Graph
) -> dict[str, Range]:
    """Sizes for which the graph computes what the model does, over all inputs that share a name."""
    ranges: dict[str, Range] = {}
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    for spec, node in zip(specs, nodes, strict=True):
        for name, size in zip(spec.shape, dims(node), strict=True):
            if not isinstance(name, str):
                continue
            bounds = cast(Any, exported).range_constraints.get(size)
            ranges[name] = _narrowed(ranges.get(name, Range()), bounds)
    return ranges


def _narrowed(known: Range, bounds: Any) -> Range:
    """The sizes in both; export says 2 where it only means that 1 was not tried."""
    lower, upper = (getattr(bounds, side, None) for side in ("lower", "upper"))
    minimum = int(lower) if getattr(lower, "is_Integer", False) and int(lower) > 2 else 1  # pyright: ignore[reportArgumentType]
    maxima = [known.maximum] if known.maximum is not None else []
    if getattr(upper, "is_Integer", False) and int(upper) < 2**31:  # pyright: ignore[reportArgumentType]
        maxima.append(int(upper))  # pyright: ignore[reportArgumentType]
    return Range(max(known.minimum, minimum), min(maxima, default=None))


def _check_dynamic(program: Program) -> None:
    """Fail if a dimension that should be dynamic came out as a number.

    Raises:
        CaptureError: names the input, the dimension and the first node that froze it.
    """
    for spec, node in zip(program.inputs, program.placeholders, strict=True):
        for axis, (name, size) in enumerate(zip(spec.shape, dims(node), strict=True)):
            if isinstance(name, str) and not size.free_symbols:
                raise CaptureError(
                    f"dimension {name!r} (axis {axis} of input {spec.name!r}) was frozen to {size}",
                    _FROZEN_REMEDY,
                )


def origin(model: nn.Module, kind: str) -> dict[str, Any]:
    """Where a Program came from, as JSON values."""
    config = getattr(model, "config", None)
    result: dict[str, Any] = {"class": type(model).__name__, "source": "", "output": kind}
    if config is not None and hasattr(config, "to_diff_dict"):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        result["model_type"] = config.model_type
        result["context_length"] = getattr(text, "max_position_embeddings", None)
        generation = getattr(model, "generation_config", None)
        result["generation"] = {
            "eos_token_id": getattr(generation, "eos_token_id", None),
            "pad_token_id": getattr(generation, "pad_token_id", None),
            "bos_token_id": getattr(generation, "bos_token_id", None),
        }
    return result
