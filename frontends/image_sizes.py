"""Sizes of images: inputs that a model reads as Python numbers, so that capture fixes their values.

transformers loops over these sizes, and computes indices from them. While a model is captured, it
gets those of the example as NumPy arrays, which compute at once where tensors would be recorded,
and what transformers' own ``exporters`` computes beforehand as constants of the graph.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.frontends import image_positions
from fxgraft.program import Input, Program

SIZE_INPUTS = ("image_grid_thw", "image_sizes")
"""Inputs of transformers models, int64 [images, ...], that hold the sizes of images."""


@dataclass
class _Constants:
    """Tensors that a module gets as buffers while it is captured.

    Attributes:
        values: by full name.
        owners: the buffer's module and its name in it.
    """

    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    owners: list[tuple[nn.Module, str]] = field(default_factory=list[tuple[nn.Module, str]])

    def add(self, path: str, module: nn.Module, name: str, value: Tensor) -> None:
        """Register a buffer on the device of the module's weights."""
        device = next((weight.device for weight in module.parameters()), value.device)
        module.register_buffer(name, value.to(device), persistent=False)
        self.values[f"{path}.{name}" if path else name] = value
        self.owners.append((module, name))

    def remove(self) -> None:
        """Leave the modules as they were."""
        for module, name in self.owners:
            delattr(module, name)


@contextlib.contextmanager
def fixed(model: nn.Module, specs: tuple[Input, ...]) -> Generator[Mapping[str, Tensor]]:
    """While active, the model is called without its sizes of images, and computes with the given.

    Args:
        model: of transformers.
        specs: its inputs.

    Yields:
        Constants of the graph by name, with their values: on the meta device they have none.

    Raises:
        InputError: the sizes do not suit the model.
    """
    sizes = {spec.name: spec.fixed_value() for spec in specs if spec.fixed}
    constants = _Constants()
    hooks: list[Any] = []
    try:
        if sizes:
            grid = sizes.get("image_grid_thw")
            if grid is not None:
                hooks += _prepare_positions(model, grid, constants)
                hooks += _prepare_towers(model, grid, constants)
            hooks.append(_give(model, {name: value.numpy() for name, value in sizes.items()}))
        yield constants.values
    finally:
        for hook in hooks:
            hook.remove()
        constants.remove()


def add_inputs(program: Program, specs: tuple[Input, ...]) -> None:
    """Add the inputs of fixed values, which no node reads; calls are checked against them."""
    if not any(spec.fixed for spec in specs):
        return
    nodes = {node.name: node for node in program.placeholders}
    anchor = next(node for node in program.graph.nodes if node.op != "placeholder")
    like = program.placeholders[0].meta["val"]
    for spec in reversed(specs):
        if spec.fixed:
            with program.graph.inserting_before(anchor):
                nodes[spec.name] = program.graph.placeholder(spec.name)
            nodes[spec.name].meta["val"] = like.new_empty(
                spec.fixed_value().shape, dtype=spec.dtype
            )
        anchor = nodes[spec.name]
    program.inputs = specs
    graphs.finish(program.graph_module)


def _give(module: nn.Module, values: Mapping[str, Any]) -> Any:
    """Call the module with further keywords, buffers of it by their names in ``values``."""

    def add(module: nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        read = {
            key: getattr(module, value) if isinstance(value, str) else value
            for key, value in values.items()
        }
        return args, {**keywords, **read}

    return module.register_forward_pre_hook(add, with_kwargs=True)


def _prepare_towers(model: nn.Module, grid: Tensor, constants: _Constants) -> list[Any]:
    """Give vision towers what they would compute from the patches of each image."""
    from transformers.exporters.utils import precompute_export_inputs

    hooks: list[Any] = []
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    for path, module in list(modules):
        if "grid_thw" not in inspect.signature(module.forward).parameters:
            continue
        computed: dict[str, Any] = {"grid_thw": grid}
        cast(Any, precompute_export_inputs)(module, computed)
        given: dict[str, Any] = {}
        for key, value in computed.items():
            if key == "grid_thw" or value is None:
                continue
            # Attention is divided at these bounds, which must be numbers.
            if key.startswith("cu_"):
                given[key] = value.numpy()
            else:
                constants.add(path, module, f"image_{key}", value)
                given[key] = f"image_{key}"
        hooks.append(_give(module, given))
    return hooks


def _prepare_positions(model: nn.Module, grid: Tensor, constants: _Constants) -> list[Any]:
    """Give a model that counts along several axes the positions of its tokens."""
    owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None:
        return []
    config: Any = cast(Any, model).config
    token = int(config.image_token_id)
    merge = int(config.vision_config.spatial_merge_size)
    if bool((grid[:, 1:] % merge).any()):
        raise InputError(
            f"example input 'image_grid_thw' is {cast(Any, grid).tolist()}, the model joins "
            f"{merge} x {merge} patches to a token",
            f"give heights and widths that {merge} divides",
        )
    table = image_positions.table(cast(Any, owner), token, grid, merge)
    constants.add("", model, "image_positions", table)

    def add(module: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        found = image_positions.positions(
            keywords["input_ids"], keywords.get("position_ids"), module.image_positions, token
        )
        return args, {**keywords, "position_ids": found}

    return [model.register_forward_pre_hook(add, with_kwargs=True)]
