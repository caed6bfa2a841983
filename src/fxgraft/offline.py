"""Offline stages: what computes a pass's artifact from a model and data, resumable.

A pass class names its stage in ``offline``; ``fxgraft calibrate PASS MODEL`` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fxgraft import artifact, atomic
from fxgraft.artifact import Artifact
from fxgraft.errors import SerializationError
from fxgraft.program import Program
from fxgraft.settings import Settings

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many parts of it are done, and how many there are.

What follows ", " in the first, such as a loss, may differ from call to call.
"""

_KEY = "calibration.json"


def silent(title: str, done: int, total: int) -> None:
    """The progress of a stage that nobody watches."""


@dataclass(frozen=True)
class Made:
    """What a stage computed.

    Attributes:
        tensors: by name.
        results: JSON values.
        summary: what came out, one line each.
        texts: further text files by name, such as a report.
    """

    tensors: dict[str, Tensor]
    results: dict[str, Any]
    summary: list[str] = field(default_factory=list[str])
    texts: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Workspace:
    """Where a stage keeps the parts that it has finished, so that it can go on after a break.

    Attributes:
        folder: of the parts; None keeps nothing.
        progress: is told how far the stage is.
        resumed: number of parts that were found finished.
    """

    folder: Path | None = None
    progress: Progress = silent
    resumed: int = 0

    @staticmethod
    def open(folder: Path, key: Mapping[str, Any], progress: Progress = silent) -> Workspace:
        """Open a folder of parts; parts that another model or other settings left are removed.

        Args:
            folder: of the parts.
            key: JSON values that the parts depend on.
            progress: is told how far the stage is.

        Raises:
            SerializationError: the folder cannot be written.
        """
        text = json.dumps(key, sort_keys=True)
        try:
            if folder.is_dir() and _read(folder / _KEY) != text:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_file(folder / _KEY, text)
        except OSError as error:
            raise SerializationError(
                f"{folder} cannot be written: {error}", "check the path and its permissions"
            ) from error
        return Workspace(folder, progress)

    def part(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of one part: read if it was finished before, else computed and kept.

        Args:
            name: of the part, a file name without suffix.
            compute: makes the tensors.
        """
        found = self.find(name)
        if found is None:
            found = compute()
            self.keep(name, found)
        return found

    def find(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were kept under a name, by an earlier run too; None if there are none.

        Args:
            name: as in ``part``.
        """
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        self.resumed += 1
        return artifact.read_tensors(path)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in place of those kept before, in one step.

        Args:
            name: as in ``part``.
            tensors: by name.
        """
        if self.folder is None:
            return
        unfinished = self.folder / f"{name}.unfinished"
        artifact.write_tensors(unfinished, tensors)
        os.replace(unfinished, self.folder / f"{name}.safetensors")  # noqa: PTH105  (Path.replace is the same call)

    def close(self) -> None:
        """Remove the parts."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class OfflineStage(Settings, ABC):
    """Computes a pass's artifact. Its fields are its settings in Python and on the command line.

    Attributes:
        name: of the pass.
    """

    role: ClassVar[str] = "the offline stage of pass"

    @abstractmethod
    def run(self, program: Program, work: Workspace) -> Made:
        """Compute the artifact.

        Args:
            program: the model; it must not be changed.
            work: keeps finished parts, and is told of progress.

        Raises:
            InputError: the settings or data do not fit the model.
        """

    def calibrate(
        self, program: Program, folder: Path, progress: Progress = silent
    ) -> tuple[Artifact, Made]:
        """Run the stage and write its artifact; go on where an interrupted run stopped.

        Args:
            program: the model.
            folder: the artifact's; finished parts are kept beside it until the end.
            progress: is told how far the stage is.

        Raises:
            Error: as ``run``, or the folder cannot be written.
        """
        target = folder.expanduser().resolve()
        key = {"pass": self.name, "settings": self.config(), "model": artifact.identify(program)}
        work = Workspace.open(target.parent / f".{target.name}.calibrating", key, progress)
        made = self.run(program, work)
        written = artifact.write(
            target, self.name, program, settings=self.config(), results=made.results,
            tensors=made.tensors, texts=made.texts,
        )  # fmt: skip
        work.close()
        return written, made


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
