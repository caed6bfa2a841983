"""A dense cost as a step-cost table: a file to look at, to change, or to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable

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
from fxgraft.runtime.hermes.dense import DenseCost, bytes_of

_PER_DOUBLING = 4
Pair = tuple[float, float]


def knots(low: int, high: int) -> tuple[int, ...]:
    """Whole numbers from low to high, four to a doubling."""
    steps = math.ceil(_PER_DOUBLING * math.log2(high / low)) if high > low else 0
    found = {round(low * (high / low) ** (i / steps)) for i in range(1, steps)}
    return tuple(sorted(found | {low, high}))


def dense_table(
    cost: DenseCost, name: str, *, tokens: int = 8192, sequences: int = 256, context: int = 32768
) -> StepCostTable:
    """Tabulate a dense cost.

    Args:
        cost: to evaluate.
        name: of the model.
        tokens: most new tokens of a step.
        sequences: most sequences of a step.
        context: most keys of a sequence.
    """
    by_tokens, by_sequences = knots(1, tokens), knots(1, sequences)
    news, contexts = knots(1, tokens), (0, context)
    start = cost.without_attention(1, 1)

    def part(per: str, axes: dict[str, tuple[int, ...]], value: Callable[..., Pair]) -> Part:
        points: list[tuple[int, ...]] = [()]
        for axis in axes.values():
            points = [(*point, knot) for point in points for knot in axis]
        found = [value(*point) for point in points]
        return Part.model_validate({
            "name": f"{per}: {', '.join(axes)}", "per": per, "axes": axes,
            "seconds": [max(seconds, 0.0) for seconds, _ in found],
            "joules": [max(joules, 0.0) for _, joules in found],
        })  # fmt: skip

    def tokens_alone(count: int) -> Pair:
        return cost.without_attention(count, 1)

    def decodes(batch: int, keys: int) -> Pair:
        return cost.decode_attention(batch * keys)

    def more_sequences(count: int) -> Pair:
        seconds, joules = cost.without_attention(1, count)
        return seconds - start[0], joules - start[1]

    parts = (
        part("step", {"tokens": by_tokens}, tokens_alone),
        part("step", {"sequences": by_sequences}, more_sequences),
        part("prefill", {"new_tokens": news, "context": contexts}, cost.prefill_attention),
        part("decode", {"batch": (1, sequences), "context": (1, context)}, decodes),
    )  # fmt: skip
    return StepCostTable(
        identity=Identity(
            model=name, backend="none", device=cost.device.name, weights=cost.weights,
            activations=cost.activations, state=cost.state, tensor_parallel=cost.devices,
        ),
        memory=Memory(
            weights=round(cost.model.parameters * bytes_of(cost.weights) / cost.devices),
            growing=(Growing(bytes_per_token=round(cost.model.kv_bytes(cost.state)
                                                   / cost.devices)),),
            capacity=round(cost.device.memory),
        ),
        energy=Energy(source="formula", idle_watts=cost.idle_watts / cost.devices),
        origin=Origin(method="roofline", points=sum(len(p.seconds) for p in parts),
                      notes=("dense transformer by its sizes",)),
        validity=Validity(tokens=(1, tokens), sequences=(1, sequences), new_tokens=(1, tokens),
                          context=(0, context)),
        parts=parts,
    )  # fmt: skip
