"""Replacing a folder as a whole: whoever looks finds the old one or the new one, complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

from fxgraft.errors import SerializationError

# renameat2(2): swap two paths in one step.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replaced(folder: Path, marker: str, owned: Callable[[str], bool]) -> Generator[Path]:
    """Give an empty folder to write to; on success it takes the place of ``folder``.

    Files in the old folder that are not ``owned`` are kept. If anything fails or the process is
    killed, the old folder is as it was.

    Args:
        folder: the folder to create or replace.
        marker: name of a file that an old folder must hold to be replaced.
        owned: whether a file name belongs to what is written.

    Raises:
        SerializationError: the old folder is something else, or writing failed.
    """
    target = folder.expanduser().resolve()
    old = find(target)
    _check_replaceable(old, marker)
    temporary = target.parent / f"{_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if old.is_dir():
            _keep_others(old, temporary, owned)
        _sync(temporary)
        _swap(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(_aside(target), ignore_errors=True)
    _remove_leftovers(target)


def write_file(path: Path, text: str) -> None:
    """Write a text file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find(folder: Path) -> Path:
    """The folder, or what was set aside from its place when a replacement was interrupted."""
    aside = _aside(folder)
    return aside if aside.is_dir() and not folder.exists() else folder


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.previous"


def _prefix(folder: Path) -> str:
    return f".{folder.name}.saving-{socket.gethostname()}-"


def _check_replaceable(folder: Path, marker: str) -> None:
    if not folder.exists() or (folder / marker).is_file():
        return
    if not folder.is_dir():
        raise SerializationError(f"{folder} is a file", "give a folder")
    if any(folder.iterdir()):
        raise SerializationError(
            f"{folder} exists and holds no {marker}", "give a new or empty folder"
        )


def _keep_others(old: Path, new: Path, owned: Callable[[str], bool]) -> None:
    for path in old.iterdir():
        if owned(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; afterwards ``new`` holds what was there, if any."""
    if not target.exists() or not any(target.iterdir()):
        new.rename(target)
    elif not _exchange(new, target):
        aside = _aside(target)
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        new.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove what processes of this machine left behind when they were killed while saving."""
    prefix = _prefix(target)
    for path in target.parent.iterdir():
        owner = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _cannot_write(folder: Path, error: OSError) -> SerializationError:
    if error.errno in _NO_ROOM:
        return SerializationError(
            f"{folder} cannot be written: the disk is full ({error.strerror})",
            "free some space and save again; what was in the folder before is unchanged",
        )
    return SerializationError(
        f"{folder} cannot be written: {error}", "check the path and its permissions"
    )
