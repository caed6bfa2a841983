"""Replacing a folder: complete or not at all, whenever it is interrupted."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fxgraft import atomic
from fxgraft.errors import SerializationError
from tests.core.saved_programs import kill_at, run_in_child


@pytest.fixture(params=["exchange", "two renames"])
def swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with and without a file system that can swap folders in one step."""
    if request.param == "two renames":

        def cannot(first: Path, second: Path) -> bool:
            return False

        monkeypatch.setattr(atomic, "_exchange", cannot)
    return request.param


def write(folder: Path, text: str) -> None:
    """Replace a folder of two files that must agree."""
    with atomic.replaced(folder, "mark", lambda name: name in ("mark", "twin")) as new:
        for name in ("twin", "mark"):
            atomic.write_file(new / name, text)


def content(folder: Path) -> str:
    found = atomic.find(folder)
    mark, twin = ((found / name).read_text() for name in ("mark", "twin"))
    assert mark == twin
    return mark


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_this_system_swaps_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")  # pyright: ignore[reportPrivateUsage]
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.usefixtures("swapping")
def test_a_kill_at_any_file_operation_leaves_old_or_new(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder, "old")
    found: list[str] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        write(folder, "old")
        (folder / "notes").write_text("mine")
        code = run_in_child(kill_at(len(found), lambda: write(folder, "new")))
        found.append(content(folder))
        assert (atomic.find(folder) / "notes").read_text() == "mine"
    assert code == 0
    assert found[0] == "old"
    assert found == sorted(found, reverse=True)
    assert 15 < len(found) < 200
    assert found.count("new") > 2
    write(folder, "last")
    assert names(tmp_path) == ["p"]
    assert names(folder) == ["mark", "notes", "twin"]


@pytest.mark.usefixtures("swapping")
def test_an_error_at_any_step_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "p"
    write(folder, "old")
    sync = os.fsync
    failures = 0
    for calls in range(20):
        monkeypatch.setattr(os, "fsync", failing_after(calls, sync))
        if not reports_full_disk(lambda: write(folder, "new")):
            break
        failures += 1
        assert names(tmp_path) == ["p"]
        assert content(folder) == "old"
    # Two files written, two files and their folder synced before the swap.
    assert failures == 5
    assert content(folder) == "new"


def failing_after(calls: int, sync: Callable[[int], None]) -> Callable[[int], None]:
    """An fsync that finds the disk full after some calls, up to the swap of the folders."""
    left = calls

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == -1 and calls < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    return full


def reports_full_disk(work: Callable[[], None]) -> bool:
    try:
        work()
    except SerializationError as error:
        return "disk is full" in str(error) and "free some space" in str(error)
    return False


def test_any_other_exception_passes_through(tmp_path: Path) -> None:
    write(tmp_path / "p", "old")
    with (
        pytest.raises(KeyboardInterrupt),
        atomic.replaced(tmp_path / "p", "mark", lambda name: True),
    ):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["p"]
    assert content(tmp_path / "p") == "old"


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SerializationError, match="holds no mark"):
        write(tmp_path, "new")
    with pytest.raises(SerializationError, match="is a file"):
        write(tmp_path / "thesis.tex", "new")
    with pytest.raises(SerializationError, match="cannot be written"):
        write(tmp_path / "thesis.tex" / "p", "new")
    assert names(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    write(tmp_path / "p", "new")
    assert names(tmp_path) == ["p"]
    assert content(tmp_path / "p") == "new"


@pytest.mark.usefixtures("swapping")
def test_other_files_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder, "old")
    (folder / "tokenizer" / "deep").mkdir(parents=True)
    (folder / "tokenizer" / "deep" / "vocabulary").write_text("a b")
    (folder / "link").symlink_to("mark")
    write(folder, "new")
    assert (folder / "tokenizer" / "deep" / "vocabulary").read_text() == "a b"
    assert (folder / "link").is_symlink()
    assert names(folder) == ["link", "mark", "tokenizer", "twin"]


def test_parents_are_created_and_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "old")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "a" / "b") == "new"


def test_leftovers_of_running_processes_are_not_touched(tmp_path: Path) -> None:
    prefix = atomic._prefix(tmp_path / "p")  # pyright: ignore[reportPrivateUsage]
    running = tmp_path / f"{prefix}{os.getpid()}-0"
    dead = tmp_path / f"{prefix}{2**22 + 1}-0"
    elsewhere = tmp_path / ".p.saving-otherhost-1-0"
    for path in (running, dead, elsewhere):
        path.mkdir()
    write(tmp_path / "p", "new")
    assert names(tmp_path) == sorted([running.name, elsewhere.name, "p"])
