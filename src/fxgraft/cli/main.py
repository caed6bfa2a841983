"""The command's entry point: sub-commands, and how errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from fxgraft.cli import bench, calibrate, export, inspect, run, serve, simulate
from fxgraft.cli.console import fail
from fxgraft.errors import ContractError, Error, InputError

FAILED, BAD_INPUT = 1, 2

app = typer.Typer(
    name="fxgraft",
    help="Graft published efficiency methods onto PyTorch models you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("passes")(inspect.passes)
app.command("diff")(inspect.diff)
app.command("draw")(inspect.draw)
app.command("export")(export.export)
app.command("calibrate")(calibrate.calibrate)
app.command("bench")(bench.bench)
app.command("serve")(serve.serve)
app.command("simulate")(simulate.simulate)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        print(version("fxgraft"))
    except PackageNotFoundError:
        print("fxgraft from a source tree")
    raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and exit."
        ),
    ] = False,
) -> None:
    """Graft published efficiency methods onto PyTorch models you already have."""


def main() -> None:
    """Run the command; exit with 0, 1 (it failed) or 2 (bad input)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (InputError, ContractError) as error:
        fail(str(error))
        sys.exit(BAD_INPUT)
    except Error as error:
        fail(str(error))
        sys.exit(FAILED)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
