"""A run in the Chrome trace-event format, which Perfetto and chrome://tracing read.

Each client is a process. Its steps are slices; the queue, the batch and the KV blocks are counters.
Each request is a row of slices, one per stage, in a process of its workload.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.stages import KINDS

Tables = Mapping[str, Mapping[str, Array]]
Event = dict[str, Any]
_FIRST_REQUESTS = 1 << 20


def write(
    path: Path, tables: Tables, clients: Sequence[Mapping[str, Any]], workloads: Sequence[str]
) -> Path:
    """Write the trace of the logs that were kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in _events(tables, clients, workloads):
            stream.write(separator + json.dumps(event))
            separator = ",\n"
        stream.write("\n]}\n")
    return path


def _events(
    tables: Tables, clients: Sequence[Mapping[str, Any]], workloads: Sequence[str]
) -> Iterator[Event]:
    for index, client in enumerate(clients):
        yield _name(index, f"client {client['name']}", index)
    for index, workload in enumerate(workloads):
        process = _FIRST_REQUESTS + index
        yield _name(process, f"requests of {workload}", process)
    if "steps" in tables:
        yield from _steps(tables["steps"])
    if "stages" in tables:
        yield from _stages(tables, clients)
    if "transfers" in tables:
        yield from _transfers(tables, clients)


def _name(process: int, name: str, order: int) -> Event:
    return {"ph": "M", "pid": process, "tid": 0, "name": "process_name",
            "args": {"name": name, "sort_index": order}}  # fmt: skip


def _rows(table: Mapping[str, Array]) -> Iterator[dict[str, float]]:
    names = list(table)
    for row in zip(*(table[name].tolist() for name in names), strict=True):
        yield dict(zip(names, row, strict=True))


def _slice(process: int, thread: int, name: str, start: float, end: float, **args: Any) -> Event:
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "ts": start * 1e6,
            "dur": (end - start) * 1e6, "args": args}  # fmt: skip


def _lanes(steps: Mapping[str, Array]) -> list[int]:
    """A thread for each step, so that steps of several servers do not lie over each other."""
    lanes = [0] * len(steps["start"])
    ends: dict[float, list[float]] = {}
    clients, starts, stops = (steps[name].tolist() for name in ("client", "start", "end"))
    for place in np.lexsort((steps["end"], steps["start"])).tolist():
        own = ends.setdefault(clients[place], [])
        start, end = starts[place], stops[place]
        lane = next((i for i, free in enumerate(own) if free <= start), len(own))
        own[lane : lane + 1] = [end]
        lanes[place] = lane
    return lanes


def _steps(steps: Mapping[str, Array]) -> Iterator[Event]:
    for row, lane in zip(_rows(steps), _lanes(steps), strict=True):
        process = int(row["client"])
        parts: list[str] = []
        if row["prefill_requests"]:
            parts.append(f"prefill {row['prefill_tokens']:.0f}" if row["prefill_tokens"]
                         else f"{row['prefill_requests']:.0f} requests")  # fmt: skip
        if row["decodes"]:
            parts.append(f"decode {row['decodes']:.0f}")
        name = " + ".join(parts) or "cut off"
        if row["steps"] > 1:
            name += f", {row['steps']:.0f} steps"
        yield _slice(process, lane, name, row["start"], row["end"], context=row["context"],
                     joules=row["joules"])  # fmt: skip
        counters = {"waiting": row["waiting"], "decodes": row["decodes"], "blocks": row["blocks"]}
        for counter, value in counters.items():
            yield {"ph": "C", "pid": process, "tid": 0, "name": counter, "ts": row["start"] * 1e6,
                   "args": {counter: value}}  # fmt: skip


def _stages(tables: Tables, clients: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    requests = tables["requests"]
    workload = dict(zip(requests["request"].tolist(), requests["workload"].tolist(), strict=True))
    for row in _rows(tables["stages"]):
        process = _FIRST_REQUESTS + int(workload.get(row["request"], 0))
        thread, kind = int(row["request"]), KINDS[int(row["kind"])]
        client = clients[int(row["client"])]["name"]
        if row["started"] > row["assigned"]:
            yield _slice(process, thread, f"{kind}: waiting", row["assigned"], row["started"])
        yield _slice(process, thread, kind, row["started"], row["ended"], client=client)


def _transfers(tables: Tables, clients: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    """Moves between clients as asynchronous slices of the client that sends."""
    for number, row in enumerate(_rows(tables["transfers"])):
        name = f"to {clients[int(row['target'])]['name']}"
        for phase, time in (("b", row["start"]), ("e", row["end"])):
            yield {"ph": phase, "cat": "transfer", "id": number, "pid": int(row["source"]),
                   "tid": 0, "name": name, "ts": time * 1e6,
                   "args": {"request": row["request"], "bytes": row["bytes"]}}  # fmt: skip
