"""What linear attention costs in quality: a model distilled layer by layer, variant by variant.

Perplexity on held-out text and the log-likelihood of GSM8K's worked answers, of the teacher and
after each stage; two states against one, forms of gates, chained against joint training, orders.

    python benchmarks/dsla_quality.py --device cuda
    python benchmarks/dsla_quality.py --smoke          # a minute on a CPU, prints only

Each variant gets the same tokens per stage. Text: every other page of the Debian Administrator's
Handbook (the other half is held out) and what the teacher writes by itself, in equal parts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import _flow_text
import torch
from flow_quality import Answers
from safetensors.torch import save_file
from torch import Tensor

import fxgraft
from fxgraft import placement, results, sources
from fxgraft.calibration import token_losses
from fxgraft.offline import Made, Workspace
from fxgraft.passes.dsla import Form
from fxgraft.passes.dsla.data import batches, generated
from fxgraft.passes.dsla.distil import DslaDistillation
from fxgraft.passes.dsla.probe import student_of
from fxgraft.passes.dsla.stages import prefix_of
from fxgraft.program import Program

HERE = Path(__file__).parent
BASE = Form(adapt="heads", rope="keep")
VARIANTS: dict[str, dict[str, Any]] = {
    "two states, key gates": {},
    "one state (GLA)": {"form": {"states": 1}},
    "low-rank gates": {"form": {"gate": "lowrank"}},
    "full gates": {"form": {"gate": "full"}},
    "no rotation": {"form": {"rope": "none"}},
    "gates alone": {"form": {"adapt": "none"}},
    "trained jointly": {"joint": True},
    "random order": {"order": "random"},
    "reverse order": {"reverse": True},
    "order by loss": {"order": "loss", "trial_steps": 20},
}
TARGETS = {0.25: 1.05, 0.5: 1.15}
"""Largest perplexity relative to the teacher's, by share of the layers."""


def main() -> None:
    """Train and measure each variant; the result file grows with each."""
    options = _options()
    program = fxgraft.capture(options.model).copy()
    placement.move(program, options.device)
    tokenizer = sources.tokenizer(options.model)
    learn, held = _text(program, tokenizer, options)
    answers = _answers(tokenizer, options, program.device)
    teacher = measure(program, held, answers)
    print(f"teacher: {teacher}", flush=True)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "tokens.safetensors"
        save_file({"input_ids": learn.contiguous()}, data)
        for name in options.variants:
            found[name] = _variant(program, name, data, held, answers, options)
            if not options.smoke:
                _write(teacher, found, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=sources.SMOLLM2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=300_000, help="per stage")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--generated", type=int, default=256, help="sequences by the teacher")
    parser.add_argument("--evaluation", type=int, default=64, help="sequences")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--handbook", type=Path, help="folder of the handbook's English pages")
    parser.add_argument("--gsm8k-only", action="store_true", help="text from GSM8K alone")
    parser.add_argument("--smoke", action="store_true", help="a few steps, GSM8K's text only")
    options = parser.parse_args()
    if options.smoke:
        small = {
            "tokens": 512, "length": 64, "batch": 2, "generated": 2, "evaluation": 2,
            "problems": 2, "fraction": 0.04, "gsm8k_only": True,
            "variants": list(VARIANTS)[:2],
        }  # fmt: skip
        vars(options).update(small)
    return options


