"""``spin``: equal to the written-out method on original models, for every way to ask for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft import images
from fxgraft.kernels.head_gate.reference import kept_heads
from fxgraft.passes.spin import Spin
from fxgraft.program import Program
from fxgraft.transform import apply
from tests.passes import _spin, _vision_models
from tests.passes._vision_models import IMAGE, Case

HEADS = 4
TEXTS = ["ttItttt", "tIt"]


def last_only(gated: Tensor, mask: Tensor) -> Tensor:
    """Only the last token of each row."""
    last = torch.zeros_like(gated)
    last[:, -1] = True
    return gated & last & mask.bool()


def expected(
    case: Case, values: dict[str, Tensor], *, rows: str, **fields: Any
) -> tuple[Tensor, _spin.Reference]:
    """Logits of the original model with the written-out method."""
    image, gated = _spin.text_behind_images(values["input_ids"], values["attention_mask"], IMAGE)
    if rows == "last":
        gated = last_only(gated, values["attention_mask"])
    reference = _spin.Reference(image=image, gated=gated, **fields)
    with _spin.active(case.model, reference), torch.no_grad():
        return cast(Any, case.model)(**values, use_cache=False).logits, reference


def check(case: Case, values: dict[str, Tensor], *, keep: int, **fields: Any) -> Program:
    """A Program after the pass equals the reference, and not the model as it was."""
    settings: dict[str, Any] = {"score": "logit_sum", "factor": 0.0, "rows": "last", **fields}
    layers = settings.pop("layers", None)
    step = Spin(heads=keep, layers=layers, **settings)
    program = apply(case.program(), step, check=False)
    covered = range(99) if layers is None else range(*layers)
    wanted, reference = expected(case, values, keep=keep, layers=covered, **settings)
    assert min(reference.gaps, default=1) > 1e-5, "the cut falls between scores that tie"
    real = values["attention_mask"].bool()
    found = program(**values)[0]
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[real], case.program()(**values)[0][real], atol=1e-4)
    return program


@pytest.mark.parametrize("name", _vision_models.MODELS)
@pytest.mark.parametrize("score", ["logit_sum", "mass"])
@pytest.mark.parametrize("rows", ["last", "all_text"])
def test_models(name: str, score: str, rows: str) -> None:
    """Images at unequal places, texts of unequal length, padded on the left."""
    case = _vision_models.MODELS[name]()
    program = check(case, case.inputs(TEXTS), keep=2, score=score, rows=rows, factor=0.1)
    merge = images.find_merge(program)
    assert merge is not None
    assert merge.tokens == (IMAGE,)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.05, 0.5])
def test_heads_kept_and_factors(kv_heads: int, keep: int, factor: float) -> None:
    case = _vision_models.llava(kv_heads)
    for score, rows in itertools.product(("logit_sum", "mass"), ("last", "all_text")):
        check(case, case.inputs(TEXTS), keep=keep, factor=factor, score=score, rows=rows)


@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (1, 3), (2, 4)])
def test_layer_ranges(layers: tuple[int, int]) -> None:
    case = _vision_models.llava(2, 4)
    check(case, case.inputs(TEXTS), keep=1, layers=layers)


@pytest.mark.parametrize("texts", [["tItIt", "tttttt"], ["IIttt", "t"], ["tt", "ttIIttt"]])
def test_several_images_or_none_in_a_row(texts: list[str]) -> None:
    """Images add up; text between them sees the first; a row without one stays as it is."""
    case = _vision_models.llava()
    values = case.inputs(texts)
    program = check(case, values, keep=1, rows="all_text")
    row = [("I" in text) for text in texts].index(False)
    real = values["attention_mask"][row].bool()
    plain, found = (p(**values)[0][row][real] for p in (case.program(), program))
    assert torch.equal(found, plain)


def test_a_row_of_a_batch_equals_the_row_alone() -> None:
    case = _vision_models.llava()
    program = apply(case.program(), Spin(heads=2, rows="all_text"), check=False)
    values = case.inputs(TEXTS)
    whole = program(**values)[0]
    language = images.language_model(program)
    features = images.encode(images.image_encoder(program), case.images)
    for row, share in enumerate(features.chunk(2)):
        real = values["attention_mask"][row].bool()
        ids = values["input_ids"][row][real][None]
        alone = language(input_ids=ids, image_embeds=images.place(share, ids, (IMAGE,)))[0][0]
        torch.testing.assert_close(alone, whole[row][real], atol=1e-5, rtol=1e-5)


def test_only_gated_rows_change() -> None:
    """In the first gated layer, and so here in the last one of the model."""
    case = _vision_models.llava()
    values = case.inputs(TEXTS)
    plain = case.program()(**values)[0]
    last = apply(case.program(), Spin(heads=1, layers=(1, 2)), check=False)(**values)[0]
    assert torch.equal(last[:, :-1], plain[:, :-1])
    assert not torch.equal(last[:, -1], plain[:, -1])
    every = Spin(heads=1, layers=(1, 2), rows="all_text")
    found = apply(case.program(), every, check=False)(**values)[0]
    _, gated = _spin.text_behind_images(values["input_ids"], values["attention_mask"], IMAGE)
    assert torch.equal(found[~gated], plain[~gated])
    assert bool((found[gated] != plain[gated]).any(-1).all())


@pytest.mark.parametrize("name", _vision_models.MODELS)
def test_every_family_is_left_alone_by_neutral_settings(name: str) -> None:
    program = _vision_models.MODELS[name]().program()
    for step in (Spin().neutral(), Spin(keep=1.0)):
        rewritten = program.copy()
        step.run(rewritten)
        assert not rewritten.diff(program)
    assert apply(program, Spin(keep=0.5)).history[-1].error == 0


@pytest.mark.parametrize(
    "fields", [{"factor": 1.0}, {"keep": 1.0}, {"heads": HEADS}, {"layers": (1, 1)}]
)
def test_settings_that_change_nothing(fields: dict[str, Any]) -> None:
    """The pass leaves the graph as it is, to the bit."""
    program = _vision_models.llava().program()
    step = Spin(**fields).neutral() if fields == {"factor": 1.0} else Spin(**fields)
    rewritten = program.copy()
    step.run(rewritten)
    assert not rewritten.diff(program)


def test_the_neutral_check_runs_with_images() -> None:
    program = apply(_vision_models.llava().program(), Spin(keep=0.5))
    record = program.history[-1]
    assert record.error == 0
    assert "batch=2" in record.check
    assert record.summary == [
        "2 of 4 heads kept in layers 0 to 1, the others times 0, by logit_sum, rows last"
    ]


@pytest.mark.parametrize(
    ("keep", "heads", "kept"),
    [(0.95, 32, 30), (0.9, 40, 36), (0.8, 32, 25), (0.7, 32, 22), (0.29, 100, 29), (1.0, 7, 7),
     (0.05, 32, 1), (0.01, 32, 0)],
)  # fmt: skip
def test_a_share_is_rounded_down_exactly(keep: float, heads: int, kept: int) -> None:
    assert Spin(keep=keep).kept(heads) == kept


def test_controls() -> None:
    """Random heads are the same in every row; uniform scaling has the gates' mean."""
    case = _vision_models.llava()
    values = case.inputs(TEXTS)
    generator = torch.Generator().manual_seed(7)
    order = torch.rand(HEADS, generator=generator)
    program = apply(case.program(), Spin(heads=2, score="random", seed=7, rows="all_text"))
    stored = program.weight("spin.order_0")[0, :, 0]
    assert torch.equal(stored, order)
    assert not torch.equal(stored, program.weight("spin.order_1")[0, :, 0])
    gates = [n for n in program.graph.nodes if n.target is torch.ops.fxgraft.head_gate.default]
    assert [dict(node.kwargs) for node in gates] == [{"keep": 2, "factor": 0.0}] * 2
    uniform = apply(case.program(), Spin(heads=1, score="uniform", factor=0.2, rows="all_text"))
    wanted, _ = expected(case, values, rows="all_text", keep=0, factor=(1 + 3 * 0.2) / 4)
    real = values["attention_mask"].bool()
    torch.testing.assert_close(uniform(**values)[0][real], wanted[real], atol=1e-5, rtol=1e-5)


