"""Vectors from vectors, and vectors of one task used with another's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxgraft.errors import InputError
from fxgraft.passes.seal import (
    SteeringVector,
    combine,
    cosine,
    project,
    random_like,
    without,
)


def vector(seed: int, **changes: object) -> SteeringVector:
    values = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    return replace(SteeringVector(values, "E-RT", 3, "tiny"), **changes)


def test_combine() -> None:
    one, two = vector(0), vector(1)
    torch.testing.assert_close(combine([one, two]).vector, (one.vector + two.vector) / 2)
    weighted = combine([one, two], [2.0, -1.0]).vector
    torch.testing.assert_close(weighted, 2 * one.vector - two.vector)
    turned = replace(two, vector=-two.vector, convention="RT-E")
    assert torch.equal(combine([one, turned]).vector, combine([one, two]).vector)
    assert combine([turned]).convention == "E-RT"


def test_parts_along_and_across() -> None:
    one, two = vector(0), vector(1)
    along, across = project(one, two), without(one, two)
    torch.testing.assert_close(along.vector + across.vector, one.vector)
    assert cosine(across, two) == pytest.approx(0, abs=1e-6)
    assert abs(cosine(along, two)) == pytest.approx(1)
    assert cosine(one, one) == pytest.approx(1)
    assert cosine(one, replace(one, vector=torch.zeros(16))) == 0


def test_random_controls_have_the_norm_and_no_direction() -> None:
    one = vector(0)
    others = [random_like(one, seed) for seed in range(40)]
    norms = torch.stack([other.vector.norm() for other in others])
    torch.testing.assert_close(norms, one.vector.norm().expand(40))
    assert abs(sum(cosine(one, other) for other in others)) / 40 < 0.15
    assert torch.equal(random_like(one, 3).vector, others[3].vector)


def test_what_does_not_belong_together_is_refused() -> None:
    one = vector(0)
    for other, words in (
        (vector(1, layer=4), "layer 3 and 4"),
        (vector(1, model="other"), "model tiny and other"),
        (vector(1, vector=torch.ones(8)), "size 16 and 8"),
    ):
        with pytest.raises(InputError, match=words):
            combine([one, other])
        with pytest.raises(InputError, match=words):
            cosine(one, other)
    assert combine([one, vector(1, model="")]).model == "tiny"
    with pytest.raises(InputError, match="no vector"):
        combine([])
    with pytest.raises(InputError, match="1 vectors, 2 weights"):
        combine([one], [1.0, 2.0])
    with pytest.raises(InputError, match="is 0"):
        project(one, replace(one, vector=torch.zeros(16)))
