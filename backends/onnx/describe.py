"""How a model was written in ONNX: the backend's report."""

from __future__ import annotations

from collections.abc import Set

from fxgraft.backends.onnx.graph_model import GraphModel
from fxgraft.report import ReportLine

_REASONS = {
    "fxgraft.attention": "the operator Attention (opset 23) has no chunks or sinks",
    "fxgraft.rotary": "RotaryEmbedding needs opset 23",
    "fxgraft.rms_norm": "RMSNormalization needs opset 23; runtimes fuse these",
}


def lines(graph: GraphModel) -> list[ReportLine]:
    """One line per operator of the Program, the most frequent first."""
    return [
        ReportLine(op, count, *_how(op, graph.used.get(op, set())))
        for op, count in graph.counts.most_common()
    ]


def _how(op: str, used: Set[str]) -> tuple[str, str]:
    if not used:
        return "nothing: folded into a constant, or no change", ""
    if "Scan" in used:
        return "onnxruntime Scan", "prefill goes token by token; decode needs no Scan"
    if "Loop" in used:
        return "onnxruntime Loop", "ONNX has no product of groups of rows"
    if not op.startswith("fxgraft."):
        return f"onnxruntime {', '.join(sorted(used))}", ""
    if len(used) == 1:
        return f"onnxruntime {next(iter(used))}", ""
    return f"onnxruntime, inlined: {', '.join(sorted(used))}", _REASONS.get(op, "")
