"""Where a dynamic dimension turned into a number while a module was captured."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxgraft.program import Input

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent.parent)
_FROZEN = re.compile(
    r"(?P<source>L\['(?P<name>\w+)'\]\.size\(\)\[(?P<axis>\d+)\]) as dynamic but your code "
    r"specialized it to be a constant \((?P<size>\d+)\)"
)


@dataclass
class Watch:
    """The first place that fixed each dimension.

    Attributes:
        places: ``"in module 'cell' at file.py:12: code"`` by torch's name for the dimension.
    """

    places: dict[str, str] = field(default_factory=dict[str, str])

    def explain(self, message: str, specs: tuple[Input, ...]) -> str:
        """What torch's complaint about fixed dimensions means, a line per dimension.

        Args:
            message: torch's; about something else if the result is empty.
            specs: the inputs of the capture.
        """
        axes = {spec.name: spec.shape for spec in specs}
        return "\n".join(
            f"dimension {axes[found['name']][int(found['axis'])]!r} (axis {found['axis']} of input "
            f"{found['name']!r}) was frozen to {found['size']}\n"
            f"  {self.places.get(found['source'], 'at an unknown place')}"
            for found in _FROZEN.finditer(message)
            if found["name"] in axes
        )


@contextlib.contextmanager
def watch(model: nn.Module) -> Generator[Watch]:
    """While active, note where dimensions are fixed: torch itself only says that they were."""
    found = Watch()
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    paths = {id(module): name or type(model).__name__ for name, module in modules}
    shape_env = cast(Any, ShapeEnv)
    replace = shape_env._set_replacement

    def noting(shapes: Any, symbol: Any, target: Any, reason: str) -> None:
        if not target.free_symbols:
            for source in shapes.var_to_sources.get(symbol, ()):
                found.places.setdefault(source.name, _place(paths))
        replace(shapes, symbol, target, reason)

    shape_env._set_replacement = noting
    try:
        yield found
    finally:
        shape_env._set_replacement = replace


def is_library(file: str) -> bool:
    """Whether a source file is torch's or fxgraft's, so not the user's."""
    return file.startswith("<") or any(Path(file).is_relative_to(root) for root in _LIBRARIES)


def _place(paths: dict[int, str]) -> str:
    """Innermost module and innermost line of the user's that run now."""
    module, line, frame = "", "", inspect.currentframe()
    while frame is not None:
        module = module or paths.get(id(frame.f_locals.get("self")), "")
        file = frame.f_code.co_filename
        if not line and not is_library(file):
            code = linecache.getline(file, frame.f_lineno).strip()
            line = f"{file}:{frame.f_lineno}: {code}"
        frame = frame.f_back
    return f"in module {module!r} at {line or 'unknown'}"
