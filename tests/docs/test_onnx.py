"""The page ``docs/onnx.md`` runs as it stands, with fxgraft's tokens from plain onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxgraft
from fxgraft import sources
from fxgraft.backends.onnx.options import FIRST_OPSET, LAST_OPSET, OnnxOptions
from fxgraft.backends.onnx.verify import TOLERANCE
from tests import model_folder
from tests.docs._pages import ROOT, run_page

PAGE = ROOT / "docs" / "onnx.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("onnx_page")
    model_folder.write(folder / "model", model_folder.llama())
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "embedded_model", lambda: folder / "model")
        patch.chdir(folder / "work")
        found = run_page(PAGE)
    return {**found, "work": folder / "work"}


def test_the_plain_onnxruntime_loop_gives_the_tokens_of_generate(
    namespace: dict[str, Any],
) -> None:
    prompts = [[5, 17, 9, 4], [8, 3]]
    compiled = fxgraft.compile(namespace["program"], backend="torch")
    ours = compiled.generate(prompts, max_new_tokens=6, eos_token_id=[])
    assert torch.equal(torch.from_numpy(namespace["answers"]), ours[:, 4:])  # pyright: ignore


def test_the_named_files_are_the_written_ones(namespace: dict[str, Any]) -> None:
    work: Path = namespace["work"]
    written = {file.name for file in (work / "out").iterdir()}
    assert written == {"prefill.onnx", "decode.onnx", "weights.bin", "fxgraft.json"}
    assert all(f"`{name}`" in TEXT for name in written)


def test_the_options_and_tolerances_are_the_real_ones() -> None:
    assert all(f"`{name}`" in TEXT for name in OnnxOptions.model_fields)
    assert f"| `opset` | {FIRST_OPSET} (default) to {LAST_OPSET}" in TEXT
    for dtype, limit in TOLERANCE.items():
        name = str(dtype).removeprefix("torch.")
        assert f"| {name} | {limit:.0e} |".replace("e-0", "e-") in TEXT
