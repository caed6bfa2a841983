"""Small step-cost tables for tests."""

from __future__ import annotations

from typing import Any

from fxgraft.cost_table import (
    Energy,
    Growing,
    Identity,
    Memory,
    Origin,
    Part,
    StepCostTable,
    Validity,
)


def table(
    *, base: float = 0.01, watts: float | None = None, tokens: int = 4096, **changes: Any
) -> StepCostTable:
    """``base`` seconds per step, 50 µs per new token, 0.5 µs per key of the mean decode context.

    Args:
        base: seconds of every step.
        watts: drawn in steps; None for a table without energy.
        tokens: the most new tokens of a step that it answers for.
        changes: other fields of the table.
    """

    def joules(seconds: tuple[float, ...]) -> tuple[float, ...] | None:
        return None if watts is None else tuple(watts * value for value in seconds)

    linear, attention = (base + 5e-5, base + 5e-5 * tokens), (5e-7, 5e-4 * 8.192, 64 * 5e-7, 0.5)
    fields: dict[str, Any] = {
        "identity": Identity(model="m", backend="none", device="none", weights="bfloat16",
                             activations="bfloat16", state="bfloat16"),
        "memory": Memory(weights=1000, growing=(Growing(bytes_per_token=10),), capacity=100_000),
        "energy": Energy(source="formula", idle_watts=20.0) if watts else Energy(),
        "origin": Origin(method="formula", points=6),
        "validity": Validity(tokens=(1, tokens), sequences=(1, 64), new_tokens=(1, tokens),
                             context=(0, 8192)),
        "parts": (
            Part(name="linear", per="step", axes={"tokens": (1, tokens)}, seconds=linear,
                 joules=joules(linear)),
            Part(name="attention", per="decode", axes={"batch": (1, 64), "context": (1, 8192)},
                 seconds=attention, joules=joules(attention)),
        ),
    }  # fmt: skip
    return StepCostTable(**(fields | changes))
