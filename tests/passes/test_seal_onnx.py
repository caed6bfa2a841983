"""A steered model in onnxruntime: the automaton's state goes in and out, rows choose vectors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgraft
from tests import model_folder
from tests.runtime.seal._steered import choosing, talkative

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="there is no onnxruntime"
)
TEXTS = ["ask\n<think>\n\nfirst\n\nsecond\n", "<think>a\n\nb</think>c\n\nd\n"]


def test_onnx(tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    folder.mkdir()
    torch_model = choosing(folder, default="one", coefficient=4.0)
    program = torch_model.program
    exported = fxgraft.compile(program, backend="onnx")
    prompts = [model_folder.tokens_of(folder, text) for text in TEXTS]
    length = min(map(len, prompts))
    ids = torch.tensor([prompt[:length] for prompt in prompts])
    choice: dict[str, Any] = {
        "seal_vector": torch.tensor([2, 3]), "seal_strength": torch.tensor([1.0, -0.5]),
    }  # fmt: skip
    steered = program(ids, **choice)[0]
    torch.testing.assert_close(exported(ids, **choice).logits, steered, atol=1e-5, rtol=1e-5)
    assert not torch.equal(steered, program(ids)[0])
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": []}
    tokens = exported.generate(prompts, **options)
    assert torch.equal(tokens, torch_model.generate(prompts, **options))
    plain = fxgraft.compile(talkative(), backend="torch")
    assert not torch.equal(tokens, plain.generate(prompts, **options))
    fxgraft.export_onnx(torch_model, tmp_path / "files")
    facts = json.loads((tmp_path / "files" / "fxgraft.json").read_text())
    assert any(state["name"].endswith("automaton") for state in facts["states"])
