"""The golden-file fixture and the import path that conftest.py sets up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_repository_root_is_not_importable() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


def test_golden_is_compared_and_rewritten_by_the_switch_only(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("def test_it(golden): golden('words', 'one\\ntwo')")
    file = pytester.path / "golden" / "words.txt"

    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*words.txt is new*", "*--accept-golden*"])
    assert not file.exists()

    pytester.runpytest_inprocess("--accept-golden").assert_outcomes(passed=1)
    assert file.read_text(encoding="utf-8") == "one\ntwo\n"
    pytester.runpytest_inprocess().assert_outcomes(passed=1)

    file.write_text("one\n2\n", encoding="utf-8")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*words.txt differs*", "-2", "+two", "*--accept-golden*"])
    assert file.read_text(encoding="utf-8") == "one\n2\n"
