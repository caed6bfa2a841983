"""``calibrate seal``: thoughts, labels, and the vector against transformers' hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.generation import Vocabulary
from fxgraft.offline import Workspace
from fxgraft.passes.seal import Seal, SealCalibration, SteeringVector
from fxgraft.passes.seal.automaton import tables_of
from fxgraft.passes.seal.statistics import Sums
from fxgraft.passes.seal.thoughts import LABEL_SETS, kind_of, labeller, split
from fxgraft.program import Program
from fxgraft.sources import tokenizer as tokenizer_at
from fxgraft.transform import apply
from tests import model_folder
from tests.command import command

ANSWERS = [
    "<think>one two\n\nfirst sum\n\nWait, check it\n\nsecond\n\nso</think>done\n\nWait, no",
    "no thoughts\n\nWait, here",
    "<think>\n\na sum\n\nAlternatively, this\n\nlast",
    "<think>x\n\nmake sure\n\nmore\n\nend</think>z",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and traces of it."""
    made = model_folder.write(tmp_path_factory.mktemp("model"))
    lines = [json.dumps({"prompt": "ask: ", "response": text}) for text in ANSWERS]
    (made / "traces.jsonl").write_text("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return capture(folder)


def stage(folder: Path, **fields: Any) -> SealCalibration:
    values: dict[str, Any] = {"data": (folder / "traces.jsonl",), **fields}
    return SealCalibration(**values)


@pytest.mark.parametrize(
    ("text", "seal_math", "fixed"),
    [
        ("7+5=12.", "execution", "execution"),
        ("Wait, is it?", "reflection", "reflection"),
        ("wait", "reflection", "reflection"),
        ("But wait, is it?", "execution", "reflection"),
        ("First one. Then wait.", "execution", "execution"),
        ("We are awaiting it", "execution", "execution"),
        ("So 12's correct", "reflection", "reflection"),
        ("Alternatively, add", "transition", "transition"),
        ("Or, alternatively, add", "execution", "transition"),
        ("Alternatively, let me check", "reflection", "reflection"),
        ("Another way is", "transition", "transition"),
        ("I think differenly", "transition", "execution"),
        ("I think differently", "execution", "transition"),
        (" \n Wait", "execution", "reflection"),
        (" Wait", "reflection", "reflection"),
        ("\nWait", "reflection", "reflection"),
        ("", "execution", "execution"),
    ],
)
def test_labels(text: str, seal_math: str, fixed: str) -> None:
    """``seal_math`` keeps the authors' slips: their spelling, and spaces stripped first."""
    assert LABEL_SETS["seal_math"](text) == seal_math
    assert LABEL_SETS["fixed"](text) == fixed


def test_a_function_may_label() -> None:
    assert labeller("tests.passes.test_seal_calibration:by_length")("abc") == "transition"
    with pytest.raises(InputError, match="no labels 'nowhere'"):
        labeller("nowhere")
    with pytest.raises(InputError, match="is no function"):
        labeller("tests.passes.test_seal_calibration:ANSWERS")
    with pytest.raises(InputError, match="call a thought 'odd'"):
        kind_of(lambda text: "odd", "x")


def by_length(text: str) -> str:
    return "transition" if len(text.strip()) < 4 else "execution"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb", []),
        ("<think>a\n\nb", ["b"]),
        ("<think>a\n\nb\n\nc</think>d\n\ne", ["b\n\n", "c"]),
        ("<think>\n\nb\n\n\n\nc", ["b\n\n", "\n\nc"]),
        ("<think>a\n\n</think>b", [""]),
        ("<think>a\n\nb</think>c<think>d\n\ne", ["b", "e"]),
        ("<think>a\r\n\r\nb", ["b"]),
    ],
)
def test_thoughts(folder: Path, text: str, expected: list[str]) -> None:
    tokens = model_folder.tokens_of(folder, text)
    tables = tables_of(str(folder), model_folder.VOCABULARY, "<think>", "</think>", False)
    vocabulary = Vocabulary(tokenizer_at(folder))
    found = [t.text for t in split(tokens, tables.fired(tokens), vocabulary, "</think>")]
    # The newlines before the next break belong to whichever token completes it.
    assert [text.rstrip("\n") for text in found] == [text.rstrip("\n") for text in expected]


