"""What was chosen, as JSON values and as a picture of blocks by projections."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxgraft.artifact import fingerprint_of
from fxgraft.passes.flow.budget import Selection
from fxgraft.passes.flow.criteria import Assignment
from fxgraft.passes.flow.study import Study
from fxgraft.passes.flow.units import Unit

NOT_TAKEN = "the recovery did not lower the calibration loss; weights are as pruned"
_CELL, _ROW, _LEFT, _TOP = 92, 22, 70, 64


def layers(study: Study, assignment: Assignment) -> list[dict[str, Any]]:
    """One entry per layer: its pattern, sparsity, and what was noticed."""
    return [_layer(study, unit, assignment) for unit in study.found.units]


def _layer(study: Study, unit: Unit, assignment: Assignment) -> dict[str, Any]:
    pattern, statistics = assignment[unit], study.statistics[unit]
    weight = study.program.weight(unit.weight)
    entry: dict[str, Any] = {
        "weight": unit.weight,
        "layer": unit.layer,
        "role": unit.role,
        "pattern": str(pattern),
        "parameters": unit.parameters,
        "sparsity": unit.pruned(pattern) / unit.parameters,
        "fingerprint": fingerprint_of(weight),
    }
    if statistics.dead:
        entry["dead_inputs"] = statistics.dead
    if statistics.unseen and unit.product.copies > 1:
        entry["experts_by_magnitude"] = statistics.unseen
    return entry


def blocks(study: Study) -> list[dict[str, Any]]:
    """Presence and clustering of outliers by block."""
    return [
        {
            "layer": index,
            "presence": found.presence,
            "clustering": found.clustering,
            "published": found.published,
        }
        for index, found in study.blocks().items()
    ]


def summary(results: Mapping[str, Any], selection: Selection) -> list[str]:
    """What came out, for people."""
    loss = results["loss"]
    lines = [
        f"{selection.describe()}; {results['chosen']} chosen",
        "calibration loss "
        + ", ".join(f"{name} {value:.4g}" for name, value in loss.items() if value is not None),
    ]
    if results["guard"]:
        lines.append(results["guard"])
    if results["recovery"] is not None and not results["recovery"]["taken"]:
        lines.append(NOT_TAKEN)
    counts: dict[str, int] = {}
    for entry in results["layers"]:
        counts[entry["pattern"]] = counts.get(entry["pattern"], 0) + 1
    lines.append("patterns: " + ", ".join(f"{count} × {name}" for name, count in counts.items()))
    unseen = [e["weight"] for e in results["layers"] if "experts_by_magnitude" in e]
    if unseen:
        lines.append(f"warning: experts that no token reached, pruned by magnitude: {unseen}")
    dead = sum(entry.get("dead_inputs", 0) for entry in results["layers"])
    if dead:
        lines.append(f"{dead} input channels were always zero; their weights went first")
    lines += [f"left alone: {path}: {reason}" for path, reason in results["left"].items()]
    return lines


def picture(results: Mapping[str, Any]) -> str:
    """Blocks by projections: the N:M of each, darker where more is kept; outliers beside them."""
    roles = list(dict.fromkeys(entry["role"] for entry in results["layers"]))
    indices = list(dict.fromkeys(entry["layer"] for entry in results["layers"]))
    columns = [*roles, "presence %", "clustering"]
    width = _LEFT + _CELL * len(columns) + 10
    height = _TOP + _ROW * len(indices) + 14
    title = f"sparsity {results['sparsity']:.4g}, {results['chosen']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="sans-serif" font-size="11">'
        f'<title>{html.escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>',
        _text(10, 20, title, size=14),
        _text(10, _TOP - 8, "block"),
    ]
    parts += [_text(_LEFT + _CELL * i + 4, _TOP - 8, name) for i, name in enumerate(columns)]
    parts += [_text(10, _middle(row), str(index)) for row, index in enumerate(indices)]
    for entry in results["layers"]:
        column, row = roles.index(entry["role"]), indices.index(entry["layer"])
        parts.append(_cell(column, row, 1 - entry["sparsity"], entry["pattern"], "38,92,150"))
    for key, column in (("presence", len(roles)), ("clustering", len(roles) + 1)):
        most = max((entry[key] for entry in results["blocks"]), default=0.0)
        for entry in results["blocks"]:
            row, share = indices.index(entry["layer"]), entry[key] / most if most else 0.0
            parts.append(_cell(column, row, share, f"{entry[key]:.3g}", "180,95,30"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _middle(row: int) -> int:
    return _TOP + _ROW * row + 15


def _cell(column: int, row: int, share: float, words: str, colour: str) -> str:
    x, y = _LEFT + _CELL * column, _TOP + _ROW * row
    opacity = 0.08 + 0.8 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    ink = "#fff" if opacity > 0.55 else "#222"
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL - 3}" height="{_ROW - 3}" rx="3" '
        f'fill="rgba({colour},{opacity:.2f})"/>{_text(x + 6, _middle(row) - 1, words, ink)}'
    )


def _text(x: int, y: int, words: str, ink: str = "#222", size: int = 11) -> str:
    return f'<text x="{x}" y="{y}" fill="{ink}" font-size="{size}">{html.escape(words)}</text>'


def statistics(study: Study) -> dict[str, Tensor]:
    """The input statistics of every layer, for the artifact."""
    return {f"{unit.weight}.squares": study.statistics[unit].squares for unit in study.found.units}
