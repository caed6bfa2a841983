"""Plots of costs, comparisons, sensitivities and sweeps; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxgraft.backends.flexcim.baselines import Result
from fxgraft.backends.flexcim.costs import ENERGY_PARTS, Costs
from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.sensitivity import Effect
from fxgraft.backends.flexcim.sweep import Design, pareto
from fxgraft.errors import LoweringError

_MOST_BARS = 24


def missing() -> str | None:
    """What plotting needs and this machine does not have, or None."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        return "matplotlib is not installed"
    return None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    problem = missing()
    if problem:
        raise LoweringError(f"plots cannot be drawn: {problem}", "pip install 'fxgraft[plot]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def breakdown(costs: Costs, path: str | Path) -> Path:
    """Energy by part, one stacked bar per block of the model.

    Raises:
        LoweringError: matplotlib is missing.
    """
    blocks: dict[str, dict[str, float]] = {}
    for node in costs.nodes:
        parts = blocks.setdefault(node.block, {})
        for part, joules in node.energy.items():
            parts[part] = parts.get(part, 0.0) + joules
    least = 1e-3 * costs.joules
    names = [name for name, parts in blocks.items() if sum(parts.values()) > least]
    if len(names) > _MOST_BARS:
        largest = sorted(names, key=lambda name: -sum(blocks[name].values()))[:_MOST_BARS]
        names = [name for name in names if name in largest]
    figure, axes = _figure(8, 2.5 + 0.3 * len(names))
    left = [0.0] * len(names)
    for place, part in enumerate(p for p in ENERGY_PARTS if costs.energy[p]):
        values = [blocks[name].get(part, 0.0) * 1e6 for name in names]
        axes.barh(names, values, left=left, label=part.replace("_", " "), color=f"C{place % 10}",
                  hatch="//" if place >= 10 else None)  # fmt: skip
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("energy (uJ)")
    axes.set_title(f"{costs.configuration}: {costs.batch} x {costs.new_tokens} tokens")
    figure.legend(loc="outside right upper", fontsize="small")
    return _save(figure, path)


def roofline(costs: Costs, hardware: Hardware, path: str | Path) -> Path:
    """Operations per second of each linear layer over operations per byte of weights loaded.

    The roofs are all cells multiplying at once (dense), and one column of weights per macro and
    cycle. A sparse layer may lie above: operations that it skips count.

    Raises:
        LoweringError: matplotlib is missing.
    """
    figure, axes = _figure(6.5, 4.5)
    peak = 2 * hardware.macros * hardware.cells / hardware.token_cycles * hardware.clock
    per_cycle = hardware.macros * hardware.sub_macros * hardware.rows * hardware.weight_bits / 8
    loading = per_cycle * hardware.clock
    patterns: dict[str, list[tuple[float, float]]] = {}
    for node in costs.nodes:
        if node.unit == "macros" and node.tiles:
            size = node.tiles * hardware.cells * node.utilisation * hardware.weight_bits / 8
            point = (node.flops / size, node.flops / node.seconds)
            patterns.setdefault(node.pattern, []).append(point)
    xs = [x for points in patterns.values() for x, _ in points] or [1.0]
    low, high = min(*xs, peak / loading) / 4, max(*xs, peak / loading) * 4
    ridge = peak / loading
    axes.plot([low, ridge, high], [low * loading, peak, peak], color="0.3", label="dense roof")
    for pattern, points in patterns.items():
        axes.plot(*zip(*points, strict=True), "o", label=pattern, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("operations per second")
    axes.legend(fontsize="small")
    return _save(figure, path)


def comparison(results: Sequence[Result], path: str | Path) -> Path:
    """Latency and energy of each kind of hardware, relative to the first.

    Raises:
        LoweringError: matplotlib is missing.
    """
    figure, axes = _figure(6, 3.5)
    places = range(len(results))
    first = results[0]
    axes.bar([p - 0.2 for p in places], [r.cycles / first.cycles for r in results], 0.4,
             label="latency")  # fmt: skip
    axes.bar([p + 0.2 for p in places], [r.joules / first.joules for r in results], 0.4,
             label="energy")  # fmt: skip
    axes.set_xticks(list(places), [result.name for result in results])
    axes.set_ylabel(f"relative to {first.name}")
    axes.legend()
    return _save(figure, path)


def tornado(effects: Sequence[Effect], path: str | Path) -> Path:
    """Range of the headline gains over each constant's values.

    Raises:
        LoweringError: matplotlib is missing.
    """
    shown = list(effects)[:_MOST_BARS]
    figure, axes = _figure(7, 1.5 + 0.35 * len(shown))
    names = [f"{effect.constant} [{effect.source}]" for effect in shown]
    for offset, gain in ((-0.2, "latency"), (0.2, "energy")):
        ranges = [getattr(effect, gain) for effect in shown]
        axes.barh(
            [place + offset for place in range(len(shown))],
            [max(max(values) - min(values), 2e-3) for values in ranges],
            0.4,
            left=[min(values) for values in ranges],
            label=f"gain in {gain}",
        )
    axes.set_yticks(range(len(shown)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("gain over fixed:2:4")
    axes.legend(fontsize="small")
    return _save(figure, path)


def designs(found: Sequence[Design], path: str | Path) -> Path:
    """Energy over time of all designs, coloured by area, with those that none beats marked.

    Raises:
        LoweringError: matplotlib is missing.
    """
    figure, axes = _figure(7, 5)
    able = [design for design in found if not design.problem]
    best = pareto(able)
    dots = axes.scatter(
        [d.seconds * 1e3 for d in able], [d.joules * 1e3 for d in able],
        c=[d.transistors / 1e6 for d in able], cmap="viridis",
    )  # fmt: skip
    axes.plot([d.seconds * 1e3 for d in best], [d.joules * 1e3 for d in best], "o",
              markerfacecolor="none", markeredgecolor="C3", markersize=11,
              label="none better in time, energy and area")  # fmt: skip
    for design in best[:_MOST_BARS]:
        text = " ".join(f"{value}" for value in design.values.values())
        axes.annotate(text, (design.seconds * 1e3, design.joules * 1e3), fontsize=6,
                      xytext=(4, 4), textcoords="offset points")  # fmt: skip
    if able and max(d.seconds for d in able) > 10 * min(d.seconds for d in able):
        axes.set_xscale("log")
    axes.set_xlabel("time (ms)")
    axes.set_ylabel("energy (mJ)")
    axes.set_title(", ".join(able[0].values) if able else "")
    figure.colorbar(dots, label="million transistors")
    axes.legend(fontsize="small")
    return _save(figure, path)
