"""Scenes of coloured shapes with a planted habit of language, for ``spin_quality.py``.

36 objects make 18 pairs; object ``n`` and its partner ``n ^ 1`` differ in shape and colour. A scene
holds something of three or four pairs. In training a partner comes along with probability 0.9, in
what is measured with 0.5, and many objects are faint under noise: whoever leans on the habit names
partners that are not there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
_RGB = ((0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.2, 0.95), (0.95, 0.9, 0.1), (0.7, 0.1, 0.8),
        (1.0, 1.0, 1.0))  # fmt: skip
_HALF = len(SHAPES) // 2
# Pair by pair: (shape, colour) of an object, then of its partner.
OBJECTS = tuple(
    one
    for shape in range(_HALF)
    for colour in range(len(COLOURS))
    for one in ((shape, colour), (shape + _HALF, (colour + 2 + shape) % len(COLOURS)))
)
PAIRS = len(OBJECTS) // 2
POPULARITY = tuple((1 + pair) ** -0.3 for pair in range(PAIRS))
SPLITS = ("random", "popular", "adversarial")
COLUMNS = ("true yes", "false no", *(f"{kind}, {split}" for split in SPLITS
           for kind in ("false yes", "true no")), "named", "named wrongly", "captions with a wrong",
           "in the scene", "neither yes nor no")  # fmt: skip
Figures = dict[str, Any]
SIZE, CELL = 64, 16
_ROW = SIZE // CELL
_BACKGROUND, _NOISE, _CONTRAST = 0.45, 0.25, (0.05, 0.9)


@dataclass(frozen=True)
class Scene:
    """What is in a picture.

    Attributes:
        objects: in increasing order, so that partners are neighbours.
        cells: where each of them is, row by row of a 4 x 4 grid.
        contrasts: how strongly each stands out.
    """

    objects: tuple[int, ...]
    cells: tuple[int, ...]
    contrasts: tuple[float, ...]


@dataclass(frozen=True)
class Probe:
    """Questions about a scene as POPE asks them.

    Attributes:
        present: three objects that are there.
        absent: three that are not, for each of ``SPLITS``.
    """

    present: tuple[int, ...]
    absent: tuple[tuple[int, ...], ...]

    @property
    def questions(self) -> list[int]:
        """All objects asked for: those present, then those of each split."""
        return [*self.present, *(one for split in self.absent for one in split)]


def name(thing: int) -> str:
    """The words for an object."""
    shape, colour = OBJECTS[thing]
    return f"{COLOURS[colour]} {SHAPES[shape]}"


def scenes(generator: random.Random, count: int, together: float) -> list[Scene]:
    """Random scenes.

    Args:
        generator: is advanced.
        count: of scenes.
        together: probability that a partner comes along.
    """
    return [_scene(generator, together) for _ in range(count)]


def _scene(generator: random.Random, together: float) -> Scene:
    pairs: list[int] = []
    wanted = generator.choice((3, 4))
    while len(pairs) < wanted:
        pair = generator.choices(range(PAIRS), POPULARITY)[0]
        pairs += [] if pair in pairs else [pair]
    found: list[int] = []
    for pair in sorted(pairs):
        anchor = 2 * pair + generator.randrange(2)
        found += [anchor, anchor ^ 1] if generator.random() < together else [anchor]
    cells = generator.sample(range(_ROW * _ROW), len(found))
    contrasts = [generator.uniform(*_CONTRAST) for _ in found]
    return Scene(tuple(sorted(found)), tuple(cells), tuple(contrasts))


def asked(generator: random.Random, scene: Scene, count: int) -> list[tuple[int, bool]]:
    """Questions of training: any objects, half of them present; no partner is asked for on purpose.

    Returns:
        Objects, and whether they are there.
    """
    absent = [one for one in range(len(OBJECTS)) if one not in scene.objects]
    yes = [(one, True) for one in generator.sample(scene.objects, count // 2)]
    no = [(one, False) for one in generator.sample(absent, count - count // 2)]
    return generator.sample(yes + no, count)


def probe(generator: random.Random, scene: Scene, count: int = 3) -> Probe:
    """Questions as POPE asks them: absent objects are random, frequent, or partners of those there.

    Where there are fewer absent partners than questions, frequent objects follow.
    """
    absent = [one for one in range(len(OBJECTS)) if one not in scene.objects]
    partners = [one ^ 1 for one in scene.objects if one ^ 1 in absent]
    generator.shuffle(partners)
    popular = sorted(absent, key=lambda one: (one // 2, generator.random()))
    adversarial = partners + [one for one in popular if one not in partners]
    return Probe(
        tuple(generator.sample(scene.objects, count)),
        (tuple(generator.sample(absent, count)), tuple(popular[:count]),
         tuple(adversarial[:count])),
    )  # fmt: skip


def draw(found: Sequence[Scene], seed: int, device: str) -> Tensor:
    """Pictures [N, 3, 64, 64] around 0, noise included."""
    grid, contrasts = (one.to(device) for one in _grids(found))
    there = grid < len(OBJECTS)
    shape, colour = torch.tensor((*OBJECTS, (0, 0)), device=device)[grid].unbind(-1)
    ink = (torch.tensor(_RGB, device=device) - _BACKGROUND)[colour]
    ink = ink * (contrasts * there)[..., None]
    tiles = ink[..., None, None] * _masks().to(device)[shape][:, :, None]
    tiles = tiles.view(-1, _ROW, _ROW, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(len(found), 3, SIZE, SIZE, generator=generator, device=device)
    return tiles.reshape(noise.shape) / _NOISE + noise


def cell_labels(found: Sequence[Scene], patch: int) -> Tensor:
    """int64 [N, patches]: the object in each patch's cell; the number of objects where none is."""
    wide = CELL // patch
    square = _grids(found)[0].view(-1, _ROW, _ROW)
    return square.repeat_interleave(wide, 1).repeat_interleave(wide, 2).flatten(1)


