"""``fxgraft simulate``: a serving system before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from fxgraft.cli.console import output, print_json, step, table
from fxgraft.errors import InputError
from fxgraft.runtime.hermes import Comparison, Result, System, sweep
from fxgraft.runtime.hermes.compare import rows as comparison_rows
from fxgraft.runtime.hermes.results import text
from fxgraft.runtime.hermes.results.files import plain


def simulate(
    system: Annotated[Path, typer.Argument(help="System file (.yaml).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for summary.json and the logs as CSV.")
    ] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write Parquet, not CSV.")] = False,
    plots: Annotated[bool, typer.Option("--plots", help="Also draw plots (needs --out).")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="File for a trace that Perfetto shows.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Second system to compare with.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Value instead of the file's: PATH=VALUE.")
    ] = None,
    sweeps: Annotated[
        list[str] | None, typer.Option("--sweep", help="Several values: PATH=VALUE,VALUE,...")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes for a sweep.", min=1)] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Spread a sweep over Ray.")] = False,
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="Run every step: slow, the same times.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Simulate requests through clients, and report latencies, goodput and energy."""
    changes = dict(_assignment(text, "--set") for text in change or [])
    if sweeps:
        _only_alone(
            out=out, parquet=parquet, plots=plots, trace=trace, against=against, set=change,
            stepwise=stepwise,
        )  # fmt: skip
        values = {path: _listed(value) for path, value in (
            _assignment(text, "--sweep") for text in sweeps)}  # fmt: skip
        with step(f"simulate {system} at every point"):
            points = sweep(
                system, values, processes=processes, engine="ray" if ray else "processes"
            )
        if as_json:
            print_json(plain([{"changes": p.changes, **p.summary} for p in points]))
        else:
            _print_sweep(list(values), [(p.changes, p.summary) for p in points])
        return
    result = _run(system, changes, stepwise)
    _write(result, out, parquet, plots, trace)
    if against is None:
        _print(result, as_json)
        return
    comparison = Comparison(result, _run(against, changes, stepwise))
    if as_json:
        print_json(plain({"a": comparison.a.summary, "b": comparison.b.summary}))
    else:
        names = ["", comparison.a.name, comparison.b.name, "change"]
        table("Comparison", names, comparison_rows(comparison))


def _run(file: Path, changes: dict[str, object], stepwise: bool) -> Result:
    with step(f"read {file}"):
        system = System.read(file, changes)
    with step(f"simulate {file}"):
        return system.simulate(stepwise=stepwise)


def _write(
    result: Result, out: Path | None, parquet: bool, plots: bool, trace: Path | None
) -> None:
    if out is None and (parquet or plots):
        raise InputError("files have nowhere to go", "give a folder with --out")
    if out is not None:
        with step(f"tables to {out}"):
            result.save(out, parquet=parquet)
        if plots:
            with step(f"plots to {out}"):
                result.plot(out)
    if trace is not None:
        with step(f"trace to {trace}"):
            result.trace(trace)


def _print(result: Result, as_json: bool) -> None:
    summary = result.summary
    if as_json:
        print_json(plain(summary))
        return
    for line in text.sentences(summary):
        output.print(line, highlight=False, markup=False)
    table("Latency", list(text.LATENCY_COLUMNS), text.latency_rows(summary["total"]))
    table("Clients", list(text.CLIENT_COLUMNS), text.client_rows(summary["clients"]))


def _print_sweep(paths: list[str], points: list[tuple[dict[str, object], dict[str, Any]]]) -> None:
    names = [".".join(path.split(".")[-2:]) for path in paths]
    columns = [*names, "completed", "ttft p50", "ttft p99", "tpot p50", "tpot p99",
               "tokens/s out", "goodput", "tokens/J"]  # fmt: skip
    rows: list[list[str]] = []
    for changes, summary in points:
        total = summary["total"]
        slo = total.get("slo")
        rows.append([
            *(str(changes[path]) for path in paths),
            f"{total['completed']} of {total['accepted']}",
            *(text.duration(total[name][p]) for name in ("ttft", "tpot") for p in ("p50", "p99")),
            text.number(total["output_tokens_per_second"]),
            text.number(slo["goodput"]) if slo else "–",
            text.number(total["tokens_per_joule"]),
        ])  # fmt: skip
    table("Sweep", columns, rows)


def _assignment(words: str, option: str) -> tuple[str, Any]:
    path, separator, value = words.partition("=")
    if not separator or not path:
        raise InputError(f"option {option}: {words!r} is no assignment", "write PATH=VALUE")
    return path, _value(value)


def _value(words: str) -> Any:
    """A YAML value; ``1e-3`` is a number."""
    try:
        value = yaml.safe_load(words)
    except yaml.YAMLError as error:
        raise InputError(f"{words!r} is no YAML value", "put text in quotes") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> list[Any]:
    return [_value(part) for part in value.split(",")] if isinstance(value, str) else [value]


def _only_alone(**options: object) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise InputError(f"--sweep and --{given[0]} exclude each other", "leave one of them out")
