"""Pictures of a run: how latencies are spread, and what the clients did over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fxgraft.errors import InputError
from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.results.metrics import latencies

Tables = Mapping[str, Mapping[str, Array]]
_MOST_POINTS = 2000


def _figures() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib", "pip install 'fxgraft[plot]'") from error
    return Figure


def draw(tables: Tables, clients: Sequence[str], folder: Path) -> list[Path]:
    """Write ``latency.svg`` and, if the steps were kept, ``clients.svg``.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure_of = _figures()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_latency(figure_of, tables["requests"], folder / "latency.svg")]
    if "steps" in tables and len(tables["steps"]["start"]):
        paths.append(_over_time(figure_of, tables["steps"], clients, folder / "clients.svg"))
    return paths


def _latency(figure_of: Any, requests: Mapping[str, Array], path: Path) -> Path:
    """Share of requests up to each latency; a curve that ends below 1 has requests cut off."""
    found = latencies(requests)
    figure = figure_of(figsize=(11, 3.4), layout="constrained")
    shown = (("time to first token", found.ttft), ("time per output token", found.tpot),
             ("end to end", found.e2e))  # fmt: skip
    for axes, (title, values) in zip(figure.subplots(1, 3), shown, strict=True):
        values = np.sort(values[~np.isnan(values)])
        share = np.arange(1, len(values) + 1) / max(len(values), 1)
        kept = np.isfinite(values)
        chosen = _chosen(int(kept.sum()))
        if kept.any():
            axes.plot(values[kept][chosen], share[kept][chosen])
            axes.set_xscale("log" if values[kept][0] > 0 else "linear")
        axes.set(title=title, xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.savefig(path)
    return path


def _chosen(count: int) -> npt.NDArray[np.int64]:
    """Some of many points, evenly."""
    places = np.linspace(0, max(count - 1, 0), min(_MOST_POINTS, max(count, 1)))
    return np.asarray(places, np.int64)


def _time_since(moments: Array, times: Array) -> Array:
    """Seconds from each moment to each time, those after it left out and the rest added up [T]."""
    moments = np.sort(moments)
    count = np.searchsorted(moments, times)
    return count * times - np.concatenate([[0.0], np.cumsum(moments)])[count]


def _over_time(
    figure_of: Any, steps: Mapping[str, Array], clients: Sequence[str], path: Path
) -> Path:
    """Queue, batch, blocks and busy share of each client."""
    figure = figure_of(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    names = (("waiting", "queue"), ("decodes", "decodes in a step"), ("blocks", "KV blocks"))
    bounds = np.linspace(0.0, float(steps["end"].max()), 200)
    for index, client in enumerate(clients):
        own = steps["client"] == index
        if not own.any():
            continue
        time, length = steps["start"][own], (steps["end"] - steps["start"])[own]
        chosen = _chosen(int(own.sum()))
        for axes, (column, _) in zip(panels, names, strict=False):
            axes.step(time[chosen], steps[column][own][chosen], where="post", label=client, lw=0.8)
        busy = np.diff(_time_since(time, bounds) - _time_since(time + length, bounds))
        panels[3].step(bounds[:-1], busy / np.diff(bounds), where="post", label=client, lw=0.8)
    for axes, title in zip(panels, [*(n for _, n in names), "busy share"], strict=True):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    panels[3].set_xlabel("seconds")
    if len(clients) <= 12:
        panels[0].legend(fontsize=7, ncols=4)
    figure.savefig(path)
    return path
