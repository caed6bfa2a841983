"""A workload: one kind of request, as a section of a system file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fxgraft.runtime.hermes.section import Count, File, Number, Positive, Rate, Section, tagged
from fxgraft.runtime.hermes.slo import Slo
from fxgraft.runtime.hermes.stages import DECODE_KINDS, Chain, Stage, chain_problem
from fxgraft.runtime.hermes.workload.arrivals import Arrivals, Closed, Trace
from fxgraft.runtime.hermes.workload.lengths import Keys, Length

StageKind = Literal[
    "preprocess", "rag", "embed", "retrieve", "rerank", "kv_retrieval", "prefill", "decode",
    "reasoning", "postprocess",
]  # fmt: skip


class StageSection(Section):
    """One stage of a chain; a bare name stands for ``{kind: name}``. See ``stages.Stage``."""

    kind: StageKind
    task: str = ""
    tokens: Count = 0
    docs: Count = 0
    tokens_per_doc: Count = 0
    context_tokens: Count = 0
    scale: Rate = 1.0
    branches: Positive = 1
    spread: Number = 0.0
    model: str = ""

    def stage(self) -> Stage:
        """The stage."""
        return Stage(**self.model_dump())


def _stage(value: Any) -> Any:
    return tagged(value, value, "kind") if isinstance(value, str) else value


class TraceLengths(Section):
    """Lengths from the rows of a trace.

    Attributes:
        file: see ``arrivals.Trace``.
        order: ``"sequence"``: row after row, again from the start after the last; ``"draw"``: rows
            drawn with replacement. Prompt and output of a row stay together.
    """

    file: File
    order: Literal["sequence", "draw"] = "sequence"


class SharedPrefix(Section):
    """The start of a prompt that several requests have in common.

    Attributes:
        tokens: of it; a shorter prompt is all shared.
        contents: number of different ones.
        law: how they are chosen.
        exponent: of ``zipf``.
    """

    tokens: Positive
    contents: Positive = 1
    law: Literal["uniform", "zipf"] = "uniform"
    exponent: Rate = 1.0


class Workload(Section):
    """Requests of one kind.

    Attributes:
        name: for reports.
        model: that its LLM stages run on; may be left out where the clients serve only one.
        requests: how many; a trace has as many as rows.
        arrivals: when they come, see ``arrivals``.
        prompt, output: tokens, see ``lengths``.
        lengths: a trace to take both from instead.
        context: tokens of prior context, for stages of the kind ``kv_retrieval``.
        keys: whose context it is.
        prefix: what prompts start with, for prefix caches.
        chain: its stages.
        timeout: seconds after which a request gives up if it still waits for its first token.
        preferred: names of clients to choose where they can run a stage, best first.
        slo: what a request must meet to count as good.
    """

    name: str = "workload"
    model: str = ""
    requests: Positive | None = None
    arrivals: Arrivals
    prompt: Length | None = None
    output: Length | None = None
    lengths: Annotated[TraceLengths | None, BeforeValidator(
        lambda value: {"file": value} if isinstance(value, str) else value)] = None  # fmt: skip
    context: Length | None = None
    keys: Keys = Keys()
    prefix: SharedPrefix | None = None
    chain: tuple[Annotated[StageSection, BeforeValidator(_stage)], ...] = (
        StageSection(kind="prefill"),
        StageSection(kind="decode"),
    )
    timeout: Rate | None = None
    preferred: tuple[str, ...] = ()
    slo: Slo | None = None

    @field_validator("chain")
    @classmethod
    def _possible(cls, chain: tuple[StageSection, ...]) -> tuple[StageSection, ...]:
        problem = chain_problem(tuple(section.stage() for section in chain))
        if problem:
            raise ValueError(f"describes no possible chain: {problem}")
        return chain

    @model_validator(mode="after")
    def _complete(self) -> Workload:
        given = [self.prompt is not None, self.output is not None]
        if self.lengths is not None or isinstance(self.arrivals, Trace):
            if self.lengths is not None and any(given):
                raise ValueError("has lengths of a trace and also prompt or output")
            if any(given) and not all(given):
                raise ValueError("has only one of prompt and output; give both, or none to take "
                                 "them from the trace")  # fmt: skip
        elif not all(given):
            raise ValueError("needs prompt and output, or lengths")
        if self.requests is None and not isinstance(self.arrivals, Trace):
            raise ValueError("needs the number of its requests")
        if self.wants_context and not self.has_trace:
            raise ValueError("retrieves prior context and does not say how much: give context")
        return self

    @property
    def has_trace(self) -> bool:
        """Whether lengths come from a file."""
        return self.lengths is not None or (
            isinstance(self.arrivals, Trace) and self.prompt is None
        )

    @property
    def wants_context(self) -> bool:
        """Whether a stage retrieves prior context of a length that no key says."""
        asks = any(s.kind == "kv_retrieval" and not s.context_tokens for s in self.chain)
        return asks and self.context is None

    @property
    def is_closed(self) -> bool:
        """Whether users wait for answers."""
        return isinstance(self.arrivals, Closed)

    def stages(self) -> Chain:
        """Its chain."""
        return tuple(section.stage() for section in self.chain)

    def is_planned(self) -> bool:
        """Whether decode stages differ from one decode of ``output`` tokens."""
        decodes = [stage for stage in self.chain if stage.kind in DECODE_KINDS]
        plain = len(decodes) == 1 and decodes[0].scale == 1.0 and decodes[0].branches == 1
        return not plain and bool(decodes)


Workloads = Annotated[tuple[Workload, ...], Field(min_length=1)]
