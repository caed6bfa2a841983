"""N:M patterns that weights are declared to obey: noted by passes, read by backends.

A weight obeys N:M if, of each M neighbouring elements along its input dimension, at most N are
not zero. A declaration is part of the Program: it is copied, saved and loaded with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from fxgraft.errors import InputError
from fxgraft.program import Program

_KEY = "sparsity"


@dataclass(frozen=True)
class DeclaredPattern:
    """At most ``n`` of ``m`` neighbours along the input dimension are kept.

    Attributes:
        n, m: the pattern.
        is_padded: the last group may be shorter than ``m``.
    """

    n: int
    m: int
    is_padded: bool = False


def declare(program: Program, weight: str, pattern: DeclaredPattern) -> None:
    """Note the pattern of a weight, in place of an older note.

    Args:
        program: whose weight it is; it is changed.
        weight: name of a weight.
        pattern: what it obeys; backends hold the weight's values against it.

    Raises:
        InputError: there is no such weight.
    """
    if weight not in {name for name, _ in program.weights()}:
        raise InputError(f"the Program has no weight {weight!r}", "give the name of a weight")
    noted = cast("Mapping[str, Any]", program.origin.get(_KEY) or {})
    program.origin[_KEY] = {**noted, weight: asdict(pattern)}


def declared(program: Program) -> dict[str, DeclaredPattern]:
    """The pattern of each weight that has a declaration."""
    noted = cast("Mapping[str, Mapping[str, Any]]", program.origin.get(_KEY) or {})
    return {weight: DeclaredPattern(**fields) for weight, fields in noted.items()}