def test_masked_image_tokens_do_not_count() -> None:
    """Whoever hides a part of an image hides it from the score too."""
    case = _vision_models.llava()
    values = case.inputs(["tItttt", "tIttt"])
    values["attention_mask"][:, 5:9] = 0
    check(case, values, keep=2, rows="all_text")


def test_removing_the_pass_restores_the_model() -> None:
    """The original is never changed, so it is there to go back to."""
    case = _vision_models.llava()
    values = case.inputs(TEXTS)
    before = case.program()(**values)[0]
    apply(case.program(), Spin(heads=1), check=False)
    assert torch.equal(case.program()(**values)[0], before)
    assert not case.program().history


@pytest.mark.parametrize("score", ["logit_sum", "mass"])
@pytest.mark.parametrize("name", ["llava", *_vision_models.SIZED])
def test_saved_and_loaded(name: str, score: str, tmp_path: Any) -> None:
    case = _vision_models.MODELS[name]()
    values = case.inputs(TEXTS)
    program = apply(case.program(), Spin(heads=2, score=cast(Any, score)), check=False)
    loaded = fxgraft.load(program.save(tmp_path / "saved"))
    assert isinstance(loaded, Program)
    assert torch.equal(loaded(**values)[0], program(**values)[0])
    assert loaded.inputs == program.inputs
    # Checks of the original's code are written another way once they are read back.
    assert not images.language_model(loaded).diff(images.language_model(program))


