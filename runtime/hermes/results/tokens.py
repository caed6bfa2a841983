"""When tokens were emitted, from the logs of stages, steps and preemptions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxgraft.errors import InputError
from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.stages import DECODE_KINDS, KINDS

Tables = Mapping[str, Mapping[str, Array]]


def token_times(tables: Tables, request: int) -> Array:
    """Times of a request's tokens, of the longest branch in each of its decode stages.

    Args:
        tables: the logs of requests, stages, steps and breaks.
        request: its index.

    Raises:
        InputError: there is no such request, it did not complete, or a log was not kept.
    """
    missing = [name for name in ("stages", "steps", "breaks") if name not in tables]
    if missing:
        raise InputError(f"the log of {missing[0]} was not kept", "add it to `logs` of the system")
    stages = tables["stages"]
    own = np.flatnonzero(stages["request"] == request)
    if not len(own):
        raise InputError(f"there is no request {request} that ended a stage", "give its index")
    found: list[Array] = []
    for row in own:
        if KINDS[int(stages["kind"][row])] in DECODE_KINDS:
            before = own[stages["stage"][own] == stages["stage"][row] - 1][0]
            found.append(_of_stage(tables, request, row, before))
    return np.concatenate(found) if found else np.empty(0)


def _of_stage(tables: Tables, request: int, row: np.intp, before: np.intp) -> Array:
    """Tokens of one stage, the one that ended the prefill before it included."""
    stages, steps = tables["stages"], tables["steps"]
    client, start, end = (stages[name][row] for name in ("client", "started", "ended"))
    rows = np.flatnonzero(
        (steps["client"] == client) & (steps["decodes"] > 0) & (steps["end"] > start)
        & (steps["start"] < end) & (steps["steps"] > 0)
    )  # fmt: skip
    times = [np.array([stages["ended"][before]])]
    for step in rows:
        number = np.arange(1, int(steps["steps"][step]) + 1)
        ends = number * steps["first_seconds"][step]
        ends += steps["slope"][step] * (number * (number - 1) // 2)
        ends += steps["start"][step]
        ends[-1] = steps["end"][step]
        times.append(ends[(ends > start) & (ends <= end)])
    return _without_breaks(np.concatenate(times), tables["breaks"], request, (start, end))


def _without_breaks(
    times: Array, breaks: Mapping[str, Array], request: int, stage: tuple[float, float]
) -> Array:
    """Tokens that others emitted while the request was preempted are not its own."""
    start, end = stage
    own = (breaks["request"] == request) & (breaks["stopped"] >= start)
    for row in np.flatnonzero(own & (breaks["resumed"] <= end)):
        stopped, resumed = breaks["stopped"][row], breaks["resumed"][row]
        times = times[(times <= stopped) | (times > resumed)]
        if breaks["recomputed"][row]:
            times = np.sort(np.append(times, resumed))
    return times
