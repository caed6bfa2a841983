"""A log of decisions, and running it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from fxgraft.errors import InputError
from fxgraft.runtime.dsla_serve.policy import Decision, Memory, Rules, Running, Snapshot, decide


def line_of(rules: Rules, snapshot: Snapshot, memory: Memory, decision: Decision) -> str:
    """One decision with everything that it depended on, as a line of JSON."""
    record = {
        "rules": rules.config(),
        "snapshot": asdict(snapshot),
        "memory": asdict(memory),
        "decision": asdict(decision),
    }
    return json.dumps(record, separators=(",", ":"))


def replay(lines: Iterable[str], rules: Rules | None = None) -> Iterator[tuple[Decision, Decision]]:
    """Decide once more.

    Args:
        lines: of a log.
        rules: to decide by, default each line's own.

    Yields:
        The decision of each line, and the one that comes out now.

    Raises:
        InputError: a line is no decision.
    """
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            own = Rules.from_config(record["rules"])
            snapshot, memory = _snapshot(record["snapshot"]), Memory(**record["memory"])
            before = _decision(record["decision"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"line {number} is no decision: {error}", "give a log that the server wrote"
            ) from error
        yield before, decide(rules or own, snapshot, memory)


def _snapshot(raw: dict[str, Any]) -> Snapshot:
    values: dict[str, Any] = {**raw, "running": tuple(Running(**one) for one in raw["running"])}
    return Snapshot(**values)


def _decision(raw: dict[str, Any]) -> Decision:
    raised = tuple((str(request), int(level)) for request, level in raw["raised"])
    return Decision(raised, Memory(**raw["memory"]))