def hidden_states(model: nn.Module, tokens: list[int]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return cast(Any, model)(torch.tensor([tokens]), output_hidden_states=True).hidden_states


def test_the_vector_is_the_difference_of_pooled_means(folder: Path, program: Program) -> None:
    """Layer L is entry L of transformers' hidden states, the number of blocks the last norm."""
    layers = (0, 1, 2)
    made = stage(folder, layers=layers).run(program, Workspace())
    model = model_folder.llama()
    tables = tables_of(str(folder), model_folder.VOCABULARY, "<think>", "</think>", False)
    vocabulary, kinds = Vocabulary(tokenizer_at(folder)), dict[bool, list[tuple[Tensor, ...]]]()
    for text in ANSWERS:
        tokens = model_folder.tokens_of(folder, "ask: ") + model_folder.tokens_of(folder, text)
        states = hidden_states(model, tokens)
        for thought in split(tokens, tables.fired(tokens), vocabulary, "</think>"):
            is_execution = LABEL_SETS["fixed"](thought.text) == "execution"
            sample = tuple(state[0, thought.place] for state in states)
            kinds.setdefault(is_execution, []).append(sample)
    assert (len(kinds[True]), len(kinds[False])) == (7, 3)
    for layer in layers:
        means = [torch.stack([s[layer] for s in kinds[k]]).mean(0) for k in (True, False)]
        torch.testing.assert_close(made.tensors[f"layer_{layer}"], means[0] - means[1],
                                   atol=1e-6, rtol=1e-5)  # fmt: skip
    assert made.results["counts"] == {"execution": 7, "reflection": 2, "transition": 1}
    facts = made.results["layers"]["1"]
    assert facts["norm"] == pytest.approx(float(made.tensors["layer_1"].norm()), rel=1e-5)
    assert -1 <= facts["split_half_cosine"] <= 1
    assert any("has only 3 samples" in line for line in made.summary)
    assert made.texts["layer_1.svg"].count("<circle") == 10


def test_order_and_batches_change_nothing(folder: Path, program: Program, tmp_path: Path) -> None:
    first = stage(folder).run(program, Workspace()).tensors
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed((folder / "traces.jsonl").read_text().splitlines())))
    for other in (stage(folder, batch_size=3), stage(folder, data=(turned,))):
        for name, value in other.run(program, Workspace()).tensors.items():
            torch.testing.assert_close(value, first[name], atol=1e-6, rtol=1e-5)


def test_from_the_command_to_the_pass(folder: Path, program: Program, tmp_path: Path) -> None:
    out, data = tmp_path / "vectors", folder / "traces.jsonl"
    arguments = ["calibrate", "seal", str(folder), "--out", str(out), "--data", str(data)]
    assert command(*arguments, "--set", "layers=[0, 1]") == 0
    document = json.loads((out / "artifact.json").read_text())
    assert document["results"]["counts"]["execution"] == 7
    assert {"layer_0.svg", "layer_1.svg"} <= {path.name for path in out.iterdir()}
    best = SteeringVector.load(out)
    assert best.layer == document["results"]["layer"]
    other = SteeringVector.load(out, 1 - best.layer)
    assert other.layer == 1 - best.layer
    assert other.hidden_norm > 0
    item = Seal(vector=out, layer=(0, 1))
    steered = apply(program, item)
    tokens = torch.tensor([model_folder.tokens_of(folder, model_folder.TEXT)])
    assert not torch.equal(steered(tokens)[0], program(tokens)[0])
    stored = [w for name, w in steered.weights() if name.startswith("seal.vector")]
    assert torch.equal(stored[0], SteeringVector.load(out, 0).vector)
    assert torch.equal(stored[1], SteeringVector.load(out, 1).vector)


