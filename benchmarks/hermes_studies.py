"""The published case studies of HERMES (arXiv 2504.09775): which of their statements hold here.

Llama-3.1-70B and 8B by their sizes on H100s at 75 % of peak rates, weights in float8 where two
devices hold 70 B parameters, lengths drawn from laws with the medians and means of the public Azure
traces. Nothing is measured on a device. Requests that are cut off are counted, never left out.

    python benchmarks/hermes_studies.py [--out FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _hermes_studies import STUDIES, Key, Study  # noqa: E402
from _hermes_systems import Content  # noqa: E402

from fxgraft import results  # noqa: E402


def main() -> None:
    """Simulate every study, draw it, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--only", nargs="*", choices=[one.__name__ for one in STUDIES])
    options = parser.parse_args()
    chosen = [one for one in STUDIES if not options.only or one.__name__ in options.only]
    context = multiprocessing.get_context("spawn")
    found: list[Study] = []
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for study in chosen:
            begun = time.perf_counter()
            found.append(study(partial(simulate, pool)))
            print(f"{study.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
    folder = options.out / "hermes_studies"
    folder.mkdir(parents=True, exist_ok=True)
    for study in found:
        draw(study, folder / f"{study.name}.png")
    write(found, options.out)


def simulate(
    pool: ProcessPoolExecutor, systems: Mapping[Key, Content]
) -> dict[Key, dict[str, Any]]:
    """The totals of systems, over the processes of a pool."""
    totals = pool.map(total, systems.values())
    return dict(zip(systems, totals, strict=True))


def total(content: Content) -> dict[str, Any]:
    """The total of one system's summary."""
    from fxgraft.runtime.hermes import System

    return System.parse(content).simulate().summary["total"]


def draw(study: Study, path: Path) -> None:
    """A figure with the panels of a study."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(len(study.panels), 3)
    rows = -(-len(study.panels) // columns)
    size = (4.2 * columns, 3.2 * rows)
    figure, places = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for panel, place in zip(study.panels, places.flat, strict=False):
        for label, (x, y) in panel.lines.items():
            place.plot(x, y, "o-", markersize=3, linewidth=1, label=label)
        place.set(xlabel=panel.x, ylabel=panel.y, yscale="log")
        place.set_title(panel.title, fontsize=8)
        place.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def write(studies: list[Study], folder: Path) -> None:
    """The result file: how many statements hold, and the figures of every one."""
    rows: list[results.Row] = []
    notes: list[str] = []
    for study in studies:
        held = sum(one.holds for one in study.statements)
        name = f"{study.name}: published statements that hold"
        rows.append(
            results.row(name, held, f"of {len(study.statements)}", better="higher",
                        target=len(study.statements))
        )  # fmt: skip
        for one in study.statements:
            word = "holds" if one.holds else "does not hold"
            notes.append(f"{study.name}: {one.text}: {word} ({one.figures})")
    results.write("hermes_studies", "hermes", rows, folder, notes=notes)


if __name__ == "__main__":
    main()
