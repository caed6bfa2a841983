"""``fxgraft run``: a pipeline file from model to answers, files and pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fxgraft
from fxgraft import sources
from fxgraft.backend import find_backend
from fxgraft.cli.console import change, messages, output, print_json, step, table
from fxgraft.cli.reading import read
from fxgraft.errors import Error, InputError
from fxgraft.generation.prompts import integers
from fxgraft.history import Record
from fxgraft.pipeline import PipelineFile
from fxgraft.transform import apply

_PROMPT = "What is the capital of France? Answer in one sentence."


def run(
    pipeline: Annotated[Path, typer.Argument(help="Pipeline file (.yaml).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the saved Program, diff.html and ONNX files.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model instead of the file's: alias, hub id or path.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Question to answer before and after.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.", min=1)] = 32,
    onnx: Annotated[bool, typer.Option(help="Also export ONNX (needs --out).")] = True,
    backend: Annotated[str | None, typer.Option(help="Backend instead of the file's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Capture a model, apply a pipeline's passes, and show what changed and what it answers."""
    file = PipelineFile.read(pipeline)
    source = model or file.model
    if source is None:
        raise InputError(f"{pipeline} names no model", "add `model: smollm2-135m`, or use --model")
    question = next(text for text in (prompt, file.prompt, _PROMPT) if text is not None)
    if not question:
        raise InputError("the prompt is empty", "give a text with --prompt")
    if (backend or file.backend) != "auto":
        find_backend(backend or file.backend)
    before = read(source)
    file.pipeline.validate(before)
    after = before
    for item in file.pipeline.passes:
        with step(f"pass {item.name}"):
            after = apply(after, item)
    new = after.history[len(before.history) :]
    result: dict[str, Any] = {"model": str(source), "passes": [asdict(record) for record in new]}
    if not as_json:
        print_passes(new)
    result["answers"] = _answers(
        source, before, after, question, max_new_tokens,
        backend or file.backend, file.options, as_json,
    )  # fmt: skip
    if out is not None:
        result["files"] = _write(before, after, out, onnx, result["answers"])
        if (costs := _write_costs(after, out, backend or file.backend, file.options)) is not None:
            result["files"]["costs"] = costs
    if as_json:
        print_json(result)


def print_passes(records: list[Record]) -> None:
    """Print what every pass changed."""
    columns = ["pass", "nodes", "parameters", "bytes", "operations", "time", "error"]
    rows = [
        [
            record.name,
            change(record.before.nodes, record.after.nodes),
            change(record.before.parameters, record.after.parameters),
            change(record.before.bytes, record.after.bytes, "B"),
            change(record.before.flops, record.after.flops),
            f"{record.seconds:.2f} s",
            "not checked" if record.error is None else f"{record.error:.1e}",
        ]
        for record in records
    ]
    table("What the passes changed", columns, rows)
    for record in records:
        for line in record.summary:
            output.print(f"  {record.name}: {line}", highlight=False, markup=False)


def _answers(
    source: str | Path,
    before: fxgraft.Program,
    after: fxgraft.Program,
    prompt: str,
    max_new_tokens: int,
    backend: str,
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    if "logits" not in before.outputs or "input_ids" not in {i.name for i in before.inputs}:
        return {}
    tokenizer = sources.tokenizer(before.origin.get("source") or source)
    ids = encode(tokenizer, prompt)
    answers: dict[str, Any] = {"prompt": prompt, "prompt_tokens": integers(ids[0])}
    for name, program in (("before", before), ("after", after)):
        with step(f"answer {name} the passes"):
            compiled = fxgraft.compile(program, backend=backend, options=options)
            tokens = compiled.generate(ids, max_new_tokens=max_new_tokens)[0, ids.shape[1] :]
        answers[name] = tokenizer.decode(tokens, skip_special_tokens=True)
        answers[f"{name}_tokens"] = integers(tokens)
        answers[f"{name}_backend"] = compiled.backend
        if not quiet:
            output.print(f"[bold]{name}[/] ({compiled.backend}):", highlight=False)
            output.print(answers[name].strip(), markup=False, highlight=False)
    return answers


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids [1, S] of a question, through the chat template if there is one."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def _write(
    before: fxgraft.Program,
    after: fxgraft.Program,
    out: Path,
    onnx: bool,
    answers: dict[str, Any],
) -> dict[str, str]:
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    with step(f"graph diff to {out / 'diff.html'}"):
        files["diff"] = str(after.diff(before).to_html(out / "diff.html"))
    with step(f"program to {out / 'program'}"):
        files["program"] = str(after.save(out / "program"))
    if not onnx:
        return files
    with step(f"ONNX to {out / 'onnx'}, checked in onnxruntime"):
        files["onnx"] = str(fxgraft.export_onnx(after, out / "onnx"))
    if answers:
        _compare_onnx(after, answers)
    return files


def _write_costs(
    after: fxgraft.Program, out: Path, backend: str, options: dict[str, Any]
) -> str | None:
    """What a backend that only costs Programs has to say; None for other backends."""
    if backend != "flexcim":
        return None
    with step(f"costs to {out / backend}"):
        return str(find_backend(backend).export(after, out / backend, **options))


def _compare_onnx(after: fxgraft.Program, answers: dict[str, Any]) -> None:
    """Generate in onnxruntime and compare the tokens.

    Raises:
        Error: they differ.
    """
    with step("same tokens in onnxruntime"):
        compiled = fxgraft.compile(after, backend="onnx")
        prompt = torch.tensor([answers["prompt_tokens"]])
        wanted = answers["after_tokens"]
        tokens = compiled.generate(prompt, max_new_tokens=len(wanted))[0, prompt.shape[1] :]
    answers["onnx_tokens"] = integers(tokens)
    if answers["onnx_tokens"] != wanted:
        raise Error(
            "onnxruntime generates other tokens than the compiled model",
            "compare both with fxgraft.compile(program, backend='onnx')",
        )
    messages.print(f"  {len(wanted)} tokens, all equal", highlight=False)
