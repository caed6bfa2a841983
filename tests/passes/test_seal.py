"""``seal``: the vector is added where a paragraph breaks inside a thinking section only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import PreTrainedTokenizerFast

from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.generation import Vocabulary
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.seal import Seal, SteeringVector
from fxgraft.passes.seal.automaton import Automaton, build
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.stepping import StateModel
from fxgraft.transform import apply
from tests import models

HIDDEN, LAYERS, VOCABULARY = 64, 3, 300
TEXT = "a\n\n<think>one\n\ntwo\n \nthree\r\n\r\n\n\nfour</think>five\n\nsix"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that knows a double newline and one tag as single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    vocabulary["ĊĊ"] = len(vocabulary)
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</think>", special=True)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Program]:
    model = models.llama(vocab_size=VOCABULARY, num_hidden_layers=LAYERS)
    return model, capture(model)


def vector_file(folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "vector": torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3)),
        "convention": "E-RT", "layer": 1, "model": "", **changes,
    }  # fmt: skip
    return SteeringVector(**values).save(folder / "vector.safetensors")


def seal(folder: Path, tokenizer: Path, **fields: Any) -> Seal:
    vector = fields.pop("vector", None) or vector_file(folder)
    return Seal(vector=vector, tokenizer=str(tokenizer), **fields)


def tokens_of(tokenizer: Path, text: str) -> list[int]:
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    return cast("list[int]", loaded(text)["input_ids"])


def expected_firings(pieces: list[bytes], start: bytes, end: bytes) -> list[bool]:
    """The rule, written over the whole text: a position fires if a byte of its token does."""
    text = b"".join(pieces)
    thinking, run, fired = False, 0, [False] * len(text)
    for place in range(len(text)):
        if text[: place + 1].endswith(start):
            thinking = True
        if text[: place + 1].endswith(end):
            thinking = False
        if text[place : place + 1] == b"\n":
            run += 1
            fired[place] = run == 2 and thinking
        elif text[place : place + 1] != b"\r":
            run = 0
    ends = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
    return [any(fired[stop - len(piece) : stop]) for piece, stop in zip(pieces, ends, strict=True)]


def run_automaton(tables: Automaton, ids: list[int]) -> list[bool]:
    fired = tables.fired(ids)
    return [place in fired for place in range(len(ids))]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8]), min_size=1, max_size=40))
def test_automaton_follows_the_rule(ids: list[int]) -> None:
    vocabulary = [b"\n", b"\n\n", b"x", b"<t", b">", b"</t>", b"\r\n", b"a\n\nb", b"<"]
    tables = build(vocabulary, "<t>", "</t>")
    pieces = [vocabulary[index] for index in ids]
    assert run_automaton(tables, ids) == expected_firings(pieces, b"<t>", b"</t>")


def test_two_newlines_or_one_token_fire_alike() -> None:
    tables = build([b"\n", b"\n\n", b"<t>", b"x", b"</t>"], "<t>", "</t>")
    assert run_automaton(tables, [2, 3, 0, 0]) == [False, False, False, True]
    assert run_automaton(tables, [2, 3, 1]) == [False, False, True]
    assert run_automaton(tables, [2, 3, 0, 0, 0, 0]) == [False, False, False, True, False, False]


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1, LAYERS])
@pytest.mark.parametrize("coefficient", [-1.0, 0.5, 2.0])
def test_equals_hooks_on_the_original(
    llama: tuple[nn.Module, Program],
    tokenizer_folder: Path,
    tmp_path: Path,
    layer: int,
    coefficient: float,
) -> None:
    model, program = llama
    item = seal(tmp_path, tokenizer_folder, layer=layer, coefficient=coefficient, after_norm=True)
    steered = apply(program, item)
    ids = torch.tensor([tokens_of(tokenizer_folder, TEXT)])
    vocabulary = Vocabulary(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))
    pieces = [vocabulary.bytes_of(token) for token in ids[0].tolist()]
    fired = torch.tensor(expected_firings(pieces, b"<think>", b"</think>"))
    assert 2 <= int(fired.sum()) < len(pieces) // 4
    assert item.vector is not None
    vector = coefficient * SteeringVector.load(item.vector).direction

    def add(x: torch.Tensor) -> torch.Tensor:
        return torch.where(fired[None, :, None], x + vector, x)

    inner = cast(Any, model).model
    if layer < LAYERS:
        handle = inner.layers[layer].register_forward_pre_hook(lambda _, a: (add(a[0]), *a[1:]))
    else:
        handle = inner.norm.register_forward_hook(lambda _, a, out: add(out))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(steered(ids)[0], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(steered(ids)[0], program(ids)[0])


def test_neutral_and_no_break_keep_every_bit(
    llama: tuple[nn.Module, Program], tokenizer_folder: Path, tmp_path: Path
) -> None:
    _, program = llama
    ids = torch.tensor([tokens_of(tokenizer_folder, TEXT)])
    neutral = apply(program, seal(tmp_path, tokenizer_folder, coefficient=0.0))
    assert torch.equal(neutral(ids)[0], program(ids)[0])
    zero = vector_file(tmp_path, vector=torch.zeros(HIDDEN))
    assert torch.equal(apply(program, seal(tmp_path, tokenizer_folder, vector=zero))(ids)[0],
                       program(ids)[0])  # fmt: skip
    plain = torch.tensor([tokens_of(tokenizer_folder, "no break here<think>none\nhere")])
    steered = apply(program, seal(tmp_path, tokenizer_folder))
    assert torch.equal(steered(plain)[0], program(plain)[0])


def test_positions_before_the_first_firing_keep_every_bit(
    llama: tuple[nn.Module, Program], tokenizer_folder: Path, tmp_path: Path
) -> None:
    _, program = llama
    steered = apply(program, seal(tmp_path, tokenizer_folder))
    ids = torch.tensor([tokens_of(tokenizer_folder, TEXT)])
    first = len(tokens_of(tokenizer_folder, "a\n\n<think>one"))
    assert torch.equal(steered(ids)[0][:, :first], program(ids)[0][:, :first])


def test_conventions_mean_the_same(
    llama: tuple[nn.Module, Program], tokenizer_folder: Path, tmp_path: Path
) -> None:
    _, program = llama
    ids = torch.tensor([tokens_of(tokenizer_folder, TEXT)])
    one = apply(program, seal(tmp_path, tokenizer_folder))(ids)[0]
    vector = SteeringVector.load(tmp_path / "vector.safetensors").vector
    other = vector_file(tmp_path, vector=-vector, convention="RT-E")
    two = apply(program, seal(tmp_path, tokenizer_folder, vector=other))(ids)[0]
    assert torch.equal(one, two)


def test_steps_carry_the_automaton(
    llama: tuple[nn.Module, Program], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Prefill, chunks and single tokens steer where the whole sequence does; rows differ."""
    _, program = llama
    program = apply(apply(program, Optimize()), seal(tmp_path, tokenizer_folder, coefficient=2.0))
    long = tokens_of(tokenizer_folder, TEXT)
    short = tokens_of(tokenizer_folder, "<think>x\n\ny\n\nz")
    pad = len(long) - len(short)
    ids = torch.tensor([long, [0] * pad + short])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = program(ids, attention_mask=mask, position_ids=positions)[0]
    step = insert_state(program)
    assert any(state.name.endswith("automaton") for state in step.states)
    model = StateModel(step, lambda values: step.program.graph_module(*values))
    state, start = model.empty_state(2), 0
    for end in [pad + 2, pad + 9, *range(pad + 10, len(long) + 1)]:
        got, state = model.step(ids[:, start:end], mask[:, :end], positions[:, start:end], state)
        torch.testing.assert_close(got, whole[:, end - 1], atol=2e-5, rtol=1e-4)
        start = end


