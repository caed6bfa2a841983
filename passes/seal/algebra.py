"""Vectors from vectors: sums, parts along and across one another, and random controls.

All results are in the paper's sign, E minus RT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.passes.seal.vector import SteeringVector, norm


def combine(
    vectors: Sequence[SteeringVector], weights: Sequence[float] | None = None
) -> SteeringVector:
    """The weighted sum of vectors of one layer.

    Args:
        vectors: at least one, all of one layer, size and model.
        weights: one per vector; None takes their mean.

    Raises:
        InputError: there is none, or they do not belong together.
    """
    if not vectors:
        raise InputError("there is no vector to combine", "give at least one")
    factors = [1 / len(vectors)] * len(vectors) if weights is None else list(weights)
    if len(factors) != len(vectors):
        raise InputError(f"{len(vectors)} vectors, {len(factors)} weights", "give one per vector")
    for other in vectors[1:]:
        _check_alike(vectors[0], other)
    total = sum(
        (factor * one.direction for factor, one in zip(factors, vectors, strict=True)),
        start=torch.zeros_like(vectors[0].vector),
    )
    return _with(vectors[0], total)


def project(vector: SteeringVector, onto: SteeringVector) -> SteeringVector:
    """The part of a vector that lies along another.

    Raises:
        InputError: they do not belong together, or ``onto`` is 0.
    """
    _check_alike(vector, onto)
    a, b = vector.direction.double(), onto.direction.double()
    if not bool(b.any()):
        raise InputError("the vector to project onto is 0", "give one with a direction")
    return _with(vector, (a @ b / (b @ b) * b).to(vector.vector.dtype))


def without(vector: SteeringVector, other: SteeringVector) -> SteeringVector:
    """What is left of a vector when its part along another is taken out.

    Raises:
        InputError: as ``project``.
    """
    return _with(vector, vector.direction - project(vector, other).vector)


def cosine(one: SteeringVector, other: SteeringVector) -> float:
    """Cosine of the angle between two vectors; 0 where one of them is 0.

    Raises:
        InputError: they do not belong together.
    """
    _check_alike(one, other)
    a, b = one.direction.double(), other.direction.double()
    scale = float(norm(a) * norm(b))
    return float(a @ b) / scale if scale else 0.0


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """A random direction of the same norm: the control that every measurement needs."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(vector.vector.shape, generator=generator, dtype=torch.float64)
    scaled = direction / norm(direction) * norm(vector.vector.double())
    return _with(vector, scaled.to(vector.vector.dtype))


def _with(vector: SteeringVector, direction: Tensor) -> SteeringVector:
    return replace(vector, vector=direction, convention="E-RT")


def _check_alike(one: SteeringVector, other: SteeringVector) -> None:
    for name, a, b in (
        ("layer", one.layer, other.layer),
        ("size", one.vector.shape[0], other.vector.shape[0]),
        ("model", one.model, other.model or one.model),
    ):
        if a != b and (name != "model" or one.model):
            raise InputError(
                f"the vectors do not belong together: {name} {a} and {b}",
                "combine vectors of one layer of one model",
            )
