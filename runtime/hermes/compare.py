"""What a pass does to serving: two step-cost tables, or two systems, under one workload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fxgraft.cost_table import StepCostTable
from fxgraft.errors import InputError
from fxgraft.runtime.hermes.client import Place
from fxgraft.runtime.hermes.config.clients import LlmSection
from fxgraft.runtime.hermes.config.costs import served_by
from fxgraft.runtime.hermes.config.reading import refuse
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.results.gaps import GapHistogram
from fxgraft.runtime.hermes.results.result import Result, collect
from fxgraft.runtime.hermes.results.text import duration, grid, number
from fxgraft.runtime.hermes.section import Section
from fxgraft.runtime.hermes.workload.source import MergedSource
from fxgraft.runtime.hermes.workload.workload import Workload
from fxgraft.validation import nowhere

S = TypeVar("S", bound=Section)
_LATENCIES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True)
class Figure:
    """One figure of both.

    Attributes:
        name: what it is.
        a, b: its values.
        lower_is_better: for the reader.
        is_time: whether it is in seconds.
    """

    name: str
    a: float
    b: float
    lower_is_better: bool
    is_time: bool = False

    @property
    def change(self) -> float:
        """Relative change from a to b; NaN where one is unknown, zero, or was cut off."""
        known = self.a and math.isfinite(self.a) and math.isfinite(self.b)
        return self.b / self.a - 1.0 if known else math.nan


@dataclass(frozen=True)
class Comparison:
    """Two runs of one workload, request for request the same."""

    a: Result
    b: Result

    @property
    def figures(self) -> list[Figure]:
        """Latencies at p50 and p99, throughput, goodput, energy."""
        one, other = self.a.summary["total"], self.b.summary["total"]
        found = [
            Figure(f"{name} {percent}", one[name][percent], other[name][percent],
                   lower_is_better=True, is_time=True)
            for name in _LATENCIES for percent in ("p50", "p99")
        ]  # fmt: skip
        name = "output_tokens_per_second"
        found.append(Figure("output tokens/s", one[name], other[name], lower_is_better=False))
        if "slo" in one and "slo" in other:
            found.append(Figure("goodput requests/s", one["slo"]["goodput"],
                                other["slo"]["goodput"], lower_is_better=False))  # fmt: skip
        if one["joules"] and other["joules"]:
            name = "joules_per_token"
            found.append(Figure("joules per token", one[name], other[name], lower_is_better=True))
        return found

    def __str__(self) -> str:
        columns = ("", self.a.name, self.b.name, "change")
        return grid(columns, rows(self))


def rows(comparison: Comparison) -> list[list[str]]:
    """The figures as text: name, a, b, change."""
    found: list[list[str]] = []
    for figure in comparison.figures:
        write = duration if figure.is_time else number
        change = "–" if math.isnan(figure.change) else f"{100 * figure.change:+.1f} %"
        found.append([figure.name, write(figure.a), write(figure.b), change])
    return found


def compare(
    table_a: StepCostTable | str | Path,
    table_b: StepCostTable | str | Path,
    workload: Workload | Mapping[str, object],
    *,
    client: Mapping[str, object] | None = None,
    seed: int = 0,
    outside: str = "error",
) -> Comparison:
    """Serve one workload by one client with either table.

    Each client has the KV blocks that its own table leaves it, so a pass that makes weights smaller
    also gains memory; set ``blocks`` in ``client`` to hold them equal.

    Args:
        table_a, table_b: tables or their files, for example without and with a pass.
        workload: the requests.
        client: settings of the client, see ``config.clients.LlmSection``.
        seed: of the workload.
        outside: ``"error"`` or ``"mark"``: what happens to steps outside a table's validity.

    Raises:
        InputError: a setting is wrong, or a model does not fit.

    Example:
        >>> print(compare("dense.json", "sparse.json", {"requests": 1000, "arrivals": {"rate": 4},
        ...     "prompt": 512, "output": 128, "slo": {"ttft": 0.25}}))
    """
    if not isinstance(workload, Workload):
        workload = _validated(Workload, workload)
    settings: dict[str, object] = {"kind": "llm", "name": "client", "cost": {}, **(client or {})}
    section = _validated(LlmSection, settings)
    names = _names(table_a, table_b)
    results = [
        _run(table, name, workload, section, seed, outside)
        for table, name in zip((table_a, table_b), names, strict=True)
    ]
    return Comparison(*results)


def _validated(kind: type[S], value: Mapping[str, object]) -> S:
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        refuse(error, kind, value, nowhere)


def _names(*tables: StepCostTable | str | Path) -> list[str]:
    return [Path(table).stem if isinstance(table, (str, Path)) else letter
            for table, letter in zip(tables, "ab", strict=True)]  # fmt: skip


def _run(
    table: StepCostTable | str | Path,
    name: str,
    workload: Workload,
    section: LlmSection,
    seed: int,
    outside: Any,
) -> Result:
    if not isinstance(table, StepCostTable):
        table = StepCostTable.load(table)
    served = served_by(table, outside, section.max_batched_tokens, section.max_sequences)
    client = section.client(served, name, Place())
    client.model = workload.model
    coordinator = Coordinator([client], MergedSource([workload], seed))
    for stage in workload.stages():
        if not coordinator.candidates(stage, workload.model):
            raise InputError(f"a comparison has one client, which cannot run {stage.kind!r}",
                             "compare two systems instead: fxgraft simulate --against")  # fmt: skip
    coordinator.run()
    return collect(
        coordinator, name=name, workloads=[workload.name], slos=[workload.slo],
        gaps=GapHistogram(), notes=[],
    )  # fmt: skip
