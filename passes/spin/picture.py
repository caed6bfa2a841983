"""Which heads stayed for each token, read off a run of a Program, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import interpreter
from fxgraft.errors import InputError, LoweringError
from fxgraft.kernels.head_gate.reference import kept_heads
from fxgraft.kernels.spec import argument
from fxgraft.program import Program

_MOST_TOKENS = 24


@dataclass(frozen=True)
class Choices:
    """What ``spin`` chose for one text.

    Attributes:
        rows: positions of the gated tokens, [R].
        kept: bool [R, layers, heads].
        looks: [R, N], attention to each image token, a mean over layers and the heads that stayed.
        not_a_number: scores that were NaN, which count as the lowest.
    """

    rows: Tensor
    kept: Tensor
    looks: Tensor
    not_a_number: int


def read_choices(program: Program, inputs: Mapping[str, Tensor], row: int = 0) -> Choices:
    """Run a Program over a whole text and read off which heads stayed.

    Args:
        program: after the pass ``spin`` by ``logit_sum`` or ``mass``.
        inputs: of the Program; with ``prompt_length``, rows of answers are told from the prompt's.
        row: of the batch.

    Raises:
        InputError: the Program ranks no heads by what they look at, or the text has no gated token.
    """
    gates = program.graph.find_nodes(op="call_function", target=torch.ops.fxgraft.head_gate.default)
    scored = [node for node in gates if _image_of(node) is not None]
    if not scored:
        raise InputError(
            "the Program ranks no heads by what they look at",
            "apply the pass 'spin' with the score 'logit_sum' or 'mass'",
        )
    values: dict[str, Any] = {}
    interpreter.run(program, inputs, kept=values)
    gated = _value(values, argument(scored[0], "rows"))[row]
    rows = gated.nonzero()[:, 0]
    if not len(rows):
        raise InputError(f"no token of text {row} is gated", "give a text with an image before it")
    scores = [_value(values, argument(node, "score"))[row][:, rows] for node in scored]
    keeps = [cast(int, argument(node, "keep")) for node in scored]
    pairs = zip(scores, keeps, strict=True)
    kept = torch.stack([kept_heads(score[None], keep)[0].T for score, keep in pairs], 1)
    looks = [_looks(values, node, row, rows) for node in scored]
    return Choices(rows, kept, _mean_over_kept(torch.stack(looks, 1), kept), _count_nan(scores))


def _value(values: Mapping[str, Any], node: object) -> Tensor:
    assert isinstance(node, Node)
    return cast(Tensor, values[node.name])


def _scoring_node(gate: Node) -> Node | None:
    score = argument(gate, "score")
    assert isinstance(score, Node)
    return None if score.op != "call_function" else score


def _image_of(gate: Node) -> Node | None:
    """The node that says which tokens are images; None where heads are ranked by something else."""
    score = _scoring_node(gate)
    if score is None:
        return None
    if score.target is not torch.ops.fxgraft.attention_mass.default:
        score = score.all_input_nodes[0]
    chosen = argument(score, "chosen")
    return chosen if isinstance(chosen, Node) else None


def _looks(values: Mapping[str, Any], gate: Node, row: int, rows: Tensor) -> Tensor:
    """Attention of the gated rows to the image tokens, [R, heads, N]."""
    attention = gate.args[0]
    assert isinstance(attention, Node)
    names = ("query", "key", "key_mask", "bias", "sinks")
    given = {name: argument(attention, name) for name in names}
    found = {n: v if v is None else _value(values, v)[row : row + 1] if n != "sinks"
             else _value(values, v) for n, v in given.items()}  # fmt: skip
    rules = ("scale", "is_causal", "window", "chunk", "softcap")
    options = {name: argument(attention, name) for name in rules}
    image = _value(values, _image_of(gate))[row]
    masses: list[Tensor] = []
    for place in cast("list[int]", cast(Any, image.nonzero()[:, 0]).tolist()):
        one = torch.zeros_like(image)
        one[place] = True
        mass = torch.ops.fxgraft.attention_mass(**found, chosen=one[None], **options)
        masses.append(mass[0][:, rows].T)
    return torch.stack(masses, -1)


def _mean_over_kept(looks: Tensor, kept: Tensor) -> Tensor:
    """[R, layers, heads, N] to [R, N]."""
    weights = kept.to(looks.dtype)[..., None]
    return (looks * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)


def _count_nan(scores: Sequence[Tensor]) -> int:
    return sum(int(score.isnan().sum()) for score in scores)


def draw_choices(
    choices: Choices,
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    image: Tensor | None = None,
) -> Path:
    """A column per token: what the kept heads see of the image, and which heads those are.

    Args:
        choices: the first 24 tokens are drawn.
        path: with a suffix that matplotlib knows.
        labels: a text per token.
        grid: rows and columns of the first image's tokens; default a square, if they make one.
        image: [height, width, 3] with values from 0 to 1, drawn below what the heads see.

    Raises:
        LoweringError: matplotlib is missing.
        InputError: the grid has more places than the image has tokens.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoweringError(
            "plots cannot be drawn: matplotlib is not installed", "pip install 'fxgraft[plot]'"
        ) from error
    high, wide = grid or _square(choices.looks.shape[1])
    if high * wide > choices.looks.shape[1]:
        raise InputError(
            f"a grid of {high} x {wide} is larger than the image's {choices.looks.shape[1]} tokens",
            "give the grid of one image",
        )
    count = min(len(choices.rows), _MOST_TOKENS)
    figure: Any = Figure(figsize=(1.1 * count + 1, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        seen = choices.looks[column, : high * wide].view(high, wide)
        _draw_image(axes[0][column], seen, image)
        axes[0][column].set_title(labels[column] if labels else str(int(choices.rows[column])))
        axes[1][column].imshow(
            choices.kept[column].numpy(), cmap="Greens", vmin=0, vmax=1, aspect="auto"
        )
        for one in (axes[0][column], axes[1][column]):
            one.set_xticks([])
            one.set_yticks([])
    axes[1][0].set_ylabel("layers")
    figure.supxlabel("heads; dark ones stay")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _square(count: int) -> tuple[int, int]:
    side = int(count**0.5)
    return (side, side) if side * side == count else (1, count)


def _draw_image(axis: Any, seen: Tensor, image: Tensor | None) -> None:
    if image is None:
        axis.imshow(seen.numpy(), cmap="magma")
        return
    high, wide = image.shape[:2]
    axis.imshow(image.numpy(), extent=(0, wide, high, 0))
    axis.imshow(seen.numpy(), extent=(0, wide, high, 0), cmap="magma", alpha=0.6)
