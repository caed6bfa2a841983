"""Perplexity and answers after pruning: every method on one model, calibration and evaluation.

One command prints the table of methods for a model; with the default model it also writes the
result file, with the mean over seeds held against the targets.

    python benchmarks/flow_quality.py
    python benchmarks/flow_quality.py --seeds 0 --budgets 0.5 --samples 8 --length 512
    python benchmarks/flow_quality.py --model gpt2 --device cuda --seeds 0

Calibration: sequences cut at random from one half of the Debian Administrator's Handbook; the
evaluation is the other half, cut into sequences of the same length from its beginning. With
--gsm8k-only both come from GSM8K's problems. Answers: the mean log-likelihood per token of GSM8K's
worked answers, given the question.

Every figure goes to the journal at once; a run with the same options takes what it finds there, so
that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _flow_text
import torch
from torch import Tensor

import fxgraft
from fxgraft import calibration, placement, results, sources
from fxgraft.calibration import Inputs
from fxgraft.offline import Workspace
from fxgraft.passes.flow import compare
from fxgraft.passes.flow.objective import Objective
from fxgraft.passes.flow.settings import FlowSettings
from fxgraft.passes.flow.study import Study

WIDTHS = (8, 16)
TARGETS = {
    (0.5, "loss N:8"): 62.0,
    (0.5, "loss N:8, Hessian"): 42.0,
    (0.5, "loss N:16, Hessian"): 38.0,
    (0.625, "loss N:8"): 175.0,
    (0.625, "loss N:8, Hessian"): 73.0,
}
PEERS = {"loss N:8": "Wanda", "loss N:16": "Wanda", "loss N:8, Hessian": "SparseGPT",
         "loss N:16, Hessian": "SparseGPT"}  # fmt: skip
CPU_MINUTES, GPU_MINUTES = 15.0, 2.0
JOURNAL = Path(__file__).parent.parent / "out" / "flow_quality.jsonl"
Figures = dict[str, float]


@dataclass
class Answers(Objective):
    """The loss on answers alone.

    Attributes:
        starts: by batch (one problem each), where the answer begins.
    """

    starts: list[int] = field(default_factory=list[int])

    def evaluate(self, index: int, outputs: Any) -> tuple[float, float]:
        losses = calibration.token_losses(outputs["logits"], self.batches[index]["input_ids"])
        answer = losses[:, self.starts[index] - 1 :].double()
        return float(answer.sum()), answer.numel()


@dataclass(frozen=True)
class Texts:
    """What a run reads.

    Attributes:
        calibration, evaluation: streams of tokens.
        problems: questions and answers.
        name: of the text, for the notes.
    """

    calibration: Tensor
    evaluation: Tensor
    problems: list[tuple[str, str]]
    name: str


def main() -> None:
    """Run the methods for each seed and budget, print the tables, write the result file."""
    options = _options()
    torch.set_num_threads(options.threads)
    program = fxgraft.capture(options.model).copy()
    placement.move(program, options.device)
    tokenizer = sources.tokenizer(options.model)
    texts = read(tokenizer, options)
    found = Journal(options.journal, options)
    for seed in options.seeds:
        for budget in options.budgets:
            measure(program, tokenizer, texts, options, seed, budget, found)
    if options.model == sources.SMOLLM2 and not options.no_file:
        write(found.entries(), texts, options)


class Journal:
    """Figures of methods on disk, a line of JSON each.

    Args:
        path: the file; its folder is made.
        options: of the command; only lines of the same ones count.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        kept = ("model", "samples", "length", "probes", "evaluation", "problems", "gsm8k_only")
        self._path = path
        self._kind = {name: getattr(options, name) for name in kept}
        self._found: dict[tuple[int, float, str], Figures] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for text in path.read_text().splitlines() if path.is_file() else ():
            line = json.loads(text)
            if line["kind"] == self._kind:
                self._found[line["seed"], line["budget"], line["method"]] = line["figures"]

    def __contains__(self, key: tuple[int, float, str]) -> bool:
        return key in self._found

    def note(self, seed: int, budget: float, method: str, figures: Figures) -> None:
        """Add a method's figures."""
        self._found[seed, budget, method] = figures
        line = {"kind": self._kind, "seed": seed, "budget": budget, "method": method}
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "figures": figures}) + "\n")

    def entries(self) -> dict[tuple[float, str], list[Figures]]:
        """Figures of all seeds by budget and method."""
        found: dict[tuple[float, str], list[Figures]] = {}
        for (_, budget, method), figures in self._found.items():
            found.setdefault((budget, method), []).append(figures)
        return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=sources.SMOLLM2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.625])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--evaluation", type=int, default=32, help="sequences")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--methods", nargs="+", help="only those whose name holds a word")
    parser.add_argument("--handbook", type=Path, help="folder of the handbook's English pages")
    parser.add_argument("--gsm8k-only", action="store_true")
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--no-file", action="store_true", help="print only")
    return parser.parse_args()


def read(tokenizer: Any, options: argparse.Namespace) -> Texts:
    """The texts as tokens."""
    problems = _flow_text.gsm8k()
    if options.gsm8k_only:
        halves = ["\n\n".join(f"{q}\n{a}" for q, a in problems[start::2]) for start in (0, 1)]
        name = "GSM8K's problems, every other one"
    else:
        halves = list(_flow_text.handbook(options.handbook))
        name = "the Debian Administrator's Handbook (English), every other page"
    streams = [
        torch.tensor(tokenizer(half, add_special_tokens=False, verbose=False)["input_ids"])
        for half in halves
    ]
    return Texts(streams[0], streams[1], problems[1 : 2 * options.problems : 2], name)


