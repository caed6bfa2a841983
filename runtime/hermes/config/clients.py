"""Clients, as sections of a system file, and what is made of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from fxgraft.errors import InputError
from fxgraft.runtime.dsla_serve.policy import Rules
from fxgraft.runtime.hermes.client import Client, Place
from fxgraft.runtime.hermes.config.costs import CostSection, Served
from fxgraft.runtime.hermes.config.links import LevelSection
from fxgraft.runtime.hermes.hierarchy import StorageLevel, Store
from fxgraft.runtime.hermes.host import HostClient, Task
from fxgraft.runtime.hermes.ivf_pq import IvfPq
from fxgraft.runtime.hermes.llm.client import LlmClient, Role
from fxgraft.runtime.hermes.llm.levels import LevelRules
from fxgraft.runtime.hermes.llm.queue import Order
from fxgraft.runtime.hermes.llm.scheduler import Admission, Limits, Strategy
from fxgraft.runtime.hermes.rag import RagClient
from fxgraft.runtime.hermes.section import (
    Count,
    Number,
    Positive,
    Rate,
    Section,
    Share,
    default_kind,
)
from fxgraft.runtime.hermes.storage import Mode, Sharing, StorageClient

UNLIMITED = 1 << 40


class ClientSection(Section, ABC):
    """What all clients have.

    Attributes:
        name: unique; several alike get numbers behind it.
        count: alike clients.
        node: of the first.
        per_node: clients on one node; None puts all on that node.
        rack: None for the node's.
        dollars_per_hour: price of one.
        watts: drawn in steps, where the cost has no energy.
        idle_watts: drawn outside steps.
    """

    name: str = Field(min_length=1)
    count: Positive = 1
    node: Count = 0
    per_node: Positive | None = None
    rack: Count | None = None
    dollars_per_hour: Number = 0.0
    watts: Number = 0.0
    idle_watts: Number | None = None

    @abstractmethod
    def build(self, seed: int, number: int, nodes_per_rack: int, stepwise: bool) -> list[Client]:
        """The clients."""

    def _place(self, replica: int, nodes_per_rack: int) -> Place:
        node = self.node + (replica // self.per_node if self.per_node else 0)
        return Place(node, node // nodes_per_rack if self.rack is None else self.rack)


class SeparateSection(ClientSection):
    """Clients that have nothing in common but their settings."""

    def build(self, seed: int, number: int, nodes_per_rack: int, stepwise: bool) -> list[Client]:
        """The clients, one by one."""
        return [
            self.make(
                self.name if self.count == 1 else f"{self.name}-{replica}",
                self._place(replica, nodes_per_rack), (seed, 1 << 20, number, replica), stepwise,
            )
            for replica in range(self.count)
        ]  # fmt: skip

    @abstractmethod
    def make(self, name: str, place: Place, seed: tuple[int, ...], stepwise: bool) -> Client:
        """One client."""


class DslaSection(Rules):
    """DSLA-Serve's policy, see ``docs/dsla.md``."""

    kind: Literal["dsla"] = "dsla"
    fold_seconds_per_token: float = Field(default=2e-8, ge=0)
    """Seconds to convert one layer of a running request, per token that it has."""