def test_thousands_of_rows() -> None:
    """Layer outputs within 1e-5 on 10,240 rows; the kept heads differ only where scores tie."""
    generator = torch.Generator().manual_seed(0)
    ties = 0
    for trial in range(40):
        heads, kv_heads = [(4, 4), (8, 2), (6, 3), (32, 8)][trial % 4]
        keep = int(torch.randint(0, heads + 1, (), generator=generator))
        ties += _check_rows(generator, heads, kv_heads, keep, factor=[0.0, 0.08, 0.5][trial % 3])
    assert ties < 20


def _check_rows(
    generator: torch.Generator, heads: int, kv_heads: int, keep: int, factor: float
) -> int:
    """256 rows of 12 tokens after 24 others; the number whose cut falls between ties."""
    batch, length, total, width = 32, 8, 36, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, key = draw(batch, heads, length, width), draw(batch, kv_heads, total, width)
    value = draw(batch, kv_heads, total, width)
    image = torch.zeros(batch, total, dtype=torch.bool)
    for row, place in enumerate(
        cast(Any, torch.randint(0, 16, (batch,), generator=generator)).tolist()
    ):
        image[row, place : place + 12] = True
    _, state = torch.ops.fxgraft.logit_sum(
        draw(batch, heads, total - length, width), key[:, :, :-length], image[:, :-length],
        scale=width**-0.5,
    )  # fmt: skip
    score, _ = torch.ops.fxgraft.logit_sum(
        query, key[:, :, -length:], image[:, -length:], state, scale=width**-0.5
    )
    rows = torch.ones(batch, length, dtype=torch.bool)
    output = torch.ops.fxgraft.attention(query, key, value, scale=width**-0.5)
    found = torch.ops.fxgraft.head_gate(output, score, rows, keep=keep, factor=factor)
    reference = _spin.Reference(keep, factor, image, rows)
    visible = torch.arange(total) <= torch.arange(total - length, total)[:, None]
    wanted = reference.attend(query, key, value, visible[None, None], width**-0.5, 0)
    logits = (query @ key.repeat_interleave(heads // kv_heads, 1).mT) * width**-0.5
    exact = torch.where(image[:, None, None] & visible, logits, 0).sum(-1)
    ranked = exact.sort(1, descending=True).values
    tied = torch.zeros(batch, length, dtype=torch.bool)
    if 0 < keep < heads:
        gap = ranked[:, keep - 1] - ranked[:, keep]
        tied = gap <= 1e-5 * (ranked[:, 0] - ranked[:, -1])
    same = (kept_heads(score, keep) == kept_heads(exact, keep)).all(1)
    assert bool((same | tied).all())
    difference = (found.transpose(1, 2) - wanted).abs().amax((2, 3))
    assert float(difference[~tied].max()) <= 1e-5
    return int(tied.sum())


BUILDERS: list[Callable[[], Case]] = [_vision_models.llava, _vision_models.smolvlm]


@pytest.mark.parametrize("build", BUILDERS)
def test_half_precision_ranks_in_single(build: Callable[[], Case]) -> None:
    """The scores of a bfloat16 model are float32, and its kept heads those of its own logits."""
    case = build()
    program = apply(case.program(), Spin(heads=2, rows="all_text"), check=False)
    scores = [n for n in program.graph.nodes if n.name.startswith("head_score")]
    assert len(scores) == 2
    assert all(node.meta["val"].dtype == torch.float32 for node in scores)
