"""Running a page in headless Chromium, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--enable-logging=stderr", "--virtual-time-budget=4000", "--window-size=1400,1000",
]  # fmt: skip
_MARKER = "the probe has ended"


def probe(page: Path, script: str) -> dict[str, Any]:
    """What an async function body returns in the page, once its own script has run.

    Fails if the page writes anything to the console, errors included.
    """
    probed = page.with_name(f"probed_{page.name}")
    probed.write_text(page.read_text(encoding="utf-8") + tail(script), encoding="utf-8")
    return open_page(probed.as_uri())


def tail(script: str) -> str:
    """What a page must end with, so that ``open_page`` gives what a function body returns."""
    return (
        "<script>(async () => {" + script + "})().catch((error) => ({ error: String(error) }))"
        ".then((found) => { document.body.dataset.probe = JSON.stringify(found);"
        f"console.log({_MARKER!r}); }});</script>"
    )


def open_page(address: str) -> dict[str, Any]:
    """What the function body of ``tail`` returns in the page at an address; see ``probe``."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium on PATH")
    with tempfile.TemporaryDirectory() as profile:
        run = subprocess.run(
            [browser, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", address],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    assert _MARKER in console[0]
    found = re.search(r'data-probe="([^"]*)"', run.stdout)
    assert found is not None
    return json.loads(html.unescape(found[1]))
