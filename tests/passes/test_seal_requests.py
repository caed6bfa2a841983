"""``seal`` with a vector and a strength for each row, at several layers, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.seal import Seal, SteeringVector
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.stepping import StateModel
from fxgraft.transform import apply
from tests import model_folder

NAMES = ("none", "one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and two vectors."""
    made = model_folder.write_tokenizer(tmp_path_factory.mktemp("seal"))
    for seed, name in enumerate(NAMES[1:]):
        vector = torch.randn(model_folder.HIDDEN, generator=torch.Generator().manual_seed(seed))
        model_folder.write_vector(made / name, vector=vector)
    return made


@pytest.fixture(scope="module")
def program() -> Program:
    return apply(capture(model_folder.llama()), Optimize())


@pytest.fixture(scope="module")
def ids(folder: Path) -> Tensor:
    return torch.tensor([model_folder.tokens_of(folder, model_folder.TEXT)])


def requests(folder: Path, **fields: Any) -> Seal:
    vectors = {name: folder / name for name in NAMES[1:]}
    values: dict[str, Any] = {"vectors": vectors, "tokenizer": str(folder), **fields}
    return Seal(**values)


def one(folder: Path, name: str, **fields: Any) -> Seal:
    return Seal(vector=folder / name, tokenizer=str(folder), **fields)


def test_each_row_gets_its_own(program: Program, folder: Path, ids: Tensor) -> None:
    """Bit for bit what a Program with that vector and coefficient alone gives."""
    steered = apply(program, requests(folder, coefficient=2.0))
    assert steered.input("seal_vector").names == NAMES
    got = steered(
        ids.expand(5, -1),
        seal_vector=torch.tensor([0, 1, 2, 1, 1]),
        seal_strength=torch.tensor([1.0, 1.0, 0.25, -0.5, 0.0]),
    )[0]
    plain = program(ids.expand(5, -1))[0]
    assert torch.equal(got[[0, 4]], plain[[0, 4]])
    for row, name, coefficient in ((1, "one", 2.0), (2, "two", 0.5), (3, "one", -1.0)):
        alone = apply(program, one(folder, name, coefficient=coefficient))(ids.expand(5, -1))[0]
        assert torch.equal(got[row], alone[row])
        assert not torch.equal(got[row], plain[row])


def test_rows_that_choose_nothing_take_the_default(
    program: Program, folder: Path, ids: Tensor
) -> None:
    assert torch.equal(apply(program, requests(folder))(ids)[0], program(ids)[0])
    steered = apply(program, requests(folder, default="two"))
    assert steered.input("seal_vector").names == ("two", "none", "one")
    assert torch.equal(steered(ids)[0], apply(program, one(folder, "two"))(ids)[0])
    nothing = steered(ids, seal_vector=torch.tensor([1]))[0]
    assert torch.equal(nothing, program(ids)[0])


def test_several_layers(program: Program, folder: Path, ids: Tensor) -> None:
    """One automaton serves them all; the same as one pass per layer."""
    together = apply(program, one(folder, "one", layer=(1, 0)))
    apart = apply(apply(program, one(folder, "one", layer=0)), one(folder, "one", layer=1))
    assert torch.equal(together(ids)[0], apart(ids)[0])
    automaton = torch.ops.fxgraft.token_automaton.default
    assert len(together.graph.find_nodes(op="call_function", target=automaton)) == 1
    everyone = apply(program, requests(folder, layer=(0, 1)))
    got = everyone(ids, seal_vector=torch.tensor([1]))[0]
    assert torch.equal(got, together(ids)[0])


def test_steps_carry_the_automaton_and_take_requests(
    program: Program, folder: Path, ids: Tensor
) -> None:
    """Prefill that ends inside a break, a chunk, and single tokens steer as the whole does."""
    steered = apply(program, requests(folder, default="one"))
    whole = steered(ids)[0]
    step = insert_state(steered)
    model = StateModel(step, lambda values: step.program.graph_module(*values))
    state, start = model.empty_state(1), 0
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    for end in [12, 16, *range(17, ids.shape[1] + 1)]:
        got, state = model.step(ids[:, start:end], mask[:, :end], positions[:, start:end], state)
        torch.testing.assert_close(got, whole[:, end - 1], atol=2e-5, rtol=1e-4)
        start = end


