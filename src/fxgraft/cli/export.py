"""``fxgraft export``: write a model as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fxgraft
from fxgraft.cli.console import output, print_json, step
from fxgraft.cli.reading import read
from fxgraft.pipeline import Pipeline


def export(
    source: Annotated[str, typer.Argument(help="Saved Program or model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    passes: Annotated[
        Path | None, typer.Option(help="Pipeline file whose passes are applied first.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Export a model as ONNX, checked in onnxruntime."""
    program = read(source)
    if passes is not None:
        with step(f"apply {passes}"):
            program = Pipeline.parse(passes).run(program)
    with step(f"ONNX to {out}, checked in onnxruntime"):
        folder = fxgraft.export_onnx(program, out, opset=opset)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if as_json:
        print_json({file.name: file.stat().st_size for file in files})
        return
    for file in files:
        output.print(f"{file}  {file.stat().st_size / 1e6:.1f} MB", highlight=False)
