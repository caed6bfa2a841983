"""The offline stage of ``seal``: from traces to a steering vector (arXiv 2504.07986, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fxgraft import sources
from fxgraft.errors import InputError
from fxgraft.generation import Vocabulary
from fxgraft.generation.prompts import integers
from fxgraft.kernels.spec import dims
from fxgraft.offline import Made, OfflineStage, Workspace
from fxgraft.passes.seal import automaton, picture, traces
from fxgraft.passes.seal.statistics import FEW, Sums
from fxgraft.passes.seal.streams import tapped
from fxgraft.passes.seal.thoughts import KINDS, Kind, Labeller, kind_of, labeller, split
from fxgraft.passes.seal.traces import Trace
from fxgraft.program import Program

_PER_PART = 16
_DEPTH = 5 / 7


class SealCalibration(OfflineStage):
    """Extract steering vectors from chains of thought.

    Runs the model once over each trace and takes the hidden state at each break that opens a
    thought. The vector is the mean over execution thoughts minus the mean over all others.
    """

    name: ClassVar[str] = "seal"

    data: tuple[Path, ...] = ()
    """JSONL files of traces, or of questions that the model answers first."""
    layers: tuple[int, ...] = ()
    """Layers to extract at (the input of that block); default one at 5/7 of the depth."""
    labels: str = "fixed"
    """Label set (`fixed`, `seal_math`) or a function `module:function` from text to kind."""
    against: tuple[Kind, ...] = Field(default=("reflection", "transition"), min_length=1)
    """Kinds of thoughts to steer away from; their samples are pooled."""
    within: Literal["think", "everywhere"] = "think"
    """Look for thoughts only inside a thinking section, or in the whole answer."""
    start: str = Field(default="<think>", min_length=1)
    """Text that opens a thinking section."""
    end: str = Field(default="</think>", min_length=1)
    """Text that closes it."""
    tokenizer: str | None = None
    """Model whose tokenizer to use; default the Program's own source."""
    instruction: str = "Think step by step, in paragraphs, and end with the answer."
    """Put behind each question."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Most tokens of a generated answer."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many traces, the first ones."""
    batch_size: int = Field(default=1, ge=1)
    """Traces per forward pass."""
    most_samples: int = Field(default=1000, ge=2)
    """Hidden states per kind kept for the separation and the plot."""

    def run(self, program: Program, work: Workspace) -> Made:
        """Extract; see ``OfflineStage.run``."""
        source = self.tokenizer or str(program.origin.get("source") or "")
        if not source:
            raise InputError(
                "the model was given as a module, so its tokenizer is not known",
                "set 'tokenizer' to the model's name or folder",
            )
        tokenizer = sources.tokenizer(source)
        found = traces.read(self.data, tokenizer, self.instruction)[: self.limit]
        label = labeller(self.labels)
        extraction = Extraction(program, source, tokenizer, self)
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(found), _PER_PART):
            chunk = found[first : first + _PER_PART]
            work.progress("traces", first, len(found))
            parts.append(
                work.part(
                    f"traces_{first:06d}", lambda c=chunk, f=first: extraction.part(c, f, label)
                )
            )
        work.progress("traces", len(found), len(found))
        return self.made(Sums.merged(parts, self.most_samples), extraction.layers, len(found))

    def made(self, sums: Sums, layers: Sequence[int], count: int) -> Made:
        """The vectors, and what is to be said of them.

        Args:
            sums: over all samples.
            layers: the layers, in the order of the sums.
            count: number of traces.

        Raises:
            InputError: a class is empty.
        """
        against = [KINDS.index(kind) for kind in dict.fromkeys(self.against)]
        sums.check(against)
        direction = sums.direction(against).float()
        facts = {str(layer): sums.describe(n, against) for n, layer in enumerate(layers)}
        best = max(layers, key=lambda layer: _auc(facts[str(layer)]))
        counts = dict(zip(KINDS, integers(sums.counts.sum(0)), strict=True))
        results: dict[str, Any] = {
            "convention": "E-RT", "against": list(self.against), "layer": best,
            "hidden_size": direction.shape[-1], "traces": count, "counts": counts, "layers": facts,
        }  # fmt: skip
        texts = {
            f"layer_{layer}.svg": _plot(sums, n, direction[n], layer)
            for n, layer in enumerate(layers)
        }
        tensors = {f"layer_{layer}": direction[n] for n, layer in enumerate(layers)}
        return Made(tensors, results, _summary(results, against), texts)