def _text(program: Program, tokenizer: Any, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Sequences to learn from and to measure on, int64 [N, length]."""
    if options.gsm8k_only:
        problems = _flow_text.gsm8k()
        halves = ["\n\n".join(f"{q}\n{a}" for q, a in problems[start::2]) for start in (0, 1)]
    else:
        halves = list(_flow_text.handbook(options.handbook))
    streams = [
        torch.tensor(tokenizer(half, add_special_tokens=False, verbose=False)["input_ids"])
        for half in halves
    ]
    rows = [stream[: len(stream) // options.length * options.length] for stream in streams]
    learn, held = (row.view(-1, options.length) for row in rows)
    own = generated(program, options.generated, options.length, seed=0)
    both = torch.cat([learn[:8] if options.smoke else learn, own])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
    return both[order], held[: options.evaluation]


def _answers(tokenizer: Any, options: argparse.Namespace, device: torch.device) -> Answers:
    found: list[dict[str, Tensor]] = []
    starts: list[int] = []
    for question, answer in _flow_text.gsm8k()[1 : 2 * options.problems : 2]:
        head = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        tail = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        found.append({"input_ids": torch.tensor([head + tail], device=device)})
        starts.append(len(head))
    return Answers(found, True, starts=starts)


@torch.no_grad()
def measure(program: Program, held: Tensor, answers: Answers) -> dict[str, float]:
    """Perplexity on held-out text, and mean log-likelihood per token of the answers."""
    place = program.outputs.index("logits")
    losses = [
        token_losses(program(part)[place], part).mean(1)
        for part in batches(held.to(program.device), 4)
    ]
    perplexity = math.exp(float(torch.cat(losses).mean()))
    sums = [0.0, 0]
    for index, batch in enumerate(answers.batches):
        logits = program(batch["input_ids"])[place]
        loss, count = answers.evaluate(index, {"logits": logits})
        sums = [sums[0] + loss, sums[1] + count]
    return {"perplexity": perplexity, "answers": -sums[0] / sums[1]}


def _variant(
    program: Program,
    name: str,
    data: Path,
    held: Tensor,
    answers: Answers,
    options: argparse.Namespace,
) -> list[dict[str, float]]:
    """Figures after each stage of one variant."""
    changes = {**VARIANTS[name]}
    form = Form.from_config({**BASE.config(), **changes.pop("form", {})})
    stage = DslaDistillation.from_config({
        "data": [str(data)], "length": options.length, "held_out": 4, "form": form.config(),
        "fraction": options.fraction, "tokens": options.tokens, "batch": options.batch, **changes,
    })  # fmt: skip
    begun = time.perf_counter()
    made = stage.run(program, Workspace())
    seconds = time.perf_counter() - begun
    layers = [int(one["layer"]) for one in made.results["stages"]]
    figures: list[dict[str, float]] = []
    for count in range(1, len(layers) + 1):
        student = student_of(program, form, _parameters(made, layers[:count]))
        found = measure(student, held, answers)
        figures.append({**found, "layer": layers[count - 1], "seconds": seconds})
        print(f"{name}, {count} layers: {json.dumps(found)}", flush=True)
    return figures


def _parameters(made: Made, layers: list[int]) -> list[tuple[int, dict[str, Tensor]]]:
    return [
        (layer, {n.removeprefix(prefix_of(number)): value for n, value in made.tensors.items()
                 if n.startswith(prefix_of(number))})
        for number, layer in enumerate(layers)
    ]  # fmt: skip


def _write(
    teacher: dict[str, float],
    found: dict[str, list[dict[str, float]]],
    options: argparse.Namespace,
) -> None:
    """Write the result file and the plot from what is there so far."""
    rows = [results.row("perplexity, teacher", teacher["perplexity"], "")]
    rows.append(
        results.row("answers, teacher", teacher["answers"], "nats per token", better="higher")
    )
    main = next(iter(found))
    layers = round(len(found[main]) / options.fraction)
    for name, figures in found.items():
        for share in (0.125, 0.25, 0.375, 0.5):
            count = math.floor(share * layers)
            if not 0 < count <= len(figures):
                continue
            at = figures[count - 1]
            target = TARGETS.get(share, math.nan) * teacher["perplexity"]
            rows.append(results.row(
                f"perplexity, {name}, {share:.1%} of the layers", at["perplexity"], "",
                target=target if name == main and share in TARGETS else None,
                peer=None if name == main else (main, found[main][count - 1]["perplexity"]),
            ))  # fmt: skip
            rows.append(results.row(
                f"answers, {name}, {share:.1%} of the layers", at["answers"], "nats per token",
                better="higher",
            ))  # fmt: skip
        rows.append(results.row(f"training, {name}", figures[0]["seconds"] / 60, "minutes"))
    notes = [
        f"{options.tokens} tokens per stage, sequences of {options.length}; text: the Debian "
        f"Administrator's Handbook, every other page, and {options.generated} sequences that the "
        f"teacher wrote. Held out: {options.evaluation} sequences of the other pages. Answers: "
        f"mean log-likelihood of the worked answers of {options.problems} problems of GSM8K.",
        f"Unless named otherwise: {BASE}.",
    ]
    results.write("dsla_quality", "dsla", rows, HERE / "results", notes=notes)
    _plot(teacher, found)


def _plot(teacher: dict[str, float], found: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plot: Any = pyplot
    figure, axes = cast("tuple[Any, Any]", plot.subplots(1, 2, figsize=(11, 4.5)))
    for axis, key in zip(axes, ("perplexity", "answers"), strict=True):
        axis.axhline(teacher[key], color="black", linewidth=0.8, label="teacher")
        for name, figures in found.items():
            places = range(1, len(figures) + 1)
            axis.plot(places, [one[key] for one in figures], marker=".", label=name)
        axis.set_xlabel("linear layers")
        axis.set_title(key)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "results" / "dsla_quality.svg")


if __name__ == "__main__":
    main()