def measure(
    program: fxgraft.Program,
    tokenizer: Any,
    texts: Texts,
    options: argparse.Namespace,
    seed: int,
    budget: float,
    found: Journal,
) -> None:
    """All methods at one budget with one seed that the journal lacks."""
    choice = calibration.Choice(options.samples, options.length, seed)
    settings = FlowSettings(
        budget=budget, m=WIDTHS, samples=options.samples, length=options.length, seed=seed,
        probes=options.probes,
    )  # fmt: skip
    batches = calibration.from_tokens(texts.calibration, choice)
    study = Study.of(program, settings, Workspace(), batches)
    held_out = Objective.of(program, _sequences(texts.evaluation, options, program.device))
    answers = _answers(tokenizer, texts.problems, program.device)
    text_loss = compare.held_out_loss(study, program, held_out)
    answer_loss = compare.held_out_loss(study, program, answers)
    dense, dense_answers = text_loss({}), answer_loss({})
    if (seed, budget, "dense") not in found:
        found.note(seed, budget, "dense", _figures(math.exp(dense), -dense_answers, 0.0))
    print(f"seed {seed}, budget {budget:g}: dense {math.exp(dense):.2f}, answers "
          f"{-dense_answers:.4f}", flush=True)  # fmt: skip
    lines: list[compare.Line] = []
    for method in compare.methods(study, widths=WIDTHS):
        if options.methods and not any(word in method.name for word in options.methods):
            continue
        if (seed, budget, method.name) in found:
            continue
        start = time.perf_counter()
        made = method.make()
        result = study.run(made, method.name, Workspace(), with_products=method.with_products)
        seconds = time.perf_counter() - start + study.seconds["measure"]
        line = compare.line(study, method.name, result, text_loss)
        log_likelihood = -answer_loss(compare.weights_of(study, result))
        figures = _figures(math.exp(line.held_out), log_likelihood, seconds)
        found.note(seed, budget, method.name, figures)
        print(f"  {method.name:26} sparsity {line.sparsity:.4f} perplexity "
              f"{math.exp(line.held_out):8.1f} answers {log_likelihood:.4f} {seconds:.0f} s",
              flush=True)  # fmt: skip
        lines.append(line)
    print(compare.text(lines, dense), flush=True)


def _figures(perplexity: float, answers: float, seconds: float) -> Figures:
    return {"perplexity": perplexity, "answers": answers, "seconds": seconds}


def _sequences(
    tokens: Tensor, options: argparse.Namespace, device: torch.device
) -> Sequence[Inputs]:
    count = min(options.evaluation, tokens.numel() // options.length)
    rows = tokens[: count * options.length].view(count, options.length)
    batches = [{"input_ids": rows[i : i + 4]} for i in range(0, count, 4)]
    return calibration.to_device(batches, device)


def _answers(tokenizer: Any, problems: Sequence[tuple[str, str]], device: torch.device) -> Answers:
    batches: list[Inputs] = []
    starts: list[int] = []
    for question, answer in problems:
        head = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        tail = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        batches.append({"input_ids": torch.tensor([head + tail], device=device)})
        starts.append(len(head))
    return Answers(batches, True, starts=starts)


def write(
    found: dict[tuple[float, str], list[Figures]],
    texts: Texts,
    options: argparse.Namespace,
) -> None:
    """Write the result file: means over seeds, with targets and peers."""
    rows: list[results.Row] = []
    for (budget, method), entries in found.items():
        mean = statistics.mean(entry["perplexity"] for entry in entries)
        name = f"{method} at {budget:g}" if method != "dense" else f"dense, before {budget:g}"
        rows.append(results.row(
            f"perplexity, {name}", mean, "", target=TARGETS.get((budget, method)),
            peer=_peer(found, budget, method),
        ))  # fmt: skip
        answers = statistics.mean(entry["answers"] for entry in entries)
        rows.append(results.row(f"answers, {name}", answers, "nats per token", better="higher"))
    limit = CPU_MINUTES if options.device == "cpu" else GPU_MINUTES
    slowest = max(
        (entry["seconds"] for (_, method), entries in found.items() if method.startswith("loss")
         for entry in entries), default=0.0,
    ) / 60  # fmt: skip
    rows.append(results.row("measuring, choosing and pruning, the slowest of ours", slowest,
                            "minutes", target=limit))  # fmt: skip
    notes = [
        f"Calibration and evaluation: {texts.name}; {options.samples} sequences of "
        f"{options.length} tokens cut at random (seeds {options.seeds}), {options.evaluation} "
        "sequences of the other half. All linear layers of all blocks are pruned. Mean over seeds.",
        f"Answers: mean log-likelihood of the worked answers of {len(texts.problems)} problems of "
        "GSM8K, given the question.",
    ]
    results.write("flow_quality", "flow", rows, options.out, notes=notes)


def _peer(
    found: dict[tuple[float, str], list[Figures]], budget: float, method: str
) -> tuple[str, float] | None:
    start = PEERS.get(method)
    names = [m for b, m in found if b == budget and start and m.startswith(f"{start} ")]
    fixed = [name for name in names if ":" in name]
    if not fixed:
        return None
    return fixed[0], statistics.mean(e["perplexity"] for e in found[budget, fixed[0]])


if __name__ == "__main__":
    main()
