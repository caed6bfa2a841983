"""What the command prints: progress on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

output = Console()
if not output.is_terminal:
    output.width = 120  # files and pipes have no width of their own
messages = Console(stderr=True)
_UNITS = ("", "K", "M", "G", "T", "P")


def fail(text: str) -> None:
    """Print an error message."""
    messages.print(f"[bold red]error:[/] {escape(text)}", highlight=False)


@contextlib.contextmanager
def step(title: str) -> Generator[None]:
    """Show that something is going on, and how long it took."""
    start = time.perf_counter()
    if messages.is_terminal:
        with messages.status(title):
            yield
    else:
        messages.print(f"… {title}", highlight=False)
        yield
    messages.print(
        f"[green]✓[/] {escape(title)} [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False
    )


def print_json(value: Any) -> None:
    """Print one JSON document for machines."""
    print(json.dumps(value, indent=2, default=str))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; every column but the first is aligned to the right."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(
            column, justify="left" if index == 0 else "right", no_wrap=index == 0, overflow="fold"
        )
    for row in rows:
        grid.add_row(*[escape(cell) for cell in row])
    output.print(grid)


def count(value: float, unit: str = "") -> str:
    """A number with a decimal prefix: ``134.5 M``."""
    size = float(value)
    for prefix in _UNITS:
        if abs(size) < 1000 or prefix == _UNITS[-1]:
            digits = 0 if prefix == "" else 1
            return f"{size:.{digits}f} {prefix}{unit}".strip()
        size /= 1000
    raise AssertionError


def change(before: float, after: float, unit: str = "") -> str:
    """``134.5 M → 120.1 M``, or the number alone where it stayed."""
    if before == after:
        return count(after, unit)
    return f"{count(before, unit)} → {count(after, unit)}"
