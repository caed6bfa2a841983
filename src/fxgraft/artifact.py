"""Artifacts: what an offline stage computed from data, as a folder that a pass reads.

``artifact.json`` says what made it, with which settings, from which model, and what came out;
``tensors.safetensors`` holds the tensors; further files, such as a report, are for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from fxgraft import atomic
from fxgraft.errors import InputError, SerializationError
from fxgraft.program import Program
from fxgraft.strict_json import fields, parse

FORMAT, VERSION, FILE, TENSORS = "fxgraft.artifact", 1, "artifact.json", "tensors.safetensors"
_DOCUMENT: dict[str, type | tuple[type, ...]] = {
    "format": str, "version": int, "kind": str, "settings": dict, "model": dict, "results": dict,
    "files": dict,
}  # fmt: skip
# A weight's fingerprint reads this many of its elements, evenly spaced: models are large.
_SAMPLED = 4096


@dataclass(frozen=True)
class Artifact:
    """One artifact on disk.

    Attributes:
        folder: where it is.
        kind: name of the pass that it is for.
        settings: of the stage that made it, as JSON values.
        model: ``source`` and ``fingerprint`` of the model that it was made from.
        results: what came out, as JSON values.
    """

    folder: Path
    kind: str
    settings: dict[str, Any]
    model: dict[str, Any]
    results: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return read_tensors(self.folder / TENSORS)


def write(
    folder: Path,
    kind: str,
    program: Program,
    *,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, str],
) -> Artifact:
    """Write an artifact; an older one in its place is replaced in one step, or left as it was.

    Args:
        folder: new, empty, or one that holds an artifact.
        kind: name of the pass that it is for.
        program: the model that it was made from.
        settings: of the stage.
        results: JSON values.
        tensors: by name.
        texts: further text files by name.

    Raises:
        SerializationError: the folder holds something else, or cannot be written.
    """
    owned = {FILE, TENSORS, *texts}
    with atomic.replaced(folder, FILE, owned.__contains__) as target:
        write_tensors(target / TENSORS, tensors)
        for name, text in texts.items():
            atomic.write_file(target / name, text)
        document = {
            "format": FORMAT, "version": VERSION, "kind": kind, "settings": dict(settings),
            "model": identify(program), "results": dict(results),
            "files": {TENSORS: _hash_file(target / TENSORS)},
        }  # fmt: skip
        atomic.write_file(target / FILE, json.dumps(document, indent=1, allow_nan=False))
    return read(folder, kind)


def read(folder: Path, kind: str) -> Artifact:
    """Read an artifact and check that its tensors are whole.

    Raises:
        InputError: there is none, it is for another pass, or of a newer version.
        SerializationError: it is damaged.
    """
    found = atomic.find(folder.expanduser())
    path = found / FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no {FILE}", f"make one with: fxgraft calibrate {kind}")
    raw = fields(parse(path.read_bytes(), str(path)), str(path), _DOCUMENT)
    if raw["format"] != FORMAT or raw["version"] > VERSION:
        raise InputError(
            f"{path} has the format {raw['format']!r}, version {raw['version']}",
            f"this release reads {FORMAT!r} up to version {VERSION}",
        )
    if raw["kind"] != kind:
        raise InputError(
            f"{folder} is an artifact for pass {raw['kind']!r}, not for {kind!r}",
            f"make one with: fxgraft calibrate {kind}",
        )
    tensors = found / TENSORS
    if not tensors.is_file() or _hash_file(tensors) != raw["files"].get(TENSORS):
        raise SerializationError(
            f"{tensors} is missing or damaged: it is not what {FILE} describes",
            "calibrate again, or restore the folder",
        )
    return Artifact(found, kind, raw["settings"], raw["model"], raw["results"])


def identify(program: Program) -> dict[str, Any]:
    """The source and fingerprint of a model, as JSON values."""
    source = program.origin.get("source")
    return {"source": None if source is None else str(source), "fingerprint": fingerprint(program)}


def fingerprint(program: Program) -> str:
    """A hash of the names, shapes, dtypes and (evenly sampled) values of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(program.weights(), key=lambda item: item[0]):
        digest.update(f"{name} {fingerprint_of(weight)};".encode())
    return digest.hexdigest()[:16]


def fingerprint_of(weight: Tensor) -> str:
    """A hash of one weight's shape, dtype and (evenly sampled) values."""
    flat = weight.detach().reshape(-1)
    step = max(flat.numel() // _SAMPLED, 1)
    sample = flat[::step].contiguous().cpu()
    values = sample.view(torch.uint8) if sample.numel() else sample
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(cast(Any, values).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        # The format knows no shared tensors.
        stored[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    cast(Any, safetensors_torch).save_file(stored, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        SerializationError: it is missing or damaged.
    """
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            return {name: cast(Tensor, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SerializationError(
            f"{path} is missing or damaged: {error}", "restore the file"
        ) from error


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
