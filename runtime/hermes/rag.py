"""RAG clients: embed, retrieve, rank again, each alone or all in one stage (spec section 6.2)."""

from __future__ import annotations

from fxgraft.runtime.hermes.client import Place
from fxgraft.runtime.hermes.costs import StepCost
from fxgraft.runtime.hermes.ivf_pq import IvfPq
from fxgraft.runtime.hermes.network import Level
from fxgraft.runtime.hermes.queueing import QueueClient
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.stages import EMBED, RAG, RERANK, RETRIEVE, Stage


class RagClient(QueueClient):
    """A search engine over documents.

    Args:
        name, place, idle_watts, dollars_per_hour: see ``Client``.
        embed: price of a forward pass of the embedding model.
        index: where vectors are searched.
        rerank: price of a forward pass of a ranking model, per document and query.
        vector_link: between the embedding model's device and the index's.
        batch: most queries of a step.
        watts: drawn in a step, but for forward passes whose price has joules.
    """

    kind = "rag"

    def __init__(
        self,
        name: str,
        *,
        embed: StepCost | None = None,
        index: IvfPq | None = None,
        rerank: StepCost | None = None,
        vector_link: Level | None = None,
        batch: int = 256,
        watts: float = 0.0,
        place: Place | None = None,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
    ) -> None:
        super().__init__(
            name, batch=batch, watts=watts, place=place, idle_watts=idle_watts,
            dollars_per_hour=dollars_per_hour,
        )  # fmt: skip
        self.embed = embed
        self.index_search = index
        self.rerank = rerank
        self.vector_link = vector_link
        self.vector_bytes = 4.0 * index.dimension if index else 0.0
        self._runs = {
            EMBED: embed is not None,
            RETRIEVE: index is not None,
            RERANK: rerank is not None,
            RAG: embed is not None and index is not None,
        }

    def accepts(self, stage: Stage, model: str) -> bool:
        """It has the parts that the stage needs."""
        return self._runs.get(stage.kind, False)

    def duration(self, requests: list[Request]) -> float:
        """A step runs each part for those of its requests that want it, one part after another."""
        return self._price(requests)[0]

    def joules(self, requests: list[Request], seconds: float) -> float:
        """What the forward passes say, and the client's power for the rest of the time."""
        return self._price(requests)[1]

    def _price(self, requests: list[Request]) -> tuple[float, float]:
        by_kind: dict[str, list[Request]] = {}
        for request in requests:
            by_kind.setdefault(request.chain[request.position].kind, []).append(request)
        whole = by_kind.get(RAG, [])
        seconds = 0.0
        if whole and self.vector_link:
            size = len(whole) * self.vector_bytes
            seconds += self.vector_link.latency + size / self.vector_link.rate
        searches = len(whole) + len(by_kind.get(RETRIEVE, []))
        if self.index_search and searches:
            seconds += self.index_search.seconds(searches)
        joules = seconds * self.watts
        passes = (
            (self.embed, [(r.prompt, 0) for r in whole + by_kind.get(EMBED, [])]),
            (self.rerank, _documents(whole + by_kind.get(RERANK, []))),
        )
        for cost, prompts in passes:
            if cost and prompts:
                price = cost.price(prompts)
                seconds += price.seconds
                joules += price.joules or price.seconds * self.watts
        return seconds, joules

    def apply(self, request: Request) -> None:
        """Found documents become part of the prompt."""
        stage = request.chain[request.position]
        if stage.kind in (RAG, RETRIEVE):
            request.prompt += stage.docs * stage.tokens_per_doc


def _documents(requests: list[Request]) -> list[tuple[int, int]]:
    """A ranking model reads each document once."""
    found: list[tuple[int, int]] = []
    for request in requests:
        stage = request.chain[request.position]
        found += [(stage.tokens_per_doc, 0)] * stage.docs
    return found
