"""Vision-language models: what capture makes of sizes of images, and of positions around them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft.errors import InputError
from fxgraft.frontends import image_positions
from tests.passes import _vision_models
from tests.passes._vision_models import IMAGE

TEXTS = [["ttIttt", "tIt"], ["It", "ttttIt", "tt"], ["tItIttt", "t", "ttt", "tt"]]
QWEN = ["qwen2_vl", "qwen2_5_vl"]


@pytest.mark.parametrize("name", _vision_models.MODELS)
@pytest.mark.parametrize("texts", TEXTS)
def test_logits_equal_transformers(name: str, texts: list[str]) -> None:
    """At other batch sizes and lengths than captured, texts padded on the left."""
    case = _vision_models.MODELS[name]()
    values = case.inputs(texts)
    with torch.no_grad():
        wanted = cast(Any, case.model)(**values, use_cache=False).logits
    real = values["attention_mask"].bool()
    found = case.program()(**values)[0]
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", _vision_models.SIZED)
def test_sizes_are_constants(name: str) -> None:
    """They may be left out, and others are refused."""
    case = _vision_models.SIZED[name]()
    key = next(key for key in case.images if key != "pixel_values")
    values = case.inputs(["tIt", "tIt"])
    program = case.program()
    assert [spec.name for spec in program.inputs if spec.fixed] == [key]
    assert [spec.name for spec in program.inputs] == list(values)
    whole = program(**values)[0]
    sizes = values.pop(key)
    assert torch.equal(program(**values)[0], whole)
    with pytest.raises(InputError, match=f"input '{key}' is .* captured for"):
        program(**values, **{key: sizes.flip(0)})


@pytest.mark.parametrize("name", _vision_models.SIZED)
def test_the_model_is_left_as_it_was(name: str) -> None:
    case = _vision_models.SIZED[name]()
    values = case.inputs(["tIt", "tIt"])
    buffers = [name for name, _ in case.model.named_buffers()]
    program = fxgraft.capture(case.model, values)
    assert [name for name, _ in case.model.named_buffers()] == buffers
    modules = cast("list[Any]", list(case.model.modules()))
    assert not any(module._forward_pre_hooks for module in modules)
    # Token inputs have dynamic dimensions, others have none.
    assert {spec.name: spec.shape for spec in program.inputs} == {
        name: tuple(value.shape) if name in case.images else ("batch", "sequence")
        for name, value in values.items()
    }
    with torch.no_grad():
        wanted = cast(Any, case.model)(**values, use_cache=False).logits
    real = values["attention_mask"].bool()
    torch.testing.assert_close(program(**values)[0][real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", _vision_models.SIZED)
def test_from_a_folder(name: str, tmp_path: Path) -> None:
    """There, weights have no values while the model is captured; the constants have theirs."""
    case = _vision_models.SIZED[name]()
    cast(Any, case.model).save_pretrained(tmp_path)
    program = fxgraft.capture(tmp_path, case.inputs(["ttIttt", "tIt"]))
    values = case.inputs(["tIt", "tItt"])
    torch.testing.assert_close(program(**values)[0], case.program()(**values)[0])


@pytest.mark.parametrize("name", _vision_models.SIZED)
def test_sizes_that_cannot_be_captured(name: str) -> None:
    case = _vision_models.SIZED[name]()
    key = next(key for key in case.images if key != "pixel_values")
    values = case.inputs(["tIt", "tIt"])
    with pytest.raises(InputError, match=f"'dynamic' names input '{key}', whose values are fixed"):
        fxgraft.capture(case.model, values, dynamic={key: {0: "images"}})
    for wrong in (values[key][0], values[key][:0], values[key].float()):
        with pytest.raises(InputError, match=f"example input '{key}'"):
            fxgraft.capture(case.model, {**values, key: wrong})


@pytest.mark.parametrize("name", QWEN)
def test_patches_that_make_no_whole_tokens(name: str) -> None:
    case = _vision_models.SIZED[name]()
    values = case.inputs(["tIt", "tIt"])
    values["image_grid_thw"] = torch.tensor([[1, 4, 6], [1, 5, 4]])
    with pytest.raises(InputError, match="joins 2 x 2 patches to a token"):
        fxgraft.capture(case.model, values)


def expected(model: Any, ids: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
    """transformers' own positions."""
    found, _ = model.model.get_rope_index(
        input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=grid,
        attention_mask=mask,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("name", QWEN)
def test_positions_equal_transformers(name: str) -> None:
    """Images of 1 to 150 tokens a side; images first, last, and next to text only."""
    model: Any = _vision_models.SIZED[name]().model
    generator = torch.Generator().manual_seed(0)
    for rows in itertools.product(["It", "tIttI", "ttt", "tItIt"], repeat=2):
        count = "".join(rows).count("I")
        sides = torch.randint(1, 7, (count, 2), generator=generator) * 2
        sides[:1, :1] = 300
        grid = torch.cat([torch.ones(count, 1, dtype=torch.int64), sides], 1)
        tokens = iter(cast(Any, grid.prod(1) // 4).tolist())
        texts = [[t for c in row for t in ([IMAGE] * next(tokens) if c == "I" else [5])]
                 for row in rows]  # fmt: skip
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        if not count:
            continue
        table = image_positions.table(model.model, IMAGE, grid, 2)
        assert float(table.abs().max()) <= 256, "half precision holds whole numbers up to there"
        counted = (mask.cumsum(1) - 1).clamp(min=0)
        found = image_positions.positions(ids, counted, table, IMAGE)
        real = mask.bool()
        assert torch.equal(found[:, real], expected(model, ids, mask, grid)[:, real])


@pytest.mark.parametrize("name", QWEN)
def test_positions_that_the_caller_counts(name: str) -> None:
    """``position_ids`` count tokens as if there were no images."""
    case = _vision_models.SIZED[name]()
    values = case.inputs(["ttIttt", "tIt"])
    values["position_ids"] = (values["attention_mask"].cumsum(1) - 1).clamp(min=0)
    program = fxgraft.capture(case.model, values)
    real = values["attention_mask"].bool()
    found = program(**values)[0]
    del values["position_ids"]
    with torch.no_grad():
        wanted = cast(Any, case.model)(**values, use_cache=False).logits
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    # Counting on from text alone is something else.
    plain = torch.arange(real.shape[1]).expand(real.shape)
    with torch.no_grad():
        other = cast(Any, case.model)(**values, position_ids=plain, use_cache=False).logits
    assert not torch.allclose(found[real], other[real], atol=1e-3)