def test_two_vectors_add_in_order(
    llama: tuple[nn.Module, Program], tokenizer_folder: Path, tmp_path: Path
) -> None:
    _, program = llama
    ids = torch.tensor([tokens_of(tokenizer_folder, TEXT)])
    item = seal(tmp_path, tokenizer_folder, coefficient=0.5)
    twice = apply(apply(program, item), item)
    once = apply(program, item.model_copy(update={"coefficient": 1.0}))
    torch.testing.assert_close(twice(ids)[0], once(ids)[0], atol=1e-5, rtol=1e-5)


def test_bad_vectors(
    llama: tuple[nn.Module, Program], tokenizer_folder: Path, tmp_path: Path
) -> None:
    _, program = llama

    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(InputError, match=match):
            apply(program, seal(tmp_path, tokenizer_folder, **fields))

    refused("32 values", vector=vector_file(tmp_path, vector=torch.randn(32)))
    nan = torch.full((HIDDEN,), float("nan"))
    refused("not\\s+finite", vector=vector_file(tmp_path, vector=nan))
    refused("outside 0 to 2", layer=LAYERS)
    refused("outside 0 to 2", layer=LAYERS + 1, after_norm=True)
    bare = tmp_path / "bare.safetensors"
    save_file({"vector": torch.zeros(HIDDEN)}, bare)
    refused("convention", vector=bare)
    bare.write_bytes(bare.read_bytes()[:30])
    refused("cannot be used", vector=bare)
    refused("cannot be used", vector=tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="tokenizer"):
        apply(program, Seal(vector=vector_file(tmp_path)))
