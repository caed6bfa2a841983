"""Links and routing, as sections of a system file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fxgraft.runtime.hermes.network import Level, Network
from fxgraft.runtime.hermes.routing import (
    HEAVY_OUTPUT,
    HEAVY_PROMPT,
    Affinity,
    HeavyLight,
    LeastLoad,
    Measure,
    Policy,
    RoundRobin,
    Router,
)
from fxgraft.runtime.hermes.section import Number, Positive, Rate, Section
from fxgraft.runtime.hermes.transfers import TOKEN_BYTES, Sizes

Efficient = Annotated[float, Field(gt=0, le=1, strict=True)]
PRESETS: dict[str, tuple[Level, Level, Level]] = {
    "h100": (Level(450e9, 10e-6, 0.65), Level(50e9, 20e-6, 0.9), Level(12.5e9, 200e-6, 0.6)),
    "a100": (Level(300e9, 10e-6, 0.65), Level(25e9, 20e-6, 0.9), Level(6.25e9, 200e-6, 0.6)),
}
"""Inside a node of eight, node to node, rack to rack, as published with HERMES."""


class LevelSection(Section):
    """A kind of link: bytes per second in one direction, seconds, and the share that is reached."""

    bandwidth: Rate
    latency: Number = 0.0
    efficiency: Efficient = 1.0

    def level(self) -> Level:
        """The link."""
        return Level(self.bandwidth, self.latency, self.efficiency)


class LinkSection(LevelSection):
    """A link between two clients or switches, by name, in both directions."""

    between: tuple[str, str]


class NetworkSection(Section):
    """What connects clients. Without any link transfers take no time.

    Attributes:
        preset: a published set of the three levels that follow.
        inside_node, node_to_node, rack_to_rack: links by distance.
        links: between named clients or switches, before the levels.
        sharing: whether transfers at one time share bandwidth.
        nodes_per_rack: for clients that name no rack.
        token_bytes: per token id between hosts and LLM clients.
        text_bytes: per token of what a retrieval sends.
        layers: of each model whose KV leaves layer by layer during the prefill.
    """

    preset: Literal["h100", "a100"] | None = None
    inside_node: LevelSection | None = None
    node_to_node: LevelSection | None = None
    rack_to_rack: LevelSection | None = None
    links: tuple[LinkSection, ...] = ()
    sharing: bool = False
    nodes_per_rack: Positive = 8
    token_bytes: Number = TOKEN_BYTES
    text_bytes: Number = TOKEN_BYTES
    layers: dict[str, Positive] = {}  # noqa: RUF012

    @model_validator(mode="after")
    def _distinct(self) -> NetworkSection:
        pairs = [frozenset(link.between) for link in self.links]
        if len(set(pairs)) < len(pairs) or any(len(pair) < 2 for pair in pairs):
            raise ValueError("has two links between the same ends, or one from a client to itself")
        return self

    def build(self) -> Network:
        """The network."""
        published = PRESETS[self.preset] if self.preset else (None, None, None)
        given = (self.inside_node, self.node_to_node, self.rack_to_rack)
        levels = [
            own.level() if own else known for own, known in zip(given, published, strict=True)
        ]
        direct = {link.between: link.level() for link in self.links}
        return Network(*levels, direct=direct, shared=self.sharing)

    def sizes(self) -> Sizes:
        """Bytes of what moves."""
        return Sizes(self.token_bytes, self.text_bytes, self.layers)


class RouterSection(Section):
    """How the client of a stage is chosen; a bare name is a policy.

    Attributes:
        policy: ``"round_robin"``, ``"load"``, ``"heavy_light"`` or ``"affinity"`` (by key).
        measure: of load.
        near: prefer the node of the stage before.
        heavy_prompt, heavy_output: tokens above which a request is heavy.
    """

    policy: Policy = "round_robin"
    measure: Measure = "requests"
    near: bool = False
    heavy_prompt: Positive = HEAVY_PROMPT
    heavy_output: Positive = HEAVY_OUTPUT

    def build(self) -> Router:
        """The router; each call makes one with a state of its own."""
        if self.policy == "load":
            return LeastLoad(self.measure, prefer_near=self.near)
        if self.policy == "heavy_light":
            return HeavyLight(self.heavy_prompt, self.heavy_output)
        return Affinity() if self.policy == "affinity" else RoundRobin(prefer_near=self.near)


def _short(value: Any) -> Any:
    return {"policy": value} if isinstance(value, str) else value


Chosen = Annotated[RouterSection | None, BeforeValidator(_short)]


class RoutingSection(Section):
    """Routers by stage kind, and the default one.

    Attributes:
        disaggregation: ``"global"``: any prefill client hands over to any decode client;
            ``"local"``: only inside a node.
    """

    disaggregation: Literal["global", "local"] = "global"
    default: Chosen = None
    preprocess: Chosen = None
    rag: Chosen = None
    embed: Chosen = None
    retrieve: Chosen = None
    rerank: Chosen = None
    kv_retrieval: Chosen = None
    prefill: Chosen = None
    decode: Chosen = None
    reasoning: Chosen = None
    postprocess: Chosen = None

    def build(self) -> dict[str, Router]:
        """Routers by stage kind; ``""`` is the default one."""
        found: dict[str, Router] = {}
        for name in RoutingSection.model_fields:
            section = getattr(self, name)
            if isinstance(section, RouterSection):
                found["" if name == "default" else name] = section.build()
        return found
