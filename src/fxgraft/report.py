"""What runs what: a compiled model's report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReportLine:
    """One kind of node.

    Attributes:
        op: the op, for example ``"aten.linear"``.
        count: how many nodes of the kind there are.
        runs_on: the kernel or library that runs them.
        reason: why not a faster path, empty if it is the fastest known here.
    """

    op: str
    count: int
    runs_on: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What a backend made of a Program.

    Attributes:
        backend: its name.
        lines: one per kind of node.
        notes: other facts, for example how generation keeps its state.
    """

    backend: str
    lines: list[ReportLine]
    notes: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "backend": self.backend,
            "lines": [vars(line) for line in self.lines],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        rows = [(line.op, str(line.count), line.runs_on, line.reason) for line in self.lines]
        rows.insert(0, ("op", "nodes", "runs on", "why not faster"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([f"backend {self.backend}", *table, *self.notes])