def _grids(found: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Object and contrast of each cell, [N, cells]."""
    things = torch.full((len(found), _ROW * _ROW), len(OBJECTS))
    contrasts = torch.zeros(things.shape)
    rows = [row for row, scene in enumerate(found) for _ in scene.objects]
    cells = [cell for scene in found for cell in scene.cells]
    things[rows, cells] = torch.tensor([one for scene in found for one in scene.objects])
    contrasts[rows, cells] = torch.tensor([one for scene in found for one in scene.contrasts])
    return things, contrasts


def _masks() -> Tensor:
    """float32 [shapes, 16, 16]."""
    line = (torch.arange(CELL) - (CELL - 1) / 2) / (CELL / 2)
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius, widest = (x * x + y * y).sqrt(), torch.maximum(x.abs(), y.abs())
    parts = (
        radius < 0.8, widest < 0.7, (y < 0.75) & (x.abs() < 0.45 * (y + 0.85)),
        x.abs() + y.abs() < 0.9, (widest < 0.85) & (torch.minimum(x.abs(), y.abs()) < 0.25),
        (radius < 0.9) & (radius > 0.5),
    )  # fmt: skip
    return torch.stack(parts).float()


def figures(counts: np.ndarray) -> Figures:
    """Rates in percent.

    Args:
        counts: [..., N, ``COLUMNS``].
    """
    total = dict(zip(COLUMNS, np.moveaxis(counts.sum(-2), -1, 0), strict=True))
    found: Figures = {}
    for split in SPLITS:
        yes, no = total["true yes"], total["false no"]
        false_yes, true_no = total[f"false yes, {split}"], total[f"true no, {split}"]
        asked = yes + no + false_yes + true_no
        found |= {
            f"accuracy, {split}": 100 * (yes + true_no) / asked,
            f"precision, {split}": 100 * yes / np.maximum(yes + false_yes, 1),
            f"recall, {split}": 100 * yes / np.maximum(yes + no, 1),
            f"F1, {split}": 200 * yes / np.maximum(2 * yes + no + false_yes, 1),
            f"yes-rate, {split}": 100 * (yes + false_yes) / asked,
        }
    named, right = total["named"], total["named"] - total["named wrongly"]
    for name in ("F1", "yes-rate"):
        found[name] = sum(found[f"{name}, {split}"] for split in SPLITS) / len(SPLITS)
    found["CHAIR_I"] = 100 * total["named wrongly"] / np.maximum(named, 1)
    found["CHAIR_S"] = 100 * total["captions with a wrong"] / counts.shape[-2]
    found["recall of captions"] = 100 * right / total["in the scene"]
    found["F1 of captions"] = 200 * right / np.maximum(named + total["in the scene"], 1)
    found["neither"] = total["neither yes nor no"]
    return found
