"""``Result``: what a simulation gives, as tables, figures, files, plots and traces."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fxgraft.runtime.hermes.coordinator import LOGS, Coordinator
from fxgraft.runtime.hermes.llm.client import LlmClient
from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.results import chrome_trace, files, plots, text
from fxgraft.runtime.hermes.results.gaps import GapHistogram, describe_gaps, gap_values
from fxgraft.runtime.hermes.results.metrics import of_requests
from fxgraft.runtime.hermes.results.tokens import token_times
from fxgraft.runtime.hermes.slo import Slo
from fxgraft.runtime.hermes.storage import StorageClient

if TYPE_CHECKING:
    from fxgraft.runtime.hermes.client import Client

_EXACT_ROWS = 4_000_000


@dataclass
class Result:
    """A finished simulation.

    Attributes:
        name: of the system.
        seconds: from time 0 to the last event, or the horizon.
        tables: logs by name, each a column of float64 by name; see ``docs/hermes.md``.
        clients: figures of each client.
        links: figures of each link, by name.
        workloads: names, by index.
        slos: what good requests meet, by workload.
        reasons: why requests were rejected, by index.
        gaps: of tokens, where the steps were not kept.
        notes: what the reader should know.
        events: that were handled.
    """

    name: str
    seconds: float
    tables: dict[str, dict[str, Array]]
    clients: list[dict[str, Any]]
    links: dict[str, dict[str, float]]
    workloads: list[str]
    slos: list[Slo | None]
    reasons: dict[int, str]
    gaps: GapHistogram
    notes: list[str] = field(default_factory=list[str])
    events: int = 0

    @property
    def requests(self) -> dict[str, Array]:
        """The log of requests, in the order in which they ended."""
        return self.tables["requests"]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        requests = self.requests
        arrival = float(requests["arrival"].min()) if len(requests["arrival"]) else 0.0
        length = self.seconds - arrival
        shared = self.slos[0] if len(set(self.slos)) == 1 else None
        total = of_requests(requests, length, shared)
        by_workload = [total] if len(self.workloads) == 1 else [
            self._of_workload(number, length) for number in range(len(self.workloads))
        ]  # fmt: skip
        joules = sum(client["joules"] for client in self.clients)
        dollars = sum(client["dollars"] for client in self.clients)
        tokens = total["output_tokens"]
        total = total | {
            "itl": self._token_gaps(),
            "joules": joules,
            "joules_per_token": joules / tokens if tokens else math.nan,
            "tokens_per_joule": tokens / joules if joules else math.nan,
            "tokens_per_dollar": tokens / dollars if dollars else math.nan,
        }
        return {
            "name": self.name,
            "seconds": self.seconds,
            "events": self.events,
            "total": total,
            "workloads": dict(zip(self.workloads, by_workload, strict=True)),
            "clients": self.clients,
            "links": self.links,
            "rejections": self._reasons(),
            "notes": self.notes,
        }  # fmt: skip

    def _of_workload(self, number: int, length: float) -> dict[str, Any]:
        chosen = self.requests["workload"] == number
        rows = {name: column[chosen] for name, column in self.requests.items()}
        return of_requests(rows, length, self.slos[number])

    def _token_gaps(self) -> dict[str, float]:
        steps = self.tables.get("steps")
        if steps is None or "gaps" not in self.tables:
            return self.gaps.describe()
        if steps["steps"].sum() < _EXACT_ROWS:
            return describe_gaps(*gap_values(steps, self.tables["gaps"]))
        return GapHistogram.of(steps, self.tables["gaps"]).describe()

    def _reasons(self) -> list[dict[str, Any]]:
        """Reasons of rejections, with the numbers in them left out, and an example of each."""
        found: dict[str, dict[str, Any]] = {}
        for index, reason in self.reasons.items():
            kind = re.sub(r"\d+", "#", reason)
            entry = found.setdefault(kind, {"reason": reason, "request": index, "count": 0})
            entry["count"] += 1
        return list(found.values())

    def token_times(self, request: int) -> Array:
        """When each token of a request was emitted (of its longest branch), float64 [tokens]."""
        return token_times(self.tables, request)

    def __str__(self) -> str:
        return text.report(self.summary)

    def save(self, folder: str | Path, *, parquet: bool = False) -> Path:
        """Write ``summary.json`` and each log as CSV, or Parquet (needs pyarrow).

        Raises:
            InputError: pyarrow is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = json.dumps(files.plain(self.summary), indent=1)
        (folder / "summary.json").write_text(summary + "\n")
        for name, table in self.tables.items():
            files.write_table(folder / name, table, parquet=parquet)
        return folder

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw latencies and the clients over time (needs matplotlib); returns the files.

        Raises:
            InputError: matplotlib is not installed.
        """
        names = [client["name"] for client in self.clients]
        return plots.draw(self.tables, names, Path(folder))

    def trace(self, path: str | Path) -> Path:
        """Write a Chrome trace, for Perfetto or chrome://tracing."""
        return chrome_trace.write(Path(path), self.tables, self.clients, self.workloads)


