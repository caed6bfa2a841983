"""What all tests share: a clean import path, and golden files."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

_ROOT = Path(__file__).parent.resolve()
# The folder kernels/ would shadow Hugging Face's package of that name (docs of the layout, wart 1).
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch that accepts golden files."""
    parser.addoption(
        "--accept-golden",
        action="store_true",
        help="write what the tests produce into their golden files instead of comparing",
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden("name", text)`` compares text with ``golden/name.txt`` beside the test file."""
    folder = request.path.parent / "golden"
    accept = bool(request.config.getoption("--accept-golden"))

    def compare(name: str, text: str) -> None:
        file = folder / f"{name}.txt"
        found = text.rstrip("\n") + "\n"
        expected = file.read_text(encoding="utf-8") if file.is_file() else ""
        if found == expected:
            return
        if accept:
            folder.mkdir(exist_ok=True)
            file.write_text(found, encoding="utf-8")
            return
        pytest.fail(_difference(file, expected, found), pytrace=False)

    return compare


def _difference(file: Path, expected: str, found: str) -> str:
    lines = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), str(file), "this test's result", lineterm=""
    )
    advice = "If the change is meant, run this test with --accept-golden and commit the file."
    return "\n".join(
        [f"{file.name} differs:" if expected else f"{file.name} is new:", *lines, advice]
    )
