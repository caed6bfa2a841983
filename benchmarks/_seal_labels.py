"""Labels for paragraphs of a model that does not doubt itself, for ``seal_quality.py``."""

from __future__ import annotations

import re

_ARITHMETIC = re.compile(r"\d\s*[-+*/x×÷=]|[-+*/×÷=]\s*\$?\d")


def by_arithmetic(text: str) -> str:
    """A paragraph that calculates is execution, one that only talks is transition."""
    return "execution" if _ARITHMETIC.search(text) else "transition"
