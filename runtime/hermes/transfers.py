"""How many bytes move between two stages, and how long that takes (spec section 5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.events import ARRIVAL, FLOW, EventQueue
from fxgraft.runtime.hermes.network import Network, Path
from fxgraft.runtime.hermes.request import TRANSFER, Request
from fxgraft.runtime.hermes.sharing import FairShare, Flow
from fxgraft.runtime.hermes.stages import DECODE_KINDS, EMBED, KV_RETRIEVAL, RAG_KINDS, Stage

TOKEN_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of what is not KV.

    Attributes:
        token: per token id between hosts and LLM clients.
        text: per token of what a retrieval sends.
        layers: of each model whose KV leaves layer by layer while the prefill goes on.
    """

    token: float = TOKEN_BYTES
    text: float = TOKEN_BYTES
    layers: Mapping[str, int] = field(default_factory=dict[str, int])


class Transfers:
    """Sends requests over the network and hands them over when they arrive.

    Args:
        network: paths.
        events: the queue of the coordinator.
        sizes: bytes per token.

    Attributes:
        share: what moves at this time where bandwidth is shared.
    """

    def __init__(self, network: Network, events: EventQueue, sizes: Sizes) -> None:
        self.network = network
        self.sizes = sizes
        self.share = FairShare(self._schedule)
        self._events = events

    def send(
        self, request: Request, source: Client, target: Client, stage: Stage, now: float
    ) -> bool:
        """Start a transfer; False if there is no path."""
        path = self.network.path(source, target)
        if path is None:
            return False
        request.state = TRANSFER
        size = self._visible(request, path, self.bytes(request, target, stage))
        if self.network.shared and size > 0 and path.links:
            for link in path.links:
                self.share.add(link, self.network.link_rates[link])
            self.share.start(path.links, size, now, partial(self._sent, request, path, size, now))
            return True
        end = now + path.latency + (size / path.rate if path.rate < math.inf else 0.0)
        self.network.log(request, path, size, now, end)
        self._events.push(end, ARRIVAL, request, True)
        return True

    def _schedule(self, time: float, flow: Flow, epoch: int) -> None:
        self._events.push(time, FLOW, flow, epoch)

    def _sent(self, request: Request, path: Path, size: float, begun: float, now: float) -> None:
        """The last byte of a shared transfer has left; it arrives after the latency."""
        end = now + path.latency
        self.network.log(request, path, size, begun, end)
        self._events.push(end, ARRIVAL, request, True)

    def _visible(self, request: Request, path: Path, size: float) -> float:
        """What is left to send when the stage ends."""
        layers = self.sizes.layers.get(request.model, 0) if request.handed_over else 0
        if layers < 2:
            return size
        overlap = request.stage_first - request.prefill_started
        return visible_bytes(size, path.rate, layers, overlap)

    def bytes(self, request: Request, target: Client, stage: Stage) -> float:
        """Bytes of a transition, by what was done before."""
        before = request.chain[request.position - 1].kind
        source = request.previous
        if request.handed_over and source is not None and stage.kind in DECODE_KINDS:
            return request.prompt * source.kv_bytes
        if before == KV_RETRIEVAL:
            return request.loaded * target.kv_bytes
        if before == EMBED and target.vector_bytes:
            return target.vector_bytes
        if before in RAG_KINDS:
            return request.prompt * self.sizes.text
        return request.prompt * self.sizes.token


def visible_bytes(size: float, rate: float, layers: int, overlap: float) -> float:
    """Bytes still to send when prefill ends, if each layer's KV leaves when it is computed.

    Args:
        size: all bytes.
        rate: bytes per second of the path.
        layers: of the model.
        overlap: seconds that the prefill took.
    """
    return max(size / layers, size - rate * overlap * (layers - 1) / layers)