def test_layers_below_keep_every_bit(program: Program, folder: Path, ids: Tensor) -> None:
    """Keys and values below the layer, and the whole stream up to it, are as before (S8)."""
    step, plain = insert_state(apply(program, one(folder, "one"))), insert_state(program)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "position_ids": torch.arange(ids.shape[1])[None]}  # fmt: skip

    def states(item: Any) -> dict[str, Tensor]:
        own = [values[spec.name] for spec in item.own_inputs]
        results = item.program.graph_module(*own, *item.empty_state(1))
        names = [state.name.partition(".")[2] for state in item.states]
        found: dict[str, Tensor] = {}
        for name, value in zip(names, results[1:], strict=True):
            found[f"{name}{sum(known.startswith(name) for known in found)}"] = value
        return found

    steered, before = states(step), states(plain)
    for name in ("key", "value"):
        assert torch.equal(steered[f"{name}0"], before[f"{name}0"])
        assert not torch.equal(steered[f"{name}1"], before[f"{name}1"])


def test_saved_and_loaded(program: Program, folder: Path, ids: Tensor, tmp_path: Path) -> None:
    steered = apply(program, requests(folder))
    steered.save(tmp_path / "saved")
    loaded = Program.load(tmp_path / "saved")
    assert loaded.inputs == steered.inputs
    choice = {"seal_vector": torch.tensor([2]), "seal_strength": torch.tensor([0.5])}
    assert torch.equal(loaded(ids, **choice)[0], steered(ids, **choice)[0])


def test_neutral_setting_is_checked(program: Program, folder: Path) -> None:
    record = apply(program, requests(folder, default="one")).history[-1]
    assert record.error == 0.0
    assert record.summary[0] == "one of one, none, two added entering block 1, coefficient 1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either 'vector' or 'vectors'"),
        ({"vector": "a", "vectors": {"b": "c"}}, "either 'vector' or 'vectors'"),
        ({"vectors": {"none": "a"}}, "stands for no vector"),
        ({"vectors": {"a": "b"}, "default": "c"}, "one of none, a"),
        ({"vector": "a", "coefficient": float("nan")}, "finite"),
        ({"vector": "a", "strength": 1.0}, "no key 'strength'"),
        ({"vector": "a", "start": ""}, "at least 1"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Seal.from_config(fields)


def test_what_does_not_fit_the_model(program: Program, folder: Path, tmp_path: Path) -> None:
    def refused(words: str, **fields: Any) -> None:
        with pytest.raises(InputError, match=words):
            apply(program, requests(folder, **fields))

    refused("layer -1 is outside 0 to 1", layer=(0, -1))
    refused("layer 2 is outside 0 to 1", layer=2)
    refused("cannot spell '思考'", start="思考", tokenizer=str(_ascii_tokenizer(tmp_path)))
    deeper = model_folder.write_vector(tmp_path / "deeper", layer=0)
    refused(r"for the layers \[0, 1\]", vectors={"a": folder / "one", "b": deeper})
    twice = apply(program, requests(folder))
    with pytest.raises(InputError, match="already has an input 'seal_vector'"):
        apply(twice, requests(folder))


def test_vectors_of_another_model(folder: Path, tmp_path: Path) -> None:
    """Known by source, or by weights that no pass has changed."""
    program = capture(model_folder.llama())
    program.origin["source"] = "some/model-7b"

    def item(**facts: Any) -> Seal:
        name = tmp_path / "-".join(map(str, facts.values())).replace("/", "_")
        return one(folder, str(model_folder.write_vector(name, **facts)))

    apply(program, item(model="/home/other/Model-7B"))
    with pytest.raises(InputError, match="from model 'some/model-1b', this one is 'some/model-7b'"):
        apply(program, item(model="some/model-1b"))
    other = item(model="some/model-1b").model_copy(update={"any_model": True})
    apply(program, other)
    program.origin["source"] = None
    with pytest.raises(InputError, match="other weights"):
        apply(program, item(fingerprint="0123456789abcdef"))


def test_warnings(program: Program, folder: Path, tmp_path: Path) -> None:
    """A vector as long as what it is added to, and tags that the model may never write."""
    vector = SteeringVector.load(folder / "one").vector
    path = model_folder.write_vector(
        tmp_path / "long", vector=vector, hidden_norm=float(vector.norm()) / 2
    )
    summary = apply(program, one(folder, str(path))).history[-1].summary
    assert any("adds 2.00 of a hidden state's norm" in line for line in summary)
    assert any("'<think>' is no token" in line for line in summary)
    quiet = apply(program, one(folder, str(path), coefficient=0.1, start="</think>"))
    assert not [line for line in quiet.history[-1].summary if "warning" in line]


def _ascii_tokenizer(folder: Path) -> Path:
    """A tokenizer whose only tokens are printable ASCII characters and a newline."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    characters = [*map(chr, range(33, 127)), "Ċ", "Ġ"]
    built: Any = Tokenizer(
        tokenizer_models.BPE(vocab={char: n for n, char in enumerate(characters)}, merges=[])
    )
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    target = folder / "ascii"
    cast(Any, PreTrainedTokenizerFast)(tokenizer_object=built).save_pretrained(target)
    return target
