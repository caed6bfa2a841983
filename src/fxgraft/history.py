"""What was done to a Program: one record per pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Size:
    """How large a Program is: nodes, weight elements, weight bytes, operations.

    ``flops`` is evaluated at the sizes that the numeric check used.
    """

    nodes: int
    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Record:
    """One pass in a Program's history.

    Attributes:
        name: the pass.
        config: its configuration, as JSON values.
        effect: ``"exact"``, ``"approximate"`` or ``"behaviour"``.
        seconds: time of the rewrite without its numeric check.
        check_seconds: time of the numeric check.
        before, after: sizes of the Program.
        error: largest relative error of the check, None where it was not run.
        check: what was compared, in words.
        summary: what the pass changed, one line each.
        diff: the graph diff as JSON values.
    """

    name: str
    config: dict[str, Any]
    effect: str
    seconds: float
    check_seconds: float
    before: Size
    after: Size
    error: float | None
    check: str
    summary: list[str] = field(default_factory=list[str])
    diff: dict[str, Any] = field(default_factory=dict[str, Any])