def _in_place(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Let what is wrong with settings be reported with file and line, as of any section."""
    try:
        return check(value)
    except InputError as error:
        raise ValueError(f"{error.problem} ({error.remedy})") from error


class LlmSection(SeparateSection):
    """A server of a language model.

    Attributes:
        model: its name; None takes the cost table's.
        dtype: data type of the weights that the cost table must have; None for any.
        cost: price of its steps.
        role: ``"prefill"`` hands over after the first token, ``"decode"`` takes over.
        batching: see ``scheduler.Limits``, as the six that follow.
        blocks: None for what the memory holds, or no limit where that is unknown.
        memory_share: of the device's memory that weights and KV may fill.
        memory_reserve: bytes that the runtime needs.
        preemption: ``"recompute"``, or ``"swap"`` to host memory.
        swap_bandwidth: bytes per second to and from the host.
        kv_bytes: of keys and values per token, for transfers; None for the table's.
        context_length: most tokens of a sequence.
        policy: converts layers of requests by load; the cost must say what other levels cost.
    """

    kind: Literal["llm"] = "llm"
    model: str | None = None
    dtype: str | None = None
    cost: CostSection
    role: Role = "both"
    batching: Strategy = "chunked"
    max_batched_tokens: Positive = 2048
    max_sequences: Positive = 256
    blocks: Count | None = None
    block_size: Positive | None = None
    order: Order = "fcfs"
    admission: Admission | None = None
    prefix_cache: bool = False
    memory_share: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.9
    memory_reserve: Number = 0.0
    preemption: Literal["recompute", "swap"] = "recompute"
    swap_bandwidth: Rate | None = None
    kv_bytes: Number | None = None
    context_length: Positive | None = None
    policy: Annotated[DslaSection, WrapValidator(_in_place)] | None = None

    @model_validator(mode="after")
    def _levels_stay(self) -> LlmSection:
        for key, unfit in (
            ("role", self.role != "both"),
            ("prefix_cache", self.prefix_cache),
            ("preemption", self.preemption == "swap"),
        ):
            if self.policy is not None and unfit:
                raise ValueError(f"has a policy, which does not go with its key {key}")
        return self

    @model_validator(mode="after")
    def _decodes_advance(self) -> LlmSection:
        cuts = self.batching in ("chunked", "running_first")
        if cuts and self.max_batched_tokens < self.max_sequences:
            raise ValueError(
                f"has max_batched_tokens {self.max_batched_tokens} below max_sequences "
                f"{self.max_sequences}: not every decode could advance in every step"
            )
        if self.batching == "running_first" and self.admission not in (None, "chunk"):
            raise ValueError("takes blocks by chunk when running_first; remove the key admission")
        return self

    def served(self) -> Served:
        """What its cost says.

        Raises:
            InputError: the table is for another model or data type.
            SerializationError: the table cannot be read.
        """
        served = self.cost.serve(self.max_batched_tokens, self.max_sequences)
        for key, wanted, found in (
            ("model", self.model, served.model), ("dtype", self.dtype, served.dtype),
        ):  # fmt: skip
            if wanted is not None and found and wanted != found:
                raise InputError(
                    f"client {self.name!r} has {key} {wanted!r}, its cost is for {found!r}",
                    f"give the cost table of that {key}, or remove the key {key!r}",
                )
        return served

    def limits(self, served: Served) -> Limits:
        """What its steps may contain.

        Raises:
            InputError: the memory does not hold one block beside the weights.
        """
        size = self.block_size or served.block_tokens
        blocks = self._blocks(served, size)
        if blocks < 1:
            raise InputError(
                f"client {self.name!r} has no memory for a single block of {size} tokens: model "
                f"{served.model or self.model!r} does not fit",
                "give it more devices or memory, or set `blocks` of a real server",
            )
        return Limits(
            strategy=self.batching,
            max_batched_tokens=self.max_batched_tokens,
            max_sequences=self.max_sequences,
            blocks=blocks,
            block_size=size,
            order=self.order,
            admission=self.admission or "prompt",
            prefix_cache=self.prefix_cache,
            swap=self.preemption == "swap",
        )

    def _blocks(self, served: Served, size: int) -> int:
        if self.blocks is not None:
            return self.blocks
        converted = served.converted if self.policy is not None else None
        memory = served.state_memory if converted is None else converted.state_memory
        if memory is None:
            return UNLIMITED
        left = memory - (1.0 - self.memory_share) * served.capacity
        left -= self.memory_reserve
        if left <= 0.0:
            return 0
        return int(left // (served.kv_bytes * size)) if served.kv_bytes else UNLIMITED

    def make(self, name: str, place: Place, seed: tuple[int, ...], stepwise: bool) -> Client:
        """One server."""
        return self.client(self.served(), name, place, stepwise=stepwise)

    def client(
        self, served: Served, name: str, place: Place, *, stepwise: bool = False
    ) -> LlmClient:
        """A client of a model on a device."""
        return LlmClient(
            name,
            model=self.model if self.model is not None else served.model,
            cost=served.with_watts(self.watts),
            limits=self.limits(served),
            role=self.role,
            stepwise=stepwise,
            place=place,
            idle_watts=served.idle_watts if self.idle_watts is None else self.idle_watts,
            dollars_per_hour=self.dollars_per_hour,
            kv_bytes=served.kv_bytes if self.kv_bytes is None else self.kv_bytes,
            swap_bandwidth=self.swap_bandwidth or math.inf,
            context_length=self.context_length or 0,
            marks=served.marks,
            levels=self._levels(served),
        )

    def _levels(self, served: Served) -> LevelRules | None:
        found, policy = served.converted, self.policy
        if policy is None:
            return None
        if found is None:
            raise InputError(
                f"client {self.name!r} has the key policy, but its cost has no levels",
                "give a table with levels, or a pipeline with pass dsla and live: true",
            )
        watts = 0.0 if served.has_energy else self.watts
        return LevelRules(policy, found.levels, found.pricer, policy.fold_seconds_per_token, watts)


class TaskSection(Section):
    """Service time of a host task, see ``host.Task``."""

    seconds: Number = 0.0
    per_prompt_token: Number = 0.0
    per_output_token: Number = 0.0
    law: Literal["constant", "exponential"] = "constant"
    truncate: Count = 0


class HostSection(SeparateSection):
    """Processor cores for pre- and post-processing.

    Attributes:
        cores: that each run one task at a time.
        scheduler: ``"sequential"``, or ``"batched"``: all that waits in one step.
        tasks: by name; ``default`` is for stages that name none.
    """

    kind: Literal["host"]
    cores: Positive = 1
    scheduler: Literal["sequential", "batched"] = "sequential"
    tasks: dict[str, TaskSection] = Field(min_length=1)

    def make(self, name: str, place: Place, seed: tuple[int, ...], stepwise: bool) -> Client:
        """One host."""
        tasks = {
            "" if task == "default" else task: Task(**section.model_dump())
            for task, section in self.tasks.items()
        }
        return HostClient(
            name, tasks=tasks, cores=self.cores, batched=self.scheduler == "batched",
            watts=self.watts, seed=seed, place=place, idle_watts=self.idle_watts or 0.0,
            dollars_per_hour=self.dollars_per_hour,
        )  # fmt: skip


class IndexSection(Section):
    """An IVF-PQ index, see ``ivf_pq.IvfPq``."""

    dimension: Positive
    centroids: Positive
    probes: Positive
    vectors_per_list: Positive
    subquantizers: Positive
    flops: Rate
    bandwidth: Rate
    candidates: Count = 0
    code_bits: Annotated[int, Field(ge=1, le=16, strict=True)] = 8
    overlap: bool = False
    groups: Count = 0
    group_probes: Positive = 1

    @model_validator(mode="after")
    def _searchable(self) -> IndexSection:
        if self.probes > self.centroids:
            raise ValueError(f"probes {self.probes} lists of {self.centroids}")
        return self


class RagSection(SeparateSection):
    """A search engine, see ``rag.RagClient``.

    Attributes:
        embed: price of the embedding model's forward pass.
        index: where vectors are searched.
        rerank: price of the ranking model's forward pass.
        vector_link: between the embedding model's device and the index's.
        batch: most queries of a step.
    """

    kind: Literal["rag"]
    embed: CostSection | None = None
    index: IndexSection | None = None
    rerank: CostSection | None = None
    vector_link: LevelSection | None = None
    batch: Positive = 256

    @model_validator(mode="after")
    def _does_something(self) -> RagSection:
        if self.embed is None and self.index is None and self.rerank is None:
            raise ValueError("needs embed, index or rerank")
        return self

    def make(self, name: str, place: Place, seed: tuple[int, ...], stepwise: bool) -> Client:
        """One search engine."""
        batch = self.batch
        return RagClient(
            name,
            embed=self.embed.serve(batch, batch).cost if self.embed else None,
            index=IvfPq(**self.index.model_dump()) if self.index else None,
            rerank=self.rerank.serve(batch, batch).cost if self.rerank else None,
            vector_link=self.vector_link.level() if self.vector_link else None,
            batch=batch,
            watts=self.watts,
            place=place,
            idle_watts=self.idle_watts or 0.0,
            dollars_per_hour=self.dollars_per_hour,
        )


class StorageLevelSection(Section):
    """One level of storage, see ``hierarchy.StorageLevel``."""

    bandwidth: Rate
    latency: Number = 0.0
    hit: Share = 0.0
    capacity: Rate | None = None
    shared_by: Positive = 1

    def level(self) -> StorageLevel:
        """The level."""
        return StorageLevel(self.bandwidth, self.latency, self.hit, self.capacity or math.inf,
                            self.shared_by)  # fmt: skip


class StorageSection(ClientSection):
    """Prior context, looked up level by level; see ``storage.StorageClient``.

    Attributes:
        levels: first to last; ``shared_by`` of the ``count`` clients have one instance together.
        mode: ``"contents"``, ``"sampled"`` or ``"expectation"``.
        kv_bytes: per token.
        recompute: price of computing a context that no level has; None leaves it to the prefill.
        lookups: whether only ``"hits"`` cost a level's latency, as published, or all ``"probes"``.
        sharing: whether lookups at one time share bandwidth, or have it each as its ``"own"``; else
            they run in steps.
    """

    kind: Literal["storage"]
    levels: tuple[StorageLevelSection, ...] = ()
    mode: Mode = "contents"
    kv_bytes: Rate
    recompute: CostSection | None = None
    lookups: Literal["hits", "probes"] = "hits"
    sharing: Sharing = False

    @model_validator(mode="after")
    def _expected(self) -> StorageSection:
        if self.mode == "expectation" and (self.recompute is None or self.sharing):
            raise ValueError("in the mode expectation needs recompute, and cannot have sharing")
        return self

    def build(self, seed: int, number: int, nodes_per_rack: int, stepwise: bool) -> list[Client]:
        """The clients; those that share a level get the same store."""
        levels = [section.level() for section in self.levels]
        stores: dict[tuple[int, int, int], Store] = {}
        clients: list[Client] = []
        for replica in range(self.count):
            links = [(number, i, replica // level.shared_by) for i, level in enumerate(levels)]
            for link, level in zip(links, levels, strict=True):
                stores.setdefault(link, Store(level.capacity))
            name = self.name if self.count == 1 else f"{self.name}-{replica}"
            clients.append(StorageClient(
                name,
                levels=levels,
                stores=[stores[link] for link in links],
                mode=self.mode,
                kv_bytes=self.kv_bytes,
                recompute=self.recompute.serve(1, 1).cost if self.recompute else None,
                charge_probes=self.lookups == "probes",
                sharing=self.sharing,
                links=links,
                seed=(seed, 1 << 20, number, replica),
                watts=self.watts,
                place=self._place(replica, nodes_per_rack),
                idle_watts=self.idle_watts or 0.0,
                dollars_per_hour=self.dollars_per_hour,
            ))  # fmt: skip
        return clients


AnyClient = Annotated[
    Annotated[LlmSection | HostSection | RagSection | StorageSection, Field(discriminator="kind")],
    BeforeValidator(lambda value: _with_kind(value)),
]


def _with_kind(value: Any) -> Any:
    return default_kind(value, "llm")
