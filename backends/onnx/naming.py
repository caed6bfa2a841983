"""Names of inputs, outputs and dimensions, as users of optimum's exports know them.

=============================  ====================================================
``input_ids``, ...             the model's own inputs
``past_key_values.<L>.key``    state that grows, of layer L; ``present.<L>.key`` after
``past_states.<L>.<name>``     state of fixed size; ``present_states.<L>.<name>`` after
``logits``                     of the last position [batch, 1, vocabulary]
=============================  ====================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import dims, spec_of
from fxgraft.program import Program
from fxgraft.state import StateTensor, StepProgram

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class StateName:
    """One state of a step graph: its tensor, and its names as input and as output."""

    tensor: StateTensor
    past: str
    present: str


def state_names(step: StepProgram) -> list[StateName]:
    """Names of all states, numbered by layer where the model has numbered layers."""
    placeholders = step.program.placeholders[-len(step.states) :] if step.states else []
    found: list[StateName] = []
    taken: set[str] = set()
    for tensor, placeholder in zip(step.states, placeholders, strict=True):
        index, field = tensor.name.split(".", 1)
        layer = _layer(placeholder) or index
        before, after = ("past_key_values", "present") if tensor.grows is not None else (
            "past_states", "present_states")  # fmt: skip
        name, number = f"{layer}.{field}", 2
        while f"{before}.{name}" in taken:
            name, number = f"{layer}.{field}_{number}", number + 1
        taken.add(f"{before}.{name}")
        found.append(StateName(tensor, f"{before}.{name}", f"{after}.{name}"))
    return found


def _layer(placeholder: Node) -> str | None:
    """The layer of the op that a state belongs to: the first number in its module path."""
    node = placeholder
    while spec_of(node) is None:
        if not node.users:
            return None
        node = next((user for user in node.users if spec_of(user)), next(iter(node.users)))
    number = _NUMBER.search(str(node.meta.get("module", "")))
    return number[1] if number else None


class DimensionNames:
    """Names of symbolic sizes: those of the Program's dimensions where one fits.

    Args:
        program: gives its inputs' dimensions their names.
    """

    def __init__(self, program: Program) -> None:
        self._names: dict[sympy.Expr, str] = {}
        for spec, node in zip(program.inputs, program.placeholders, strict=True):
            for name, size in zip(spec.shape, dims(node), strict=True):
                if isinstance(name, str):
                    self._names.setdefault(size, name)

    def shape(self, node: Node) -> list[int | str]:
        """Sizes of a node's value: numbers, and names of dynamic dimensions."""
        return [int(size) if size.is_Integer else self._name(size) for size in dims(node)]  # pyright: ignore[reportArgumentType]

    def _name(self, size: sympy.Expr) -> str:
        if size not in self._names:
            self._names[size] = self._derived_name(size)
        return self._names[size]

    def _derived_name(self, size: sympy.Expr) -> str:
        """``present_<limit>`` for a bounded past after a step, else the expression spelled out."""
        text = str(size)
        for symbol in cast("set[sympy.Expr]", size.free_symbols):
            text = re.sub(rf"\b{symbol}\b", self._names.get(symbol, str(symbol)), text)
        bounded = re.search(r"\bpast_(\d+)\b", text)
        if bounded and "Max(" in text:
            return f"present_{bounded[1]}"
        return re.sub(r"\W+", "_", text).strip("_")
