"""Data types that a Program is costed as, whatever it was captured in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxgraft.errors import InputError
from fxgraft.program import Program

Role = Literal["weights", "activations", "state"]
BITS: dict[str, int] = {
    "float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "float4": 4,
    **{f"int{bits}": bits for bits in range(1, 33)},
}  # fmt: skip
_NAMES = "float64, float32, bfloat16, float16, float8, float4, int1 to int32"


@dataclass(frozen=True)
class ElementTypes:
    """One data type for all floating elements of each role.

    Attributes:
        weights: of parameters and buffers, for example ``"bfloat16"`` or ``"int4"``.
        activations: of everything between ops.
        state: of what is kept from step to step.
    """

    weights: str
    activations: str
    state: str

    def __post_init__(self) -> None:
        for role in ("weights", "activations", "state"):
            name = getattr(self, role)
            if name not in BITS:
                raise InputError(f"the data type of {role} is {name!r}", f"give one of: {_NAMES}")

    def bits(self, role: Role) -> int:
        """Bits of one element."""
        return BITS[getattr(self, role)]

    @property
    def products(self) -> str:
        """The type in which weights and activations are multiplied: the wider one."""
        return max(self.weights, self.activations, key=lambda name: BITS[name])

    @staticmethod
    def parse(value: ElementTypes | str) -> ElementTypes:
        """One type for everything, or each by name.

        Raises:
            InputError: a type is unknown.
        """
        return value if isinstance(value, ElementTypes) else ElementTypes(value, value, value)

    @staticmethod
    def of(program: Program) -> ElementTypes:
        """The types that a Program has: the commonest floating type of its weights."""
        elements: dict[torch.dtype, int] = {}
        for _, weight in program.weights():
            if weight.is_floating_point():
                elements[weight.dtype] = elements.get(weight.dtype, 0) + weight.numel()
        commonest = max(elements, key=lambda kind: elements[kind], default=torch.float32)
        name = str(commonest).removeprefix("torch.")
        return ElementTypes.parse("float8" if name.startswith("float8") else name)
