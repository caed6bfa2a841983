"""SPIN on a small LLaVA with a planted habit of language: hallucinations, F1, yes-rate, controls.

    python benchmarks/spin_quality.py                      # on one GPU, about 20 minutes
    python benchmarks/spin_quality.py --model FILE.gguf    # SmolLM2-135M-Instruct from a file
    python benchmarks/spin_quality.py --stop-after 540     # part of it; run again to go on
    python benchmarks/spin_quality.py --tiny --folder /tmp/tiny --out /tmp/tiny   # a toy on the CPU

The language model is SmolLM2-135M; tower, projector and low-rank changes of its matrices are
trained for 8 minutes. ``--folder`` keeps their weights in bf16 (``weights.safetensors``, 15 MiB,
with ``training.json``) and the counts of each setting (``measured.json``, about 2 MB), so that any
run, also on another machine, goes on where the last one stopped. The model is captured, and
everything below is greedy, on the torch backend.

For each score, and for the controls, heads kept, factor and layers are chosen on scenes that are
used for nothing else: fewest hallucinated objects in captions (CHAIR_I), the yes-rate within 2
points of the plain model's, F1 of questions and of captions at most 1 point lower. On other scenes
the choice is measured beside random heads and uniform scaling with the same mean square of gates.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import _spin_scenes as world
import numpy as np
import torch
from _spin_llava import IMAGE, TINY, Recipe, Words, trained_model
from _spin_scenes import Figures, figures

import fxgraft
from fxgraft import generation, images, results
from fxgraft.image_prompts import ImageStepModel
from fxgraft.passes.spin import Spin

HERE = Path(__file__).parent
FOLDER = HERE.parent / "out" / "spin_llava"
Method = Literal["logit_sum", "mass", "random", "uniform"]
SCORES: tuple[Method, ...] = ("logit_sum", "mass")
METHODS: tuple[Method, ...] = (*SCORES, "random", "uniform")
FACTORS = (0.0, 0.4, 0.8)
SEEDS = 5
YES_POINTS, F1_POINTS = 2.0, 1.0
TOGETHER = 0.5
LONGEST = 40
QUESTION_BATCH, CAPTION_BATCH, CAPTURED = 256, 256, 32
RESAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """How heads are suppressed.

    Attributes:
        score: what ranks them; None is the plain model.
        heads: how many stay.
        factor: of the others.
        layers: first, and the one behind the last.
        seed: of random heads.
    """

    score: Method | None = None
    heads: int = 0
    factor: float = 1.0
    layers: tuple[int, int] = (0, 0)
    seed: int = 0

    @property
    def steps(self) -> list[Spin]:
        """The pass, if any."""
        if self.score is None:
            return []
        fields = {"heads": self.heads, "factor": self.factor, "layers": self.layers}
        return [Spin(score=self.score, seed=self.seed, **cast(Any, fields))]

    def control(self, score: Method, heads: int, seed: int = 0) -> Setting:
        """The same mean square of the gates, by random heads or over all of ``heads`` alike."""
        if score == "random":
            return replace(self, score=score, seed=seed)
        energy = (self.heads + (heads - self.heads) * self.factor**2) / heads
        return replace(self, score=score, heads=0, factor=energy**0.5)

    def __str__(self) -> str:
        if self.score is None:
            return "plain"
        kept = f"{self.heads} heads kept, the others" if self.heads else "all heads"
        seed = f", seed {self.seed}" if self.score == "random" else ""
        first, end = self.layers
        return f"{self.score}: {kept} times {self.factor:.4g}, layers {first} to {end - 1}{seed}"


PLAIN = Setting()


@dataclass(frozen=True)
class Probes:
    """Scenes to be asked about.

    Attributes:
        seed: of the scenes.
        scenes: N of them.
        probes: questions on each.
        features: of their pictures, [N, P, D].
    """

    seed: int
    scenes: list[world.Scene]
    probes: list[world.Probe]
    features: torch.Tensor


def main() -> None:
    """Train, choose, measure, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="alias or file of SmolLM2-135M")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the trained model")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds of this run")
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=(128, 500), help="chosen on, measured"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU")
    arguments = parser.parse_args()
    begun = time.monotonic()
    deadline = begun + arguments.stop_after
    recipe = TINY if arguments.tiny else Recipe(arguments.model)
    torch.set_float32_matmul_precision("high")
    trained = trained_model(recipe, arguments.folder, deadline)
    if trained is None:
        return
    study = Study(*trained, recipe.device, arguments.folder, deadline)
    del trained
    print(f"captured, {time.monotonic() - begun:.0f} s", flush=True)
    choosing, measured = (
        study.probes(seed, count)
        for seed, count in zip((2001, 2002), arguments.scenes, strict=True)
    )
    try:
        chosen: dict[Method, Setting | None] = {
            method: study.choose(method, choosing) for method in METHODS
        }
        found = study.measure(chosen, measured)
    except TimeoutError:
        print("out of time; run again to go on", flush=True)
        return
    write(Evidence(chosen, found, study.heads, study.layers, arguments.folder), arguments.out)


