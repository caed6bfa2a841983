"""``System``: a system file, checked, and ready to be simulated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from fxgraft.errors import Error, InputError
from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.config.clients import AnyClient
from fxgraft.runtime.hermes.config.links import NetworkSection, RoutingSection
from fxgraft.runtime.hermes.config.reading import refuse
from fxgraft.runtime.hermes.coordinator import LOGS, Coordinator
from fxgraft.runtime.hermes.llm.client import LlmClient
from fxgraft.runtime.hermes.network import Network
from fxgraft.runtime.hermes.results.gaps import GapHistogram
from fxgraft.runtime.hermes.results.result import Result, collect
from fxgraft.runtime.hermes.section import Count, Rate, Section
from fxgraft.runtime.hermes.slo import Slo
from fxgraft.runtime.hermes.workload.source import MergedSource
from fxgraft.runtime.hermes.workload.workload import Workload, Workloads
from fxgraft.validation import Where, located, nowhere
from fxgraft.yaml_source import YamlSource

Log = Literal["requests", "stages", "steps", "gaps", "breaks", "transfers"]


class System(Section):
    """Clients, links and workloads. Times in seconds, sizes in bytes, rates per second.

    Attributes:
        name: for reports.
        seed: of all random streams.
        horizon: seconds after which the simulation stops; None for when all requests have ended.
        clients: in the order that breaks ties.
        network: links.
        routing: how clients are chosen.
        workloads: requests.
        slo: of workloads that have none of their own.
        logs: that are kept whole; the report needs none but ``requests``.

    Example:
        >>> result = System.read("examples/systems/conversation.yaml").simulate()
        >>> print(result)
    """

    name: str = "system"
    seed: Count = 0
    horizon: Rate | None = None
    clients: tuple[AnyClient, ...] = Field(min_length=1)
    network: NetworkSection = NetworkSection()
    routing: RoutingSection = RoutingSection()
    workloads: Workloads
    slo: Slo | None = None
    logs: tuple[Log, ...] = LOGS  # pyright: ignore[reportAssignmentType]
    _where: Where = PrivateAttr(default_factory=lambda: nowhere)

    @model_validator(mode="after")
    def _unique(self) -> System:
        for what, names in (
            ("client", [section.name for section in self.clients]),
            ("workload", [section.name for section in self.workloads]),
        ):
            double = sorted({name for name in names if names.count(name) > 1})
            if double:
                raise ValueError(f"has two {what}s named {double[0]!r}")
        if "requests" not in self.logs:
            raise ValueError("cannot report without the log of requests")
        return self

    @staticmethod
    def read(file: str | Path, changes: Mapping[str, object] | None = None) -> System:
        """Read a system file.

        Args:
            file: the file (YAML).
            changes: values to put in place of the file's, by path: ``workloads.0.arrivals.rate``.

        Raises:
            InputError: the file cannot be read, or a key or value is wrong; names the file, line
                and key.
        """
        source = YamlSource.read(Path(file))
        value: object = source.value
        for path, new in (changes or {}).items():
            value = replaced(value, path.split("."), new, path)
        if isinstance(value, dict) and "name" not in value:
            value = {"name": Path(file).stem, **cast("dict[str, object]", value)}
        system = System.parse(cast(object, value), folder=Path(file).parent, where=source.where)
        system.check()
        return system

    @staticmethod
    def parse(value: object, *, folder: Path | None = None, where: Where = nowhere) -> System:
        """Check the content of a system file.

        Raises:
            InputError: a key or value is wrong.
        """
        if not isinstance(value, dict):
            raise InputError(f"{where(())}a system is a mapping of keys",
                             f"give the keys {', '.join(System.model_fields)}")  # fmt: skip
        try:
            system = System.model_validate(value, context={"folder": folder})
        except ValidationError as error:
            refuse(error, System, cast(object, value), where)
        system._where = where
        return system

    def check(self) -> None:
        """Make everything once, to find what cannot run.

        Raises:
            InputError: a model that fits no client, a stage that no client can run, a missing
                link, or a bad trace.
        """
        try:
            self.coordinator()
        except InputError:
            raise
        except Error as error:
            raise InputError(error.problem, error.remedy) from error

    def build_clients(self, *, stepwise: bool = False) -> list[Client]:
        """The clients, in order."""
        per_rack = self.network.nodes_per_rack
        clients: list[Client] = []
        for number, section in enumerate(self.clients):
            with located(self._where(("clients", number))):
                clients += section.build(self.seed, number, per_rack, stepwise)
        names = [client.name for client in clients]
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{self._where(('clients',))}two clients are named {double!r}",
                             "rename one of them")  # fmt: skip
        return clients

    def coordinator(self, *, stepwise: bool = False, **options: Any) -> Coordinator:
        """A simulation that has not run yet.

        Args:
            stepwise: use the reference, one step at a time.
            options: of ``Coordinator`` (reduce, observer).
        """
        clients = self.build_clients(stepwise=stepwise)
        network = self.network.build()
        self._check_links(clients, network)
        workloads = self._with_models(clients)
        with located(self._where(("workloads",))):
            source = MergedSource(workloads, self.seed)
        coordinator = Coordinator(
            clients,
            source,
            routers=self.routing.build(),
            network=network,
            sizes=self.network.sizes(),
            horizon=self.horizon or math.inf,
            local=self.routing.disaggregation == "local",
            keep=frozenset(self.logs),
            **options,
        )
        for number, workload in enumerate(workloads):
            with located(self._where(("workloads", number))):
                self._check_chain(workload, coordinator)
        return coordinator

    def _with_models(self, clients: Sequence[Client]) -> tuple[Workload, ...]:
        """Workloads that name no model want the only one there is."""
        models = {client.model for client in clients if isinstance(client, LlmClient)}
        if len(models) != 1:
            return self.workloads
        (only,) = models
        return tuple(
            workload if workload.model else workload.model_copy(update={"model": only})
            for workload in self.workloads
        )

    def simulate(self, *, stepwise: bool = False) -> Result:
        """Run it.

        Args:
            stepwise: use the reference, one step at a time: slow, the same to 1e-9.

        Raises:
            InputError: a step lies outside a cost table's validity, or see ``check``.
            Error: nothing can happen any more although requests are left.
        """
        gaps = GapHistogram()
        reduce = {} if {"steps", "gaps"} <= set(self.logs) else {
            "steps": gaps.add_steps, "gaps": gaps.add_gaps}  # fmt: skip
        coordinator = self.coordinator(stepwise=stepwise, reduce=reduce)
        coordinator.run()
        return collect(
            coordinator,
            name=self.name,
            workloads=[workload.name for workload in self.workloads],
            slos=[workload.slo or self.slo for workload in self.workloads],
            gaps=gaps,
            notes=self._notes(coordinator),
        )

    def _notes(self, coordinator: Coordinator) -> list[str]:
        source = coordinator.source
        parts = source.parts if isinstance(source, MergedSource) else []
        return [
            f"workload {part.workload.name!r}: {part.sorted_rows} rows of its trace were out of "
            "order and were sorted"
            for part in parts if part.sorted_rows
        ]  # fmt: skip

    def _check_links(self, clients: Sequence[Client], network: Network) -> None:
        names = {client.name for client in clients}
        linked = {name for link in self.network.links for name in link.between}
        alone = [name for name in linked if name not in names and sum(
            name in link.between for link in self.network.links) < 2]  # fmt: skip
        if alone:
            raise InputError(
                f"{self._where(('network', 'links'))}a link leads to {sorted(alone)[0]!r}, which "
                "is no client and connects nothing else", "give the name of a client"
            )  # fmt: skip
        for number, workload in enumerate(self.workloads):
            unknown = [name for name in workload.preferred if name not in names]
            if unknown:
                place = self._where(("workloads", number, "preferred"))
                raise InputError(
                    f"{place}workload {workload.name!r} prefers {unknown[0]!r}, which is no client",
                    f"the clients are: {', '.join(sorted(names))}",
                )

    def _check_chain(self, workload: Workload, coordinator: Coordinator) -> None:
        """Every stage has a client, and every two in a row have a path."""
        before: list[Client] = []
        for position, stage in enumerate(workload.stages(), 1):
            found = coordinator.candidates(stage, workload.model)
            if not found:
                model = stage.model or workload.model
                detail = f" for model {model!r}" if model else ""
                raise InputError(
                    f"workload {workload.name!r}: no client can run stage {position} "
                    f"({stage.kind}){detail}",
                    "add a client, or check the names of models and tasks and the clients' roles",
                )
            for source in before:
                self._check_hop(workload, source, found, coordinator)
            before = found

    def _check_hop(
        self, workload: Workload, source: Client, targets: list[Client], coordinator: Coordinator
    ) -> None:
        if isinstance(source, LlmClient) and source.role == "prefill" and coordinator.local:
            targets = [t for t in targets if t.place.node == source.place.node]
            if not targets:
                raise InputError(
                    f"workload {workload.name!r}: client {source.name!r} hands over inside its "
                    "node only, where nobody can take over",
                    "put a decode client on that node, or use `disaggregation: global`",
                )
        if isinstance(source, LlmClient) and source.role == "both" and source in targets:
            return
        network = coordinator.network
        cut_off = [target for target in targets if network.path(source, target) is None]
        if cut_off:
            raise InputError(
                f"workload {workload.name!r}: no link leads from client {source.name!r} to "
                f"client {cut_off[0].name!r}",
                "add a link or a level to `network`",
            )


def replaced(value: object, path: Sequence[str], new: object, name: str) -> object:
    """A copy of nested mappings and lists with one value changed.

    Raises:
        InputError: the path leads nowhere.
    """
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        mapping = cast("dict[str, object]", value)
        if rest and key not in mapping:
            raise InputError(
                f"there is no {key!r} in {name!r}", f"the keys there are: {', '.join(mapping)}"
            )
        return {**mapping, key: replaced(mapping.get(key), rest, new, name)}
    if isinstance(value, list) and key.isdecimal():
        items = list(cast("list[object]", value))
        if int(key) < len(items):
            items[int(key)] = replaced(items[int(key)], rest, new, name)
            return items
    raise InputError(f"{key!r} in {name!r} leads nowhere", "give keys, and positions from 0")
