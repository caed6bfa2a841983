"""``shard`` in processes of its own: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.passes._torchrun import ROOT, torchrun

WORKER = ROOT / "tests/passes/_shard_worker.py"
FAMILIES = ["llama", "mistral", "gemma2", "qwen2", "phi", "phi3", "gpt2", "gpt_neox", "mixtral",
            "gpt_oss", "opt", "jamba"]  # fmt: skip


def check(
    folder: Path,
    group: str,
    vocabulary: str,
    families: list[str],
    size: int = 2,
    lowering: str = "torch",
) -> None:
    """Every rank gives what the whole model gives, and the same as the other ranks."""
    torchrun(size, WORKER, str(folder), group, lowering, vocabulary, *families)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    assert len(ranks[0]) == len(families)
    for first, *others in zip(*ranks, strict=True):
        for result in (first, *others):
            check_one(result)
            for draws in ("sampled", "served_sampled"):
                assert result[draws] == first[draws]


def check_one(result: dict[str, Any]) -> None:
    assert result["error"] < 1e-5 * result["scale"], result["family"]
    assert result["loaded_error"] == result["error"], result["family"]
    assert result["tokens"] == result["expected"], result["family"]
    assert result["served"] == result["served_expected"], result["family"]
    assert result["state_problem"] is None
    assert "by all 2 processes together" in result["check"]
    share, whole = result["parameters"]
    assert share < 0.65 * whole


def test_two_processes(tmp_path: Path) -> None:
    check(tmp_path, "gloo", "split", ["llama"])


@pytest.mark.slow
def test_families_in_two_processes(tmp_path: Path) -> None:
    check(tmp_path, "gloo", "split", FAMILIES)


@pytest.mark.slow
def test_vocabulary_on_every_process(tmp_path: Path) -> None:
    check(tmp_path, "gloo", "replicate", ["llama", "gpt2"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("lowering", ["torch", "triton"])
def test_two_gpus(tmp_path: Path, lowering: str) -> None:
    check(tmp_path, "nccl", "split", ["llama", "qwen2", "mixtral"], lowering=lowering)