class Extraction:
    """Collects hidden states at breaks through the graph.

    Args:
        program: the model.
        source: of its tokenizer.
        tokenizer: of transformers.
        settings: of the stage.

    Raises:
        InputError: a layer does not exist, or the tokenizer cannot spell breaks or tags.
    """

    def __init__(
        self, program: Program, source: str, tokenizer: Any, settings: SealCalibration
    ) -> None:
        count = len(program.layers)
        self.layers = settings.layers or (round(count * _DEPTH),)
        wrong = [layer for layer in self.layers if not 0 <= layer <= count]
        if wrong:
            raise InputError(
                f"'layers' has {wrong[0]}, the model has the layers 0 to {count}",
                f"{count} stands for the stream after the final norm",
            )
        self.program, self.settings = program, settings
        self.tables = automaton.tables_of(
            source, _size(program), settings.start, settings.end, settings.within == "everywhere"
        )
        self.vocabulary = Vocabulary(tokenizer)
        self._tapped = tapped(program, self.layers)

    def part(self, chunk: Sequence[Trace], first: int, label: Labeller) -> dict[str, Tensor]:
        """Sums over some traces.

        Args:
            chunk: the traces; those without an answer are answered first.
            first: the number of the first one.
            label: says the kind of a thought.
        """
        whole = traces.answered(self.program, chunk, self.settings.max_new_tokens)
        samples: list[Tensor] = []
        kinds: list[int] = []
        halves: list[int] = []
        size = self.settings.batch_size
        for start in range(0, len(whole), size):
            batch = whole[start : start + size]
            labelled = [self.labelled(trace, label) for trace in batch]
            streams = self._streams(batch) if any(labelled) else ()
            for row, thoughts in enumerate(labelled):
                places = [place for place, _ in thoughts]
                samples += [torch.stack([s[row, places] for s in streams], 1)] if places else []
                kinds += [kind for _, kind in thoughts]
                halves += [(first + start + row) % 2] * len(thoughts)
        width = int(dims(self._tapped.output_nodes[f"layer_{self.layers[0]}"])[-1])  # pyright: ignore[reportArgumentType]
        empty = torch.empty(0, len(self.layers), width)
        every = torch.cat([empty, *(one.cpu().float() for one in samples)])
        sums = Sums.of(every, torch.tensor(kinds).long(), torch.tensor(halves).long())
        return vars(sums)

    def labelled(self, trace: Trace, label: Labeller) -> list[tuple[int, int]]:
        """The place and kind of each thought of the answer."""
        tokens = self._cut(trace.tokens)
        # The last token of the prompt may be the break that opens the first thought.
        first = len(trace.prompt) - 1
        breaks = [place for place in self.tables.fired(tokens) if place >= first]
        thoughts = split(tokens, breaks, self.vocabulary, self.settings.end)
        return [(thought.place, kind_of(label, thought.text)) for thought in thoughts]

    def _cut(self, tokens: Sequence[int]) -> Sequence[int]:
        longest = self.program.origin.get("context_length")
        return tokens[:longest] if longest else tokens

    def _streams(self, batch: Sequence[Trace]) -> tuple[Tensor, ...]:
        """The residual stream at each layer, [B, S, D]; padding on the right is seen by nobody."""
        rows = [self._cut(trace.tokens) for trace in batch]
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.int64, device=self.program.device)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, device=ids.device)
            mask[number, : len(row)] = 1
        takes_mask = any(spec.name == "attention_mask" for spec in self._tapped.inputs)
        return self._tapped(ids, **({"attention_mask": mask} if takes_mask else {}))


def _size(program: Program) -> int:
    return program.input("input_ids").high or int(dims(program.output_nodes["logits"])[-1])  # pyright: ignore[reportArgumentType]


def _auc(facts: dict[str, Any]) -> float:
    separation: dict[str, float] | None = facts["separation"]
    return separation["auc"] if separation else 0.0


def _plot(sums: Sums, place: int, direction: Tensor, layer: int) -> str:
    points = picture.plane(sums.samples[:, place], direction)
    title = f"layer {layer}: along the vector (right) and across it"
    return picture.scatter(points, sums.kinds, title)


def _summary(results: dict[str, Any], against: Sequence[int]) -> list[str]:
    counts: dict[str, int] = results["counts"]
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    lines = [f"{said} in {results['traces']} traces"]
    for layer, facts in results["layers"].items():
        separation = facts["separation"]
        auc = f", separation (AUC) {separation['auc']:.3f}" if separation else ""
        cosine = facts["split_half_cosine"]
        halves = "" if cosine is None else f", split-half cosine {cosine:.3f}"
        lines.append(
            f"layer {layer}: norm {facts['norm']:.4g} ± {facts['standard_error']:.2g}, "
            f"{facts['share']:.3f} of a hidden state's{halves}{auc}"
        )
    fewest = min(counts[KINDS[0]], sum(counts[KINDS[kind]] for kind in against))
    if fewest < FEW:
        lines.append(f"warning: a class has only {fewest} samples, {FEW} make a stable direction")
    return lines