class Study:
    """A captured model, and all that was measured on it.

    Args:
        model: LLaVA.
        words: of its language model.
        device: it runs on.
        folder: keeps what was measured.
        deadline: of ``time.monotonic``, after which nothing new is measured.
    """

    def __init__(
        self, model: Any, words: Words, device: str, folder: Path, deadline: float
    ) -> None:
        self.words, self.device, self.deadline = words, device, deadline
        self.program = captured(model, words, device)
        text = model.config.text_config
        self.heads, self.layers = text.num_attention_heads, text.num_hidden_layers
        self._file = folder / "measured.json"
        self._known = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def probes(self, seed: int, count: int) -> Probes:
        """Scenes in which half of the partners are missing."""
        generator = random.Random(seed)
        scenes = world.scenes(generator, count, TOGETHER)
        pixels = world.draw(scenes, seed, self.device)
        encoder = images.image_encoder(self.program)
        features = images.encode(encoder, {"pixel_values": pixels})
        probes = [world.probe(generator, scene) for scene in scenes]
        return Probes(seed, scenes, probes, features.view(count, -1, features.shape[-1]))

    def choose(self, method: Method, probes: Probes) -> Setting | None:
        """The admissible setting with the fewest hallucinations; None if none beats the plain.

        Heads and factor are tried in all layers, the three best then in either half of them.
        """
        middle = self.layers // 2
        tried = self.candidates(method)
        ranked = sorted(tried, key=lambda one: self._rank(one, probes))
        halves = ((0, middle), (middle, self.layers))
        tried += [replace(one, layers=layers) for one in ranked[:3] for layers in halves]
        best = min([PLAIN, *tried], key=lambda one: self._rank(one, probes))
        print(f"chosen for {method}: {best}", flush=True)
        return None if best == PLAIN else best

    def _rank(self, setting: Setting, probes: Probes) -> tuple[bool, float]:
        """Admissible ones by hallucinations, then others by how far they move the yes-rate."""
        plain = figures(self.counts(PLAIN, probes))
        found = figures(self.counts(setting, probes))
        if admissible(found, plain):
            return False, float(found["CHAIR_I"])
        return True, abs(float(found["yes-rate"] - plain["yes-rate"]))

    def candidates(self, method: Method) -> list[Setting]:
        """Three shares of heads and three factors, in all layers."""
        shares = sorted({max(self.heads * share // 9, 1) for share in (8, 7, 5)}, reverse=True)
        layers = (0, self.layers)
        found = [Setting("logit_sum", heads, factor, layers)
                 for heads in shares for factor in FACTORS]  # fmt: skip
        if method in SCORES:
            return [replace(one, score=method) for one in found]
        return [one.control(method, self.heads) for one in found]

    def measure(
        self, chosen: dict[Method, Setting | None], probes: Probes
    ) -> dict[Setting, np.ndarray]:
        """Counts of the plain model, of each choice, and of controls beside it."""
        settings = [PLAIN, *(one for one in chosen.values() if one is not None)]
        for score in SCORES:
            usual = published(score, self.heads, self.layers)
            base = chosen[score] or usual
            settings += [usual, base, *controls(base, self.heads)]
        if (one := chosen["random"]) is not None:
            settings += [replace(one, seed=seed) for seed in range(1, SEEDS)]
        return {one: self.counts(one, probes) for one in dict.fromkeys(settings)}

    def counts(self, setting: Setting, probes: Probes) -> np.ndarray:
        """Counts [N, columns of ``figures``], measured or remembered.

        Raises:
            TimeoutError: the time of this run is over.
        """
        key = f"{setting}, {len(probes.scenes)} scenes of seed {probes.seed}"
        if key not in self._known:
            if time.monotonic() > self.deadline:
                raise TimeoutError
            begun = time.monotonic()
            self._known[key] = self._count(setting, probes)
            self._file.write_text(json.dumps(self._known))
            said = told(figures(np.array(self._known[key])))
            print(f"{key}, {time.monotonic() - begun:.1f} s: {said}", flush=True)
        return np.array(self._known[key])

    def _count(self, setting: Setting, probes: Probes) -> list[list[int]]:
        compiled = fxgraft.compile(
            self.program, setting.steps, backend="torch", options={"mode": "eager"}, check=False
        )
        numbers = range(len(probes.scenes))
        asked = [(n, self.words.question_prompt(thing))
                 for n in numbers for thing in probes.probes[n].questions]  # fmt: skip
        answers = self._answers(compiled.step_model, asked, probes, QUESTION_BATCH, 1)
        prompts = [(n, self.words.caption_prompt) for n in numbers]
        captions = self._answers(compiled.step_model, prompts, probes, CAPTION_BATCH, LONGEST)
        each = len(answers) // len(numbers)
        return [
            self._row(probes.scenes[n], [one[0] for one in answers[n * each : (n + 1) * each]],
                      captions[n])
            for n in numbers
        ]  # fmt: skip

    def _answers(
        self, model: Any, prompts: Sequence[tuple[int, list[int]]], probes: Probes, batch: int,
        longest: int,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens for each prompt; prompts of a kind have one length."""
        found: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            numbers, ids = zip(*prompts[start : start + batch], strict=True)
            features = probes.features[list(numbers)].flatten(0, 1)
            output = generation.generate(
                ImageStepModel(model, features, (IMAGE,)),
                torch.tensor(ids, device=self.device),
                torch.ones(len(ids), len(ids[0]), dtype=torch.int64, device=self.device),
                pad_token_id=0, max_new_tokens=longest, eos_token_id=[self.words.end],
                return_dict=True,
            )  # fmt: skip
            found += [cast(Any, one).tolist() for one in output.new_tokens]
        return found

    def _row(self, scene: world.Scene, answers: list[int], caption: list[int]) -> list[int]:
        per = len(answers) // (1 + len(world.SPLITS))
        yes = [token == self.words.yes for token in answers]
        present, splits = sum(yes[:per]), [sum(yes[n : n + per])
                                           for n in range(per, len(yes), per)]  # fmt: skip
        unclear = sum(token not in (self.words.yes, self.words.no) for token in answers)
        named = self.words.objects(caption)
        wrong = len(named - set(scene.objects))
        pairs = [number for one in splits for number in (one, per - one)]
        return [present, per - present, *pairs, len(named), wrong, int(wrong > 0),
                len(scene.objects), unclear]  # fmt: skip


def captured(model: Any, words: Words, device: str) -> fxgraft.Program:
    """The model's graph; the number of texts and their length stay open."""
    ids = torch.tensor([words.caption_prompt] * CAPTURED, device=device)
    pixels = torch.zeros(CAPTURED, 3, world.SIZE, world.SIZE, device=device)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    text = {0: "batch", 1: "sequence"}
    dynamic = {"input_ids": text, "attention_mask": text}
    return fxgraft.capture(model, example, dynamic=dynamic)


def published(score: Method, heads: int, layers: int) -> Setting:
    """What the paper's authors ran LLaVA with on questions: 0.8 of the heads, 0.1, all layers."""
    return Setting(score, int(0.8 * heads), 0.1, (0, layers))


def controls(base: Setting, heads: int) -> list[Setting]:
    """Random heads with several seeds, and uniform scaling."""
    found = [base.control("random", heads, seed) for seed in range(SEEDS)]
    return [*found, base.control("uniform", heads)]


def admissible(found: Figures, plain: Figures) -> bool:
    """Whether the yes-rate holds and no F1 falls by more than a point."""
    kept = all(found[name] >= plain[name] - F1_POINTS for name in ("F1", "F1 of captions"))
    return kept and abs(found["yes-rate"] - plain["yes-rate"]) <= YES_POINTS


def told(found: Figures) -> str:
    """The main figures in words."""
    splits = ", ".join(
        f"{split} {found[f'F1, {split}']:.1f}/{found[f'yes-rate, {split}']:.1f}"
        for split in world.SPLITS
    )
    return (
        f"CHAIR_I {found['CHAIR_I']:.2f}, CHAIR_S {found['CHAIR_S']:.1f}, caption recall "
        f"{found['recall of captions']:.1f}, caption F1 {found['F1 of captions']:.1f}; F1/yes-rate "
        f"{splits}; {found['neither']:.0f} answers neither yes nor no"
    )


@dataclass(frozen=True)
class Evidence:
    """All that was found.

    Attributes:
        chosen: settings by method.
        found: counts by setting, on the measured scenes.
        heads, layers: of the language model.
        folder: of the trained model.
    """

    chosen: dict[Method, Setting | None]
    found: dict[Setting, np.ndarray]
    heads: int
    layers: int
    folder: Path

    def difference(self, name: str, left: Setting, right: Sequence[Setting]) -> tuple[float, ...]:
        """A figure of one setting minus the mean of others' over the same scenes, and its 95 %
        interval by drawing scenes anew."""
        generator = np.random.default_rng(0)
        count = len(self.found[left])
        chosen = generator.integers(count, size=(RESAMPLES, count))
        chosen[0] = np.arange(count)

        def values(setting: Setting) -> np.ndarray:
            weights = np.stack([np.bincount(one, minlength=count) for one in chosen])
            totals = weights @ self.found[setting]
            return figures(totals[:, None])[name]

        found = values(left) - np.mean([values(one) for one in right], 0)
        low, high = np.percentile(found[1:], (2.5, 97.5))
        return float(found[0]), float(low), float(high)


def write(evidence: Evidence, out: Path) -> None:
    """Write rows, notes and the plot."""
    plain = figures(evidence.found[PLAIN])
    rows = [results.row(f"{name}, plain", float(plain[name]), "%", better=better(name))
            for name in ("CHAIR_I", "CHAIR_S", "F1 of captions", "F1", "yes-rate")]  # fmt: skip
    notes = [f"Training: {(evidence.folder / 'training.json').read_text()}", *described(evidence)]
    for score in SCORES:
        setting = evidence.chosen[score]
        if setting is None:
            setting = published(score, evidence.heads, evidence.layers)
            notes.append(f"Nothing admissible by {score} had fewer hallucinations than the plain "
                         f"model; rows show the published setting, {setting}.")  # fmt: skip
        rows += compared(evidence, setting)
        notes += intervals(evidence, setting)
    notes += [f"{setting}: {told(figures(counts))}" for setting, counts in evidence.found.items()]
    print("\n".join(notes))
    results.write("spin_quality", "spin", rows, out, notes=notes)
    plot(evidence, out)


def described(evidence: Evidence) -> list[str]:
    """What was done."""
    count = len(evidence.found[PLAIN])
    chosen = "; ".join(f"{method}: {one or 'none'}" for method, one in evidence.chosen.items())
    return [
        f"{evidence.heads} heads, {evidence.layers} layers; partners come along in 90 % of the "
        f"training scenes, in {100 * TOGETHER:.0f} % of the {count} measured ones; 3 questions of "
        "each kind per scene; rows 'last'.",
        "F1 and yes-rate without a split are means over random, popular and adversarial.",
        f"Chosen on other scenes (yes-rate within {YES_POINTS:g} points, F1 at most {F1_POINTS:g} "
        f"lower): {chosen}.",
    ]


def compared(evidence: Evidence, setting: Setting) -> Iterable[results.Row]:
    """A choice beside the plain model and the better of its controls."""
    own = figures(evidence.found[setting])
    plain = figures(evidence.found[PLAIN])
    names = {one: figures(evidence.found[one]) for one in controls(setting, evidence.heads)}
    random_rates = [found for one, found in names.items() if one.score == "random"]
    scaled = next(found for one, found in names.items() if one.score == "uniform")

    def peers(name: str) -> tuple[tuple[str, float], tuple[str, float]]:
        mean = float(np.mean([found[name] for found in random_rates]))
        return (f"random heads, mean of {SEEDS} seeds", mean), ("uniform", float(scaled[name]))

    for name in ("CHAIR_I", "CHAIR_S", "F1 of captions", "F1"):
        pick: Callable[..., Any] = max if better(name) == "higher" else min
        best = pick(peers(name), key=lambda one: one[1])
        yield results.row(f"{name}, {setting.score}", float(own[name]), "%", target=best[1],
                          better=better(name), peer=best)  # fmt: skip
    moved = abs(float(own["yes-rate"] - plain["yes-rate"]))
    yield results.row(f"yes-rate moved, {setting.score}", moved, "points", target=YES_POINTS)


def better(name: str) -> Literal["lower", "higher"]:
    """Which direction of a figure is better."""
    return "lower" if name.startswith("CHAIR") else "higher"


def intervals(evidence: Evidence, setting: Setting) -> list[str]:
    """Differences to the plain model and to each control, with intervals."""
    drawn = [setting.control("random", evidence.heads, seed) for seed in range(SEEDS)]
    against = {"plain": [PLAIN], "random heads": drawn,
               "uniform": [setting.control("uniform", evidence.heads)]}  # fmt: skip
    for method in ("random", "uniform"):
        own = evidence.chosen[method]
        if own is not None:
            seeds = range(SEEDS) if method == "random" else (0,)
            against[f"{method} at its own choice"] = [replace(own, seed=seed) for seed in seeds]
    lines: list[str] = []
    for other, settings in against.items():
        parts: list[str] = []
        for name in ("CHAIR_I", "F1 of captions", "F1", "yes-rate"):
            value, low, high = evidence.difference(name, setting, settings)
            parts.append(f"{name} {value:+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"{setting.score} minus {other}, points, 95 %: {', '.join(parts)}")
    return lines


def plot(evidence: Evidence, out: Path) -> None:
    """Hallucinations against F1 of questions and against the yes-rate, a point per setting."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    library: Any = pyplot
    figure, axes = library.subplots(1, 2, figsize=(11, 4.5))
    for axis, name in zip(axes, ("F1", "yes-rate"), strict=True):
        for method in (None, *METHODS):
            points = [figures(counts) for one, counts in evidence.found.items()
                      if one.score == method]  # fmt: skip
            across, up = ([one[key] for one in points] for key in (name, "CHAIR_I"))
            axis.plot(across, up, "o", label=method or "plain")
        axis.set_xlabel(f"{name} of questions, %")
        axis.set_ylabel("CHAIR_I, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "spin_quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