def collect(
    coordinator: Coordinator,
    *,
    name: str,
    workloads: list[str],
    slos: list[Slo | None],
    gaps: GapHistogram,
    notes: list[str],
) -> Result:
    """The result of a simulation that has run."""
    tables = {log: getattr(coordinator, log).table() for log in LOGS
              if getattr(coordinator, log).keep}  # fmt: skip
    for log in ("steps", "gaps"):
        getattr(coordinator, log).flush()
    now = coordinator.now
    links = {
        " -> ".join(_end(end) for end in link): {
            "bytes": size, "utilisation": size / (coordinator.network.link_rates[link] * now)
        }
        for link, size in coordinator.network.link_bytes.items() if now
    }  # fmt: skip
    clients = [_client(client, now, tables) for client in coordinator.clients]
    marked = sum(client["marked_steps"] for client in clients)
    if marked:
        notes = [*notes, f"{marked} steps lay outside the validity of their cost table and were "
                 "priced by extrapolation"]  # fmt: skip
    return Result(
        name=name, seconds=now, tables=tables, clients=clients, links=links, workloads=workloads,
        slos=slos, reasons=coordinator.reasons, gaps=gaps, notes=notes,
        events=coordinator.number_of_events,
    )  # fmt: skip


def _end(end: object) -> str:
    if not isinstance(end, tuple):
        return str(end)
    return " ".join(str(part) for part in cast("tuple[object, ...]", end))


def _client(
    client: Client, now: float, tables: Mapping[str, Mapping[str, Array]]
) -> dict[str, Any]:
    idle = client.idle_joules(now)
    found: dict[str, Any] = {
        "name": client.name,
        "kind": client.kind,
        "node": client.place.node,
        "rack": client.place.rack,
        "served": client.served,
        "steps": client.steps_run,
        "busy_seconds": client.busy_seconds,
        "utilisation": client.busy_seconds / (client.servers * now) if now else 0.0,
        "step_joules": client.step_joules,
        "idle_joules": idle,
        "joules": client.step_joules + idle,
        "dollars": client.dollars_per_hour * now / 3600.0,
        "marked_steps": client.marked_steps,
    }
    steps = tables.get("steps")
    if steps is not None and now:
        own = steps["client"] == client.index
        seconds = (steps["end"] - steps["start"])[own]
        found["mean_queue"] = float(steps["waiting"][own] @ seconds) / now
        if isinstance(client, LlmClient):
            found["mean_batch"] = float(steps["decodes"][own] @ seconds) / now
            found["mean_blocks"] = float(steps["blocks"][own] @ seconds) / now
    if isinstance(client, LlmClient):
        pool = client.scheduler.pool
        found |= {"blocks": pool.capacity, "peak_blocks": pool.peak}
        if client.levels is not None:
            found |= {
                "conversions": client.levels.conversions,
                "start_level": client.levels.memory.level,
            }
        if pool.prefix_cache and pool.asked_tokens:
            found["prefix_hit_share"] = pool.hit_tokens / pool.asked_tokens
    if isinstance(client, StorageClient):
        found["hits_by_level"] = client.hits
    return found