def test_an_interrupted_run_goes_on(folder: Path, program: Program, tmp_path: Path) -> None:
    lines = (folder / "traces.jsonl").read_text().splitlines() * 8
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    item = stage(folder, data=(tmp_path / "many.jsonl",))
    begun = Workspace.open(tmp_path / "work", {})
    whole = item.run(program, begun)
    again = Workspace.open(tmp_path / "work", {})
    assert (begun.resumed, len(list((tmp_path / "work").glob("*.safetensors")))) == (0, 2)
    same = item.run(program, again)
    assert again.resumed == 2
    assert torch.equal(whole.tensors["layer_1"], same.tensors["layer_1"])


def test_questions_are_answered_first(folder: Path, program: Program, tmp_path: Path) -> None:
    """The trace is the prompt and what ``generate`` gives, by ids."""
    (tmp_path / "q.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"<think>{n}\n\n"}) for n in range(5))
    )
    item = stage(
        folder, data=(tmp_path / "q.jsonl",), max_new_tokens=6,
        labels="tests.passes.test_seal_calibration:by_even_bytes",
    )  # fmt: skip
    made = item.run(program, Workspace())
    assert made.results["traces"] == 5
    # The prompt's last token is a break: at least that one opens a thought.
    assert sum(made.results["counts"].values()) >= 5


def by_even_bytes(text: str) -> str:
    return "execution" if sum(text.encode()) % 2 else "reflection"


@pytest.mark.parametrize(
    ("lines", "fields", "words"),
    [
        (["{"], {}, ":1 is no JSON"),
        (["[1]"], {}, "no JSON object"),
        (['{"text": "x"}'], {}, "its fields are text"),
        (['{"prompt": "", "response": "x"}'], {}, "no trace|empty prompt"),
        (['{"prompt": "a", "response": 3}'], {}, "no trace"),
        ([""], {}, "no traces"),
        (['{"prompt": "a", "response": "<think>a\\n\\nb"}'], {}, "none of the|kind reflection"),
        (['{"prompt": "a", "response": "<think>a\\n\\nWait"}'], {}, "kind execution .0 execution"),
        (['{"prompt": "a", "response": "b"}'], {}, "0 execution, 0 reflection, 0 transition"),
        (['{"prompt": "a", "response": "b"}'], {"layers": (5,)}, "layers 0 to 2"),
        (['{"prompt": "a", "response": "b"}'], {"labels": "odd"}, "no labels 'odd'"),
    ],
)
def test_refused(
    program: Program, tmp_path: Path, lines: list[str], fields: dict[str, Any], words: str
) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=words):
        SealCalibration(data=(tmp_path / "t.jsonl",), **fields).run(program, Workspace())


def test_refused_without_data(program: Program) -> None:
    with pytest.raises(InputError, match="no traces in no file"):
        SealCalibration().run(program, Workspace())
    with pytest.raises(InputError, match="tokenizer is not known"):
        SealCalibration().run(capture(model_folder.llama()), Workspace())


def test_separation_of_known_clouds() -> None:
    """Two clouds 3 apart: area under the curve Phi(3 / sqrt 2), and the direction is found."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 1, 8, generator=generator)
    kinds, halves = torch.arange(4000) % 2, torch.arange(4000) // 2 % 2
    samples[kinds == 0, :, 0] += 3
    parts = [
        vars(Sums.of(samples[rows], kinds[rows], halves[rows]))
        for rows in torch.arange(4000).split(700)
    ]
    sums = Sums.merged(parts, most_samples=1500)
    facts = sums.describe(0, [1, 2])
    assert facts["norm"] == pytest.approx(3, abs=0.1)
    assert facts["split_half_cosine"] > 0.99
    assert facts["separation"]["auc"] == pytest.approx(0.983, abs=0.01)
    assert facts["separation"]["distance"] == pytest.approx(3, abs=0.15)
    # Per coordinate 2 / n, over 8 coordinates and two means of 2,000 samples each.
    assert facts["standard_error"] == pytest.approx((8 * 2 / 2000) ** 0.5, rel=0.05)
    assert len(sums.samples) == 3000
