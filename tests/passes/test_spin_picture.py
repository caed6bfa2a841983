"""What ``spin`` chose is read off a run, and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fxgraft.errors import InputError
from fxgraft.passes.spin import Choices, Spin, draw_choices, read_choices
from fxgraft.transform import apply
from tests.passes import _vision_models


def choices(score: str = "logit_sum", layers: tuple[int, int] = (0, 2)) -> Choices:
    case = _vision_models.llava()
    values = case.inputs(["ttIttttt", "tItttt"])
    step = Spin(heads=1, score=cast(Any, score), rows="all_text", layers=layers)
    return read_choices(apply(case.program(), step, check=False), values)


@pytest.mark.parametrize("score", ["logit_sum", "mass"])
def test_choices_of_every_gated_token(score: str) -> None:
    found = choices(score)
    assert torch.equal(found.rows, torch.arange(18, 23))
    assert found.kept.shape == (5, 2, 4)
    assert bool((found.kept.sum(-1) == 1).all())
    assert found.looks.shape == (5, 16)
    assert bool((found.looks >= 0).all())
    assert bool((found.looks.sum(-1) <= 1 + 1e-5).all())
    assert found.not_a_number == 0


def test_by_mass_the_kept_head_looks_most() -> None:
    """In a layer whose inputs are the same, no other head that stays sees more of the image."""
    by_mass = choices("mass", (0, 1)).looks.sum(-1)
    by_logits = choices("logit_sum", (0, 1)).looks.sum(-1)
    assert bool((by_mass >= by_logits - 1e-6).all())
    assert bool((by_mass > by_logits).any())


@pytest.mark.parametrize("with_image", [False, True])
def test_picture(with_image: bool, tmp_path: Path) -> None:
    image = torch.rand(32, 32, 3) if with_image else None
    path = draw_choices(choices(), tmp_path / "spin.png", labels=list("abcde"), image=image)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 5000


def test_what_cannot_be_read_or_drawn(tmp_path: Path) -> None:
    case = _vision_models.llava()
    values = case.inputs(["ttIttt", "tIt"])
    with pytest.raises(InputError, match="ranks no heads"):
        read_choices(case.program(), values)
    random = apply(case.program(), Spin(heads=1, score="random"), check=False)
    with pytest.raises(InputError, match="ranks no heads"):
        read_choices(random, values)
    guided = apply(case.program(), Spin(heads=1), check=False)
    bare = case.inputs(["tttttt", "tIIt"])
    with pytest.raises(InputError, match="no token of text 0 is gated"):
        read_choices(guided, bare)
    with pytest.raises(InputError, match="grid of 5 x 5 is larger"):
        draw_choices(choices(), tmp_path / "spin.png", grid=(5, 5))
