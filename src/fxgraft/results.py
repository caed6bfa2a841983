"""Benchmark results: one JSON file per benchmark, and the page made from them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fxgraft.errors import InputError

System = Literal[
    "spine", "engine", "flexcim", "hermes", "dsla", "spin", "seal", "ouromamba", "flow",
    "federated", "speculative", "modm", "vert",
]  # fmt: skip
_PACKAGES = ("torch", "transformers", "triton", "onnxruntime", "numpy")


class Named(BaseModel):
    """A peer or a physical bound: what it is and its value in the row's unit."""

    model_config = ConfigDict(extra="forbid")
    name: str
    value: float


class Row(BaseModel):
    """One measured figure.

    Attributes:
        metric: what was measured.
        value: the figure.
        unit: its unit.
        target: what was to be reached, None for figures without a target.
        better: which direction is better.
        met: whether the target was reached.
        peer: another system's figure from the same run.
        bound: the physical limit.
    """

    model_config = ConfigDict(extra="forbid")
    metric: str
    value: float
    unit: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    met: bool | None = None
    peer: Named | None = None
    bound: Named | None = None


class Result(BaseModel):
    """A benchmark's result file."""

    model_config = ConfigDict(extra="forbid")
    name: str
    system: System
    hardware: str
    versions: dict[str, str]
    command: str
    date: str
    rows: list[Row]
    notes: list[str] = []


def row(
    metric: str,
    value: float,
    unit: str,
    *,
    target: float | None = None,
    better: Literal["lower", "higher"] = "lower",
    peer: tuple[str, float] | None = None,
    bound: tuple[str, float] | None = None,
) -> Row:
    """Make a row; whether the target is met follows from the figures."""
    met = None
    if target is not None:
        met = value <= target if better == "lower" else value >= target
    return Row(
        metric=metric,
        value=value,
        unit=unit,
        target=target,
        better=better,
        met=met,
        peer=Named(name=peer[0], value=peer[1]) if peer else None,
        bound=Named(name=bound[0], value=bound[1]) if bound else None,
    )


def write(
    name: str,
    system: System,
    rows: Sequence[Row],
    folder: Path,
    *,
    hardware: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``<folder>/<name>.json`` with hardware, versions, command and date."""
    result = Result(
        name=name,
        system=system,
        hardware=hardware or describe_hardware(),
        versions=versions(),
        command=" ".join(["python", *(_relative(word) for word in sys.argv)]),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        rows=list(rows),
        notes=list(notes),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result.model_dump(exclude_none=True), indent=1) + "\n")
    return path


def _relative(word: str) -> str:
    path = Path(word)
    return os.path.relpath(path) if path.is_absolute() and path.exists() else word


def describe_hardware() -> str:
    """Processor, cores and memory, and the GPU if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    import torch

    return f"{torch.cuda.get_device_name()}; {text}" if torch.cuda.is_available() else text


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_all(folder: Path) -> list[Result]:
    """All results in a folder, by name.

    Raises:
        InputError: a file is no result; names it and the field.
    """
    results: list[Result] = []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append(Result.model_validate_json(path.read_text()))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path}: field {place!r}: {first['msg']}", "run the benchmark again"
            ) from error
    return results


def pictures(folder: Path, name: str) -> list[Path]:
    """Pictures that belong to a result: ``<name>.svg`` beside it, or those in ``<name>/``."""
    found = [*folder.glob(f"{name}.*"), *folder.glob(f"{name}/*")]
    return sorted(path for path in found if path.suffix in (".svg", ".png"))


def page(results: Sequence[Result], folder: Path, place: Path) -> str:
    """The results as a Markdown page.

    Args:
        results: as ``read_all`` gives them.
        folder: where they and their pictures lie.
        place: the file that the page will be.
    """
    lines = [
        "# Results",
        "",
        "Made from `benchmarks/results/*.json` by `fxgraft bench --page docs/results.md`. "
        "Peers were measured in the same run as our figure.",
    ]
    for result in results:
        lines += ["", f"## {result.name} ({result.system})", ""]
        packages = ", ".join(f"{name} {number}" for name, number in result.versions.items())
        lines += [f"{result.hardware}; {packages}; {result.date}; `{result.command}`", ""]
        lines += [
            "| metric | value | target | met | peer | bound |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_page_row(entry) for entry in result.rows]
        lines += [f"\n{note}" for note in result.notes]
        for picture in pictures(folder, result.name):
            link = Path(os.path.relpath(picture, place.parent)).as_posix()
            lines += ["", f"![{picture.stem.replace('_', ' ')}]({link})"]
    return "\n".join(lines) + "\n"


def _page_row(entry: Row) -> str:
    sign = "≤" if entry.better == "lower" else "≥"
    cells: list[Any] = [
        entry.metric,
        f"{entry.value:g} {entry.unit}",
        f"{sign} {entry.target:g}" if entry.target is not None else "",
        {True: "yes", False: "**no**", None: ""}[entry.met],
        f"{entry.peer.name}: {entry.peer.value:g}" if entry.peer else "",
        f"{entry.bound.name}: {entry.bound.value:g}" if entry.bound else "",
    ]
    return "| " + " | ".join(cells) + " |"
