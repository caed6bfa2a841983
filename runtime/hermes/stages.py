"""Stage kinds and request chains (HERMES, arXiv 2504.09775, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

PREPROCESS, POSTPROCESS = "preprocess", "postprocess"
RAG, EMBED, RETRIEVE, RERANK = "rag", "embed", "retrieve", "rerank"
KV_RETRIEVAL = "kv_retrieval"
PREFILL, DECODE, REASONING = "prefill", "decode", "reasoning"

HOST_KINDS = frozenset({PREPROCESS, POSTPROCESS})
RAG_KINDS = frozenset({RAG, EMBED, RETRIEVE, RERANK})
DECODE_KINDS = frozenset({DECODE, REASONING})
LLM_KINDS = frozenset({PREFILL, DECODE, REASONING})
KINDS = (
    PREPROCESS, RAG, EMBED, RETRIEVE, RERANK, KV_RETRIEVAL, PREFILL, DECODE, REASONING, POSTPROCESS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """One unit of work of a chain; which fields matter depends on the kind.

    Attributes:
        kind: one of ``KINDS``.
        task: name of a host task, to choose its service time.
        tokens: tokens added to the prompt before the stage (a tool's answer before a prefill).
        docs: documents that a retrieval adds to the prompt.
        tokens_per_doc: tokens of each of them.
        context_tokens: prior context that a KV retrieval asks for.
        scale: factor on the output length (reasoning).
        branches: parallel branches of a decode (multi-path reasoning).
        spread: standard deviation of the branches' output lengths, relative to their mean.
        model: the model that runs it, where it is not the request's (a safety filter).
    """

    kind: str
    task: str = ""
    tokens: int = 0
    docs: int = 0
    tokens_per_doc: int = 0
    context_tokens: int = 0
    scale: float = 1.0
    branches: int = 1
    spread: float = 0.0
    model: str = ""


Chain = tuple[Stage, ...]


def chain_problem(chain: Chain) -> str:
    """What makes a chain impossible in any system, or ``""``."""
    if not chain:
        return "it has no stages"
    for position, stage in enumerate(chain, 1):
        name = f"stage {position} ({stage.kind})"
        if stage.kind not in KINDS:
            return f"stage {position} has the unknown kind {stage.kind!r}"
        if stage.branches < 1 or not 0 < stage.scale < float("inf"):
            return f"{name} has {stage.branches} branches and scale {stage.scale}"
        if stage.kind not in DECODE_KINDS:
            continue
        before = chain[position - 2] if position > 1 else None
        if not any(earlier.kind == PREFILL for earlier in chain[: position - 1]):
            return f"{name} has no prefill before it"
        if before is None or before.kind != PREFILL:
            return f"{name} does not follow a prefill directly"
        if before.model != stage.model:
            return f"{name} has another model than its prefill"
    return ""
